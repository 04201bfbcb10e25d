"""Block power iteration: an orthonormal basis of a matrix's top subspace, without an SVD.

Everything is matrix products and Cholesky factors r x r, and Householder reflections where those
fail. What it is used for is in `projectors`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gum_optax import _products


def basis(gradient: jax.Array, start: jax.Array, iterations: int) -> jax.Array:
    """An orthonormal basis ``[m, r]`` of ``(G G')^iterations start``."""
    largest = _products.largest(gradient)

    def iterate(orthonormalize: Callable[[jax.Array], jax.Array]) -> jax.Array:
        rows = start.T
        for _ in range(iterations):
            # Tensor cores may round these two: the basis is random anyway, the energy it captures
            # was measured equal to four digits with bfloat16 operands.
            rows = orthonormalize(jnp.matmul(rows / largest, gradient))
            rows = orthonormalize(jnp.matmul(rows / largest, gradient.T))
        return rows

    # Cholesky is several times as fast as Householder reflections on CPUs, and on accelerators
    # nearly all of it is matrix products; but it can fail on gradients of a rank below r.
    fast = iterate(well_conditioned_rows)
    for _ in range(2):
        fast, _ = orthonormal_rows(fast, shift=0.0)
    eye = jnp.eye(len(fast), dtype=fast.dtype)
    tolerance = 4 * jnp.finfo(fast.dtype).eps * gradient.shape[0] ** 0.5
    # Not `max(...) <= tolerance`: XLA's CPU backend passes over NaNs in a maximum.
    succeeded = jnp.all(jnp.abs(_products.exact(fast, fast.T) - eye) <= tolerance)
    slow = partial(iterate, lambda rows: jnp.linalg.qr(rows.T)[0].T)
    return jax.lax.cond(succeeded, lambda: fast, slow).T


def well_conditioned_rows(x: jax.Array) -> jax.Array:
    """Rows that span what those of ``x`` do, orthonormal up to a factor of two or so.

    Where the shift takes more from some direction, weak ones are still far below unit length: the
    next product would weaken them again, and soon they would be lost in rounding.
    """
    rows, lost = orthonormal_rows(x, shift=1e-6)
    return jax.lax.cond(lost < 0.5, lambda: rows, lambda: orthonormal_rows(rows, shift=1e-7)[0])


def orthonormal_rows(x: jax.Array, shift: float) -> tuple[jax.Array, jax.Array]:
    """``Q = L^-1 X`` with ``L L' = X X' + shift * trace(X X') I``, and ``trace(I - Q Q')``.

    The shift keeps what rounding may have made indefinite positive definite. Rows span the same
    space, and are orthonormal where singular values are well above the shift's root; where they are
    not, again with a smaller shift brings them nearer, and twice without makes them orthonormal to
    rounding. No direction's squared length is below one minus the trace.

    References:
      Fukaya et al., Shifted Cholesky QR, arXiv 1809.11085.
    """
    gram = _products.exact(x, x.T)
    eye = jnp.eye(len(x), dtype=x.dtype)
    lift = shift * jnp.trace(gram) + jnp.finfo(x.dtype).tiny
    lower = jnp.linalg.cholesky(gram + lift * eye)
    # The inverse of a small matrix and a product, which are faster than solving for all columns.
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    # Q Q' = L^-1 (L L' - lift I) L'^-1, so that I - Q Q' = lift * L^-1 L'^-1.
    return _products.exact(inverse, x), lift * jnp.sum(inverse**2)
