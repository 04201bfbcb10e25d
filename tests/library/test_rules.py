"""Ready rules, on parameter trees of real models and on modules of each framework.

`tests/data/trees.json` holds the paths and shapes of real models, two layers of each role, with the
axes of their hidden matrices: ``[path, shape, [input axes, output axes] or null]``; axes in neither
list are batch axes. They were taken from the frameworks' own code.
"""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportIncompatibleVariableOverride=false

import functools
import json
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import gum_optax
from gum_optax import dimension_numbers
from tests.helpers import first_coordinates, letters, tree_of

TREES = json.loads(pathlib.Path("tests/data/trees.json").read_text())
D, F, V, L, H, E = 8, 16, 32, 3, 2, 4


def _expected(leaves):
    """Path -> letters, from lists of axes."""
    sides = {path: axes or ([], []) for path, _, axes in leaves}
    return {
        path: "".join(
            "i" if axis in sides[path][0] else "o" if axis in sides[path][1] else "b"
            for axis in range(len(shape))
        )
        if axes
        else ""
        for path, shape, axes in leaves
    }


# Every rule that must get all of a tree right; `flax` unless another is named.
KNOWN_BY = {
    "gemma3_4b": ["gemma"],
    "tunix_gemma2_2b": ["gemma"],
    "levanter_llama3_8b_stacked": ["equinox_stacked"],
    "easydel_llama3_8b": ["default", "flax", "maxtext", "gemma"],
    **{name: ["flax", "maxtext"] for name in TREES if "maxtext" in name},
}


@pytest.mark.parametrize(
    ("tree", "rule"), [(tree, rule) for tree in TREES for rule in KNOWN_BY.get(tree, ["flax"])]
)
def test_real_trees(tree, rule):
    params = tree_of({path: shape for path, shape, _ in TREES[tree]})
    assert letters(params, getattr(dimension_numbers, rule)) == _expected(TREES[tree])


@pytest.mark.parametrize("tree", TREES)
def test_the_default_is_never_wrong(tree):
    """It may leave matrices to the fallback, but takes none by wrong axes.

    The tree of levanter is one of dicts here, and all of its 2-D leaves are tables or vectors.
    """
    params = tree_of({path: shape for path, shape, _ in TREES[tree]})
    expected = _expected(TREES[tree])
    found = letters(params, dimension_numbers.default)
    assert all(axes in ("", expected[path]) for path, axes in found.items())


# Modules of Flax ---------------------------------------------------------------------------------


class LinenStack(nn.Module):
    """Attention and dense layers under one scan: an axis too many, or one that is a matrix's."""

    axis: int

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = x + nn.MultiHeadDotProductAttention(num_heads=H, qkv_features=D)(x, x)
                return x + nn.Dense(D)(nn.Dense(F)(x)), None

        block = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=L,
        )
        return block(name="blocks")(x, None)[0]


def _linen_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=H, qkv_features=D)
    x = jnp.ones((1, 3, D))
    return jax.eval_shape(module.init, jax.random.key(0), x, x)["params"]


