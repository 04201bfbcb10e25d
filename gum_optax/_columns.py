r"""Column normalization: stateless directions from the scale of columns alone (SCALE, SWAN).

A column of a JAX kernel [inputs, outputs] holds the weights that feed one output. The
transformation divides every column by its own norm. It has two uses, which give columns different
norms; X is one leaf, or one matrix of a batch:

.. math::
    \text{an update X, m x n:}\quad
    X_j \leftarrow X_j / \max(\|X_j\|_2 / \sqrt m,\ \epsilon)

    \text{a residual } E = G - P P^\top G,\ R = P^\top G:\quad
    E_j \leftarrow \sqrt{(m - r) / n}\; E_j / \max(\|E_j\|_2,\ 2^{-8} \|R_j\|_2)

Tests: tests/library/test_columns.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _mesh
from gum_optax._column_scaling import column_scaling, scaled
from gum_optax._numerics import at_least_float32, norm, safe_scale
from gum_optax._paths import PyTree

# Columns below this share of |R_j| are taken for rounding errors. It is the precision of bfloat16,
# in which gradients often come, and to which TPUs round the operands of products. Where E is zero
# in exact arithmetic, |E_j| / |R_j| was measured at 3e-7 in float32, 2e-3 with bfloat16 gradients.
_NOISE = 2.0**-8


def normalize_columns(eps: float | jax.Array = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Normalizes every column of each update: SCALE's rule, which needs no optimizer state.

    **By itself**, it gives every column (the vector along axis -2, the input dimension of a kernel)
    a root mean square of one, as SCALE's code does; the paper divides by the norm instead, which
    differs by the square root of the dimension. Together with momentum for the output head alone,
    this is SCALE:

    .. math:: X_j \leftarrow X_j / \max(\operatorname{rms}(X_j),\ \epsilon)

    **For the residual of a low-rank method**, ``residuals.through(normalize_columns())``, it also
    receives the projected gradients ``R = P'G`` as the extra argument ``projected``. The residual
    ``E = G - P P'G`` of a wide matrix has rank m - r, and its polar factor would have m - r
    singular values one, a squared Frobenius norm of m - r. Every column gets an equal share of it,
    so that :math:`\|E\|_F^2 = m - r`:

    .. math:: E_j \leftarrow \sqrt{\frac{m - r}{n}} \frac{E_j}{
        \max(\|E_j\|_2,\ 2^{-8} \|R_j\|_2)}

    The second term of the maximum keeps a column small that consists of rounding errors of the
    projection, which are largest in bfloat16.

    Zero columns stay zero. Squares neither overflow nor underflow.

    Args:
      eps: a lower bound of the root mean square that a column is divided by, >= 0. It has no effect
        on residuals.

    Returns:
      A stateless ``optax.GradientTransformationExtraArgs`` for trees of arrays ``[..., m, n]``.
      Its ``update`` takes ``projected``, None or a tree like the updates with arrays
      ``[..., r, n]``. Results have the dtypes of the updates; half precision is computed in
      float32.

    Raises:
      TypeError, ValueError: if ``eps`` is not a finite number >= 0.
      ValueError: from ``init`` and ``update``, if a leaf has fewer than two axes; from ``update``,
        if the shape of a projected gradient does not fit its residual.

    Example:
      SCALE's rule for kernels; vectors need a transformation of their own:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(gum_optax.normalize_columns(), optax.scale_by_learning_rate(1e-3))
      >>> gradients = {"kernel": jnp.array([[3.0, 1.0], [4.0, -1.0]])}
      >>> updates, _ = tx.update(gradients, tx.init(gradients))
      >>> rms = jnp.sqrt(jnp.mean(updates["kernel"] ** 2, axis=-2))
      >>> bool(jnp.allclose(rms, 1e-3))
      True

      The residual of the projection onto the first of two coordinates, r = 1 and n = 3:

      >>> G = jnp.array([[1.0, 2.0, 3.0], [4.0, 0.0, -6.0]])
      >>> E, R = G.at[0].set(0.0), G[:1]
      >>> tx = gum_optax.normalize_columns()
      >>> tx.update(E, tx.init(E), projected=R)[0].round(3)
      Array([[ 0.   ,  0.   ,  0.   ],
             [ 0.577,  0.   , -0.577]], dtype=float32)

    References:
      Glentis et al., SCALE, arXiv 2506.16659.
    """
    _checks.hyperparameter("eps", eps)

    def unit_rms(x: jax.Array) -> jax.Array:
        return _in_range(lambda x: _unit_rms(x, jnp.asarray(eps, x.dtype)), x)

    def normalize(updates: PyTree, projected: PyTree | None) -> PyTree:
        if projected is None:
            return jax.tree.map(unit_rms, updates)
        return jax.tree.map(lambda e, r: _in_range(_of_residual, e, r), updates, projected)

    def init(params: PyTree) -> optax.EmptyState:
        _checks.matrices("normalize_columns", params)
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        projected: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        del params, extra
        _checks.matrices("normalize_columns", updates)
        return _mesh.in_auto_mode(normalize, updates, projected, like=lambda: updates), state

    return column_scaling(init, update, _equal_shares)


