r"""The model of a Bayesian search: a Gaussian process whose kernel knows what can be exchanged.

With the group of permutations of exchangeable coordinates and a Matern-5/2 kernel k, the kernel is

.. math::
    k_G(x, y) = \frac{1}{|G|} \sum_{g \in G} k(x, g y), \qquad
    \frac{k_G(x, y)}{\sqrt{k_G(x, x)\, k_G(y, y)}}

Its functions have the same value at x and g x, so that one run tells as much as all its
permutations would. Without the second step, points that some permutations leave in place would have
a larger variance than others, and would be tried for this alone.

Source: Brown et al., arXiv 2410.16972, with Matern-5/2 as there; expected improvement is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tinygp
from jax.flatten_util import ravel_pytree
from scipy import optimize, stats
from tinygp.kernels.distance import L2Distance

# Points at which the expected improvement is computed, half of them near the best one.
_CANDIDATES = 1024
# Priors of the model's parameters: mean and standard deviation of their logarithms. Lengths are
# shares of a coordinate's range; losses are scaled to a standard deviation of one.
_PRIORS = {"lengths": (np.log(0.5), 0.75), "amplitude": (0.0, 0.5), "noise": (np.log(1e-3), 1.0)}


class Symmetrized(tinygp.kernels.Kernel):
    """A kernel of functions that permutations of the coordinates leave as they are.

    Attributes:
      kernel: invariant if both of its arguments are permuted alike.
      permutations: a group, ``[group, coordinates]``.
    """

    kernel: tinygp.kernels.Kernel
    permutations: Any

    def mean(self, x: Any, y: Any) -> jax.Array:
        """Returns the mean over the group, ``k_G(x, y)``."""
        permuted = jnp.asarray(y)[self.permutations]  # [group, coordinates]
        return jnp.mean(jax.vmap(lambda y: self.kernel.evaluate(x, y))(permuted))

    def evaluate(self, X1: Any, X2: Any) -> Any:
        return self.mean(X1, X2) / jnp.sqrt(self.mean(X1, X1) * self.mean(X2, X2))


def next_point(x: np.ndarray, y: np.ndarray, permutations: np.ndarray, seed: int) -> np.ndarray:
    """Returns the candidate with the largest expected improvement.

    Args:
      x: points of the whole search in the unit cube, ``[trials, coordinates]``; the first
        ``len(y)`` are done, the others are not looked at.
      y: losses of the points that are done, with mean 0 and standard deviation 1.
      permutations: ``[group, coordinates]``.
      seed: of the candidates.
    """
    done = len(y)
    # Trials to come are observations with an enormous variance: all shapes stay the same, so that
    # one compiled program serves the whole search.
    unknown = np.where(np.arange(len(x)) < done, 0.0, 1e8)
    data = x, np.concatenate([y, np.zeros(len(x) - done)]), unknown, permutations
    with jax.enable_x64(True):
        # 1. The most probable parameters.
        means = {name: mean for name, (mean, _) in _PRIORS.items()}
        start, unravel = ravel_pytree(means | {"lengths": np.full(x.shape[1], means["lengths"])})

        def height(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = _unlikelihood(unravel(jnp.asarray(flat)), data)
            return float(value), np.asarray(ravel_pytree(slope)[0])

        fitted = optimize.minimize(height, np.asarray(start), jac=True, method="L-BFGS-B")
        # 2. Candidates everywhere, and near the best point so far.
        rng = np.random.default_rng((seed, done))
        near = x[np.argmin(y)] + 0.1 * rng.standard_normal((_CANDIDATES // 2, x.shape[1]))
        anywhere = rng.random((_CANDIDATES - len(near), x.shape[1]))
        candidates = np.concatenate([anywhere, near.clip(0, 1)])
        mean, deviation = map(
            np.asarray, _predict(unravel(jnp.asarray(fitted.x)), data, candidates)
        )
    # 3. Expected improvement: E max(best - f, 0) with f ~ N(mean, deviation^2).
    z = (y.min() - mean) / deviation
    return candidates[np.argmax(deviation * (z * stats.norm.cdf(z) + stats.norm.pdf(z)))]


def _process(parameters: Any, data: Any) -> tinygp.GaussianProcess:
    x, _, unknown, permutations = data
    # Coordinates that can be exchanged have one length: the length of the first of them.
    lengths = jnp.exp(parameters["lengths"])[permutations.min(axis=0)]
    matern = tinygp.kernels.Matern52(distance=L2Distance())
    kernel = Symmetrized(tinygp.transforms.Linear(1 / lengths, matern), permutations)
    noise = jnp.exp(parameters["noise"]) + unknown
    return tinygp.GaussianProcess(jnp.exp(parameters["amplitude"]) * kernel, x, diag=noise)


@jax.jit
@jax.value_and_grad
def _unlikelihood(parameters: Any, data: Any) -> jax.Array:
    """Returns the negative logarithm of prior times likelihood, up to a constant."""
    prior = sum(
        jnp.sum(((parameters[name] - mean) / deviation) ** 2) / 2
        for name, (mean, deviation) in _PRIORS.items()
    )
    return prior - _process(parameters, data).log_probability(data[1])


@jax.jit
def _predict(parameters: Any, data: Any, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of the loss at points ``[points, coordinates]``."""
    found = _process(parameters, data).condition(data[1], points).gp
    return found.loc, jnp.sqrt(jnp.maximum(found.variance, 1e-12))
