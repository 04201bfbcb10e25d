r"""Orthogonalization without a singular value decomposition: polar factors and bases.

Words used here, for ``X = U S V'``, the thin singular value decomposition of a matrix [m, n]:

- The *polar factor* of X is ``U V'``, X with all of its nonzero singular values set to one. Muon
  steps along it. `newton_schulz` approximates it by odd polynomials of X.
- A *basis* [m, r] has orthonormal columns that span (nearly) the top r left singular vectors of X.
  `power_iteration_basis` finds it by repeated products with ``X X'``.

Both consist of matrix products, which accelerators run fastest, and of Cholesky factors r x r.
Matrices are wide here, m <= n: a tall one is transposed first, so that Gram matrices are small.

Tests: tests/library/test_orthogonal.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _checks, _mesh, _scheduling

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

_GRAM_ASPECT = 4  # n / m from which steps run on Gram matrices; measured faster there on CPUs


# Products and scales --------------------------------------------------------------------------


def matmul_highest(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``a @ b`` at the dtype's full precision.

    By default TPUs and GPUs round float32 operands to 8 to 11 bits.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def safe_scale(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns a divisor that brings ``x`` into range: its largest absolute entry, or 1 for zero.

    Args:
      x: any array that is not empty.
      axis: the axis to take the maximum over, which the result keeps with length 1; by default all
        axes, which gives a scalar.
    """
    # Products of entries such as 1e-30 or 1e30 would leave the range of float32, and so would the
    # inverse of a denormal scale.
    entry = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
    return jnp.where(entry > 0, jnp.maximum(entry, 100 * jnp.finfo(x.dtype).tiny), 1)


# Polar factors --------------------------------------------------------------------------------


