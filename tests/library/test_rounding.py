"""Weights in bfloat16: random rounding has the exact mean, and small updates are not lost."""

# optax types updates as any tree of arrays, so their entries are unknown to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import LowRank, _rounding
from tests import helpers

SEEDS = jax.random.split(jax.random.key(0), 4000)
_rounded = jax.jit(jax.vmap(_rounding.round_at_random, (0, None)), compiler_options=helpers.QUICK)


@pytest.mark.parametrize("x", [1.0009765625, -1.0009765625, 3.1e-5, -7.77e8, 0.9999])
def test_rounding_gives_a_neighbour_right_on_average(x):
    """The two neighbours by another way: bfloat16's spacing below and above."""
    x = np.float32(x)
    found = _rounded(SEEDS, x)
    spacing = 2.0 ** (np.floor(np.log2(abs(x))) - 7)
    below = np.floor(float(x) / spacing) * spacing
    values = np.asarray(found, np.float64)
    assert set(values) <= {below, below + spacing}
    # Five standard deviations of the mean of 4000 draws.
    share = (float(x) - below) / spacing
    assert abs(values.mean() - float(x)) <= 5 * spacing * np.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan])
def test_what_bfloat16_holds_stays_as_it_is(x):
    found = _rounded(SEEDS[:100], np.float32(x))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full(100, x, np.float32))


def test_what_is_no_number_stays_none():
    """Whatever bits it is made of: added to some, random ones would make zero or infinity of it."""
    x = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(np.asarray(_rounded(SEEDS[:100], x), np.float32)).all()


RATE = 1 / 4096  # of a weight of one: a 32nd of what is lost to rounding


@functools.partial(jax.jit, static_argnames="key", compiler_options=helpers.QUICK)
def walk(params: Any, steps: int, key: int = 0) -> Any:
    """Weights and state after updates of -RATE."""
    tx = gum_optax.stochastic_rounding(optax.sgd(RATE), key)

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))


ONES = {"a": np.ones(512, jnp.bfloat16), "b": np.ones(512, jnp.bfloat16)}


def test_small_updates_do_not_vanish():
    """400 updates of 1/4096 make 1 - 400/4096; nearest rounding would leave 1 as it is."""
    one = jnp.ones((), jnp.bfloat16)
    assert optax.apply_updates(one, jnp.float32(-RATE)) == one
    params, state = walk(ONES, 400)
    assert state.step == 400
    for leaf in params.values():
        assert leaf.dtype == jnp.bfloat16
        values = np.asarray(leaf, np.float64)
        # Each weight is a random walk of 400 steps, of variance below (1/256)(1/4096) each: 0.02
        # in the end. The mean of 512 has a standard deviation of 0.0009; here are five of them.
        assert abs(values.mean() - (1 - 400 / 4096)) < 0.0045
        assert values.std() < 0.03


def test_bits_depend_on_key_step_and_leaf_alone():
    first, again, other = walk(ONES, 1)[0], walk(ONES, 1)[0], walk(ONES, 1, key=1)[0]
    np.testing.assert_array_equal(first["a"], again["a"])
    assert (first["a"] != other["a"]).any()
    assert (first["a"] != first["b"]).any()
    # In the second step, other weights are rounded down than in the first.
    second = walk(ONES, 2)[0]
    assert ((second["a"] != first["a"]) & (first["a"] == 1)).any()


def test_leaves_of_other_dtypes_have_the_updates_of_the_inner_transformation():
    params = {"wide": jnp.ones(4), "half": jnp.ones(4, jnp.float16), "narrow": ONES["a"]}
    inner = optax.adamw(1e-3)
    tx = gum_optax.stochastic_rounding(inner)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = inner.update(grads, inner.init(params), params)
    for name in ("wide", "half"):
        assert updates[name].dtype == params[name].dtype
        np.testing.assert_array_equal(updates[name], expected[name])
    assert updates["narrow"].dtype == jnp.float32


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "gum": lambda: gum_optax.gum(0.1, LowRank(2)),
    "muon in 8 bits": lambda: gum_optax.muon(0.1),
    "adamw": lambda: optax.adamw(0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_float32_weights(name):
    params = {"layers": [{"q": {"kernel": np.ones((8, 12), np.float32)}} for _ in range(4)]}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    inner = OPTIMIZERS[name]()
    tx = gum_optax.stochastic_rounding(inner)
    state = jax.eval_shape(tx.init, narrow)
    assert isinstance(state, gum_optax.RoundingState)
    assert state.inner == jax.eval_shape(inner.init, params)
    assert jax.eval_shape(tx.update, narrow, state, narrow)[1] == state


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_changes_no_bit(kind):
    tx = gum_optax.stochastic_rounding(optax.sgd(RATE))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    params = {"w": np.ones((8, 24), jnp.bfloat16)}
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        place = {"w": NamedSharding(mesh, P("fsdp", "tensor"))}
        placed = jax.device_put(params, place)
        state = jax.jit(tx.init)(placed)
        moves, _ = jax.jit(tx.update)(placed, state, placed)
        assert moves["w"].sharding.is_equivalent_to(place["w"], 2)
    np.testing.assert_array_equal(moves["w"], expected["w"])
    assert len(np.unique(expected["w"])) == 2


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: -value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = gum_optax.stochastic_rounding(inner)
    params = {"w": ONES["a"]}
    updates, _ = tx.update(params, tx.init(params), params, value=0.5)
    np.testing.assert_array_equal(updates["w"], np.full(512, -0.5, np.float32))


def test_it_needs_the_parameters():
    tx = gum_optax.stochastic_rounding(optax.sgd(RATE))
    with pytest.raises(ValueError, match="`stochastic_rounding` needs `params`"):
        tx.update(ONES, tx.init(ONES))


@pytest.mark.parametrize("key", [1.5, "seed", None, True])
def test_bad_keys_are_named(key):
    with pytest.raises(TypeError, match="`key`"):
        gum_optax.stochastic_rounding(optax.sgd(RATE), key)


def test_a_bad_inner_transformation_is_named():
    with pytest.raises(TypeError, match="`inner` must be an optax"):
        gum_optax.stochastic_rounding(optax.sgd)
