"""Groups: the leaves that belong together, and the names of groups."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses
import math
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import gum_optax
from gum_optax import projectors, residuals
from tests import helpers


def _array(*shape, dtype=jnp.float32):
    return np.ones(shape or (4, 6), dtype)


def _low_rank(**parts):
    compression = gum_optax.LowRank(2, 1, projector=projectors.svd, **parts)
    return gum_optax.low_rank(optax.identity(), compression)


def _groups(params, **parts):
    """Group name -> number of matrices, for groups that are compressed."""
    state = jax.eval_shape(_low_rank(**parts).init, params)
    return {name: math.prod(basis.shape[:-2]) for name, basis in state.basis.items()}


def _step(params, **parts):
    optimizer = _low_rank(**parts)
    update = jax.jit(optimizer.update, compiler_options=helpers.QUICK)
    return update(params, jax.jit(optimizer.init)(params), params)


def _abstract_step(params, **parts):
    optimizer = _low_rank(**parts)
    return jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: jax.Array
    other: jax.Array | None = None


TREES = {
    "dicts": ({"layers": {str(i): {"w": _array()} for i in range(3)}}, {"layers.*.w": 3}),
    "lists": ({"layers": [{"w": _array()} for _ in range(3)]}, {"layers.*.w": 3}),
    "tuples": (({"w": _array()}, {"w": _array()}), {"*.w": 2}),
    # Haiku and Keras leave the first layer without a number.
    "numbered from the second on": (
        {name: {"w": _array()} for name in ("blk", "blk_1", "blk_2")},
        {"blk_*.w": 3},
    ),
    "modules in modules, numbered from the second on": (
        {f"{a}/~/{b}": {"w": _array()} for a in ("mlp", "mlp_1") for b in ("lin", "lin_1")},
        {"mlp_*.~.lin_*.w": 4},
    ),
    "first layers of other shapes": (
        {"lin": {"w": _array(5, 7)}, **{f"lin_{i}": {"w": _array()} for i in (1, 2, 3)}},
        {"lin_*.w": 3},
    ),
    "numbered names": ({f"h_{i}": {"c_fc": _array()} for i in range(12)}, {"h_*.c_fc": 12}),
    "int keys": ({"h": {i: _array() for i in range(3)}}, {"h.*": 3}),
    "frozen dict": (
        FrozenDict({"h": {f"block{i}": {"w": _array()} for i in range(3)}}),
        {"h.block*.w": 3},
    ),
    "dataclass": ({"h": [Block(_array()) for _ in range(3)]}, {"h.*.kernel": 3}),
    "named tuple": (
        {"h": [gum_optax.Compressed(_array(), _array()) for _ in range(2)]},
        {"h.*.low": 2, "h.*.residual": 2},
    ),
    "roles stay apart": (
        [{"q": _array(), "k": _array()} for _ in range(3)],
        {"*.k": 3, "*.q": 3},
    ),
    "batch axes": ({"experts": _array(2, 3, 4, 6)}, {"experts": 6}),
    "batch axes and layers": ([{"e": _array(2, 4, 6)} for _ in range(3)], {"*.e": 6}),
    "shapes": (
        {"h": [_array(4, 6), _array(4, 6), _array(4, 8), _array(4, 8)]},
        {"h.*[4,6]": 2, "h.*[4,8]": 2},
    ),
    "orientations": (
        {"h": [_array(4, 6), _array(6, 4), _array(4, 6), _array(6, 4)]},
        {"h.*[4,6]": 2, "h.*[6,4]": 2},
    ),
    "dtypes": (
        {"h": [_array(), _array(), _array(dtype=jnp.bfloat16), _array(dtype=jnp.bfloat16)]},
        {"h.*:bfloat16": 2, "h.*:float32": 2},
    ),
}


@pytest.mark.parametrize(("params", "expected"), TREES.values(), ids=TREES)
def test_names_and_counts(params, expected):
    assert _groups(params) == expected


@pytest.mark.parametrize("params", [tree for tree, _ in TREES.values()], ids=TREES)
def test_updates_have_the_tree_of_the_gradients(params):
    updates, _ = _abstract_step(params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (update.shape, update.dtype) == (leaf.shape, leaf.dtype)


def test_a_single_array_is_a_tree():
    updates, state = _abstract_step(_array(5, 4, 6))
    assert updates.shape == (5, 4, 6)
    assert set(state.basis) == {"param"}
    with pytest.warns(UserWarning, match="`param`, 1 of 4 x 6: single matrix"):
        updates, state = _abstract_step(_array(4, 6))
    assert updates.shape == (4, 6)
    assert set(state.uncompressed or {}) <= {"param"}


def test_every_leaf_goes_back_to_its_place():
    """Where nothing but the scale is changed, leaves come back as they are."""
    params = {
        "b": [np.full((4, 6), i, np.float32) for i in range(3)],
        "a": {"x": 7 * _array(2, 6, 4), "y": 9 * _array(4, 6)},
    }
    updates, _ = _step(params)
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        # A constant matrix has rank one: it lies in its basis, or its residual is zero.
        scale = np.asarray(update) / np.where(leaf == 0, 1, leaf)
        spread = scale.reshape(-1, leaf.shape[-2] * leaf.shape[-1])
        np.testing.assert_allclose(spread, spread[:, :1] * np.ones_like(spread), atol=1e-5)


def test_mixed_dtypes_and_shapes_of_one_role():
    params = [
        *[_array(4, 6), _array(4, 6), _array(4, 8), _array(4, 8)],
        *[_array(4, 6, dtype=jnp.float16), _array(4, 6, dtype=jnp.float16)],
    ]
    assert set(_groups(params)) == {"*[4,6]:float32", "*[4,6]:float16", "*[4,8]"}


def test_gradients_of_other_dtypes_are_of_the_groups_of_their_parameters():
    """As where half of the weights are narrow, and all gradients are summed in float32."""
    params = [_array(), _array(), _array(dtype=jnp.bfloat16), _array(dtype=jnp.bfloat16)]
    gradients = [_array() for _ in params]
    optimizer = _low_rank()
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, gradients, state, params)
    assert set(after.basis) == {"*:float32", "*:bfloat16"}
    assert helpers.described(after) == helpers.described(state)
    assert helpers.described(updates) == helpers.described(gradients)
    # Gradients alone do not tell, and this is an error.
    with pytest.raises(ValueError, match="do not fit the optimizer state"):
        jax.eval_shape(optimizer.update, gradients, state)


def test_uncompressed_leaves_run_in_float32():
    """As compressed ones do; momentum rests in the dtype of the parameters."""
    seen = []

    def spy(updates, state, params=None):
        seen.extend(jax.tree.map(lambda x: x.dtype, jax.tree.leaves(updates)))
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), spy)
    tx = gum_optax.low_rank(inner, gum_optax.LowRank(2))
    params = {"w": [_array(dtype=jnp.bfloat16)] * 4, "single": _array(dtype=jnp.bfloat16)}
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert set(seen) == {jnp.dtype(jnp.float32)}


def test_by_shape_joins_roles():
    params = [{"q": _array(), "o": _array(), "up": _array(4, 8)} for _ in range(3)]
    assert _groups(params, group_by=gum_optax.by_shape) == {"4x6": 6, "4x8": 3}
    updates, _ = _abstract_step(params, group_by=gum_optax.by_shape)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_users_key_function_sees_path_and_leaf():
    seen = []

    def by_last_letter(path, leaf):
        seen.append((path, leaf.shape))
        return path[-1]

    params = {"a": {"q": _array(), "k": _array()}, "b": {"q": _array(), "k": _array()}}
    assert _groups(params, group_by=by_last_letter) == {"k": 2, "q": 2}
    paths = [("a/k", (4, 6)), ("a/q", (4, 6)), ("b/k", (4, 6)), ("b/q", (4, 6))]
    assert seen == paths


def test_a_users_names_may_have_slashes():
    """Names are keys of the state, whatever made them."""
    assert _groups({"x": [_array()] * 3}, group_by=lambda path, leaf: f"mine/{path[0]}") == {
        "mine.x": 3
    }


def test_a_users_groups_that_collide_with_suffixed_names_stay_apart():
    """A suffix for a shape must not turn one group's name into another's."""
    params = {"w": [_array(4, 6), _array(4, 6), _array(4, 8), _array(4, 8)], "z": [_array()] * 2}
    names = {"w": "s", "z": "s[4,6]"}
    groups = _groups(params, group_by=lambda path, leaf: names[path[0]])
    assert sum(groups.values()) == 6


def test_groups_whose_names_differ_in_points_and_slashes_stay_apart():
    """The state has points for slashes; the draws come from the roles, which still differ."""
    params = {"a": {"w": [_array()] * 2}, "a.w": [_array()] * 2}
    groups = gum_optax.LowRank(rank=2).groups(params)
    assert {group.name: group.role for group in groups} == {"a.w.*": "a/w/*", "a.w.*'": "a.w/*"}


@pytest.mark.parametrize("layout", ["separate", "scanned"])
def test_draws_of_a_group_come_from_its_role(layout):
    """From the documented function of the seed, the period and the path, as in every version."""
    layers = {"attn": {"q": _array(8, 4, 6)}}
    if layout == "separate":
        layers = [{"attn": {"q": _array()}} for _ in range(8)]
    compression = gum_optax.LowRank(rank=2, period=1)
    optimizer = gum_optax.low_rank(optax.identity(), compression)
    params = {"layers": layers}
    _, state = jax.jit(optimizer.update)(params, jax.jit(optimizer.init)(params))
    [slots] = state.slots.values()
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0)
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"layers/attn/q")))
    expected = gum_optax.samplers.fixed_size(2)(8).draw(key)
    np.testing.assert_array_equal(slots, expected)


def test_zero_size_leaves_pass_through():
    params = {"w": [_array(), _array()], "none": _array(0, 6), "batch": _array(0, 4, 6)}
    updates, state = _step(params)
    assert set(state.basis) == {"w.*"}
    assert updates["none"].shape == (0, 6)
    assert updates["batch"].shape == (0, 4, 6)


def test_none_leaves_pass_through():
    params = {"w": [_array(), None, _array()], "b": None}
    updates, state = _abstract_step(params)
    assert state.basis["w.*"].shape[0] == 2
    assert updates["w"][1] is None
    assert updates["b"] is None


def test_masked_nodes_pass_through():
    params = {"w": [_array(), optax.MaskedNode(), _array()]}
    updates, _ = _abstract_step(params)
    assert isinstance(updates["w"][1], optax.MaskedNode)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_names_are_equal_at_init_and_update_under_nnx():
    """NNX shows ``kernel/value`` at one call and ``kernel`` at another."""
    seen = []

    def recording(path, leaf):
        seen.append(path)
        return gum_optax.by_role(path, leaf)

    module = Mlp(nnx.Rngs(0))
    # Parts that take no time where every operation is compiled alone.
    parts = {"residual": residuals.drop(), "projector": helpers.first_coordinates}
    tx = gum_optax.low_rank(optax.sgd(0.1), gum_optax.LowRank(2, 1, group_by=recording, **parts))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    at_init = set(seen)
    seen.clear()
    gradient = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))
    gradients = nnx.jit(gradient)(module)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    optimizer.update(module, gradients)
    assert at_init == set(seen) == {f"layers/{i}/kernel" for i in range(2)}
    after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert np.abs(before["layers"][0]["kernel"] - after["layers"][0]["kernel"]).max() > 0


def test_nnx_state_and_its_pure_dict_share_names():
    state = nnx.state(Mlp(nnx.Rngs(0)), nnx.Param)
    expected = {"layers.*.kernel": 2}
    assert _groups(state) == expected
    assert _groups(nnx.to_pure_dict(state)) == expected
    assert _groups(nnx.eval_shape(lambda: nnx.state(Mlp(nnx.Rngs(0)), nnx.Param))) == expected


def test_a_parameter_that_is_called_value_keeps_its_name():
    """``value`` is a role of attention, and only as an attribute is it a container's."""
    params = {"attention": {i: {"value": _array(), "query": _array()} for i in range(2)}}
    assert _groups(params) == {"attention.*.query": 2, "attention.*.value": 2}


def test_zero_size_leaves_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gum_optax.gum(0.1).init({"w": _array(0, 4)})


def test_leading_axes_of_the_state_are_those_of_the_leaves():
    trees = {
        (3,): [_array() for _ in range(3)],
        (5,): {"w": _array(5, 4, 6)},
        (2, 5): {"w": _array(2, 5, 4, 6)},
        (3, 5): [_array(5, 4, 6) for _ in range(3)],
        (2, 1, 5): [_array(1, 5, 4, 6) for _ in range(2)],
    }
    for lead, tree in trees.items():
        state = jax.eval_shape(_low_rank().init, tree)
        (basis,) = state.basis.values()
        assert basis.shape == (*lead, 4, 2)
