r"""Bases without a singular value decomposition: power iteration on Cholesky factors.

A *basis* [m, r] of a matrix ``G = U S V'`` [m, n], m <= n, has orthonormal columns that span
(nearly) its top r left singular vectors. Repeated products with ``G G'`` turn any start towards
them; between products the directions are made orthonormal again, since all of them would turn
into the first. All of it is matrix products, which accelerators run fastest, and Cholesky factors
r x r.

Tests: tests/library/test_bases.py.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gum_optax._numerics import matmul_highest, safe_scale


def power_iteration_basis(gradient: jax.Array, start: jax.Array, iterations: int) -> jax.Array:
    """Returns an orthonormal basis of the span of ``(G G')^iterations start``.

    Args:
      gradient: G, ``[m, n]``, m <= n.
      start: ``[m, r]``, r <= m, the subspace to start from.
      iterations: number of power iterations, an int >= 1.

    Returns:
      The basis ``[m, r]``, orthonormal to rounding whatever the gradient's rank.
    """
    scale = safe_scale(gradient)

    def iterate(orthonormalize: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # Q <- orth(orth(Q G) G'). On tensor cores these products may round their operands: the
        # start is random anyway, and the captured energy was measured equal to four digits with
        # bfloat16 operands.
        def once(_: int, rows: jax.Array) -> jax.Array:
            rows = orthonormalize(jnp.matmul(rows / scale, gradient))  # [r, n]
            return orthonormalize(jnp.matmul(rows / scale, gradient.T))  # [r, m]

        # Bases are kept transposed, Q = P': rows of length n are contiguous for the products. A
        # loop, since every iteration that is written out is compiled again for every group.
        return jax.lax.fori_loop(0, iterations, once, start.T)

    # 1. The fast way. Cholesky is several times as fast as Householder reflections on CPUs, and on
    #    accelerators nearly all of it is matrix products.
    fast = iterate(well_conditioned_rows)
    fast = jax.lax.fori_loop(0, 2, lambda _, rows: orthonormal_rows(rows, shift=0.0)[0], fast)

    # 2. It can fail on gradients of a rank below r, so check |Q Q' - I| entry by entry.
    eye = jnp.eye(len(fast), dtype=fast.dtype)
    tolerance = 4 * jnp.finfo(fast.dtype).eps * gradient.shape[0] ** 0.5
    # Not `max(...) <= tolerance`: XLA's CPU backend passes over NaNs in a maximum.
    succeeded = jnp.all(jnp.abs(matmul_highest(fast, fast.T) - eye) <= tolerance)

    # 3. Where it failed, start again with Householder reflections.
    def slow() -> jax.Array:
        return jnp.where(succeeded, fast, iterate(lambda rows: jnp.linalg.qr(rows.T)[0].T))

    return jax.lax.cond(_in_all(succeeded), lambda: fast, slow).T


@jax.custom_batching.custom_vmap
def _in_all(condition: jax.Array) -> jax.Array:
    """The condition; under `jax.vmap`, whether it holds in the whole batch.

    A `jax.lax.cond` on a batch of conditions is a selection, which computes both branches: with
    this, runs that are vectorized, as over learning rates, do not pay for the slow way at every
    refresh.
    """
    return condition


@_in_all.def_vmap
def _in_all_of_batch(
    size: int, batched: Sequence[bool], condition: jax.Array
) -> tuple[jax.Array, bool]:
    del size, batched
    return jnp.all(condition), False


def well_conditioned_rows(x: jax.Array) -> jax.Array:
    """Returns rows with the span of the rows of ``x``, orthonormal up to a factor of about two.

    Where one shifted Cholesky factor has shortened some direction by more than half, weak
    directions may still be far below unit length. The next product would weaken them again, and
    soon they would be lost in rounding; so the rows are orthonormalized a second time.
    """
    rows, lost = orthonormal_rows(x, shift=1e-6)
    return jax.lax.cond(lost < 0.5, lambda: rows, lambda: orthonormal_rows(rows, shift=1e-7)[0])


def orthonormal_rows(x: jax.Array, shift: float) -> tuple[jax.Array, jax.Array]:
    r"""Orthonormalizes rows by a shifted Cholesky factor.

    .. math::
        Q = L^{-1} X \quad\text{with}\quad L L^\top = X X^\top + \text{shift} \cdot
        \operatorname{tr}(X X^\top) I

    The shift keeps a Gram matrix positive definite that rounding may have made indefinite. The rows
    of Q span the same space as the rows of X, and are orthonormal where singular values of X are
    well above the square root of the shift (relative to its norm). For the others, a second call
    with a smaller shift brings the rows nearer to orthonormal, and two calls without a shift make
    them orthonormal to rounding.

    Args:
      x: X, ``[r, n]``.
      shift: the shift relative to the trace of the Gram matrix.

    Returns:
      Q, ``[r, n]``, and ``trace(I - Q Q')``, an upper bound of how far the squared length of any
      direction falls short of one.

    References:
      Fukaya et al., Shifted Cholesky QR, arXiv 1809.11085.
    """
    gram = matmul_highest(x, x.T)  # [r, r]
    eye = jnp.eye(len(x), dtype=x.dtype)
    lift = shift * jnp.trace(gram) + jnp.finfo(x.dtype).tiny
    lower = jnp.linalg.cholesky(gram + lift * eye)
    # The inverse of a small matrix and a product are faster than a solve for all n columns.
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    # Q Q' = L^-1 (L L' - lift I) L'^-1, so I - Q Q' = lift * L^-1 L'^-1.
    return matmul_highest(inverse, x), lift * jnp.sum(inverse**2)
