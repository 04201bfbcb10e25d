"""Storages: how the inner state rests between two steps.

A storage packs every floating-point array of the inner transformation's state at the end of a step
and unpacks it at the start of the next. Integers and keys are left alone. Bases and slots' indices
are no part of the inner state.

Example:
  Momentum in bfloat16, whatever the dtype of the parameters:

  >>> import jax.numpy as jnp
  >>> import gum_optax
  >>> from gum_optax import storages
  >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(storage=storages.cast(jnp.bfloat16)))

Tests: tests/library/test_storages.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import _checks
from gum_optax._paths import PyTree


class Storage(NamedTuple):
    """A pair of functions of one floating-point array.

    Attributes:
      pack: ``array -> packed``, an array or a tree of arrays; traced, and also called on zeros at
        ``init``.
      unpack: ``(packed, like) -> array``; ``like`` has the shape and dtype with which the inner
        transformation's ``init`` makes the array.
    """

    pack: Callable[[jax.Array], Any]
    unpack: Callable[[Any, jax.Array], jax.Array]


def plain() -> Storage:
    """Keeps the state as it is, in the dtypes of the parameters.

    Returns:
      The `Storage` that packs nothing.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(storage=gum_optax.storages.plain()))
    """
    return Storage(lambda array: array, lambda packed, like: packed)


def cast(dtype: Any) -> Storage:
    """Keeps the state in another floating-point dtype, rounded to nearest.

    The inner transformation computes in float32 (float64 for float64 parameters).

    Args:
      dtype: for example ``jnp.bfloat16``: half the bytes of float32.

    Returns:
      The `Storage`.

    Raises:
      TypeError: if ``dtype`` is not a real floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import storages
      >>> storages.cast("bfloat16").pack(jnp.ones(3)).dtype
      dtype(bfloat16)
    """
    rest = _checks.floating_dtype("dtype", dtype)
    # Unpacked at least to float32: beta * R would be rounded in the narrow dtype otherwise.
    return Storage(
        lambda array: array.astype(rest),
        lambda packed, like: packed.astype(jnp.promote_types(like.dtype, jnp.float32)),
    )


def pack(storage: Storage, state: PyTree) -> PyTree:
    """Packs every floating-point array of a state."""
    return jax.tree.map(lambda leaf: storage.pack(leaf) if _is_floating(leaf) else leaf, state)


def unpack(storage: Storage, packed: PyTree, like: PyTree) -> PyTree:
    """Unpacks a state; ``like`` is the state that the inner transformation's ``init`` makes."""
    return jax.tree.map(
        lambda leaf, rest: storage.unpack(rest, leaf) if _is_floating(leaf) else rest, like, packed
    )


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
