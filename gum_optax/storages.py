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

from gum_optax import _checks, _codes, _maps, _mesh
from gum_optax._numerics import at_least_float32
from gum_optax._rounding import round_at_random

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
      pack_at_random: ``(array, key) -> packed``, which rounds at random, so that the array is the
        mean of what `unpack` returns. None: the storage has no such rounding.
      key: the key for rounding at random, see `at_random`. None: arrays are packed by ``pack``.
    """

    pack: Callable[[jax.Array], Any]
    unpack: Callable[[Any, jax.Array], jax.Array]
    choose: Callable[[KeyPath], Any] | None = None
    pack_at_random: Callable[[jax.Array, jax.Array], Any] | None = None
    key: int | jax.Array | None = None


def plain() -> Storage:
    """Keeps the state unchanged, in the dtypes of the parameters.

    Returns:
      The `Storage` that packs nothing.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(storage=gum_optax.storages.plain()))
    """
    return Storage(_identity, lambda packed, like: packed)


def _identity(array: jax.Array) -> jax.Array:
    return array


def cast(dtype: Any) -> Storage:
    """Keeps the state in another floating-point dtype, rounded to nearest.

    The inner transformation computes in float32 (float64 for float64 parameters). Of all dtypes,
    only bfloat16 can be rounded `at_random`.

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
        pack_at_random=_to_bfloat16 if rest == jnp.bfloat16 else None,
    )


def _to_bfloat16(array: jax.Array, key: jax.Array) -> jax.Array:
    wide = array.astype(jnp.float32)
    return _mesh.in_auto_mode(round_at_random, key, wide, like=lambda: array)


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
    nearest unless told otherwise (`at_random`), and a state that is decoded and encoded again does
    not change. A block with a non-finite number becomes NaN. Scalars and empty arrays are not
    packed.

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

    # Of a single array; `_packing` asks for the storage of each array of a state.
    def chosen() -> Storage:
        storage = choose(())
        _checks.instance("choose(path)", storage, Storage, "of `gum_optax.storages`")
        return storage

    return Storage(
        lambda array: chosen().pack(array),
        lambda packed, like: chosen().unpack(packed, like),
        choose,
    )


def at_random(storage: Storage, key: int | jax.Array = 0) -> Storage:
    r"""Rounds at random: each number to one of its two neighbours, so that no change is lost.

    A number x between the levels a < b becomes b with the probability that makes its mean exact:

    .. math::
        P(\hat x = b) = \frac{x - a}{b - a}, \qquad \operatorname{E} \hat x = x

    Rounding to nearest keeps a running mean where it is as long as a step changes it by less than
    half of the distance to the next level. A second moment with b2 = 0.99 changes by a hundredth in
    a step, and levels of 8 bits are 6 to 12 % apart: rounded to nearest it settles 1.4 times too
    high (of Gaussian gradients), and rounded at random it is right. Where a state forgets faster,
    rounding to nearest has the smaller errors.

    Numbers beyond the levels of their block are rounded to nearest: those below the lowest of
    `int4`, -0.88 of the extreme, and second moments below the least level. So is a state when it
    is made. In `layer_by_layer` all layers have the same random bits.

    Args:
      storage: the storage that rounds. Around `by_path`, all chosen ones round at random.
      key: a seed or a threefry key (typed, or raw ``uint32[2]``). With the number of the step and
        of the array it determines the random bits, which do not depend on the mesh.

    Returns:
      The `Storage`, for `LowRank` (not for its bases), `quantized` and what is built on them. The
      state of `quantized` is then a `RoundingState`, of four bytes more.

    Raises:
      TypeError, ValueError: if an argument is malformed; when a state is packed, if the storage of
        an array has no rounding at random, as casts to other dtypes than bfloat16 have not.

    Example:
      AdamW in 8 bits, with a second moment of long memory:

      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import storages
      >>> tx = gum_optax.quantized(
      ...     optax.adamw(1e-3, b2=0.999), storages.at_random(storages.float8()))

    References:
      Gupta et al., Deep learning with limited numerical precision, arXiv 1502.02551.
    """
    _checks.instance("storage", storage, Storage, "of `gum_optax.storages`")
    _checks.key("key", key)
    return storage._replace(key=key)


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
    def pack(levels: _maps.Map, array: jax.Array, key: jax.Array | None = None) -> Any:
        return _codes.encode(levels, length, array, key) if _has_blocks(array) else array

    def unpack(levels: _maps.Map, packed: Any, like: jax.Array) -> jax.Array:
        return _codes.decode(levels, length, packed, like) if _has_blocks(like) else packed

    one, other = (
        Storage(partial(pack, m), partial(unpack, m), pack_at_random=partial(pack, m))
        for m in (signed, unsigned)
    )
    return one._replace(choose=lambda path: other if non_negative(path) else one)


def _has_blocks(array: jax.Array) -> bool:
    return len(jnp.shape(array)) > 0 and math.prod(jnp.shape(array)) > 0