def standardize_columns(eps: float | jax.Array = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Gives every column of each update the mean zero and the standard deviation one.

    A column of a kernel [inputs, outputs] holds the weights of one output. This is SWAN's first
    step, ahead of `scale_by_polar`, and needs no optimizer state:

    .. math:: X_j \leftarrow (X_j - \bar X_j) / \max(\operatorname{std}(X_j),\ \epsilon)

    Columns whose entries are equal become zero. Squares neither overflow nor underflow.

    Args:
      eps: lower bound of the standard deviation.

    Returns:
      A stateless ``optax.GradientTransformationExtraArgs`` for trees of arrays ``[..., m, n]``.
      Results have the dtypes of the updates; half precision is computed in float32.

    Raises:
      TypeError, ValueError: if ``eps`` is not a finite number >= 0.
      ValueError: from ``init`` and ``update``, if a leaf has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> tx = gum_optax.standardize_columns()
      >>> G = jnp.array([[3.0, 1.0], [5.0, 1.0]])
      >>> tx.update(G, tx.init(G))[0]
      Array([[-1.,  0.],
             [ 1.,  0.]], dtype=float32)

    References:
      Ma et al., SWAN, arXiv 2412.13148.
    """
    _checks.hyperparameter("eps", eps)

    def standardize(x: jax.Array) -> jax.Array:
        # In units of the largest entry, so that sums stay in range: X_j / s_j, and eps / s_j.
        scale = safe_scale(x, axis=-2)  # [..., 1, n]
        unit = x / scale
        centered = unit - jnp.mean(unit, axis=-2, keepdims=True)
        return _unit_rms(centered, jnp.asarray(eps, x.dtype) / scale)

    def all_leaves(updates: PyTree) -> PyTree:
        return jax.tree.map(lambda x: _in_range(standardize, x), updates)

    def init(params: PyTree) -> optax.EmptyState:
        _checks.matrices("standardize_columns", params)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        del params, extra
        _checks.matrices("standardize_columns", updates)
        return _mesh.in_auto_mode(all_leaves, updates, like=lambda: updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _in_range(function: Any, x: jax.Array, *others: jax.Array) -> jax.Array:
    """Calls a function in float32 or wider, and returns its result in the dtype of ``x``."""
    if x.size == 0:
        return x
    dtype = at_least_float32(x.dtype)
    return function(x.astype(dtype), *(other.astype(dtype) for other in others)).astype(x.dtype)


def _unit_rms(x: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns ``x`` [..., m, n] with columns of root mean square one."""
    # X_j / max(rms(X_j), eps) = Y_j / max(rms(Y_j), eps / s_j)  with Y_j = X_j / s_j and
    # s_j = max_i |x_ij|
    scale = safe_scale(x, axis=-2)  # [..., 1, n]
    unit = x / scale
    rms = jnp.sqrt(jnp.mean(unit**2, axis=-2, keepdims=True))
    divisor = jnp.maximum(rms, eps / scale)
    # The divisor is zero for a zero column with eps = 0.
    return unit / jnp.where(divisor > 0, divisor, 1)


def _equal_shares(
    norms: jax.Array,
    rows: int,
    projected: jax.Array,
    projected_update: jax.Array | None,
    state: Any,
) -> tuple[jax.Array, Any]:
    """Returns the factors that give columns of a residual the norm ``sqrt((m - r) / n)``."""
    del projected_update
    r, n = projected.shape[-2:]
    # c_j = sqrt((m - r) / n) / max(|E_j|, 2^-8 |R_j|, tiny)
    divisor = jnp.maximum(norms, _NOISE * norm(projected, -2))
    divisor = jnp.maximum(divisor, jnp.finfo(norms.dtype).tiny)
    return ((rows - r) / n) ** 0.5 / divisor, state


def _of_residual(residual: jax.Array, projected: jax.Array) -> jax.Array:
    """Returns a residual E [..., m, n] with columns of norm ``sqrt((m - r) / n)``."""
    *batch, m, n = residual.shape
    r = projected.shape[-2] if projected.ndim > 1 else m + 1
    if projected.shape != (*batch, r, n) or r > m:
        raise ValueError(
            "`projected` must hold R = P'G of shape [..., r, n], r <= m, for each residual "
            f"[..., m, n], got {projected.shape} for {residual.shape}; pass both as wide matrices."
        )
    return scaled(_equal_shares, residual, projected, None, ())[0]
