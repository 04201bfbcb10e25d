"""Projectors: from a gradient to an orthonormal basis of the subspace that is kept.

A projector is a function ``(key, gradient [m, n], rank, previous_basis [m, r]) -> basis [m, r]``
with m <= n and r = min(rank, m), whose columns are orthonormal and finite for every finite
gradient, zero included. Any function of that signature plugs into ``low_rank(projector=...)``;
options of the ones here are set with ``functools.partial``. Before the first refresh the previous
basis is zero; after a refresh from a gradient that is not finite, it need not be finite.

A basis that depends on the gradient and on a random key leaves the estimate unbiased, because
layers are drawn independently of it (arXiv 2510.17802).

Example:
  The simplest projector keeps the first coordinates:

  >>> import jax.numpy as jnp
  >>> import optax
  >>> import gum_optax
  >>> def coordinates(key, gradient, rank, previous_basis):
  ...     return jnp.eye(gradient.shape[0], rank)
  >>> tx = gum_optax.low_rank(optax.identity(), rank=2, period=10, projector=coordinates)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import _checks, _power_iteration, _products
from gum_optax._typing import Projector

_SIGNATURE = "(key, gradient, rank, previous_basis) -> basis"


def svd(key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array) -> jax.Array:
    """The top left singular vectors, by a full SVD: exact, and slow (GaLore's projector).

    Args:
      key: unused.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: unused.

    Returns:
      The basis ``[m, min(rank, m)]`` in the gradient's dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gum_optax import projectors
      >>> gradient = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
      >>> abs(projectors.svd(jax.random.key(0), gradient, 1, jnp.zeros((3, 1)))).tolist()
      [[0.0], [1.0], [0.0]]

    References:
      Zhao et al., GaLore, arXiv 2403.03507; Pan et al., arXiv 2510.17802.
    """
    del key, previous_basis
    left, _, _ = jnp.linalg.svd(_unit_scale(gradient), full_matrices=False)
    return left[:, : _rank(rank, gradient)]


def subspace_iteration(
    key: jax.Array,
    gradient: jax.Array,
    rank: int,
    previous_basis: jax.Array,
    *,
    iterations: int = 3,
) -> jax.Array:
    """The top left singular subspace, by block power iteration from the previous basis.

    Each iteration is two products with the gradient, each followed by an orthonormalization, by
    Cholesky factors r x r (by Householder reflections where those fail): without the second, the
    start of the next product spans fourth powers of the singular values, which float32 cannot hold.
    The start is the previous basis with a little Gaussian noise, and noise alone at the first
    refresh. Three iterations caught 99 % of the SVD's energy in every matrix at every refresh that
    was recorded, two nearly so.

    Args:
      key: for the noise.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: ``[m, r]``, the start; zero at the first refresh, and taken as zero if it is
        not finite, as after a gradient that was not.
      iterations: number of power iterations, an int >= 1.

    Returns:
      The basis ``[m, min(rank, m)]`` in the gradient's dtype.

    Raises:
      TypeError, ValueError: if ``iterations`` is not an int >= 1.

    Example:
      >>> import functools
      >>> import gum_optax
      >>> from gum_optax import projectors
      >>> more_exact = functools.partial(projectors.subspace_iteration, iterations=4)
      >>> tx = gum_optax.gum(1e-2, projector=more_exact)

    References:
      Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithm 4.4.
    """
    iterations = _checks.positive_int("iterations", iterations)
    noise = jax.random.normal(key, (gradient.shape[0], _rank(rank, gradient)), gradient.dtype)
    # A NaN in a gradient may spoil one period; starting from its basis would spoil all later ones.
    previous_basis = jnp.where(jnp.all(jnp.isfinite(previous_basis)), previous_basis, 0)
    # The noise is all of the start at the first refresh. Later it lets in what the previous
    # basis is orthogonal to: without it, a gradient whose support moved would stay invisible.
    start = previous_basis + 0.01 * noise / jnp.sqrt(gradient.shape[0])
    return _power_iteration.basis(gradient, start, iterations)


def randomized_svd(
    key: jax.Array,
    gradient: jax.Array,
    rank: int,
    previous_basis: jax.Array,
    *,
    oversampling: int = 8,
    iterations: int = 2,
) -> jax.Array:
    """The top left singular vectors, by SVD of a random sketch of the row space.

    Args:
      key: for the Gaussian sketch.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: unused; every refresh is independent of the last.
      oversampling: columns of the sketch beyond ``rank``, an int >= 0.
      iterations: power iterations on the sketch, an int >= 1.

    Returns:
      The basis ``[m, min(rank, m)]`` in the gradient's dtype.

    Raises:
      TypeError, ValueError: if ``oversampling`` or ``iterations`` is not an int in its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gum_optax import projectors
      >>> basis = projectors.randomized_svd(
      ...     jax.random.key(0), jnp.eye(8, 16), 4, jnp.zeros((8, 4)), oversampling=2)
      >>> basis.shape
      (8, 4)

    References:
      Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and 5.1.
    """
    del previous_basis
    oversampling = _checks.non_negative_int("oversampling", oversampling)
    iterations = _checks.positive_int("iterations", iterations)
    gradient = _unit_scale(gradient)
    width = min(_rank(rank, gradient) + oversampling, gradient.shape[0])
    sketch = jax.random.normal(key, (gradient.shape[0], width), gradient.dtype)
    wide = _power_iteration.basis(gradient, sketch, iterations)
    small, _, _ = jnp.linalg.svd(_products.exact(wide.T, gradient), full_matrices=False)
    return _products.exact(wide, small[:, : _rank(rank, gradient)])


def random_orthonormal(
    key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
) -> jax.Array:
    """A uniformly random subspace, blind to the gradient (GoLore's projector).

    Args:
      key: for the subspace.
      gradient: ``[m, n]``, m <= n; only its shape and dtype are used.
      rank: number of vectors to keep.
      previous_basis: unused.

    Returns:
      The basis ``[m, min(rank, m)]`` in the gradient's dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gum_optax import projectors
      >>> basis = projectors.random_orthonormal(
      ...     jax.random.key(0), jnp.zeros((8, 16)), 4, jnp.zeros((8, 4)))
      >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(4), atol=1e-5))
      True

    References:
      He et al., GoLore, arXiv 2410.11289.
    """
    del previous_basis
    shape = (gradient.shape[0], _rank(rank, gradient))
    return jnp.linalg.qr(jax.random.normal(key, shape, gradient.dtype))[0]


class switch(NamedTuple):
    """Uses one projector before a step and another from that step on (GoLore's schedule).

    The engine asks for the projector of a step with ``at(step)``; that makes this a schedule of
    projectors rather than a projector.

    Attributes:
      before: the projector of refreshes at steps ``< step``.
      after: the projector of refreshes at steps ``>= step``.
      step: an int >= 0, counted in optimizer steps from 0.

    Example:
      >>> from gum_optax import projectors
      >>> late_random = projectors.switch(projectors.svd, projectors.random_orthonormal, 1000)
    """

    before: Projector
    after: Projector
    step: int

    def at(self, step: jax.Array) -> Projector:
        """Returns the projector for a refresh at ``step``, an int32 scalar."""

        def projector(
            key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
        ) -> jax.Array:
            return jax.lax.cond(
                step < self.step,
                lambda: self.before(key, gradient, rank, previous_basis),
                lambda: self.after(key, gradient, rank, previous_basis),
            )

        return projector


def check(projector: Any) -> None:
    """Raises unless ``projector`` is a projector or a `switch` between two."""
    if isinstance(projector, switch):
        check(projector.before)
        check(projector.after)
        _checks.non_negative_int("step", projector.step)
    else:
        _checks.function("projector", projector, _SIGNATURE)


def resolve(projector: Projector | switch, step: jax.Array) -> Projector:
    """Returns the projector in force for a refresh at ``step``."""
    return projector.at(step) if isinstance(projector, switch) else projector


def _rank(rank: int, gradient: jax.Array) -> int:
    return min(_checks.positive_int("rank", rank), gradient.shape[0])


def _unit_scale(gradient: jax.Array) -> jax.Array:
    # A basis does not depend on the gradient's scale.
    return gradient / _products.largest(gradient)
