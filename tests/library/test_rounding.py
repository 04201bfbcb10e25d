"""Weights in bfloat16: random rounding is right on average, and small updates are not lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers, precision
from experiments.config import Config
from tests.helpers import QUICK

SEEDS = jax.random.split(jax.random.key(0), 4000)
_rounded = jax.jit(jax.vmap(precision.round_at_random, (0, None)), compiler_options=QUICK)


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


def train(config, steps=400, size=512):
    """Weights of ones after steps whose updates are 1/4096 of them, a 32nd of what is lost."""
    params = precision.cast({"norm": jnp.ones(size)}, config.weights)
    optimizer = optimizers.build(config, 8)
    state = optimizer.init(params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
    return params["norm"]


CONSTANT = Config(
    optimizer="adamw", learning_rate=1 / 4096, warmup=0.0, final_learning_rate=1.0, clip_norm=0.0
)


def test_small_updates_do_not_vanish():
    """400 updates of 1/4096 make 1 - 400/4096; nearest rounding would leave 1 as it is."""
    ones = jnp.ones((), jnp.bfloat16)
    assert optax.apply_updates(ones, jnp.float32(-1 / 4096)) == ones
    expected = 1 - 400 / 4096
    exact = np.asarray(train(CONSTANT))
    np.testing.assert_allclose(exact, expected, rtol=1e-4)
    rounded = train(dataclasses.replace(CONSTANT, weights="bfloat16"))
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    # Each weight is a random walk of 400 steps, of variance below (1/256)(1/4096) each: 0.02 in
    # the end. The mean of 512 has a standard deviation of 0.0009; here are five of them.
    assert abs(values.mean() - expected) < 0.0045
    assert values.std() < 0.03


@pytest.mark.parametrize("optimizer", ["gum", "muon", "galore"])
def test_the_state_is_that_of_float32_weights(optimizer):
    config = Config(optimizer=optimizer, rank=2, projector=None)
    params = {"layers": [{"q": {"kernel": jnp.ones((8, 12))}} for _ in range(4)]}
    alone = optimizers.build(config, 4).init(params)
    narrow = precision.cast(params, "bfloat16")
    state = optimizers.build(dataclasses.replace(config, weights="bfloat16"), 4).init(narrow)
    assert isinstance(state, precision.RoundingState)
    assert jax.tree.map(jnp.shape, state.inner) == jax.tree.map(jnp.shape, alone)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state.inner)}
    assert jnp.dtype("bfloat16") not in kinds


def test_the_same_seed_rounds_alike():
    config = dataclasses.replace(CONSTANT, weights="bfloat16")
    first, again = train(config, steps=20), train(config, steps=20)
    other = train(dataclasses.replace(config, seed=1), steps=20)
    np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(again, np.float32))
    assert (np.asarray(first) != np.asarray(other)).any()
