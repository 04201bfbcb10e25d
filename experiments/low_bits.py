"""Momentum in few bits between two steps, as a storage of the library: integers and a scale a row.

A row is the last axis. Codes are linear and symmetric, ``x ~ scale * code`` with the scale
``max |x| / limit``, and rounded to nearest; two codes of four bits share a byte.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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


STORAGES: dict[Any, storages.Storage] = {
    32: storages.plain(),
    8: storages.Storage(lambda array: _encode(array, 127), _decode),
    4: storages.Storage(_pair, _unpair),
}


def resting(inner: optax.GradientTransformation, bits: int) -> optax.GradientTransformation:
    """The same transformation, with its state in few bits between two steps."""
    storage = STORAGES[bits]

    def init(params: Any) -> Any:
        return storages.pack(storage, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        like = jax.eval_shape(inner.init, updates)
        updates, new = inner.update(updates, storages.unpack(storage, state, like), params)
        return updates, storages.pack(storage, new)

    return optax.GradientTransformation(init, update)
