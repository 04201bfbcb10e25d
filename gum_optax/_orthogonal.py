r"""Polar factors without a singular value decomposition: Newton-Schulz.

With ``X = U S V'``, the thin singular value decomposition of a matrix [m, n], the *polar factor* of
X is ``U V'``: X with all of its nonzero singular values set to one. Muon steps along it.
`newton_schulz` approximates it by odd polynomials of X, which consist of matrix products.

Matrices are wide inside, m <= n: tall ones are transposed first, so that Gram matrices are small.

Tests: tests/library/test_orthogonal.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _checks, _mesh, _scheduling
from gum_optax._numerics import matmul_highest

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

_GRAM_ASPECT = 4  # n / m from which steps run on Gram matrices; measured faster there on CPUs


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

    Muon's coefficients bring singular values near one, between about 0.7 and 1.2, but not exactly
    to one. In exchange, their polynomial has a steep slope at zero, which raises small singular
    values in few steps.

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
    """Runs the iteration by its definition: 2 m^2 n + m^3 multiplications per step."""

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        # A = X X',  X <- a X + (b A + c A^2) X
        gram = x @ x.mT  # [..., m, m]
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    # A scan, not an unrolled loop: unrolled, every iterate may stay alive at once.
    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def _in_gram_space(x: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """Runs the iteration on m x m matrices, for n much larger than m.

    Every iterate is the first iterate times a polynomial T of the first Gram matrix,
    ``X_k = T X_0``, so its own Gram matrix is ``A_k = T A_0 T``. Hence only m x m matrices change
    from step to step, and products with n columns are needed twice in three steps.

    A Gram matrix has squared singular values, so rounding errors grow. A new Gram matrix every
    three steps keeps the error near that of `_directly` (five steps in float32, largest error in
    spectral norm, measured: 1.6e-5 here, 1.3e-5 there, and 5e-4 with one Gram matrix for all
    steps). The polynomial is stored as ``T = scale * I + rest``, and its products run at full
    precision, since large terms may cancel in it.
    """
    eye = jnp.eye(x.shape[-2], dtype=x.dtype).reshape(*[1] * (x.ndim - 2), *x.shape[-2:-1] * 2)
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
    bounds the memory of temporaries. In such batches zero matrices, as in empty slots, are skipped.

    Args:
      ns_coeffs: Newton-Schulz coefficients, see `newton_schulz`.
      ns_steps: number of Newton-Schulz steps, an int >= 1.
      eps: added to the norm before the iteration.

    Returns:
      A stateless ``optax.GradientTransformationExtraArgs`` for trees of arrays ``[..., m, n]``;
      results have the dtypes of the updates. The extra argument ``outside``, a tree like the
      updates of bases P ``[..., m, r]`` or None, projects results out of bases: ``F - P P'F``.

    Raises:
      TypeError, ValueError: if ``ns_coeffs``, ``ns_steps`` or ``eps`` is malformed.

    Example:
      >>> import optax
      >>> from gum_optax import scale_by_polar
      >>> muon = optax.chain(optax.trace(0.95), scale_by_polar(), optax.scale(-0.02))

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    _checks.hyperparameter("eps", eps)
    _coefficients(ns_coeffs, ns_steps)
    return matrix_by_matrix(lambda x: newton_schulz(x, ns_coeffs, ns_steps, eps))


def matrix_by_matrix(
    direction: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that replaces every matrix by its direction.

    Args:
      direction: maps ``[..., m, n]`` to the same shape and dtype, and zero to zero.

    Returns:
      A stateless transformation. Batches of large matrices take turns in a loop. The extra argument
      ``outside``, a tree like the updates of bases P ``[..., m, r]`` or None, projects results
      out of bases: ``F - P P'F``.
    """

    def one(x: jax.Array, *bases: jax.Array) -> jax.Array:
        result = direction(x)
        for basis in bases:  # one or none
            result = (result - basis @ (basis.mT @ result)).astype(x.dtype)
        return result

    def apply(x: jax.Array, basis: jax.Array | None) -> jax.Array:
        bases = () if basis is None else (basis,)
        if _scheduling.takes_turns(x):
            return _scheduling.one_by_one(one, x, *bases)
        return one(x, *bases)

    def apply_all(updates: Any, outside: Any) -> Any:
        leaves, treedef = jax.tree.flatten(updates)
        bases = [None] * len(leaves) if outside is None else treedef.flatten_up_to(outside)
        return treedef.unflatten(_scheduling.in_sequence(apply, leaves, bases))

    def update(
        updates: Any, state: Any, params: Any = None, *, outside: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        return _mesh.in_auto_mode(apply_all, updates, outside, like=lambda: updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
