"""Descent by gradients of a swarm of particles, smoothed by a Gaussian process, on a test function.

Only the abstract of the particle-based sparse Gaussian process optimizer (arXiv 2211.14517) was at
hand: this is an idea in its spirit and not its algorithm. Gradients at K particles around x are
averaged,

    g(x) = k(x, X) (k(X, X) + noise I)^-1 [g_1 ... g_K],        x <- x - rate g(x),

with a Gaussian kernel k, which costs K gradients per step. Run it with
`python -m experiments.examples.particles`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def smoothed(
    x: jax.Array, particles: jax.Array, gradients: jax.Array, length: float, noise: float
) -> jax.Array:
    """Estimates the gradient at x ``[d]`` from gradients ``[K, d]`` at particles ``[K, d]``.

    Args:
      x: the point.
      particles: where the gradients were taken.
      gradients: one for each particle.
      length: the length scale of the Gaussian kernel.
      noise: the variance of gradients; more of it shrinks the estimate towards zero.
    """

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        # k(a, b) = exp(-|a - b|^2 / 2 length^2): [A, d] and [B, d] to [A, B]
        square = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
        return jnp.exp(-square / (2 * length**2))

    # The posterior mean of a Gaussian process of mean zero, one for each coordinate.
    gram = kernel(particles, particles) + noise * jnp.eye(len(particles))
    return (kernel(x[None], particles) @ jnp.linalg.solve(gram, gradients))[0]


def descend(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    particles: int = 8,
    spread: float = 0.3,
    rate: float = 0.02,
    steps: int = 200,
    length: float = 0.5,
    noise: float = 0.1,
    seed: int = 0,
) -> jax.Array:
    """Descends for `steps` steps; returns the last x ``[d]``.

    With one particle and neither spread nor noise, this is gradient descent.

    Args:
      function: to minimize.
      x: the start, ``[d]``.
      particles: their number K.
      spread: the standard deviation of particles around x.
      rate: the learning rate.
      steps: their number.
      length: the length scale of the kernel.
      noise: the variance of gradients.
      seed: of the particles.
    """

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        # New particles around x in every step: [K, d].
        swarm = x + spread * jax.random.normal(key, (particles, len(x)))
        slope = smoothed(x, swarm, jax.vmap(jax.grad(function))(swarm), length, noise)
        return x - rate * slope, None

    return jax.lax.scan(step, x, jax.random.split(jax.random.key(seed), steps))[0]


def ripples(x: jax.Array) -> jax.Array:
    """A bowl with many local minima, in the form of Rastrigin's; its minimum is 0 at 0."""
    return jnp.sum(x**2 + 0.5 * (1 - jnp.cos(4 * jnp.pi * x)))


def main() -> None:
    """Compares the swarm with gradient descent, from one start."""
    start = jnp.array([2.1, -1.6])
    alone = descend(ripples, start, particles=1, spread=0.0, noise=0.0)
    swarm = descend(ripples, start)
    print(f"gradient descent ends at {ripples(alone):.3f}, a swarm of 8 at {ripples(swarm):.3f}")


if __name__ == "__main__":
    main()