def _nnx_attention():
    make = lambda: nnx.MultiHeadAttention(H, D, decode=False, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.state(nnx.eval_shape(make), nnx.Param)


def _scanned(axis):
    x = jnp.ones((1, 3, D))
    return jax.eval_shape(LinenStack(axis).init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize("layer_axis", ["found", "given"])
@pytest.mark.parametrize("axis", [0, 1])
def test_flax_on_scanned_modules(axis, layer_axis):
    params = _scanned(axis)
    rule = dimension_numbers.flax
    if layer_axis == "given":
        rule = functools.partial(rule, layer_axis=axis)
    found = {path: axes for path, axes in letters(params, rule).items() if axes}
    single = {
        **{f"MultiHeadDotProductAttention_0/{r}/kernel": "ioo" for r in ("query", "key", "value")},
        "MultiHeadDotProductAttention_0/out/kernel": "iio",
        "Dense_0/kernel": "io",
        "Dense_1/kernel": "io",
    }
    assert found == {
        f"blocks/{path}": axes[:axis] + "b" + axes[axis:] for path, axes in single.items()
    }


@pytest.mark.parametrize("make", [_linen_attention, _nnx_attention])
def test_flax_on_single_modules(make):
    """Every kernel becomes D x D, in a group of its own role, and nothing is left to guess."""
    compression = gum_optax.LowRank(
        rank=2, residual=gum_optax.residuals.drop(), projector=first_coordinates
    )
    tx = gum_optax.gum(0.1, compression, weight_dimension_numbers=dimension_numbers.flax)
    bases = optax.tree.get(jax.eval_shape(tx.init, make()), "basis")
    assert sorted(name.split(".")[-2] for name in bases) == ["key", "out", "query", "value"]
    assert {basis.shape for basis in bases.values()} == {(1, D, 2)}


NAMES = {
    # Roles by other names, and their axes.
    "attn/q_proj/w": ((D, H, E), "ioo"),
    "attn/wkv_b/kernel": ((D, H, E), "ioo"),
    "attn/o_proj/w": ((H, E, D), "iio"),
    "attn_out_proj/kernel": ((H, E, D), "iio"),
    "attention_out/kernel": ((H, E, D), "iio"),
    "attention_output/kernel": ((H, E, D), "iio"),
    "qkv_proj/kernel": ((D, 3, H, E), "iboo"),
    "qkv/kernel": ((D, 3, D), "ibo"),
    "attn/qkv/kernel": ((D, H, 3 * E), "ioo"),
    "experts/up": ((E, D, F), "bio"),
    "MoeBlock_0/wi_0": ((E, D, F), "bio"),
    "blocks/experts/up": ((L, E, D, F), "bbio"),
    # The innermost name decides.
    "experts/query/kernel": ((D, H, E), "ioo"),
    "Conv_0/kernel": ((3, 3, D, F), "iiio"),
    "conv1d/kernel": ((3, 1, F), ""),
    # Nothing is known of these.
    "keys/kernel": ((L, D, F), ""),
    "query_out/bias": ((L, D, F), ""),
    "patch_embedding/kernel": ((E, E, 3, D), ""),
    "shared_experts/wi_0/kernel": ((D, L, F), ""),
}


@pytest.mark.parametrize(("shape", "expected"), NAMES.values(), ids=NAMES)
def test_flax_on_single_leaves(shape, expected, request):
    path = request.node.callspec.id
    assert letters(tree_of({path: shape}), dimension_numbers.flax) == {path: expected}


def test_flattened_heads_under_a_scan_are_two_axes():
    """``q_proj`` ``[L, d, d]`` is a stack, whatever a query kernel with heads looks like."""
    spec = {
        "layers/q_proj/kernel": (L, D, D),
        "layers/up/kernel": (L, D, F),
        "layers/norm/scale": (L, D),
    }
    expected = dict(zip(spec, ["bio", "bio", ""], strict=True))
    assert letters(tree_of(spec), dimension_numbers.flax) == expected


# The other rules ---------------------------------------------------------------------------------


def test_scanned_layers():
    params = tree_of(
        {
            "layers/up": (L, D, F),
            "layers/experts": (L, 5, D, F),
            "layers/bias": (L, F),
            "layers/norm/scale": (L, D),
            "layers/gates": (L, D),
            "embed/embedding": (V, D),
            "head/kernel": (D, V),
        }
    )
    found = letters(params, dimension_numbers.scanned_layers)
    assert {path: axes for path, axes in found.items() if axes} == {
        "layers/up": "bio",
        "layers/experts": "bbio",
        # Two axes and no word against it: `default` has the last say.
        "layers/gates": "io",
    }


def test_scanned_layers_over_the_second_axis():
    params = tree_of({"up": (D, L, F), "experts": (E, L, D, F), "norm": (D, L), "w": (D, F)})
    rule = functools.partial(dimension_numbers.scanned_layers, layer_axis=1)
    assert letters(params, rule) == {"up": "ibo", "experts": "bbio", "norm": "", "w": "io"}


@pytest.mark.parametrize(
    "rule",
    [
        functools.partial(dimension_numbers.scanned_layers, layer_axis=1),
        dimension_numbers.flax,
        dimension_numbers.maxtext,
    ],
    ids=["scanned_layers", "flax", "maxtext"],
)
def test_a_layer_scanned_over_the_second_axis_is_alone(rule):
    """Ten times the gradient of one layer moves no other layer's update.

    It is the first layer: if layers were taken for rows, `first_coordinates` would keep the first
    two in one matrix, and would leave a third one out.
    """
    params = {
        "up": np.random.default_rng(0).normal(size=(D, L, F)).astype(np.float32),
        # [embed, layers], from which `flax` sees that the layers are on the second axis.
        "norm": {"scale": np.ones((D, L), np.float32)},
    }
    compression = gum_optax.LowRank(rank=2, projector=first_coordinates)
    tx = gum_optax.gum(0.1, compression, weight_dimension_numbers=rule)

    @jax.jit
    def update(gradients):
        return tx.update(gradients, tx.init(params), params)[0]["up"]

    scaled = params["up"].copy()
    scaled[:, 0] *= 10
    before, after = update(params), update({**params, "up": scaled})
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert np.abs(before[:, 1:]).max() > 0


@pytest.mark.parametrize("shape", [(3, D, F), (3, 3, D, F), (3, 3, 3, D, F)], ids=str)
def test_convolutions(shape):
    params = tree_of({"stem/kernel": shape, "stem/bias": (F,)})
    found = letters(params, dimension_numbers.convolutions)
    assert found == {"stem/bias": "", "stem/kernel": "i" * (len(shape) - 1) + "o"}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("q_einsum/w", (H, D, E), "oio"),
        ("kv_einsum/w", (2, H, D, E), "boio"),
        ("qkv_einsum/w", (3, H, D, E), "boio"),
        ("attn_vec_einsum/w", (H, E, D), "iio"),
    ],
)
def test_gemma_on_single_leaves(path, shape, expected):
    assert letters(tree_of({path: shape}), dimension_numbers.gemma) == {path: expected}


