"""The plainest codes for momentum, which the library's are compared with: a scale for each row.

A row is the last axis. Codes are linear and symmetric, ``x ~ scale * code`` with the scale
``max |x| / limit``, and rounded to nearest; two codes of four bits share a byte.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import storages


class Codes(NamedTuple):
    """An array ``[..., n]`` at rest: `codes` ``int8[..., n]``, or ``uint8[..., (n + 1) // 2]``."""

    codes: jax.Array
    scale: jax.Array


def _encode(array: jax.Array, limit: int) -> Codes:
    largest = jnp.max(jnp.abs(array), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / limit, jnp.finfo(array.dtype).tiny)
    return Codes(jnp.round(array / scale).astype(jnp.int8), scale)


def _decode(packed: Codes, like: jax.Array) -> jax.Array:
    return (packed.codes.astype(like.dtype) * packed.scale).reshape(like.shape)


def _pair(array: jax.Array) -> Codes:
    codes, scale = _encode(array, 7)
    # From -7 ... 7 to 1 ... 15; a row of odd length ends with a code of zero.
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]) + 8
    codes = codes.astype(jnp.uint8)
    return Codes(codes[..., ::2] | codes[..., 1::2] << 4, scale)


def _unpair(packed: Codes, like: jax.Array) -> jax.Array:
    both = jnp.stack([packed.codes & 15, packed.codes >> 4], axis=-1).astype(jnp.int8) - 8
    flat = both.reshape(*packed.codes.shape[:-1], -1)[..., : like.shape[-1]]
    return _decode(Codes(flat, packed.scale), like)


# By the name that `--momentum` has for it.
STORAGES: dict[str, storages.Storage] = {
    "float32": storages.plain(),
    "int8": storages.int8(),
    "int4": storages.int4(),
    "rows8": storages.Storage(lambda array: _encode(array, 127), _decode),
    "rows4": storages.Storage(_pair, _unpair),
}
