"""Weights followed through programs of every kind, to the products and operations that use them.

In float64 the projected gradients equal ``P'G`` up to rounding, for both kinds of taps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gum_optax
from gum_optax import LowRank, backward, residuals
from gum_optax._axis_rules import _reshaped
from gum_optax._taps import Axis
from tests.helpers import QUICK, all_arguments, low_rank_state

RANK, LAYERS = 3, 4
# Sums in another order; the largest error measured is 4e-14.
TOLERANCE = 1e-12


def _array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) / 4


# Separate leaves, of which square ones do not show by their shape which side is which, and stacks.
SEPARATE = [_array(seed, 6, 9) for seed in range(LAYERS)]
SQUARE = [_array(seed, 6, 6) for seed in range(LAYERS)]
TOKENS = 4 * _array(10, 5, 6)
STACKED = {"up": _array(11, LAYERS, 6, 9), "down": _array(12, LAYERS, 9, 6)}
EXPERT_TOKENS = 4 * _array(13, LAYERS, 5, 6)


def _mlp(x: Any, up: Any, down: Any) -> Any:
    return jnp.tanh(x @ up) @ down


def _tied(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w) @ w.T
    return jnp.sum(x**2)


def _shared_by_turns(weights, x):
    def turn(h, _):
        for w in weights:
            h = jnp.tanh(h @ w) @ w.T
        return h, None

    return jnp.sum(jax.lax.scan(turn, x, None, length=2)[0] ** 2)


def _looked_up(weights, x):
    rows = weights[0][np.array([1, 2, 3, 1, 5])]
    return jnp.sum(jnp.tanh(rows @ weights[1].T) ** 2) + jnp.sum(
        jnp.tanh(x @ weights[2]) ** 2 * jnp.sum(weights[3] ** 2)
    )


def _branch(weights, x):
    hidden = jax.lax.cond(x[0, 0] > 9, lambda: x @ weights[0], lambda: x @ weights[1])
    return jnp.sum((hidden @ weights[2].T @ weights[3]) ** 2)


def _per_example(weights, x):
    def one(row):
        return jnp.sum((jnp.tanh(row @ weights[0]) @ weights[1].T @ weights[2]) ** 2)

    return jnp.mean(jax.vmap(one)(x)) + jnp.sum((x @ weights[3]) ** 2)


def _gradient_inside(weights, x):
    def energy(x):
        return jnp.sum((jnp.tanh(x @ weights[0]) @ weights[1].T @ weights[2] @ weights[3].T) ** 2)

    return jnp.sum(jax.grad(energy)(x) ** 2)


def _in_float32(weights, x):
    for w in weights:
        x = jnp.tanh(x.astype(jnp.float32) @ w.astype(jnp.float32)) @ w.astype(jnp.float32).T
    return jnp.sum(x.astype(jnp.float64) ** 2)


def _heads(weights, x):
    """Reshaped and transposed before its use, as by attention; and sizes of one."""
    hidden = jnp.einsum("td,dhe->the", x, weights[0].reshape(6, 3, 3))
    back = jnp.einsum("the,hed->td", hidden, weights[1].T.reshape(3, 3, 6))
    other = jnp.einsum("td,oda->toa", back, jnp.expand_dims(weights[2], 0))[:, 0]
    return jnp.sum((jnp.tanh(other) @ jnp.squeeze(weights[3][None], 0).T) ** 2)


def _jitted(weights, x):
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w.T)
    for w in weights:
        x = jax.checkpoint(inner)(x, w)
    return jnp.sum(x**2)


@jax.custom_vjp
def _own_product(x, w):
    return x @ w


_own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


def _own_rule(weights, x):
    for w in weights:
        x = jnp.tanh(_own_product(x, w)) @ w.T
    return jnp.sum(x**2)


def _scan(params, x, wrap=lambda body: body):
    def layer(h, w):
        return h + _mlp(h, w["up"], w["down"]), None

    return jnp.sum(jax.lax.scan(wrap(layer), x[0], params)[0] ** 2)


def _recomputed(params, x):
    return _scan(params, x, jax.checkpoint)


def _twice(params, x):
    return _scan(params, x) + _scan(params, x[::-1])


def _unrolled(params, x):
    h = x[0]
    for i in range(LAYERS):
        h = h + _mlp(h, params["up"][i], params["down"][i])
    return jnp.sum(h**2)


def _halves(params, x):
    """The first half of the layers in one loop, the others in another."""
    half = LAYERS // 2
    first = jax.tree.map(lambda w: w[:half], params)
    last = jax.tree.map(lambda w: w[half:], params)
    return _scan(first, x) + _scan(last, x)


def _at_traced_positions(params, x):
    def turn(h, i):
        up, down = (jax.lax.dynamic_index_in_dim(params[k], i, keepdims=False) for k in params)
        return h + _mlp(h, *((up, down) if up.shape[0] == 6 else (down, up))), None

    return jnp.sum(jax.lax.scan(turn, x[0], jnp.arange(LAYERS))[0] ** 2)


def _experts(params, x):
    return jnp.sum(jax.vmap(_mlp)(x, params["up"], params["down"]) ** 2)


def _einsum_experts(params, x):
    hidden = jnp.tanh(jnp.einsum("end,edf->enf", x, params["up"]))
    return jnp.sum(jnp.einsum("enf,efd->end", hidden, params["down"]) ** 2)


def _in_parts(weights, x):
    """Half of the rows, and rows of which some are kept by the product: none is a whole side."""
    first = x[:, :3] @ weights[0][:3]
    second = jnp.einsum("td,hdk->thk", x[:, :3], weights[1].reshape(2, 3, 9)).sum(1)
    return jnp.sum((first + second + jnp.tanh(x @ weights[2] + x @ weights[3])) ** 2)


def _backwards_and_at_once(params, x):
    """From the last layer to the first; and one product with the matrices of all layers."""

    def layer(h, w):
        return h + _mlp(h, w["up"], w["down"]), None

    down = params["down"].mean(0)
    last = jax.lax.scan(layer, x[0], params, reverse=True)[0]
    every = jnp.einsum("td,ldf->tlf", x[1], params["up"]).sum(1)
    return jnp.sum(last**2) + jnp.sum((every @ down) ** 2)


def _other_order(params, x):
    """Batch axes that have changed places, in the weight and against those of the activations."""
    hidden = jnp.tanh(jnp.einsum("batd,abdf->batf", x, params["up"]))
    return jnp.sum((hidden @ jnp.swapaxes(params["down"], 0, 1)) ** 2)


TWO_AXES = {"up": _array(14, 2, 3, 6, 9), "down": _array(15, 2, 3, 9, 6)}


class Case(NamedTuple):
    """A loss, its parameters and argument, and how the weights are used in it."""

    loss: Any
    params: Any
    x: np.ndarray
    products: int
    others: tuple[str, ...] = ()
    tolerance: float = TOLERANCE


CASES = {
    "tied": Case(_tied, SEPARATE, TOKENS, 8),
    "shared by the turns of a loop": Case(_shared_by_turns, SEPARATE, TOKENS, 8),
    "looked up": Case(_looked_up, SEPARATE, TOKENS, 2, ("gather", "integer_pow")),
    "branch": Case(_branch, SEPARATE, TOKENS, 4),
    "per example": Case(_per_example, SEPARATE, TOKENS, 4),
    "gradient inside": Case(_gradient_inside, SEPARATE, TOKENS, 8),
    # Computed in float32: the largest error measured is 1e-7.
    "cast": Case(_in_float32, SEPARATE, TOKENS, 8, tolerance=1e-6),
    "heads": Case(_heads, SEPARATE, TOKENS, 4),
    "jitted and recomputed": Case(_jitted, SQUARE, TOKENS, 8),
    "a rule of its own": Case(_own_rule, SEPARATE, TOKENS, 4, 4 * ("custom_vjp_call",)),
    "scan": Case(_scan, STACKED, EXPERT_TOKENS, 2),
    "recomputed scan": Case(_recomputed, STACKED, EXPERT_TOKENS, 2),
    "two scans": Case(_twice, STACKED, EXPERT_TOKENS, 4),
    "unrolled": Case(_unrolled, STACKED, EXPERT_TOKENS, 2 * LAYERS),
    "halves": Case(_halves, STACKED, EXPERT_TOKENS, 4),
    "at traced positions": Case(_at_traced_positions, STACKED, EXPERT_TOKENS, 2),
    "experts": Case(_experts, STACKED, EXPERT_TOKENS, 2),
    "experts by einsum": Case(_einsum_experts, STACKED, EXPERT_TOKENS, 2),
    "in parts": Case(_in_parts, SEPARATE, TOKENS, 2, ("dot_general", "slice")),
    "layers backwards and at once": Case(
        _backwards_and_at_once, STACKED, EXPERT_TOKENS, 2, ("dot_general", "reduce_sum")
    ),
    "batch axes in another order": Case(_other_order, TWO_AXES, 4 * _array(16, 3, 2, 5, 6), 2),
}


def _expected(group, state, gradients):
    """By definition, from G of all matrices of a group: P'G, and G - P P'G of those drawn."""
    wide = [g.T if g.shape[0] > g.shape[1] else g for g in gradients]
    bases = np.asarray(state.basis[group]).reshape(len(wide), -1, RANK)
    low = [p.T @ g for p, g in zip(bases, wide, strict=True)]
    left_out = [wide[i] - bases[i] @ low[i] for i in np.asarray(state.slots[group])]
    return np.stack(low), np.stack(left_out)


def _by_group(tree):
    """Leaves by group: of lists, the group ``*`` below their name; of stacks, one each."""
    if isinstance(tree, list):
        return {"*": tree}
    return {
        name + (".*" if isinstance(part, list) else ""): part if isinstance(part, list) else [part]
        for name, part in tree.items()
    }


def check(
    loss: Any, params: Any, x: Any, tolerance: float = TOLERANCE
) -> optax.GradientTransformationExtraArgs:
    """Compares projected gradients with projections of gradients, and returns their optimizer."""
    # Bases that depend on key, gradient and the last basis, and cost no compilation.
    compression = LowRank(
        rank=RANK, residual=residuals.sampled(2, form="additive"), projector=all_arguments
    )
    tx = gum_optax.low_rank(optax.identity(), compression)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)

    def everything(params, state, x):
        value, full = jax.value_and_grad(loss)(params, x)
        _, standard = tx.update(full, state, params)
        renewed = backward.refresh(loss, tx)(params, state, x)
        return (
            value,
            full,
            standard,
            renewed,
            backward.value_and_grad(loss, tx)(params, renewed, x),
        )

    value, full, standard, renewed, (own_value, projected) = jax.jit(
        everything, compiler_options=QUICK
    )(params, state, x)
    # The refresh makes the bases and draws of a standard step.
    assert int(renewed.period) == int(standard.period) == 0
    for group in standard.basis:
        np.testing.assert_allclose(renewed.basis[group], standard.basis[group], atol=tolerance)
        np.testing.assert_array_equal(renewed.slots[group], standard.slots[group])
    # And gradients are compressed by these.
    assert float(own_value) == pytest.approx(float(value), rel=tolerance)
    leaves = _by_group(projected)
    for group, gradients in _by_group(full).items():
        matrices = np.concatenate([np.reshape(g, (-1, *g.shape[-2:])) for g in gradients])
        low, left_out = _expected(group, renewed, matrices)
        scale = float(np.linalg.norm(matrices))
        own = np.concatenate([np.reshape(p.low, (-1, *p.low.shape[-2:])) for p in leaves[group]])
        np.testing.assert_allclose(own, low, atol=tolerance * scale)
        np.testing.assert_allclose(leaves[group][0].drawn, left_out, atol=tolerance * scale)
        assert all(p.drawn is None for p in leaves[group][1:])
        assert all(p.residual is None for p in leaves[group])
    return tx


# By `make slow`: these meet rules that the other cases meet as well.
SLOW = (
    *("shared by the turns of a loop", "per example", "gradient inside", "cast", "scan"),
    *("halves", "at traced positions", "experts", "two scans", "unrolled", "heads"),
    *("jitted and recomputed", "branch"),
    *("in parts", "layers backwards and at once", "batch axes in another order"),
)


@jax.enable_x64(True)
@pytest.mark.filterwarnings("ignore:.*compressed leaves have uses other than dense products")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_projected_gradients_are_projections_of_gradients(name):
    case = CASES[name]
    tx = check(case.loss, case.params, case.x, case.tolerance)
    uses = backward.explain(case.loss, tx, case.params, case.x)
    assert sum(use.products for use in uses) == case.products
    assert tuple(sorted(why for use in uses for why in use.others)) == case.others


@jax.enable_x64(True)
@pytest.mark.parametrize("name", ["tied", "recomputed scan", "experts by einsum"])
def test_rules_that_read_residuals_get_them(name):
    """And with them the updates of full gradients."""
    case = CASES[name]
    compression = LowRank(
        rank=RANK,
        residual=residuals.through(gum_optax.normalize_columns()),
        projector=all_arguments,
    )
    tx = gum_optax.low_rank(optax.trace(0.9), compression)
    params = jax.tree.map(jnp.asarray, case.params)

    def both(params, state, x):
        standard = tx.update(jax.grad(case.loss)(params, x), state, params)
        renewed = backward.refresh(case.loss, tx)(params, state, x)
        _, gradients = backward.value_and_grad(case.loss, tx)(params, renewed, x)
        return standard, tx.update(gradients, renewed, params), gradients

    standard, own, gradients = jax.jit(both, compiler_options=QUICK)(
        params, tx.init(params), case.x
    )
    for expected, got in zip(*map(jax.tree.leaves, (standard, own)), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    for leaf in jax.tree.leaves(gradients, is_leaf=lambda x: isinstance(x, backward.Projected)):
        assert leaf.residual.shape == leaf.shape


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)(h, h)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


@jax.enable_x64(True)
@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_an_unmodified_linen_model_with_layers_on_any_axis(axis):
    """Kernels ``[layers, embed, heads, head_dim]``, or with the layers behind: no G is made."""
    scanned = nn.scan(
        nn.remat(_Layer),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
    )
    model, x = scanned(), 4 * _array(3, 2, 5, 8)
    params = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(1), x, None)["params"]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

    def numbers(params):
        def of_leaf(path, leaf):
            name = jax.tree_util.keystr(path)
            first, *rest = (i for i in range(leaf.ndim) if i != axis)
            if "kernel" not in name:
                return None
            inputs = (first, *rest[:-1]) if "out" in name else (first,)
            outputs = tuple(i for i in (first, *rest) if i not in inputs)
            return optax.contrib.MuonDimensionNumbers(inputs, outputs)

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x, None)[0] - 1) ** 2)

    compression = LowRank(rank=RANK, residual=residuals.sampled(1), projector=all_arguments)
    tx = gum_optax.for_matrices(
        gum_optax.low_rank(optax.trace(0.9), compression),
        0.1,
        weight_dimension_numbers=numbers,
    )

    def both(params, state, x):
        standard = tx.update(jax.grad(loss)(params, x), state, params)
        renewed = backward.refresh(loss, tx)(params, state, x)
        _, gradients = backward.value_and_grad(loss, tx)(params, renewed, x)
        return standard, tx.update(gradients, renewed, params)

    standard, own = jax.jit(both, compiler_options=QUICK)(params, tx.init(params), x)
    assert len(low_rank_state(own[1]).basis) == 6
    for expected, got in zip(*map(jax.tree.leaves, (standard, own)), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    uses = backward.explain(loss, tx, params, x)
    assert [(use.products, use.others) for use in uses] == [(1, ())] * 6


def test_reshapes_keep_rows_columns_and_batch_apart():
    batch, rows, columns = Axis("batch", 0, 4), Axis("rows", 1, 6), Axis("columns", 1, 8)
    one = Axis("one", 0, 1)
    split = _reshaped((batch, rows, columns), (4, 6, 2, 4))
    assert split is not None
    assert split == (batch, rows, Axis("columns", 4, 2), Axis("columns", 1, 4))
    assert _reshaped(split, (4, 6, 8)) == (batch, rows, columns)
    assert _reshaped((rows, columns), (1, 6, 1, 8)) == (one, rows, one, columns)
    assert _reshaped((one, rows, columns), (6, 8)) == (rows, columns)
    # A stack of a single matrix keeps its batch axis, which the tap has too.
    single = Axis("batch", 0, 1)
    assert _reshaped((single, rows, columns), (1, 6, 8)) == (single, rows, columns)
    # Merged sides, merged layers, and a side whose axes have changed places.
    assert _reshaped((rows, columns), (48,)) is None
    assert _reshaped((batch, rows, columns), (24, 8)) is None
    assert _reshaped((rows, split[3], split[2]), (6, 8)) is None
    assert _reshaped((batch, rows, columns), (2, 2, 6, 8)) is None
