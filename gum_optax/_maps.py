"""Maps of codes: the levels in [-1, 1] that `_codes` has for the numbers of a block.

=============  ====  ======================================  ============  ==================
map            bits  levels                                  scale         relative l2 error
=============  ====  ======================================  ============  ==================
`LINEAR_8`     8     ``c / 127``, c from -127 to 127         ``max |x|``   .007 (blocks of 256)
`LINEAR_6`     6     ``c / 31``, c from -31 to 31            ``max |x|``   .027 (blocks of 128)
`NORMAL_4`     4     16, made for Gaussian numbers           signed        .080 (blocks of 32)
`FLOAT_8`      8     ``+- 2 ** e (1 + f / 8)``, and zero     ``max |x|``   .026
`OCTAVES_8`    8     ``2 ** e (1 + f / 8)``, no zero         ``max x``     .024
`OCTAVES_6`    6     ``2 ** e (1 + f / 4)``, no zero         ``max x``     .047
`OCTAVES_4`    4     ``2 ** (c - 15)``, no zero              ``max x``     .15
=============  ====  ======================================  ============  ==================

The level 1 is the block's entry of largest magnitude, its extreme, and is exact.

References:
  Dettmers et al., 8-bit optimizers, arXiv 2110.02861; Li et al., 4-bit optimizers, arXiv
  2309.01507 (maps without zero); Gupta et al., 8-bit Muon, arXiv 2509.23106 (linear maps);
  Blumenberg et al., BOF4, arXiv 2505.06653 (signed scales).

Tests: tests/library/test_codes.py.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Map(NamedTuple):
    """Levels in [-1, 1], and how a block is scaled to them.

    Attributes:
      bits: 8, 6 or 4.
      scale_dtype: the dtype of scales; None: the dtype of the computation, float32 or float64.
      extreme: ``blocks [..., length] -> [..., 1]``, the entry that is scaled to 1.
      to_codes: ``(u, share) -> codes``, of numbers in [-1, 1]; numbers outside have the nearest
        code. The share, in (0, 1), divides each interval between two levels: u is rounded to one
        or the other on its two sides. None is a half, which rounds to nearest; with shares that
        are uniform on (0, 1) u is rounded at random, and the mean of its level is u.
      to_levels: ``(codes, dtype) -> levels``.
    """

    bits: int
    scale_dtype: Any
    extreme: Callable[[jax.Array], jax.Array]
    to_codes: Callable[[jax.Array, jax.Array | None], jax.Array]
    to_levels: Callable[[jax.Array, Any], jax.Array]


def _largest(blocks: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)


def _signed_extreme(blocks: jax.Array) -> jax.Array:
    """The entry of largest magnitude with its sign; the positive one of two that are equal."""
    highest = jnp.max(blocks, axis=-1, keepdims=True)
    lowest = jnp.min(blocks, axis=-1, keepdims=True)
    # Written so that a NaN, which compares false, is kept.
    return jnp.where(-lowest > highest, lowest, highest)


def _largest_of_non_negative(blocks: jax.Array) -> jax.Array:
    lowest = jnp.min(blocks, axis=-1, keepdims=True)
    return jnp.where(lowest < 0, jnp.nan, jnp.max(blocks, axis=-1, keepdims=True))


def _linear(top: int) -> tuple[Any, Any]:
    """Returns both functions of the map ``c / top``, with codes in int8."""

    def to_codes(u: jax.Array, share: jax.Array | None = None) -> jax.Array:
        # No addition of zero where the share is a half: a TPU's compiler would pay for it.
        shifted = top * u if share is None else top * u + (share - 0.5)
        return jnp.clip(jnp.round(shifted), -top, top).astype(jnp.int8)

    def to_levels(codes: jax.Array, dtype: Any) -> jax.Array:
        linear = codes.astype(dtype) / top
        # XLA multiplies by 1 / top, and by the scale before that: the extreme would not be exact.
        return jnp.where(jnp.abs(codes) == top, jnp.sign(linear), linear)

    return to_codes, to_levels


def _unsigned(zero: int, to_codes: Any, to_levels: Any) -> tuple[Any, Any]:
    """Returns both functions of a map with codes in uint8, of which ``zero`` stands for 0."""
    return (
        lambda u, share=None: (to_codes(u, share) + zero).astype(jnp.uint8),
        lambda codes, dtype: to_levels(codes.astype(jnp.int8) - zero, dtype),
    )


def _table(levels: tuple[float, ...]) -> tuple[Any, Any]:
    """Returns both functions of a map with these rising levels.

    They compare with constants and read no table from memory.
    """

    def to_codes(u: jax.Array, share: jax.Array | None = None) -> jax.Array:
        # The number of borders that u exceeds, one between any two levels: their midpoint if the
        # share is a half.
        codes = jnp.zeros(u.shape, jnp.uint8)
        for low, high in itertools.pairwise(levels):
            border = (low + high) / 2 if share is None else low + (high - low) * share
            codes += (u > border).astype(jnp.uint8)
        return codes

    def to_levels(codes: jax.Array, dtype: Any) -> jax.Array:
        result = jnp.full(codes.shape, levels[0], dtype)
        for code, level in enumerate(levels[1:], start=1):
            result = jnp.where(codes >= code, jnp.asarray(level, dtype), result)
        return result

    return to_codes, to_levels


def _octaves(bits: int, fraction: int) -> tuple[Any, Any]:
    """Returns both functions of the map ``2 ** e (1 + f / 2 ** fraction)`` up to 1, without zero.

    Codes count the leading bits of float32, so neither function needs a logarithm, which takes a
    CPU longer than the rest of a step of Adam.
    """
    top = 2**bits - 1
    dropped = 23 - fraction  # of float32's 23 bits of fraction
    # The leading bits of 1.0, whose exponent is stored as 127, less its code.
    offset = (127 << fraction) - top

    def to_codes(u: jax.Array, share: jax.Array | None = None) -> jax.Array:
        word = jax.lax.bitcast_convert_type(u.astype(jnp.float32), jnp.int32)
        # With a share of the last bit that is kept, cutting the others off rounds as the share
        # tells: to nearest with half of it. Levels of one octave are evenly spaced.
        added = 1 << (dropped - 1) if share is None else (share * 2**dropped).astype(jnp.int32)
        codes = (word + added >> dropped) - offset
        return jnp.clip(codes, 0, top).astype(jnp.uint8)

    def to_levels(codes: jax.Array, dtype: Any) -> jax.Array:
        word = codes.astype(jnp.int32) + offset << dropped
        return jax.lax.bitcast_convert_type(word, jnp.float32).astype(dtype)

    return to_codes, to_levels


def _signed(to_codes: Any, to_levels: Any) -> tuple[Any, Any]:
    """Returns both functions of a map of 7 bits with a sign in the eighth; its level 0 is zero."""

    def signed_codes(u: jax.Array, share: jax.Array | None = None) -> jax.Array:
        # The least level above zero has code 1. Below it, the other neighbour is zero.
        least = to_levels(jnp.ones((), jnp.int32), u.dtype)
        border = least * (0.5 if share is None else share)
        size = jnp.abs(u)
        magnitude = jnp.where(size < least, size > border, to_codes(size, share))
        negative = (u < 0) & (magnitude > 0)
        return jnp.where(negative, magnitude | 128, magnitude).astype(jnp.uint8)

    def signed_levels(codes: jax.Array, dtype: Any) -> jax.Array:
        magnitude = codes & 127
        level = jnp.where(magnitude == 0, 0, to_levels(magnitude, dtype))
        return jnp.where(codes > 127, -level, level)

    return signed_codes, signed_levels


LINEAR_8 = Map(8, None, _largest, *_linear(127))
LINEAR_6 = Map(6, None, _largest, *_unsigned(32, *_linear(31)))
# Least squares (Lloyd) on Gaussian blocks of 32 over their signed extremes, with 0 and 1 fixed.
_NORMAL = (
    *(-0.8785, -0.6995, -0.5531, -0.4265, -0.3114, -0.2038, -0.1010, 0.0),
    *(0.0967, 0.1944, 0.2949, 0.4013, 0.5171, 0.6474, 0.8011, 1.0),
)
NORMAL_4 = Map(4, jnp.bfloat16, _signed_extreme, *_table(_NORMAL))
# For second moments: the next step divides by their roots, so relative errors count and zero is no
# level. Scales in bfloat16 would never fall at a decay of .999, which rounds back to the old value.
OCTAVES_8 = Map(8, None, _largest_of_non_negative, *_octaves(8, 3))
# For Adam's first moment: where the second moment is small too, small numbers count in quotients.
FLOAT_8 = Map(8, None, _largest, *_signed(*_octaves(7, 3)))
OCTAVES_6 = Map(6, None, _largest_of_non_negative, *_octaves(6, 2))
OCTAVES_4 = Map(4, None, _largest_of_non_negative, *_octaves(4, 0))