def test_gemma_tells_gating_weights_by_the_layer_beside_them():
    spec = {
        "old/gating_einsum": (2, D, F),
        "old/linear": (F, D),
        "new/gating_einsum/w": (2, F, D),
        "new/linear/w": (F, D),
        "moe/gating_einsum": (E, 2, F, D),
        "moe/linear": (E, F, D),
    }
    found = letters(tree_of(spec), dimension_numbers.gemma)
    assert found == {
        "old/gating_einsum": "bio",
        "old/linear": "io",
        "new/gating_einsum/w": "boi",
        "new/linear/w": "io",
        "moe/gating_einsum": "bboi",
        "moe/linear": "bio",
    }


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def test_equinox_modules_stacked_and_not():
    make = functools.partial(eqx.nn.MultiheadAttention, H, D)
    single = eqx.filter(eqx.filter_eval_shape(make, key=jax.random.key(0)), _is_shape)
    norms = jax.ShapeDtypeStruct((L, D), jnp.float32)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((L, *x.shape), x.dtype), single)
    params = {"one": single, "many": {"attention": stacked, "norm": norms}}
    found = {k: v for k, v in letters(params, dimension_numbers.equinox_stacked).items() if v}
    roles = [f"{role}_proj/weight" for role in ("query", "key", "value", "output")]
    assert found == {
        **{f"one/{role}": "oi" for role in roles},
        **{f"many/attention/{role}": "boi" for role in roles},
    }


@jax.tree_util.register_pytree_node_class
class NamedArray:
    """A node around one array, without a name for its child, as haliax has it."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Projection(eqx.Module):
    weight: NamedArray


@pytest.mark.parametrize("rule", ["default", "equinox_stacked"])
def test_named_arrays_of_equinox_modules_have_outputs_first(rule):
    """As levanter's weights of layers that are not stacked; their paths end with ``weight/0``."""
    params = {"up": Projection(NamedArray(jax.ShapeDtypeStruct((F, D), jnp.float32)))}
    assert letters(params, getattr(dimension_numbers, rule)) == {"up/weight/0": "oi"}


def test_first_of_takes_each_leaf_by_the_first_that_knows_it():
    spec = {"query/kernel": (D, H, E), "stem/kernel": (3, 3, D, F), "up": (D, F), "bias": (F,)}
    rule = dimension_numbers.first_of(dimension_numbers.flax, dimension_numbers.convolutions)
    params = tree_of(spec)
    expected = {"query/kernel": "ioo", "stem/kernel": "iiio", "up": "io", "bias": ""}
    assert letters(params, rule) == expected
    # A tree of one's own comes first, where it says something.
    mine = {
        **jax.tree.map(lambda _: None, params),
        "up": dimension_numbers.MuonDimensionNumbers(1, 0),
    }
    rule = dimension_numbers.first_of(mine, rule)
    assert letters(params, rule) == {**expected, "up": "oi"}


def test_rules_follow_the_default_rule_elsewhere():
    params = tree_of({"up": (D, F), "embed": (V, D), "b": (L, D), "x": (D,)})
    for rule in ("scanned_layers", "flax", "maxtext", "gemma", "convolutions"):
        numbers = getattr(dimension_numbers, rule)(params)
        assert numbers == dimension_numbers.default(params), rule
