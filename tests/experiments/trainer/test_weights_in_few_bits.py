"""Weights in 8 bits: they are levels of their codes, and their mean is the exact sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments.trainer import optimizers, rounding
from experiments.trainer.config import Config
from gum_optax import storages
from tests import tables

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.standard_normal((64, 96)), jnp.float32),
    "norm": jnp.asarray(RNG.standard_normal(96), jnp.float32),
}
GRADS = {"w": jnp.asarray(1e-3 * RNG.standard_normal((64, 96)), jnp.float32), "norm": jnp.ones(96)}


@functools.cache
def steps() -> dict[str, np.ndarray]:
    """The weights after one step, for each of a hundred keys."""

    def step(key: jax.Array) -> optax.Params:
        tx = rounding.in_few_bits(optax.sgd(1.0), key)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)

    return jax.device_get(jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(0), 100)))


def test_weights_are_levels_and_small_arrays_are_not_rounded():
    new = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), steps())
    row = np.asarray(new["w"][0], np.float64)
    codes = 127 * row / np.abs(row).max()
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    # Codes of these weights stand for the same weights.
    storage = storages.int8()
    again = storage.unpack(storage.pack(new["w"]), new["w"])
    np.testing.assert_allclose(again, new["w"], rtol=1e-6)
    tables.assert_close(new["norm"], PARAMS["norm"] - 1)


def test_no_update_is_lost_on_average():
    """Updates of a tenth of the distance of two levels, which rounding to nearest would lose."""
    found = steps()["w"].mean(axis=0, dtype=np.float64)
    exact = np.asarray(PARAMS["w"] - GRADS["w"], np.float64)
    spacing = np.abs(exact).max(axis=1, keepdims=True) / 127
    # The standard deviation of one rounding is at most half of the distance.
    assert np.abs(found - exact).max() < 5 * 0.5 * spacing.max() / np.sqrt(100)
    assert abs((found - exact).mean()) < 5 * 0.5 * spacing.max() / np.sqrt(100 * exact.size)


def test_the_option_wraps_the_optimizer():
    run = Config(weights="int8", optimizer=optimizers.named("muon"))
    state = jax.eval_shape(optimizers.build(run, layers=2).init, PARAMS)
    assert isinstance(state, gum_optax.RoundingState)
