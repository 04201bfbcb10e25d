"""Projectors: functions from a gradient to a basis of the subspace that is kept of it.

A projector is a function ``(key, gradient [m, n], rank, previous_basis [m, r]) -> basis [m, r]``
with m <= n and r = min(rank, m). `low_rank` calls it for one matrix at a time, at every refresh,
with the gradient in the dtype of its computation: float32, or float64 for float64 leaves. The basis
has orthonormal columns in the same dtype, and is finite for every finite gradient, zero included.

Any function of that signature can take the place of those here, whose options are set with
``functools.partial``. The previous basis is zero before the first refresh; after a refresh from a
gradient that was not finite, it need not be finite either.

A basis may depend on the gradient and on the random key and still leave the gradient estimate
unbiased, because layers are sampled independently of it (arXiv 2510.17802).

Example:
  The simplest projector keeps the first coordinates:

  >>> import jax.numpy as jnp
  >>> import optax
  >>> import gum_optax
  >>> def coordinates(key, gradient, rank, previous_basis):
  ...     return jnp.eye(gradient.shape[0], rank, dtype=gradient.dtype)
  >>> tx = gum_optax.low_rank(
  ...     optax.identity(), gum_optax.LowRank(rank=2, period=10, projector=coordinates))

Tests: tests/library/test_projectors.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gum_optax import _checks
from gum_optax._bases import power_iteration_basis
from gum_optax._numerics import matmul_highest, safe_scale

Projector: TypeAlias = Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array]
"""``(key, gradient [m, n], rank, previous_basis [m, r]) -> basis [m, r]``."""

_SIGNATURE = "(key, gradient, rank, previous_basis) -> basis"


def svd(key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array) -> jax.Array:
    """Computes the top left singular vectors by a full SVD: exact but slow (GaLore's projector).

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
    # G = U S V',  P = U[:, :r]
    left, _, _ = jnp.linalg.svd(_unit_scale(gradient), full_matrices=False)  # [m, m]
    return left[:, : _rank(rank, gradient)]


def subspace_iteration(
    key: jax.Array,
    gradient: jax.Array,
    rank: int,
    previous_basis: jax.Array,
    *,
    iterations: int = 3,
) -> jax.Array:
    """Approximates the top left singular subspace by power iteration from the previous basis.

    The iteration starts from the previous basis with a little Gaussian noise, and from noise alone
    at the first refresh. Each iteration consists of two products with the gradient, and the rows
    are orthonormalized after each of them, by Cholesky factors r x r (by Householder reflections
    where those fail). Without the second orthonormalization, the start of the next product would
    span fourth powers of the singular values, which float32 cannot represent.

    Three iterations captured 99 % of the SVD's energy in every matrix at every refresh that was
    recorded; two iterations nearly did.

    Args:
      key: for the noise.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: ``[m, r]``, the start; zero at the first refresh. A basis that is not finite,
        as after a gradient that was not, counts as zero.
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
      >>> tx = gum_optax.gum(1e-2, gum_optax.LowRank(projector=more_exact))

    References:
      Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithm 4.4.
    """
    iterations = _checks.positive_int("iterations", iterations)
    noise = jax.random.normal(key, (gradient.shape[0], _rank(rank, gradient)), gradient.dtype)
    # A NaN in a gradient may spoil one period; starting from its basis would spoil all later ones.
    previous_basis = jnp.where(jnp.all(jnp.isfinite(previous_basis)), previous_basis, 0)
    # start = P_old + 0.01 N / sqrt(m), the columns of N / sqrt(m) being about unit vectors. At the
    # first refresh the noise is the whole start. Later it admits directions orthogonal to the
    # previous basis: without it, a gradient whose support has moved would stay invisible.
    start = previous_basis + 0.01 * noise / jnp.sqrt(gradient.shape[0])  # [m, r]
    return power_iteration_basis(gradient, start, iterations)


def randomized_svd(
    key: jax.Array,
    gradient: jax.Array,
    rank: int,
    previous_basis: jax.Array,
    *,
    oversampling: int = 8,
    iterations: int = 2,
) -> jax.Array:
    """Approximates the top left singular vectors by the SVD of a randomly sketched matrix.

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
    # 1. A basis W of somewhat more than r directions, from a Gaussian start.
    width = min(_rank(rank, gradient) + oversampling, gradient.shape[0])
    sketch = jax.random.normal(key, (gradient.shape[0], width), gradient.dtype)
    wide = power_iteration_basis(gradient, sketch, iterations)  # [m, width]
    # 2. The exact top r inside of it: W'G = U S V' is small,  P = W U[:, :r].
    small, _, _ = jnp.linalg.svd(matmul_highest(wide.T, gradient), full_matrices=False)
    return matmul_highest(wide, small[:, : _rank(rank, gradient)])


def random_orthonormal(
    key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
) -> jax.Array:
    """Draws a uniformly random subspace, whatever the gradient (GoLore's projector).

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
    # The distribution of a Gaussian matrix is invariant under rotations, so its span is uniform.
    shape = (gradient.shape[0], _rank(rank, gradient))
    return jnp.linalg.qr(jax.random.normal(key, shape, gradient.dtype))[0]


class switch(NamedTuple):
    """Uses one projector before a step and another from that step on (GoLore's schedule).

    It is a schedule of projectors rather than a projector: `low_rank` asks it for the projector of
    a step with ``at(step)``.

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

        # Steps are traced, so both projectors are compiled; only one of them runs.
        def projector(
            key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
        ) -> jax.Array:
            return jax.lax.cond(
                step < self.step,
                lambda: self.before(key, gradient, rank, previous_basis),
                lambda: self.after(key, gradient, rank, previous_basis),
            )

        return projector


def grassmann(step: float = 1.0) -> Projector:
    r"""Turns the previous basis towards the gradient along a geodesic: SubTrack++'s projector.

    With ``A = S'G`` and ``E = G - S A`` for the previous basis S, a step of gradient descent on the
    energy that S leaves out, whose slope is :math:`-2 E A^\top`, turns one direction of S:

    .. math::
        \frac{2 E A^\top}{\|G\|_F^2} \approx \sigma u v^\top, \qquad
        S \leftarrow (S v \cos\theta + u \sin\theta) v^\top + S (I - v v^\top), \quad
        \theta = \text{step} \cdot \sigma

    The first basis, and that after one that was not finite, is `svd`'s. Published steps count in
    units of ``1 / |G|^2``; these do not, so that scaling a loss changes nothing.

    Args:
      step: the angle for sigma = 1, its largest value, in radians, > 0.

    Returns:
      A projector.

    Raises:
      TypeError, ValueError: if ``step`` is not a positive number.

    Example:
      SubTrack++ without its recovery of the residual:

      >>> import gum_optax
      >>> from gum_optax import carries, projectors
      >>> tx = gum_optax.adamw(1e-3, gum_optax.galore(
      ...     rank=64, projector=projectors.grassmann(), carry=carries.projection_aware()))

    References:
      Rajabi et al., SubTrack++, arXiv 2502.01586. The equations, not its code, in which the
      subspaces of tall matrices never move.
    """
    _checks.hyperparameter("step", step)

    def turned(gradient: jax.Array, basis: jax.Array) -> jax.Array:
        # Range first: |G|^2 of large or small gradients would leave that of float32.
        unit = _unit_scale(gradient)
        low = matmul_highest(basis.T, unit)  # A, [r, n]
        slope = 2 * matmul_highest(unit - matmul_highest(basis, low), low.T)  # 2 E A', [m, r]
        energy = jnp.sum(unit**2)
        u, sigma, vt = jnp.linalg.svd(slope, full_matrices=False)
        angle = step * sigma[0] / jnp.where(energy > 0, energy, 1)
        u, v = u[:, :1], vt[:1].T  # [m, 1], [r, 1]
        # S + ((cos - 1) S v + sin u) v'
        moved = (jnp.cos(angle) - 1) * matmul_highest(basis, v) + jnp.sin(angle) * u
        new = basis + matmul_highest(moved, v.T)
        # Turns amplify what a basis lacks of orthonormality (to 0.2 within 300 in float32), so each
        # repairs it, without a change of sign: S <- S (3 I - S'S) / 2.
        return 1.5 * new - 0.5 * matmul_highest(new, matmul_highest(new.T, new))

    def projector(
        key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
    ) -> jax.Array:
        known = jnp.all(jnp.isfinite(previous_basis)) & jnp.any(previous_basis != 0)
        return jax.lax.cond(
            known,
            turned,
            lambda gradient, basis: svd(key, gradient, rank, basis),
            gradient,
            previous_basis,
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
    """Returns the projector for a refresh at ``step``."""
    return projector.at(step) if isinstance(projector, switch) else projector


def _rank(rank: int, gradient: jax.Array) -> int:
    """Returns r = min(rank, m), or raises if ``rank`` is not an int >= 1."""
    return min(_checks.positive_int("rank", rank), gradient.shape[0])


def _unit_scale(gradient: jax.Array) -> jax.Array:
    """Scales the largest entry to one; the singular vectors do not depend on the scale."""
    return gradient / safe_scale(gradient)
