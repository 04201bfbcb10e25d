"""A swarm of particles whose gradients a Gaussian process smooths, on a test function.

A reconstruction: the particle-based sparse Gaussian process optimizer (arXiv 2211.14517) was known
by its abstract alone; this is not its algorithm. Gradients at K particles around x are averaged:

    g(x) = k(x, X) (k(X, X) + noise I)^-1 [g_1 ... g_K],        x <- x - rate g(x)

which costs K gradients a step. Run it: `python -m experiments.examples.particles`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def smoothed(
    x: jax.Array, particles: jax.Array, gradients: jax.Array, length: float, noise: float
) -> jax.Array:
    """The gradient at x [d] by a Gaussian process through those at particles [K, d]."""

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        square = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
        return jnp.exp(-square / (2 * length**2))

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
    """The last x [d]; with one particle and no spread or noise, gradient descent."""

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        swarm = x + spread * jax.random.normal(key, (particles, len(x)))
        slope = smoothed(x, swarm, jax.vmap(jax.grad(function))(swarm), length, noise)
        return x - rate * slope, None

    return jax.lax.scan(step, x, jax.random.split(jax.random.key(seed), steps))[0]


def ripples(x: jax.Array) -> jax.Array:
    """A bowl with many local minima (Rastrigin's), least at 0."""
    return jnp.sum(x**2 + 0.5 * (1 - jnp.cos(4 * jnp.pi * x)))


def main() -> None:
    start = jnp.array([2.1, -1.6])
    alone = descend(ripples, start, particles=1, spread=0.0, noise=0.0)
    swarm = descend(ripples, start)
    print(f"gradient descent ends at {ripples(alone):.3f}, a swarm of 8 at {ripples(swarm):.3f}")


if __name__ == "__main__":
    main()
