"""`stochastic_rounding`: trains weights in bfloat16 without losing small updates.

Tests: tests/library/test_rounding.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _mesh
from gum_optax._paths import PyTree, is_stand_in
from gum_optax._projected import Projected, is_projected

_DROPPED = 16  # bits by which bfloat16 is shorter than float32


class RoundingState(NamedTuple):
    """State of `stochastic_rounding`, and of `quantized` with `storages.at_random`.

    Attributes:
      step: ``int32[]``, the number of updates so far; with the key it determines the random bits.
        It wraps around, so that bits repeat after ``2**32`` updates.
      inner: the state of the wrapped optimizer; in `quantized`, packed.
    """

    step: jax.Array
    inner: optax.OptState


def stochastic_rounding(
    inner: optax.GradientTransformation, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Trains weights in bfloat16 without a float32 copy: sums are rounded up or down at random.

    bfloat16 keeps eight binary digits, so an update below 1/512 of a weight is lost when the sum is
    rounded to nearest. Stochastic rounding chooses one of the two neighbours a < b of the sum, with
    the probabilities that make its mean exact:

    .. math::
        x = W + U, \quad P(W' = b) = \frac{x - a}{b - a}, \quad \operatorname{E} W' = x

    The inner transformation sees gradients and weights in float32, so its state has the dtypes of
    float32 weights (`quantized` inside this wrapper packs it). The returned updates are float32,
    too: ``optax.apply_updates`` turns them into exactly the rounded sum. Nothing may change these
    updates afterwards, so this must be the outermost transformation. Leaves of other dtypes are
    updated as without this wrapper.

    Args:
      inner: a whole optimizer, with its learning rate.
      key: a seed or a threefry key (typed, or raw ``uint32[2]``) for the random bits, which do not
        depend on the mesh.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its ``update`` needs ``params``. The state is a
      `RoundingState`, four bytes more than the state of ``inner``.

    Raises:
      TypeError, ValueError: if an argument is malformed; at ``update``, if ``params`` is missing.

    Example:
      A thousand updates, each far too small for bfloat16:

      >>> import jax, jax.numpy as jnp, optax
      >>> import gum_optax
      >>> tx = gum_optax.stochastic_rounding(optax.sgd(2.0 ** -18))
      >>> params = jnp.ones(1000, jnp.bfloat16)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=1000)
      >>> exact = 1 - 1000 * 2.0 ** -18
      >>> bool(abs(params.astype(jnp.float32).mean() - exact) < 3e-4)
      True

    References:
      Gupta et al., Deep learning with limited numerical precision, arXiv 1502.02551.
    """
    _checks.transformation("inner", inner)
    _checks.key("key", key)
    run = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        if is_stand_in(params):
            return jnp.zeros(())  # A prefix of every state: `map_params` changes nothing.
        return RoundingState(jnp.zeros([], jnp.int32), run.init(_wide(params)))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "`stochastic_rounding` needs `params`: call `update(updates, state, params)`."
            )
        # 1. The inner update, in float32.
        wide = _wide(params)
        moves, inner_state = run.update(_wide(updates), state.inner, wide, **extra_args)
        # 2. x = W + U, rounded at random, each leaf by bits of its own.
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key_of_step(key, state.step), len(leaves))
        moves = [
            _rounded_move(k, leaf, move)
            for k, leaf, move in zip(keys, leaves, tree.flatten_up_to(moves), strict=True)
        ]
        return tree.unflatten(moves), RoundingState(state.step + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def key_of_step(key: int | jax.Array, step: jax.Array) -> jax.Array:
    """Returns the typed key for the random bits of one step."""
    typed = jax.random.wrap_key_data(_checks.key_data(key), impl="threefry2x32")
    return jax.random.fold_in(typed, step)


def _wide(tree: PyTree) -> PyTree:
    """Converts bfloat16 leaves to float32 and leaves others unchanged."""

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, Projected):
            dtype = jnp.float32 if leaf.dtype == jnp.bfloat16 else leaf.dtype
            residual = None if leaf.residual is None else leaf.residual.astype(dtype)
            return dataclasses.replace(leaf, residual=residual, dtype=jnp.dtype(dtype))
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(widen, tree, is_leaf=is_projected)


def _rounded_move(key: jax.Array, weight: jax.Array, move: jax.Array) -> jax.Array:
    """Returns the float32 update U' for which ``W + U'`` is the sum ``W + U`` rounded at random."""
    if weight.dtype != jnp.bfloat16:
        return move

    def rounded(key: jax.Array, weight: jax.Array, move: jax.Array) -> jax.Array:
        old = weight.astype(jnp.float32)
        # U' = W' - W. The sum W + U' is exactly W': both have eight digits, and float32 keeps 24.
        return round_at_random(key, old + move).astype(jnp.float32) - old

    return _mesh.in_auto_mode(rounded, key, weight, move, like=lambda: move)


def round_at_random(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds a float32 array to bfloat16, each entry up or down, with the exact mean.

    Random bits are added below the last bit that is kept. They carry into it with the probability
    (x - a) / (b - a). Entries that are not finite are converted without rounding.
    """
    # bfloat16 is the upper half of float32, so integer arithmetic on the bits does it.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = ((bits + noise) >> _DROPPED).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
