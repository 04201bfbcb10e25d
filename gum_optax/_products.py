"""Matrix products that keep precision, and stay within a dtype's range."""

import jax
import jax.numpy as jnp


def exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` at full precision: TPU and GPU defaults round float32 operands to 8 to 11 bits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def largest(x: jax.Array) -> jax.Array:
    """The largest absolute entry of ``x``, to divide by before products; one if all are zero."""
    # Products of entries such as 1e-30 or 1e30 would leave the range of float32. Nor may the
    # inverse of the scale leave it.
    entry = jnp.max(jnp.abs(x))
    return jnp.where(entry > 0, jnp.maximum(entry, 100 * jnp.finfo(x.dtype).tiny), 1)