def newton_schulz(
    x: jax.Array,
    ns_coeffs: Sequence[Any] = MUON_COEFFICIENTS,
    ns_steps: int = 5,
    eps: float | jax.Array = 1e-8,
) -> jax.Array:
    r"""Approximates the polar factor :math:`(X X^\top)^{-1/2} X` of each matrix.

    .. math::
        X_0 = X / (\|X\|_F + \epsilon), \qquad
        X_{k+1} = a X_k + (b A + c A^2) X_k, \quad A = X_k X_k^\top

    Muon's coefficients bring singular values near one but not to it (between about 0.7 and 1.2);
    in exchange, their polynomial has a steep slope at zero, which lifts small singular values in
    few steps.

    Args:
      x: ``[..., m, n]``, real floating point; leading axes are batch axes.
      ns_coeffs: ``(a, b, c)``, or one such triple per step (then ``ns_steps`` is ignored).
      ns_steps: number of steps, an int >= 1.
      eps: added to the norm; matrices whose norm is far below it stay small.

    Returns:
      An array of the shape and dtype of ``x``. Zero matrices stay zero.

    Raises:
      TypeError, ValueError: if ``ns_coeffs`` or ``ns_steps`` is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import newton_schulz
      >>> values = jnp.linalg.svd(newton_schulz(jnp.diag(jnp.array([3.0, 1.0]))), compute_uv=False)
      >>> bool(jnp.all((values > 0.6) & (values < 1.25)))
      True

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    coefficients = _coefficients(ns_coeffs, ns_steps)

    def polar(x: jax.Array) -> jax.Array:
        return _newton_schulz(x, coefficients, eps)

    return _mesh.in_auto_mode(polar, x, like=lambda: x)


def _newton_schulz(x: jax.Array, coefficients: np.ndarray, eps: float | jax.Array) -> jax.Array:
    if x.size == 0:
        return x
    # 1. Turn tall matrices: polar(X') = polar(X)'.
    wide = x.mT if x.shape[-2] > x.shape[-1] else x  # [..., m, n]

    # 2. X_0 = X / (|X|_F + eps). Scaling by the largest entry first keeps the squares of the norm
    #    within the dtype's range: with s = max |x_ij|, X_0 = (X / s) / (|X / s|_F + eps / s).
    largest = jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True)  # [..., 1, 1]
    largest = jnp.where(largest > 0, largest, 1)
    wide = wide / largest
    norm = jnp.sqrt(jnp.sum(wide**2, axis=(-2, -1), keepdims=True))
    scale = norm + eps / largest
    # The scale is zero for a zero matrix with eps = 0.
    wide = _mesh.gather_rows(wide / jnp.where(scale > 0, scale, 1))

    # 3. Iterate, on the form of the iteration that needs fewer multiplications.
    m, n = wide.shape[-2:]
    iterate = _in_gram_space if n >= _GRAM_ASPECT * m else _directly
    wide = _mesh.gather_rows(iterate(wide, coefficients))
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def _directly(x: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """Runs the iteration as it is defined: 2 m^2 n + m^3 multiplications a step."""

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        # A = X X',  X <- a X + (b A + c A^2) X
        gram = x @ x.mT  # [..., m, m]
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    # A scan, not an unrolled loop: unrolled, every iterate may stay alive at once.
    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def _in_gram_space(x: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """Runs the iteration on m x m matrices, for n much larger than m.

    Every iterate is a polynomial of the first Gram matrix times the first iterate, ``X_k = T X_0``,
    and so is its own Gram matrix, ``A_k = T A_0 T``. Hence only m x m matrices change from step to
    step, and products with n columns are needed twice in three steps.

    Gram matrices square singular values, so rounding errors grow. A new Gram matrix every three
    steps keeps the error near that of `_directly` (five steps in float32, spectral norm, measured:
    1.6e-5 and 1.3e-5 at most; without, 5e-4). The polynomial is kept as ``T = scale * I + rest``,
    and its products run at full precision, since large terms may cancel in it.
    """
    eye = jnp.eye(x.shape[-2], dtype=x.dtype)
    for block in np.split(coefficients, range(3, len(coefficients), 3)):
        gram, scale, rest = matmul_highest(x, x.mT), 1.0, jnp.zeros_like(eye)  # [..., m, m]
        for step, (a, b, c) in enumerate(block.tolist()):
            # F = b A + c A^2,  T <- (a I + F) T; the first T is I, so F times its rest is zero.
            factor = b * gram + c * matmul_highest(gram, gram)
            rest = a * rest + scale * factor + (matmul_highest(factor, rest) if step else 0)
            scale = a * scale
            if step < len(block) - 1:
                # A <- (a I + F) A (a I + F)
                factor += a * eye
                gram = matmul_highest(factor, matmul_highest(gram, factor))
        # X <- T X
        x = scale * x + rest @ x
    return x


def _coefficients(ns_coeffs: Sequence[Any], ns_steps: int) -> np.ndarray:
    """Returns one triple (a, b, c) per step, ``[steps, 3]``, or raises."""
    steps = _checks.positive_int("ns_steps", ns_steps)
    coefficients: np.ndarray
    try:
        coefficients = np.asarray(ns_coeffs, np.float64)
    except (TypeError, ValueError):
        coefficients = np.zeros(0)
    if coefficients.ndim == 1:
        coefficients = np.tile(coefficients, (steps, 1))
    if coefficients.ndim != 2 or coefficients.shape[1] != 3 or not len(coefficients):
        raise ValueError(
            "`ns_coeffs` must have shape (3,), or (steps, 3) with one triple per step, got "
            f"{ns_coeffs!r}."
        )
    if not np.isfinite(coefficients).all():
        raise ValueError(f"`ns_coeffs` must be finite, got {ns_coeffs!r}.")
    return coefficients


def scale_by_polar(
    ns_coeffs: Sequence[Any] = MUON_COEFFICIENTS,
    ns_steps: int = 5,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformation:
    """Replaces every update by its polar factor: Muon without momentum.

    Batches of large matrices (short side above 256) are orthogonalized one matrix at a time, which
    bounds the memory for temporaries; there, zero matrices cost nothing.

    Args:
      ns_coeffs: Newton-Schulz coefficients, see `newton_schulz`.
      ns_steps: number of Newton-Schulz steps, an int >= 1.
      eps: added to the norm before the iteration.

    Returns:
      A stateless ``optax.GradientTransformation`` for trees of arrays ``[..., m, n]``.

    Raises:
      TypeError, ValueError: if a coefficient, ``ns_steps`` or ``eps`` is out of range.

    Example:
      >>> import optax
      >>> from gum_optax import scale_by_polar
      >>> muon = optax.chain(optax.trace(0.95), scale_by_polar(), optax.scale(-0.02))

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    _checks.hyperparameter("eps", eps)
    _coefficients(ns_coeffs, ns_steps)

    def polar(x: jax.Array) -> jax.Array:
        return newton_schulz(x, ns_coeffs, ns_steps, eps)

    def apply(x: jax.Array) -> jax.Array:
        # A loop over a sharded batch axis would gather it.
        if x.ndim > 2 and _scheduling.is_large(x) and not _mesh.on_mesh(x):
            return _scheduling.one_by_one(polar, x)
        return polar(x)

    def apply_all(updates: Any) -> Any:
        return jax.tree.map(apply, updates)

    return optax.stateless(
        lambda updates, params: _mesh.in_auto_mode(apply_all, updates, like=lambda: updates)
    )


# Bases ----------------------------------------------------------------------------------------


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
    slow = partial(iterate, lambda rows: jnp.linalg.qr(rows.T)[0].T)
    return jax.lax.cond(succeeded, lambda: fast, slow).T


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

    The shift keeps Gram matrices positive definite that rounding may have made indefinite. The rows
    of Q span the same space as those of X, and are orthonormal where singular values of X are well
    above the square root of the shift (relative to its norm). For the others, a second call with a
    smaller shift brings the rows nearer to orthonormal, and two calls without a shift make them
    orthonormal to rounding.

    Args:
      x: X, ``[r, n]``.
      shift: the shift relative to the trace of the Gram matrix.

    Returns:
      Q, ``[r, n]``, and ``trace(I - Q Q')``, by which at most any direction's squared length falls
      short of one.

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
