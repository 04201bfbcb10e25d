"""Weights in 8 bits between two steps (`--weights int8`), an experiment: what does it cost?

Q-GaLore and Q-APOLLO keep weights in 8 bits and round their sums with updates at random:

    W' = decode(encode(W + U)),    E W' = W + U

Here the weights hold the numbers that the codes stand for, in float32 arrays: a decoded array has
the same codes when it is encoded again, so that losses are those of weights in codes, but memory
is not. Norms and other small arrays are not rounded.

Reference: Zhang et al., Q-GaLore, arXiv 2407.08296.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import RoundingState, storages

_STORAGE: Any = storages.int8()
_SMALLEST = 4096  # arrays with fewer numbers are not rounded


def in_few_bits(
    inner: optax.GradientTransformation, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole optimizer: its updates lead from weights in codes to weights in codes.

    Args:
      inner: the optimizer, with its learning rate.
      key: the key of the random bits.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is a `RoundingState`. Nothing may
      change its updates.
    """
    run = optax.with_extra_args_support(inner)

    def init(params: Any) -> RoundingState:
        return RoundingState(jnp.zeros([], jnp.int32), run.init(params))

    def update(
        updates: Any, state: RoundingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RoundingState]:
        # 1. x = W + U
        moves, inner_state = run.update(updates, state.inner, params, **extra_args)
        exact = optax.apply_updates(params, moves)
        # 2. U' = W' - W, where W' are the numbers that the codes of x stand for; each leaf is
        #    rounded by bits of its own.
        leaves, tree = jax.tree.flatten(exact)
        keys = jax.random.split(jax.random.fold_in(key, state.step), len(leaves))
        kept = tree.unflatten(map(rounded, keys, leaves))
        moves = jax.tree.map(jnp.subtract, kept, params)
        return moves, RoundingState(state.step + 1, inner_state)

    def rounded(key: jax.Array, x: jax.Array) -> jax.Array:
        if x.size < _SMALLEST:
            return x
        return _STORAGE.unpack(_STORAGE.pack_at_random(x, key), x)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
