"""The plainest codes for momentum, with one scale for each row: a baseline for the library's codes.

A row is the last axis. Codes are linear, symmetric and rounded to nearest::

    scale = max |x| / limit,    code = round(x / scale),    x ~ scale * code

With 8 bits these are the library's codes in blocks as long as any row; with 4 bits, two codes share
a byte.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import storages


class Codes(NamedTuple):
    """An array ``[..., n]`` at rest: `codes` ``uint8[..., (n + 1) // 2]``, `scale` ``[..., 1]``."""

    codes: jax.Array
    scale: jax.Array


_LIMIT = 7  # the largest code of 4 bits


def _pack(array: jax.Array) -> Codes:
    """Returns the 4-bit codes of an array `[..., n]`."""
    largest = jnp.max(jnp.abs(array), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / _LIMIT, jnp.finfo(array.dtype).tiny)
    codes = jnp.round(array / scale).astype(jnp.int8)
    # From -7 ... 7 to 1 ... 15; a row of odd length ends with a code of zero.
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]) + 8
    codes = codes.astype(jnp.uint8)
    return Codes(codes[..., ::2] | codes[..., 1::2] << 4, scale)


def _unpack(packed: Codes, like: jax.Array) -> jax.Array:
    """Returns the array of shape and dtype of `like` that codes stand for."""
    # [..., (n + 1) // 2] bytes -> [..., (n + 1) // 2, 2] codes -> [..., n]
    both = jnp.stack([packed.codes & 15, packed.codes >> 4], axis=-1).astype(jnp.int8) - 8
    codes = both.reshape(*packed.codes.shape[:-1], -1)[..., : like.shape[-1]]
    return (codes.astype(like.dtype) * packed.scale).reshape(like.shape)


# By the values of the options `momentum` and `bases`.
STORAGES: dict[str, storages.Storage] = {
    "float32": storages.plain(),
    "int8": storages.int8(256),
    "int6": storages.int6(128),
    "int4": storages.int4(32),
    "int4_at_random": storages.at_random(storages.int4(32)),
    "rows8": storages.int8(block=None),
    "rows4": storages.Storage(_pack, _unpack),
}
