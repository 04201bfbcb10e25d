r"""Residuals whose columns are scaled, without the residuals themselves.

The update of a low-rank method that scales the columns of its residual ``E = G - P R`` is

.. math::
    U = P D + E \,\text{diag}(c) = P \,(D - R \,\text{diag}(c)) + G \,\text{diag}(c)

so E is not needed for it. The factors c depend on the norms of its columns, and these follow from
inner products of length r:

.. math::
    \|E_j\|^2 = \|G_j\|^2 - R_j^\top (2 R - P^\top P R)_j \qquad (R = P^\top G)

which holds for any P, also one in few bits that is orthonormal only up to rounding. An update then
takes the two large products of a method that drops the residual, where E would take a third, and
its own memory.

Tests: tests/library/test_column_scaling.py.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gum_optax._numerics import norm, safe_scale

Factors: TypeAlias = Callable[[jax.Array, int, jax.Array, Any, Any], tuple[jax.Array, Any]]
"""``(norms, rows, projected, projected_update, state) -> (c, state)`` of one leaf.

The factors c of the columns of its residual, ``[..., 1, n]`` or one for all, from ``|E_j|``
``[..., 1, n]``, m, and R and D ``[..., r, n]``; D may be None, where the caller has none.
"""


_NAME = "column_factors"


def column_scaling(
    init: Callable[..., Any], update: Callable[..., Any], factors: Factors
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that multiplies the columns of residuals by factors.

    The factors are an attribute of its ``update``, so that a copy with another update loses them.
    """
    setattr(update, _NAME, factors)
    return optax.GradientTransformationExtraArgs(init, update)


def factors_of(transformation: optax.GradientTransformation) -> Factors | None:
    """Returns the factors of a transformation that was made by `column_scaling`, or None."""
    return getattr(transformation.update, _NAME, None)


def scaled(
    factors: Factors,
    residual: jax.Array,
    projected: jax.Array,
    projected_update: jax.Array | None,
    state: Any,
) -> tuple[jax.Array, Any]:
    """Returns ``E diag(c)`` of a residual ``[..., m, n]`` that exists, and the new state."""
    rows = residual.shape[-2]
    c, state = factors(norm(residual, -2), rows, projected, projected_update, state)
    return c * residual, state


def expanded(
    factors: Factors,
    basis: jax.Array,
    projected_update: jax.Array,
    projected: jax.Array,
    gradient: jax.Array,
    state: Any,
) -> tuple[jax.Array, Any]:
    """Returns ``P D + E diag(c)`` without E, and the new state.

    Args:
      factors: the factors of the columns.
      basis: P, ``[..., m, r]``.
      projected_update: D, ``[..., r, n]``.
      projected: R = P'G, ``[..., r, n]``.
      gradient: G, wide, ``[..., m, n]``.
      state: the state of the leaf.
    """
    # 1. |E_j|^2 in units of s_j^2, with s_j = max_i |G_ij|, so that squares stay in range.
    #    Rounding may make a square of zero slightly negative.
    scale = safe_scale(gradient, -2)  # [..., 1, n]
    unit = projected / scale
    twice = 2 * unit - (basis.mT @ basis) @ unit  # 2 R - P'P R
    squares = jnp.sum((gradient / scale) ** 2, axis=-2, keepdims=True)
    squares = squares - jnp.sum(unit * twice, axis=-2, keepdims=True)
    norms = scale * jnp.sqrt(jnp.maximum(squares, 0))
    # 2. U = P (D - R diag(c)) + G diag(c)
    c, state = factors(norms, basis.shape[-2], projected, projected_update, state)
    return basis @ (projected_update - c * projected) + c * gradient, state
