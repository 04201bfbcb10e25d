"""Packs whole states by a storage, and unpacks them: array by array, one after the other.

Tests: tests/library/test_quantized.py, tests/library/test_storages.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gum_optax import _checks, _codes, _scheduling, storages
from gum_optax._paths import PyTree
from gum_optax._rounding import key_of_step
from gum_optax.storages import KeyPath, Storage

_IDENTITY = storages.plain().pack


def pack(
    storage: Storage,
    state: PyTree,
    smallest: int = 0,
    *,
    fresh: bool = False,
    bits: jax.Array | None = None,
) -> PyTree:
    """Packs every floating-point array of a state that has ``smallest`` numbers or more.

    Packed arrays are not packed again, as in the state of a `LowRank` with its own storage.

    Args:
      storage: how arrays are packed.
      state: any tree.
      smallest: arrays with fewer numbers are not packed.
      fresh: whether the state comes from ``init``, so that its arrays are constants.
      bits: the key of this step, see `bits_of`; every array is rounded by bits of its own. None:
        rounding to nearest.

    Raises:
      ValueError: if there is a key, and a storage has no rounding at random.
    """
    # The array that was packed last, after which the next one is scheduled.
    last: jax.Array | None = None
    numbers = itertools.count()

    def on_leaf(path: KeyPath, leaf: Any) -> Any:
        nonlocal last
        if not _is_packable(leaf, smallest):
            return leaf
        serving = _serving(path, storage)
        if serving.pack is _IDENTITY:
            return leaf
        if fresh:
            leaf = _scheduling.as_data(leaf)
        # Arrays are packed one after the other, so that one of them is unpacked at a time, see
        # `_scheduling`.
        leaf = _scheduling.scheduled_after(leaf, last)
        if bits is None:
            packed = serving.pack(leaf)
        else:
            packed = _at_random(path, serving)(leaf, jax.random.fold_in(bits, next(numbers)))
        last = next((p for p in jax.tree.leaves(packed) if _is_packable(p, 1)), last)
        return packed

    return jax.tree_util.tree_map_with_path(on_leaf, state, is_leaf=_is_codes)


def bits_of(storage: Storage, step: jax.Array, states: int = 1) -> Sequence[jax.Array | None]:
    """Returns the keys with which the states of a step are packed; None for rounding to nearest.

    Args:
      storage: perhaps `at_random`.
      step: ``int32[]``, a number that no other call has.
      states: the number of states.
    """
    if storage.key is None:
        return [None] * states
    return list(jax.random.split(key_of_step(storage.key, step), states))


def rounds(storage: Storage) -> bool:
    """Returns whether a storage may change numbers; only `plain` certainly does not."""
    return storage.pack is not _IDENTITY


def unpack(storage: Storage, packed: PyTree, like: PyTree, smallest: int = 0) -> PyTree:
    """Unpacks a state; ``like`` is the state that the inner transformation's ``init`` makes."""

    def on_leaf(path: KeyPath, leaf: Any, rest: Any) -> Any:
        if not _is_packable(leaf, smallest):
            return rest
        return _serving(path, storage).unpack(rest, leaf)

    return jax.tree_util.tree_map_with_path(on_leaf, like, packed, is_leaf=_is_codes)


def _serving(path: KeyPath, storage: Storage) -> Storage:
    """Returns the storage for the array at a path; the chosen storage may choose again."""
    if storage.choose is None:
        return storage
    chosen = storage.choose(path)
    _checks.instance("choose(path)", chosen, Storage, "of `gum_optax.storages`")
    if chosen.key is not None:
        raise ValueError(
            f"`choose(path)` must not return a storage `at_random`, got one for "
            f"{jax.tree_util.keystr(path)}: put `at_random` around `by_path`."
        )
    return _serving(path, chosen)


def _at_random(path: KeyPath, serving: Storage) -> Callable[[jax.Array, jax.Array], Any]:
    if serving.pack_at_random is None:
        raise ValueError(
            f"`storage`: the storage of {jax.tree_util.keystr(path) or 'the array'} has no rounding"
            " at random (its `pack_at_random` is None): leave `at_random` out or choose another."
        )
    return serving.pack_at_random


def _is_packable(leaf: Any, smallest: int) -> bool:
    if _is_codes(leaf):
        return False
    return (
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and math.prod(jnp.shape(leaf)) >= smallest
    )


def _is_codes(node: Any) -> bool:
    return isinstance(node, _codes.Codes)
