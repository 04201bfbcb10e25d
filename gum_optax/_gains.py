r"""Gains: matrices scaled as a low-rank optimizer scales their projections (Fira, APOLLO).

A low-rank optimizer maps ``R = P'G`` to an update D. The ratio of their norms is its *gain*. The
part of G that it does not see is scaled by the same gain:

.. math::
    S_j = \frac{\|D_j\|}{\|R_j\| + \epsilon}\, X_j \quad\text{(per column)}, \qquad
    S = \frac{\|D\|_F}{\|R\|_F + \epsilon}\, X \quad\text{(per matrix)}

    \text{then, with } z = \|S\|_F \text{ of the step before, if } z > 0: \quad
    S \leftarrow S / \max\!\left(1, \frac{\|S\|_F}{\text{limit}\,(z + \epsilon)}\right)

Tests: tests/library/test_gains.py.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks
from gum_optax._column_scaling import column_scaling, scaled
from gum_optax._numerics import at_least_float32, norm
from gum_optax._paths import PyTree, unzip


def scale_by_gain(
    per: Literal["column", "matrix"] = "column",
    *,
    growth_limit: float | None = 1.01,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales matrices by the gain of a low-rank optimizer: the rule of Fira and of APOLLO.

    It is made for `residuals.through` (Fira) and `residuals.guided` (APOLLO), which pass the
    projected gradients R and their updates D as extra arguments. Then with X the residual (Fira) or
    the gradient (APOLLO) of a wide matrix,

    .. math::
        S_j = \frac{\|D_j\|}{\|R_j\| + \epsilon}\, X_j \quad\text{(per column)}, \qquad
        S = \frac{\|D\|_F}{\|R\|_F + \epsilon}\, X \quad\text{(per matrix)}

    The *norm-growth limiter* lets the norm of a matrix's result grow by at most the factor
    ``growth_limit`` per step. After a result of norm zero it does not limit, unlike the official
    codes, where a matrix whose gradient was once zero stays frozen for 1,387 steps.

    Args:
      per: ``"column"``: one gain per column of a wide matrix; ``"matrix"``: one per matrix.
      growth_limit: the largest ratio of the norms of two successive steps, > 0; None: no limit.
      eps: added to the norm of R in the denominator, > 0.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for trees of wide matrices ``[..., m, n]``. Its
      state is the norm of each matrix's last result, ``[...]``, float32 or wider. ``update`` needs
      ``projected`` and ``projected_update``, trees like the updates with arrays ``[..., r, n]``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and from ``update``, if the extra
        arguments are missing.

    Example:
      >>> import gum_optax
      >>> residual = gum_optax.residuals.through(gum_optax.scale_by_gain())
      >>> fira = gum_optax.adamw(1e-3, gum_optax.galore(rank=64, residual=residual))

    References:
      Chen et al., Fira, arXiv 2410.01623, equations 5 to 9; Zhu et al., APOLLO, arXiv 2412.05270.
    """
    _checks.one_of("per", per, ("column", "matrix"))
    _checks.hyperparameter("eps", eps)
    if growth_limit is not None:
        _checks.hyperparameter("growth_limit", growth_limit)
    axes = -2 if per == "column" else (-2, -1)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(no_norm_yet, params)

    def factors(
        norms: jax.Array,
        rows: int,
        projected: jax.Array,
        projected_update: jax.Array | None,
        last: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        del rows
        assert projected_update is not None
        # gain = |D| / (|R| + eps), [..., 1, n] or [..., 1, 1]
        gain = norm(projected_update, axes) / (norm(projected, axes) + eps)
        if growth_limit is None:
            return gain, last
        # S = X diag(gain) has columns of the norms `gain * norms`.
        divisor, sizes = growth(norm(gain * norms, (-2, -1)), last, growth_limit, eps)
        return gain / divisor, sizes

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        projected: PyTree | None = None,
        projected_update: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        if projected is None or projected_update is None:
            raise ValueError(
                "`scale_by_gain` needs `projected` and `projected_update`, which "
                "`residuals.through` and `residuals.guided` give it; it does nothing by itself."
            )
        leaves, treedef = jax.tree.flatten(updates)
        others = map(treedef.flatten_up_to, (projected, projected_update, state))
        return unzip(updates, [scaled(factors, *row) for row in zip(leaves, *others, strict=True)])

    return column_scaling(init, update, factors)


def no_norm_yet(leaf: jax.Array) -> jax.Array:
    """Returns z for matrices ``[..., m, n]`` before their first result: zeros ``[...]``."""
    # Not in bfloat16, which would round a growth of 1 % to 0.8 or 1.6 %.
    return jnp.zeros(leaf.shape[:-2], at_least_float32(leaf.dtype))


def growth(
    sizes: jax.Array, last: jax.Array, limit: float, eps: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Limits the growth of norms from step to step.

    Args:
      sizes: ``|S|`` of matrices, ``[..., 1, 1]``.
      last: z, the norms of their last results ``[...]``; where it is zero, there is no limit.
      limit: the largest ratio of two successive norms.
      eps: added to z.

    Returns:
      The divisor ``max(1, |S| / (limit (z + eps)))`` of S, ``[..., 1, 1]``, and the norms of the
      results, ``[...]``, in the dtype of ``last``.
    """
    z = last[..., None, None]
    excess = jnp.maximum(sizes / (limit * (jnp.where(z > 0, z, 1.0) + eps)), 1.0)
    divisor = jnp.where(z > 0, excess, 1.0)
    return divisor, (sizes / divisor)[..., 0, 0].astype(last.dtype)
