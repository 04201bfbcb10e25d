r"""Rows without their correlations, by one triangular solve: the direction of MUD.

Muon makes the rows of momentum nearly orthonormal by fifteen matrix products. Two products and a
triangular solve take from each row only its parts along the rows before it, as Gram and Schmidt do:

.. math::
    q_i = \frac{x_i}{\|x_i\|}, \qquad
    T = \text{tril}(Q Q^\top), \qquad
    Y = T^{-1} Q, \qquad
    u_i = \frac{y_i}{\|y_i\|}

This is one step of Gauss-Seidel towards orthonormal rows, which it does not change. T is far from
singular: the identity ``T + T' = Q Q' + I`` gives ``|T^-1| <= 2`` in the spectral norm.

Tests: tests/library/test_decorrelation.py.
"""

import jax
import jax.numpy as jnp
import optax

from gum_optax import _mesh
from gum_optax._numerics import at_least_float32, norm
from gum_optax._orthogonal import matrix_by_matrix


def decorrelate(x: jax.Array) -> jax.Array:
    r"""Takes from each row its parts along earlier rows, on the short side of every matrix.

    Rows are scaled to length one before and after that, so a result [m, n] with m <= n has the
    norm ``sqrt(m)`` of Muon's direction. Its rows are nearly, not exactly, orthogonal.

    Args:
      x: ``[..., m, n]``, real floating point; leading axes are batch axes. Matrices with m > n are
        transposed on the way in and out.

    Returns:
      An array of the shape and dtype of ``x``; half precision is computed in float32. Rows of zeros
      stay zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import decorrelate
      >>> decorrelate(jnp.array([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).round(3)
      Array([[1., 0., 0.],
             [0., 1., 0.]], dtype=float32)

    References:
      Southworth and Thomas, Beyond Muon: MUD, arXiv 2603.17970.
    """
    return _mesh.in_auto_mode(_decorrelate, x, like=lambda: x)


def _decorrelate(x: jax.Array) -> jax.Array:
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).astype(at_least_float32(x.dtype))  # [..., m, n]
    # 1. Rows of length one. On a mesh, all devices have whole columns from here on.
    Q = _unit_rows(_mesh.gather_rows(wide))
    # 2. T^-1, where T = tril(Q Q') has ones on its diagonal: the solve reads what lies below it.
    gram = Q @ Q.mT  # [..., m, m]
    eye = jnp.broadcast_to(jnp.eye(Q.shape[-2], dtype=Q.dtype), gram.shape)
    inverse = jax.lax.linalg.triangular_solve(
        gram, eye, left_side=True, lower=True, unit_diagonal=True
    )
    # 3. Y = T^-1 Q, then rows of length one. A product with the inverse takes a fourth longer than
    #    a solve with n columns would, and shards along n, as no solve does.
    U = _unit_rows(_mesh.gather_rows(inverse @ Q)).astype(x.dtype)
    return U.mT if tall else U


def _unit_rows(matrices: jax.Array) -> jax.Array:
    """Divides rows of ``[..., m, n]`` by their norms; rows of zeros stay zero."""
    norms = norm(matrices, -1)  # [..., m, 1]
    return matrices / jnp.where(norms > 0, norms, 1)


def scale_by_decorrelation() -> optax.GradientTransformationExtraArgs:
    """Replaces every update by its decorrelated rows: MUD without momentum.

    It can take the place of Muon's Newton-Schulz, at about an eighth of its arithmetic:
    ``muon(learning_rate, orthogonalizer=scale_by_decorrelation())`` is MUD with momentum in 8 bits.

    Batches of large matrices are decorrelated one matrix at a time, as in `scale_by_polar`.

    Returns:
      A stateless ``optax.GradientTransformationExtraArgs`` for trees of arrays ``[..., m, n]``;
      results have the dtypes of the updates. The extra argument ``outside`` is that of
      `scale_by_polar`.

    Example:
      >>> import optax
      >>> import gum_optax
      >>> mud = gum_optax.muon(
      ...     3e-3, consistent_rms=0.2, orthogonalizer=gum_optax.scale_by_decorrelation())

    References:
      Southworth and Thomas, Beyond Muon: MUD, arXiv 2603.17970.
    """
    return matrix_by_matrix(decorrelate)
