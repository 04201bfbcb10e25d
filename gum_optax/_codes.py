r"""Blockwise codes: arrays in 8, 6 or 4 bits per number, and back.

The last axis is cut into *blocks*. Each block keeps one *scale* N, its entry of largest magnitude,
and for each number the *code* of the nearest *level* in [-1, 1] of a map, see `_maps`:

.. math::
    c = \arg\min_k |\ell_k - x / N|, \qquad \hat x = N \ell_c

Every map has the level 1, which is exact: the scale of a decoded block is the old one, so encoding
a decoded array changes nothing, and where a block decays its scale decays as it would in float32.

A scale takes four bytes per block, in `NORMAL_4` two. Blocks depend on the length of the axis
alone, so that a state has the same arrays on every mesh.

References:
  Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv 2110.02861.

Tests: tests/library/test_codes.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from gum_optax import _mesh
from gum_optax._maps import Map
from gum_optax._numerics import at_least_float32
from gum_optax._rounding import round_at_random


class Codes(NamedTuple):
    """An array ``[..., n]`` at rest.

    Attributes:
      codes: with 8 bits ``int8[..., n]`` or ``uint8[..., n]``; with 6 or 4 bits the codes of each
        block in fewer bytes, ``uint8[..., blocks * bytes]``, see `_folded`.
      scale: ``[..., blocks]``, see `cut`.
    """

    codes: jax.Array
    scale: jax.Array


def cut(n: int, block: int) -> tuple[int, int]:
    """Cuts an axis into blocks of at most ``block`` numbers: returns their count and length.

    As few blocks as possible, or the next power of two if it divides the axis, so that a mesh that
    shards the axis cuts no block. The last block may be shorter.
    """
    count = -(-n // block)
    rounded = 1 << (count - 1).bit_length()
    if n % rounded == 0:
        count = rounded
    return count, -(-n // count)


def encode(map: Map, block: int, array: jax.Array, key: jax.Array | None = None) -> Codes:
    """Returns the codes of a floating-point array ``[..., n]``, ``n >= 1``.

    Numbers have the nearest level, or with a key one of the two levels around them, at random, so
    that the mean of the decoded number is the number:

    ``c = argmin_k |level_k - x / N|``, or ``E[N level_c] = x``

    A block with a non-finite number decodes to NaN as a whole, and so does a block with a negative
    number under a map without negative levels. Blocks below the range of normal numbers become
    zero, and numbers above a quarter of the largest normal number are clipped to it.
    """
    described = _describe(map, block, array)
    packed = _mesh.in_auto_mode(
        lambda *given: _encode(map, block, *given), array, key, like=lambda: described
    )
    if isinstance(array, jax.core.Tracer) or _mesh.sharding_of(array) is None:
        return packed
    # Outside of `jit`, padding and reshaping may have moved the codes to one device.
    return jax.device_put(packed, jax.tree.map(lambda leaf: leaf.sharding, described))


def decode(map: Map, block: int, packed: Codes, like: jax.Array) -> jax.Array:
    """Returns the array, with the shape of ``like``, in its dtype or float32 if that is wider."""
    dtype = at_least_float32(like.dtype)
    return _mesh.in_auto_mode(
        lambda packed: _decode(map, block, packed, like.shape[-1], dtype),
        packed,
        like=lambda: like if _mesh.sharding_of(like) else packed.codes,
    )


# `jit` for two reasons. Within another traced function, this one is traced once per shape and not
# once per leaf; `inline` then puts its operations into the caller's program without a call. Outside
# of `jit`, it is one program instead of one for each operation.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _encode(map: Map, block: int, array: jax.Array, key: jax.Array | None) -> Codes:
    dtype, n = at_least_float32(array.dtype), array.shape[-1]
    blocks = _to_blocks(array.astype(dtype), block)  # [..., count, length]
    # A key for the codes, and one for scales in fewer bits than the computation.
    of_codes, of_scales = (None, None) if key is None else jax.random.split(key)

    # 1. The scale N, rounded to its own dtype before anything is divided by it.
    kept = map.scale_dtype or dtype
    limits = jnp.finfo(kept)
    extreme = map.extreme(blocks)  # [..., count, 1]
    # Clipped, since the inverse of a larger scale is no normal number, and XLA divides by inverses.
    largest = float(limits.max) / 4
    scale = jnp.clip(extreme, -largest, largest)
    scale = scale.astype(kept) if of_scales is None else _rounded(of_scales, scale, kept)
    scale = jnp.where(jnp.abs(extreme) < float(limits.tiny), 0, scale)
    scale = jnp.where(jnp.isfinite(extreme), scale, jnp.nan)

    # 2. The level c nearest to u = x / N, or one of two at random.
    divisor = jnp.where(scale == 0, 1, scale).astype(dtype)
    share = None if of_codes is None else _to_blocks(_shares(of_codes, array.shape), block)
    codes = map.to_codes(blocks / divisor, share)  # [..., count, length]

    # 3. Codes of 6 or 4 bits share bytes, within each block; a code of 8 bits is a byte.
    folds = map.bits < 8
    codes = _folded(map.bits, codes) if folds else codes
    codes = codes.reshape(*array.shape[:-1], -1)
    codes = codes if folds else codes[..., :n]
    scale = scale.squeeze(-1)
    # Where the last block is shorter, no device has the scales of its own numbers: see `_describe`.
    whole = blocks.shape[-2] * blocks.shape[-1] == n
    return Codes(codes, scale if whole else _mesh.gather(scale, axis=-1))


def _shares(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns random numbers in (0, 1), in float32; multiples of ``2**-16``, less half of it."""
    # Neither 0 nor 1: a number that is a level, up to a rounding error, keeps it.
    return (jax.random.bits(key, shape, jnp.uint16).astype(jnp.float32) + 0.5) * 2.0**-16


