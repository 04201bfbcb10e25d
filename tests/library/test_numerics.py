"""Precision of products, and divisors that keep squares in range."""

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax._numerics import matmul_highest, safe_scale


def test_products_ask_for_the_highest_precision():
    jaxpr = jax.make_jaxpr(matmul_highest)(jnp.ones((2, 3)), jnp.ones((3, 2)))
    precisions = [equation.params.get("precision") for equation in jaxpr.jaxpr.eqns]
    assert (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST) in precisions


def test_the_safe_scale_is_the_largest_entry():
    x = np.array([[0.0, 3.0, 1e-40], [0.0, -4.0, 0.0]], np.float32)
    scale = jax.jit(safe_scale, static_argnames="axis")
    assert scale(x) == 4.0
    assert scale(0 * x) == 1.0
    # Entries whose inverse is no normal number, or whose square is none, are no divisors.
    tiny = np.finfo(np.float32).tiny
    assert scale(2 * tiny * np.ones(3, np.float32)) == np.float32(100 * tiny)
    # Neither a zero nor a denormal column has an inverse in float32.
    columns = np.asarray(scale(x, axis=-2))
    assert columns.shape == (1, 3)
    np.testing.assert_array_equal(columns[0, :2], [1.0, 4.0])
    assert np.isfinite(1 / columns).all()
