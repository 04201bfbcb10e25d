"""Weights in bfloat16: halved, and still moved by updates smaller than half their spacing.

bfloat16 keeps eight binary digits, so an update below 1/512 of a weight is lost when the sum is
rounded to the nearest. Rounding to one of the two neighbours, to each with the probability that
makes the mean right, loses nothing on average (Gupta et al., arXiv 1502.02551).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_DROPPED = 16  # bits by which bfloat16 is shorter than float32


class RoundingState(NamedTuple):
    """The state of the wrapped optimizer, and what the random bits depend on."""

    step: jax.Array
    inner: optax.OptState


def cast(params: Any, dtype: str) -> Any:
    """The weights in another type."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def stochastic_rounding(
    inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformation:
    """`inner` in float32, for weights in bfloat16 to which its updates are added without loss.

    `inner` sees gradients and weights in float32, so its state is float32. Updates come back in
    float32, such that `optax.apply_updates` gives the sum of weight and update, rounded at random.

    Args:
      inner: the optimizer.
      seed: of the random bits; with the number of the step it decides them.
    """

    def init(params: optax.Params) -> RoundingState:
        return RoundingState(jnp.zeros([], jnp.int32), inner.init(cast(params, "float32")))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RoundingState]:
        wide = cast(params, "float32")
        updates, inner_state = inner.update(cast(updates, "float32"), state.inner, wide)
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.add, wide, updates))
        keys = jax.random.split(key, len(leaves))
        rounded = tree.unflatten(map(round_at_random, keys, leaves))
        # The difference of two neighbours is exact, so that the weight plus it is, too.
        moves = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, rounded, wide)
        return moves, RoundingState(state.step + 1, inner_state)

    return optax.GradientTransformation(init, update)


def round_at_random(key: jax.Array, x: jax.Array) -> jax.Array:
    """A float32 array in bfloat16, each entry rounded up or down, right on average.

    Adding random bits below the last one that is kept carries into it as often as it should; what
    is not finite stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = ((bits + noise) >> _DROPPED).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
