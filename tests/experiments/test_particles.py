"""Laws of gradients that a Gaussian process smooths."""

import jax
import numpy as np

from experiments.examples.particles import smoothed


def _swarm():
    noise = np.random.default_rng(0)
    # On the device: the function is typed for JAX's arrays.
    return jax.device_put((noise.normal(size=(4, 2)), noise.normal(size=(4, 2))))


def test_the_laws_of_smoothing():
    X, g = _swarm()
    x = X[0]
    # One particle at x without noise: gradient descent.
    np.testing.assert_allclose(smoothed(x, X[:1], g[:1], 1.0, 0.0), g[0], rtol=1e-6)
    # A long length with noise: the shrunk mean; much noise: nothing; order does not matter.
    mean = g.sum(0) / (len(g) + 0.5)
    np.testing.assert_allclose(smoothed(x, X, g, 1e4, 0.5), mean, rtol=1e-4)
    np.testing.assert_allclose(smoothed(x, X, g, 1.0, 1e9), 0, atol=1e-8)
    np.testing.assert_allclose(
        smoothed(x, X, g, 1.0, 0.1), smoothed(x, X[::-1], g[::-1], 1.0, 0.1), rtol=1e-4
    )
