"""Projectors: functions from a gradient to an orthonormal basis.

A projector is a function ``(key, gradient [m, n], rank, previous_basis [m, r]) -> basis [m, r]``
with m <= n and r = min(rank, m). `low_rank` calls it for one matrix at a time, at every refresh,
with the gradient in the dtype of its computation: float32, or float64 for float64 leaves. The basis
must have orthonormal columns in the same dtype, and be finite for every finite gradient, including
zero.

Any function of this signature can be passed as ``LowRank(projector=...)``; options of the
projectors here are set with ``functools.partial``. The previous basis is zero before the first
refresh. After a refresh from a non-finite gradient, it may be non-finite.

A basis may depend on the gradient and on the key without making the gradient estimate biased,
because layers are sampled independently of it (arXiv 2510.17802).

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
    """Computes the top left singular vectors by a full SVD: GaLore's projector, exact but slow.

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

    The iteration starts from the previous basis plus a little Gaussian noise, and from noise alone
    at the first refresh. Each iteration consists of two products with the gradient. The result is
    orthonormalized after each product, by Cholesky factors r x r, or by Householder reflections if
    those fail. Without the second orthonormalization, the start of the next product would contain
    fourth powers of the singular values, which exceed the precision of float32.

    In recorded runs, three iterations captured at least 99 % of the SVD's energy in every matrix at
    every refresh; two iterations nearly did.

    Args:
      key: a typed key for the noise.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: ``[m, r]``, the start; zero at the first refresh. A non-finite basis, as after
        a non-finite gradient, counts as zero.
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
    # start = P_old + 0.01 N / sqrt(m), where columns of N / sqrt(m) have about unit length. At the
    # first refresh the noise is the whole start. Later it adds directions orthogonal to the
    # previous basis: without them, the iteration could never find a gradient orthogonal to it.
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
    """Approximates the top left singular vectors by the SVD of a random sketch.

    Args:
      key: a typed key for the Gaussian sketch.
      gradient: ``[m, n]``, m <= n, real floating point.
      rank: number of vectors to keep.
      previous_basis: unused.
      oversampling: columns of the sketch beyond ``rank``, an int >= 0.
      iterations: power iterations on the sketch, an int >= 1.

    Returns:
      The basis ``[m, min(rank, m)]`` in the gradient's dtype.

    Raises:
      TypeError, ValueError: if ``oversampling`` or ``iterations`` is not an int in its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gum_optax import projectors
      >>> project = jax.jit(projectors.randomized_svd, static_argnames=("rank", "oversampling"))
      >>> basis = project(
      ...     jax.random.key(0), jnp.eye(8, 16), rank=4, previous_basis=jnp.zeros((8, 4)),
      ...     oversampling=2)
      >>> basis.shape
      (8, 4)

    References:
      Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and 5.1.
    """
    del previous_basis
    oversampling = _checks.non_negative_int("oversampling", oversampling)
    iterations = _checks.positive_int("iterations", iterations)
    gradient = _unit_scale(gradient)
    # 1. A basis W of r + oversampling directions, from a Gaussian start.
    width = min(_rank(rank, gradient) + oversampling, gradient.shape[0])
    sketch = jax.random.normal(key, (gradient.shape[0], width), gradient.dtype)
    wide = power_iteration_basis(gradient, sketch, iterations)  # [m, width]
    # 2. The exact top r inside of it: W'G = U S V' is small,  P = W U[:, :r].
    small, _, _ = jnp.linalg.svd(matmul_highest(wide.T, gradient), full_matrices=False)
    return matmul_highest(wide, small[:, : _rank(rank, gradient)])


def random_orthonormal(
    key: jax.Array, gradient: jax.Array, rank: int, previous_basis: jax.Array
) -> jax.Array:
    """Draws a uniformly random subspace, independent of the gradient: GoLore's projector.

    Args:
      key: a typed key for the subspace.
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
    """Uses one projector before a step and another from that step on: GoLore's schedule.

    This is a schedule of projectors, not a projector: `low_rank` calls ``at(step)`` for the
    projector of a step.

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
    r"""Rotates the previous basis towards the gradient along a geodesic: SubTrack++'s projector.

    For the previous basis S, let ``A = S'G`` and ``E = G - S A``. The energy :math:`\|E\|_F^2`
    outside S has the gradient :math:`-2 E A^\top` in S. A step of gradient descent on it rotates
    one direction of S:

    .. math::
        \frac{2 E A^\top}{\|G\|_F^2} \approx \sigma u v^\top, \qquad
        S \leftarrow (S v \cos\theta + u \sin\theta) v^\top + S (I - v v^\top), \quad
        \theta = \text{step} \cdot \sigma

    The first basis comes from `svd`, and so does the basis after a non-finite one. Unlike the step
    of the paper, this one is relative to ``|G|^2``, so that scaling the loss changes nothing.

    Args:
      step: the angle in radians for sigma = 1, the largest possible value; > 0.

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
      Rajabi et al., SubTrack++, arXiv 2502.01586. This follows the equations, not the authors'
      code, in which the subspaces of tall matrices never move.
    """
    _checks.hyperparameter("step", step)

    def turned(gradient: jax.Array, basis: jax.Array) -> jax.Array:
        # 1. Scale first: |G|^2 of large or small gradients would leave the range of float32.
        unit = _unit_scale(gradient)
        low = matmul_highest(basis.T, unit)  # A, [r, n]
        slope = 2 * matmul_highest(unit - matmul_highest(basis, low), low.T)  # 2 E A', [m, r]
        energy = jnp.sum(unit**2)
        # 2. The leading singular triple of the slope, and the angle theta = step sigma.
        u, sigma, vt = jnp.linalg.svd(slope, full_matrices=False)
        angle = step * sigma[0] / jnp.where(energy > 0, energy, 1)
        u, v = u[:, :1], vt[:1].T  # [m, 1], [r, 1]
        # 3. S <- S + ((cos theta - 1) S v + sin theta u) v'
        moved = (jnp.cos(angle) - 1) * matmul_highest(basis, v) + jnp.sin(angle) * u
        new = basis + matmul_highest(moved, v.T)
        # 4. Rotations amplify deviations from orthonormality (to 0.2 within 300 of them in
        #    float32), so each one repairs the basis, without flipping signs:
        #    S <- S (3 I - S'S) / 2
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
