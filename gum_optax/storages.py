"""Storages: the form of an optimizer state between two steps.

A storage packs every floating-point array of a state at the end of a step and unpacks it at the
start of the next. Integers and keys are not packed. `LowRank` takes a storage for the state of its
inner transformation and one for its bases, `quantized` takes one for the state of any
transformation.

Example:
  Momentum in bfloat16, or in 8 bits, whatever the dtype of the parameters; `int6` and `int4` take
  less:

  >>> import jax.numpy as jnp
  >>> import gum_optax
  >>> from gum_optax import storages
  >>> half = gum_optax.gum(0.02, gum_optax.LowRank(storage=storages.cast(jnp.bfloat16)))
  >>> quarter = gum_optax.gum(0.02, gum_optax.LowRank(storage=storages.int8()))

Tests: tests/library/test_storages.py, tests/library/test_codes.py.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gum_optax import _checks, _codes, _maps, _scheduling
from gum_optax._numerics import at_least_float32
from gum_optax._paths import PyTree

KeyPath: TypeAlias = tuple[Any, ...]
"""The path of an array in a state, as of ``jax.tree_util.tree_flatten_with_path``."""


class Storage(NamedTuple):
    """A pair of functions of one floating-point array, or a choice of such pairs.

    Attributes:
      pack: ``array -> packed``, an array or a tree of arrays; traced in steps, and called on the
        arrays of ``init``.
      unpack: ``(packed, like) -> array``; ``like`` has the shape and dtype of the array from the
        inner transformation's ``init``.
      choose: ``path -> Storage``, which selects the storage of the array at a `KeyPath`. None: this
        storage is used for all arrays.
    """

    pack: Callable[[jax.Array], Any]
    unpack: Callable[[Any, jax.Array], jax.Array]
    choose: Callable[[KeyPath], Any] | None = None


def plain() -> Storage:
    """Keeps the state unchanged, in the dtypes of the parameters.

    Returns:
      The `Storage` that packs nothing.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(storage=gum_optax.storages.plain()))
    """
    return Storage(_identity, lambda packed, like: packed)


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
    # Unpacked to float32 at least: otherwise beta * R would be rounded to the narrow dtype.
    return Storage(
        lambda array: array.astype(rest),
        lambda packed, like: packed.astype(at_least_float32(like.dtype)),
    )


def field(*names: str) -> Callable[[KeyPath], bool]:
    """Makes a test of whether a path leads through a field with one of these names.

    Keys of dicts do not count, so parameters may have any names.

    Args:
      *names: names of fields of the state's NamedTuples, such as ``"nu"``.

    Returns:
      The function ``path -> bool``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gum_optax import storages
      >>> state = optax.scale_by_adam().init({"w": jnp.ones(3)})
      >>> is_nu = storages.field("nu")
      >>> [is_nu(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
      [False, False, True]
    """

    def leads_through(path: KeyPath) -> bool:
        return any(isinstance(e, jax.tree_util.GetAttrKey) and e.name in names for e in path)

    return leads_through


# Fields of optax's states. `v` is left out: in Adafactor it is a second moment, of arrays that are
# not factored, but in Adan it is a moment of differences of gradients.
_SECOND_MOMENT = field(
    *("nu", "nu_max", "sum_of_squares", "exp_avg_sq", "e_g", "e_x", "n", "v_row", "v_col")
)


def int8(
    block: int | None = 256, non_negative: Callable[[KeyPath], bool] = _SECOND_MOMENT
) -> Storage:
    """Keeps the state in 8 bits per number, plus four bytes per block of the last axis.

    Codes are linear and symmetric: the error of a number is at most 1/254 of the largest magnitude
    N in its block (for Gaussian numbers, .007 in the relative l2 norm). Arrays that are never
    negative, such as Adam's second moment, have eight levels per octave. Their relative errors are
    at most 5.9 %, and no level is zero, since the next step divides by the roots; numbers below
    ``2**-32 N`` are rounded up.

    The inner transformation computes in float32 (float64 for float64 parameters). Rounding is to
    nearest, and a state that is decoded and encoded again does not change. A block with a
    non-finite number becomes NaN. Scalars and empty arrays are not packed.

    Args:
      block: the largest length of a block, an int >= 1, or None for rows: one block for each row
        of the last axis. A TPU decodes rows without rearranging them, and full-rank momentum in
        rows trained as well as in float32. Blocks of an axis have equal lengths, except for a
        shorter last one if the length of the axis is not divisible. Their number is a power of two
        if that divides the axis. A mesh that shards the axis should cut it between blocks;
        otherwise steps communicate, and need ``out_shardings`` to keep the sharding of the state,
        see `state_shardings`.
      non_negative: ``path -> bool``, true for arrays that are never negative (a negative number
        makes its block NaN); by default second moments, by the names of their fields in optax:
        ``nu`` of Adam, ``sum_of_squares`` of AdaGrad and so on. Sophia's ``nu`` may be negative:
        pass ``lambda path: False`` for it, and ``field("v_row", "v_col", "v")`` for Adafactor.

    Returns:
      The `Storage`; packed arrays are NamedTuples of ``codes`` and ``scale``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import storages
      >>> packed = storages.int8().pack(jnp.ones((64, 512)))
      >>> packed.codes.shape, packed.codes.dtype, packed.scale.shape
      ((64, 512), dtype('int8'), (64, 2))

    References:
      Gupta et al., 8-bit Muon, arXiv 2509.23106; Dettmers et al., arXiv 2110.02861.
    """
    return _coded(_maps.LINEAR_8, _maps.OCTAVES_8, block, non_negative)


def float8(
    block: int | None = None, non_negative: Callable[[KeyPath], bool] = _SECOND_MOMENT
) -> Storage:
    """Keeps the state in 8 bits per number with a relative precision, and a scale per row.

    Codes have a sign, four bits of an exponent and three of a fraction: eight levels per octave
    over sixteen octaves below the largest magnitude N in the block. Relative errors are at most
    5.9 % (.026 in the relative l2 norm of Gaussian numbers) above ``2**-15 N``, and numbers below
    ``2**-17 N`` become zero. Arrays that are never negative have the codes of `int8`.

    It is the storage for Adam, which divides by the root of a second moment: in a head, whose row
    holds all words, moments of rare words are smaller by orders of magnitude, and `int8` drops
    them. `int8` is closer where a moment is not divided, as in Muon.

    Everything else is as in `int8`.

    Args:
      block: as for `int8`.
      non_negative: as for `int8`.

    Returns:
      The `Storage`; packed arrays are NamedTuples of ``codes`` and ``scale``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import storages
      >>> packed = storages.float8().pack(jnp.ones((64, 512)))
      >>> packed.codes.shape, packed.codes.dtype, packed.scale.shape
      ((64, 512), dtype('uint8'), (64, 1))

    References:
      Dettmers et al., arXiv 2110.02861, for codes of relative precision; Micikevicius et al., FP8
      formats, arXiv 2209.05433.
    """
    return _coded(_maps.FLOAT_8, _maps.OCTAVES_8, block, non_negative)


def int6(
    block: int | None = 128, non_negative: Callable[[KeyPath], bool] = _SECOND_MOMENT
) -> Storage:
    """Keeps the state in 6 bits per number, four numbers in three bytes, and a scale per block.

    Codes are linear and symmetric: the error of a number is at most 1/62 of the largest magnitude N
    in its block (for Gaussian numbers, .027 in the relative l2 norm). Arrays that are never
    negative have four levels per octave: their relative errors are at most 11 %, and numbers below
    ``2**-16 N`` are rounded up. For Adam's second moment `int8` is closer.

    Everything else is as in `int8`, but for one thing: a mesh that shards the axis has to cut it
    between blocks, or the codes are gathered.

    Args:
      block: as for `int8`; a block of n numbers takes ``3 ceil(n / 4)`` bytes and its scale four.
      non_negative: as for `int8`.

    Returns:
      The `Storage`; packed arrays are NamedTuples of ``codes`` and ``scale``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import storages
      >>> packed = storages.int6().pack(jnp.ones((64, 512)))
      >>> packed.codes.shape, packed.codes.dtype, packed.scale.shape
      ((64, 384), dtype('uint8'), (64, 4))
    """
    return _coded(_maps.LINEAR_6, _maps.OCTAVES_6, block, non_negative)


def int4(
    block: int | None = 32, non_negative: Callable[[KeyPath], bool] = _SECOND_MOMENT
) -> Storage:
    """Keeps the state in 4 bits per number, two numbers in a byte, and a scale per block.

    The 16 levels suit Gaussian numbers: the relative l2 error is .08 in blocks of 32, and the error
    of a number is at most .13 of the largest magnitude in its block. Scales are signed and take two
    bytes. Arrays that are never negative have 16 levels, the largest number in the block times
    ``1, 1/2, 1/4, ...``, and scales of four bytes. For Adam's second moment use `int8`: it changes
    in many steps much smaller than an octave.

    Everything else is as in `int6`.

    Args:
      block: as for `int8`.
      non_negative: as for `int8`.

    Returns:
      The `Storage`; packed arrays are NamedTuples of ``codes`` and ``scale``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      Adam's first moment in 4 bits and its second in 8:

      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import storages
      >>> is_nu = storages.field("nu")
      >>> storage = storages.by_path(
      ...     lambda path: storages.int8() if is_nu(path) else storages.int4())
      >>> tx = gum_optax.quantized(optax.adamw(1e-3), storage)

    References:
      Li et al., arXiv 2309.01507; Blumenberg et al., arXiv 2505.06653.
    """
    return _coded(_maps.NORMAL_4, _maps.OCTAVES_4, block, non_negative)


def by_path(choose: Callable[[KeyPath], Storage]) -> Storage:
    """Chooses a storage for each array by its place in the state.

    Args:
      choose: ``path -> Storage``, a function of a `KeyPath`; see `field`.

    Returns:
      The `Storage`. A single array, without a state around it, has the path ``()``.

    Raises:
      TypeError: if ``choose`` is no function, or does not return a storage.

    Example:
      >>> from gum_optax import storages
      >>> is_momentum = storages.field("trace", "mu")
      >>> storage = storages.by_path(
      ...     lambda path: storages.int8() if is_momentum(path) else storages.plain())
    """
    _checks.function("choose", choose, "path -> Storage")
    storage = plain()._replace(choose=choose)
    return storage._replace(
        pack=lambda array: _serving((), storage).pack(array),
        unpack=lambda packed, like: _serving((), storage).unpack(packed, like),
    )


def _coded(
    signed: _maps.Map,
    unsigned: _maps.Map,
    block: int | None,
    non_negative: Callable[[KeyPath], bool],
) -> Storage:
    """Makes a storage of blockwise codes, with one map for signed arrays and one for others."""
    length = sys.maxsize if block is None else _checks.positive_int("block", block)
    _checks.function("non_negative", non_negative, "path -> bool")

    # Scalars and empty arrays have no blocks and are not packed.
    def pack(levels: _maps.Map, array: jax.Array) -> Any:
        return _codes.encode(levels, length, array) if _has_blocks(array) else array

    def unpack(levels: _maps.Map, packed: Any, like: jax.Array) -> jax.Array:
        return _codes.decode(levels, length, packed, like) if _has_blocks(like) else packed

    one, other = (Storage(partial(pack, m), partial(unpack, m)) for m in (signed, unsigned))
    return one._replace(choose=lambda path: other if non_negative(path) else one)


def _has_blocks(array: jax.Array) -> bool:
    return len(jnp.shape(array)) > 0 and _size(array) > 0


# States --------------------------------------------------------------------------------------


def pack(storage: Storage, state: PyTree, smallest: int = 0, *, fresh: bool = False) -> PyTree:
    """Packs every floating-point array of a state that has ``smallest`` numbers or more.

    Packed arrays are not packed again, as in the state of a `LowRank` with its own storage.

    Args:
      storage: how arrays are packed.
      state: any tree.
      smallest: arrays with fewer numbers are not packed.
      fresh: whether the state comes from ``init``, so that its arrays are constants.
    """
    # The array that was packed last, after which the next one is scheduled.
    last: jax.Array | None = None

    def on_leaf(path: KeyPath, leaf: Any) -> Any:
        nonlocal last
        if not _is_packable(leaf, smallest):
            return leaf
        serving = _serving(path, storage)
        if serving.pack is _identity:
            return leaf
        if fresh:
            leaf = _scheduling.as_data(leaf)
        # Arrays are packed one after the other, so that one of them is unpacked at a time, see
        # `_scheduling`.
        packed = serving.pack(_scheduling.scheduled_after(leaf, last))
        last = next((p for p in jax.tree.leaves(packed) if _is_packable(p, 1)), last)
        return packed

    return jax.tree_util.tree_map_with_path(on_leaf, state, is_leaf=_is_codes)


def rounds(storage: Storage) -> bool:
    """Returns whether a storage may change numbers; only `plain` certainly does not."""
    return storage.pack is not _identity


def _identity(array: jax.Array) -> jax.Array:
    return array


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
    return _serving(path, chosen)


def _is_packable(leaf: Any, smallest: int) -> bool:
    if _is_codes(leaf):
        return False
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and _size(leaf) >= smallest


def _size(leaf: Any) -> int:
    return math.prod(jnp.shape(leaf))


def _is_codes(node: Any) -> bool:
    return isinstance(node, _codes.Codes)
