"""Muon's base: momentum, then orthogonalization by Newton-Schulz."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _checks, _mesh, _products
from gum_optax._codec import Compressed

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

    With Muon's coefficients singular values end near one, not at it (between about 0.7 and 1.2), in
    exchange for a steep slope at zero.

    Args:
      x: ``[..., m, n]``, real floating point; leading axes are batch.
      ns_coeffs: ``(a, b, c)``, or one such triple per step (then ``ns_steps`` is not used).
      ns_steps: number of steps, an int >= 1.
      eps: added to the norm; matrices far smaller than it stay small.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError, ValueError: if ``ns_coeffs`` or ``ns_steps`` is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import newton_schulz
      >>> jnp.linalg.svd(newton_schulz(jnp.diag(jnp.array([3.0, 1.0]))))[1].shape
      (2,)

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    coefficients = _coefficients(ns_coeffs, ns_steps)

    def polar(x: jax.Array) -> jax.Array:
        return _newton_schulz(x, coefficients, eps)

    return _mesh.in_auto_mode(polar, x, like=x)


def _newton_schulz(x: jax.Array, coefficients: np.ndarray, eps: float | jax.Array) -> jax.Array:
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    # Scaling by the largest entry first keeps the squares of the norm within the dtype's range.
    largest = jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    wide = wide / largest
    norm = jnp.sqrt(jnp.sum(wide**2, axis=(-2, -1), keepdims=True))
    scale = norm + eps / largest
    wide = _mesh.gather_rows(wide / jnp.where(scale > 0, scale, 1))
    m, n = wide.shape[-2:]
    iterate = _in_gram_space if n >= _GRAM_ASPECT * m else _directly
    wide = _mesh.gather_rows(iterate(wide, coefficients))
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def _directly(x: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """The iteration as it is written: 2 m^2 n + m^3 multiplications a step."""

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    # A scan, not an unrolled loop: unrolled, every iterate may stay alive at once.
    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def _in_gram_space(x: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """The iteration on m x m matrices, for n much larger than m: n is touched twice in three steps.

    An iterate is a polynomial of the first Gram matrix times the start, and so is its own Gram
    matrix. That squares singular values, so rounding grows; a new Gram matrix every three steps
    keeps the error near that of `_directly` (five steps in float32, spectral norm, measured: 1.6e-5
    and 1.3e-5 at most; without, 5e-4). The polynomial is kept as ``scale * I + rest`` and its
    products at full precision, since what it cancels may be large.
    """
    eye = jnp.eye(x.shape[-2], dtype=x.dtype)
    for block in np.split(coefficients, range(3, len(coefficients), 3)):
        gram, scale, rest = _products.exact(x, x.mT), 1.0, jnp.zeros_like(eye)
        for step, (a, b, c) in enumerate(block.tolist()):
            factor = b * gram + c * _products.exact(gram, gram)
            rest = a * rest + scale * factor + (_products.exact(factor, rest) if step else 0)
            scale = a * scale
            if step < len(block) - 1:
                factor += a * eye
                gram = _products.exact(factor, _products.exact(gram, factor))
        x = scale * x + rest @ x
    return x


def _coefficients(ns_coeffs: Sequence[Any], ns_steps: int) -> np.ndarray:
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

    Args:
      ns_coeffs: Newton-Schulz coefficients, see `newton_schulz`.
      ns_steps: number of Newton-Schulz steps.
      eps: added to the norm before the iteration.

    Returns:
      A stateless ``optax.GradientTransformation`` for leaves ``[..., m, n]``, and for the
      compressed values that `low_rank` gives to its base.

    Raises:
      TypeError, ValueError: if a coefficient, ``ns_steps`` or ``eps`` is out of range.

    Example:
      >>> import optax
      >>> from gum_optax import scale_by_polar
      >>> muon = optax.chain(optax.trace(0.95), scale_by_polar(), optax.scale(-0.02))
    """
    _checks.hyperparameter("eps", eps)
    _coefficients(ns_coeffs, ns_steps)

    def polar(x: jax.Array) -> jax.Array:
        return newton_schulz(x, ns_coeffs, ns_steps, eps)

    def one_by_one(x: jax.Array) -> jax.Array:
        """For full-size matrices: temporaries of one at a time, and empty slots cost nothing."""

        def in_place(i: jax.Array, matrices: jax.Array) -> jax.Array:
            matrix = matrices[i]
            return matrices.at[i].set(
                jax.lax.cond(jnp.any(matrix != 0), polar, jnp.zeros_like, matrix)
            )

        if x.size == 0:
            return x
        matrices = x.reshape(-1, *x.shape[-2:])
        return jax.lax.fori_loop(0, len(matrices), in_place, matrices).reshape(x.shape)

    def apply(update: Any) -> Any:
        if isinstance(update, Compressed):
            return Compressed(
                polar(update.low), None if update.full is None else one_by_one(update.full)
            )
        # A loop over a batch axis that is sharded would gather it.
        return polar(update) if _mesh.on_mesh(update) else one_by_one(update)

    def apply_all(updates: Any) -> Any:
        return jax.tree.map(apply, updates, is_leaf=lambda x: isinstance(x, Compressed))

    return optax.stateless(
        lambda updates, params: _mesh.in_auto_mode(apply_all, updates, like=updates)
    )