def _rounded(key: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Rounds scales at random to their own dtype, if that is bfloat16."""
    if dtype != jnp.bfloat16:
        return scale.astype(dtype)
    return round_at_random(key, scale.astype(jnp.float32))


@partial(jax.jit, static_argnums=(0, 1, 3, 4), inline=True)
def _decode(map: Map, block: int, packed: Codes, n: int, dtype: Any) -> jax.Array:
    codes, scale = packed
    lead = codes.shape[:-1]
    # 1. The codes of each block, [..., count, length].
    if map.bits < 8:
        count, length = cut(n, block)
        codes = _unfolded(map.bits, codes.reshape(*lead, count, -1))[..., :length]
    else:
        codes = _to_blocks(codes, block)
    # 2. x = N level_c
    blocks = scale[..., None].astype(dtype) * map.to_levels(codes, dtype)
    return blocks.reshape(*lead, -1)[..., :n]


# How many codes share bytes, by their bits: two take one byte, or four take three.
_SHARING = {4: 2, 6: 4}


def _folded_bytes(bits: int, length: int) -> int:
    """Returns the bytes of a folded block of ``length`` codes."""
    together = _SHARING[bits]
    return -(-length // together) * together * bits // 8


def _folded(bits: int, codes: jax.Array) -> jax.Array:
    """``[..., length] -> [..., _folded_bytes]``: the codes of each block share bytes.

    Codes that share a byte lie half or a quarter of the block apart, so that every operation is on
    runs of numbers: a CPU would take neighbours that share bytes apart one by one, and a TPU keeps
    arrays with an axis of two or four in several times their size.
    """
    together = _SHARING[bits]
    codes = jnp.pad(codes, _at_the_end(codes.ndim, -codes.shape[-1] % together))
    parts = jnp.split(codes, together, axis=-1)
    if bits == 4:
        low, high = parts
        return low | high << 4
    # Two bits of the last quarter become the high bits of each of the other three.
    first, second, third, last = parts
    whole = [first | last << 6, second | (last >> 2) << 6, third | (last >> 4) << 6]
    return jnp.concatenate(whole, axis=-1)


def _unfolded(bits: int, packed: jax.Array) -> jax.Array:
    """The inverse of `_folded`, but for its padding."""
    if bits == 4:
        return jnp.concatenate([packed & 15, packed >> 4], axis=-1)
    first, second, third = jnp.split(packed, 3, axis=-1)
    last = first >> 6 | (second >> 6) << 2 | (third >> 6) << 4
    return jnp.concatenate([first & 63, second & 63, third & 63, last], axis=-1)


def _to_blocks(array: jax.Array, block: int) -> jax.Array:
    """``[..., n] -> [..., count, length]``, the last block filled up with zeros."""
    n = array.shape[-1]
    count, length = cut(n, block)
    padded = jnp.pad(array, _at_the_end(array.ndim, count * length - n))
    return padded.reshape(*array.shape[:-1], count, length)


def _at_the_end(ndim: int, amount: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (ndim - 1) + [(0, amount)]


def _describe(map: Map, block: int, array: jax.Array) -> Codes:
    """Describes codes: shapes, dtypes, and the array's sharding as far as the shapes allow."""
    *lead, n = array.shape
    sharding = _mesh.sharding_of(array)
    *entries, last = _mesh.spec_entries(sharding, array.ndim)

    def like(length: int, dtype: Any, whole: bool) -> Any:
        # Sharded as the array, if each device then has the codes and scales of its own numbers.
        parts = _mesh.parts(sharding, last)
        entry = last if whole and length % parts == 0 else None
        return jax.ShapeDtypeStruct(
            (*lead, length), dtype, sharding=_mesh.sharding_like(sharding, [*entries, entry])
        )

    codes = jax.eval_shape(map.to_codes, jax.ShapeDtypeStruct((), jnp.float32), None).dtype
    dtype = map.scale_dtype or at_least_float32(array.dtype)
    count, length = cut(n, block)
    whole = count * length == n
    # 1. The bytes of the codes, and whether each device's numbers have bytes of their own.
    of_codes, cuts = n, True
    if map.bits < 8:
        of_codes = count * _folded_bytes(map.bits, length)
        # A folded block cannot be decoded in parts.
        cuts = whole and count % _mesh.parts(sharding, last) == 0
    # 2. The scales.
    return Codes(like(of_codes, codes, cuts), like(count, dtype, whole))
