"""Long lives: counts at their end, and models that change while they are trained."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, fallbacks, residuals, storages
from tests import helpers, tables

LAST = 2**31 - 1
SLOW = pytest.mark.slow

# Counts -----------------------------------------------------------------------------------------


def _nearly_at_the_end(state):
    """Every step count of a state, whoever keeps it, two steps before the largest number."""

    def on_leaf(path, leaf):
        named = getattr(path[-1], "name", "") in ("count", "step")
        return np.full(leaf.shape, LAST - 2, leaf.dtype) if named else leaf

    return jax.tree_util.tree_map_with_path(on_leaf, state)


# By `make slow`: counts of a fallback and of Adam, and a switch of projectors.
@pytest.mark.parametrize(
    "name",
    [
        "low_rank_trace",
        *(pytest.param(name, marks=SLOW) for name in ("gum", "adamw_galore", "adamw_golore")),
    ],
)
def test_the_count_ends_and_training_does_not(name):
    """68 years at a step a second: no refresh at every step, no number that is not finite."""
    _, update = tables.compiled(name)
    params, state = tables.parameters(name), _nearly_at_the_end(tables.first_state(name))
    counts, periods = [], []
    bases: Any = {}
    for step in range(5):
        updates, state = update(tables.parameters(name, seed=step), state, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
        low_rank = helpers.low_rank_state(state)
        counts.append(int(low_rank.count))
        periods.append(int(low_rank.period))
        if step > 1:  # The last refresh was at step LAST - 1, the first of its period.
            for before, after in zip(*map(jax.tree.leaves, (bases, low_rank.basis)), strict=True):
                np.testing.assert_array_equal(before, after)
        bases = low_rank.basis
    assert counts == [LAST - 1, LAST, LAST, LAST, LAST]
    number = LAST // tables.PERIOD
    assert periods == [number - 1, number, number, number, number]


def test_the_bits_of_rounding_go_on():
    """Its count wraps, and bits differ from step to step all the same."""
    tx = gum_optax.stochastic_rounding(optax.sgd(2.0**-12))
    update = jax.jit(tx.update, compiler_options=helpers.QUICK)
    params = np.ones(2000, jnp.bfloat16)
    state = tx.init(params)._replace(step=np.asarray(LAST - 1, np.int32))
    found = []
    for _ in range(4):
        updates, state = update(params, state, params)
        found.append(np.asarray(updates))
    assert int(state.step) == -(2**31) + 2
    for i, one in enumerate(found):
        # A sixteenth of a unit in the last place: so many are rounded down.
        assert 0.03 < np.mean(one != 0) < 0.1
        assert all((one != other).any() for other in found[:i])


# Models that change in mid-run ------------------------------------------------------------------


def _ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def _layers(count=2, width=8, bias=8):
    return [{"w": _ones(6, width), "b": _ones(bias)} for _ in range(count)]


MODEL = {"layers": _layers(), "embed": _ones(20, 6), "scale": _ones(1)}
CHANGED = {
    "a layer more": {"layers": _layers(3)},
    "a layer less": {"layers": _layers(1)},
    "wider matrices": {"layers": _layers(width=9)},
    "matrices that are vectors now": {"layers": [{"w": _ones(48), "b": _ones(8)}] * 2},
    "wider biases": {"layers": _layers(bias=9)},
    "biases less": {"layers": [{"w": _ones(6, 8)}] * 2},
    "a bias more": {"other": _ones(8)},
    "more tokens": {"embed": _ones(24, 6)},
    "an embedding of three axes": {"embed": _ones(2, 10, 6)},
}
COMPRESSION = LowRank(2, 3, residuals.sampled(1))
OPTIMIZERS = {
    "gum": gum_optax.gum(0.1, COMPRESSION),
    "gum with a factored fallback": gum_optax.gum(0.1, COMPRESSION, fallback=fallbacks.factored()),
    "muon in 8 bits": gum_optax.muon(0.1, storages.int8()),
    "rounded": gum_optax.stochastic_rounding(gum_optax.adamw(0.1, COMPRESSION)),
    "quantized as a whole": gum_optax.quantized(gum_optax.adamw(0.1, COMPRESSION), smallest=0),
}


# The others by `make slow`.
FAST = ("gum",)
every_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [SLOW]) for n in OPTIMIZERS]
)


@pytest.mark.parametrize("change", CHANGED)
@every_optimizer
def test_what_changes_in_mid_run_is_named(name, change):
    """Parameters that were added, removed or resized: the first array that does not fit."""
    tx, params = OPTIMIZERS[name], MODEL | CHANGED[change]
    state = jax.eval_shape(tx.init, MODEL)
    with pytest.raises(ValueError, match=r"do not fit the optimizer state.*`state.*should have"):
        jax.eval_shape(tx.update, params, state, params)


def test_a_state_that_can_be_broadcast_is_refused_too():
    """A scale of one number that becomes one for each feature: optax goes on without a word."""
    params = MODEL | {"scale": _ones(6)}
    tx = OPTIMIZERS["gum"]
    with pytest.raises(ValueError, match=r"do not fit .*'scale'.* shape \(6,\) and has \(1,\)"):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, MODEL), params)


def test_an_error_of_a_fallback_is_its_own_where_its_state_fits():
    def update(updates, state, params=None):
        raise ValueError("`momentum` is tired")

    tired = optax.GradientTransformation(optax.trace(0.9).init, update)
    tx = gum_optax.gum(0.1, COMPRESSION, fallback=tired)
    with pytest.raises(ValueError, match="`momentum` is tired"):
        jax.eval_shape(tx.update, MODEL, jax.eval_shape(tx.init, MODEL), MODEL)


@every_optimizer
def test_gradients_may_change_their_dtype_in_mid_run(name):
    """As where a loss scale comes and goes: the state keeps its dtypes, updates follow."""
    tx = OPTIMIZERS[name]
    state = jax.eval_shape(tx.init, MODEL)
    for dtype in (jnp.bfloat16, jnp.float16):
        gradients = jax.tree.map(lambda x, d=dtype: x.astype(d), MODEL)
        updates, after = jax.eval_shape(tx.update, gradients, state, MODEL)
        assert helpers.described(after) == helpers.described(state)
        if name != "rounded":  # Whose updates are exact in float32 alone.
            assert helpers.described(updates) == helpers.described(gradients)


@pytest.mark.parametrize("name", ["gum", pytest.param("quantized as a whole", marks=SLOW)])
def test_another_rank_in_mid_run_is_named(name):
    other = LowRank(3, 3, residuals.sampled(1))
    tx = gum_optax.gum(0.1, other)
    if name != "gum":
        tx = gum_optax.quantized(gum_optax.adamw(0.1, other), smallest=0)
    state = jax.eval_shape(OPTIMIZERS[name].init, MODEL)
    with pytest.raises(ValueError, match=r"`state.*basis.*shape \(2, 6, 3\) and has \(2, 6, 2\)"):
        jax.eval_shape(tx.update, MODEL, state, MODEL)
