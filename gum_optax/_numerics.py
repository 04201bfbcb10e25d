"""Dtypes and products of full precision, and divisors that keep squares in range.

Tests: tests/library/test_numerics.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def at_least_float32(*dtypes: Any) -> np.dtype:
    """Returns the dtype for computation with these dtypes: float64 if one of them is, or float32.

    ``jnp.promote_types`` raises under a strict ``jax_numpy_dtype_promotion``.
    """
    wide = any(jnp.dtype(dtype) == np.float64 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def matmul_highest(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``a @ b``, ``[..., m, k] @ [..., k, n]``, at the dtype's full precision.

    By default TPUs and GPUs round float32 operands to 8 to 11 bits.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def safe_scale(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns a divisor that brings ``x`` into range: its largest absolute entry, or 1 for zero.

    Args:
      x: any array that is not empty.
      axis: the axis or axes to take the maximum over, which the result keeps with length 1; by
        default all axes, which gives a scalar.
    """
    # Without a scale, products of entries such as 1e-30 or 1e30 leave the range of float32. The
    # inverse of a denormal scale would leave it as well, hence the lower bound.
    entry = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
    return jnp.where(entry > 0, jnp.maximum(entry, 100 * jnp.finfo(x.dtype).tiny), 1)


def norm(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns the Euclidean norms along axes, which are kept with length 1; squares stay in range.

    Args:
      x: any array that is not empty.
      axis: the axis or axes to sum over.
    """
    scale = safe_scale(x, axis)
    return scale * jnp.sqrt(jnp.sum((x / scale) ** 2, axis=axis, keepdims=True))
