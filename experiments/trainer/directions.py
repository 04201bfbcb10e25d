"""Directions of a residual without momentum: transformations that normalize it.

A residual is E = G - P P'G `[m, n]`, the part of a gradient G that its basis P `[m, r]` leaves out.
All directions have the Frobenius norm of m - r orthonormal rows, sqrt(m - r), so that they differ
in shape alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax


def as_adam() -> optax.GradientTransformation:
    """Scales orthogonal matrices `[..., m, n]` to the RMS of Adam's updates, 0.2.

    An orthogonal matrix has the RMS ``1 / sqrt(max(m, n))`` (Liu et al., arXiv 2502.16982).
    """

    def one(update: jax.Array) -> jax.Array:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def _sized(direction: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that scales `direction` of a residual to the norm ``sqrt(m - r)``.

    This is the Frobenius norm that `gum_optax.normalize_columns` gives to residuals.

    Args:
      direction: a function of residuals `[..., m, n]`.
    """

    def one(residual: jax.Array, projected: jax.Array) -> jax.Array:
        m, r = residual.shape[-2], projected.shape[-2]
        # residual [..., m, n], projected [..., r, n]
        found = direction(residual)
        norm = jnp.linalg.norm(found, axis=(-2, -1), keepdims=True)
        # A residual of zero stays zero.
        return (m - r) ** 0.5 * found / jnp.maximum(norm, jnp.finfo(found.dtype).tiny)

    def update(
        updates: Any, state: Any, params: Any = None, *, projected: Any = None, **_: Any
    ) -> Any:
        del params
        return jax.tree.map(one, updates, projected), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _unit_rows(residual: jax.Array) -> jax.Array:
    """Divides each row of residuals `[..., m, n]` by its norm; rows of zeros stay zero."""
    norms = jnp.linalg.norm(residual, axis=-1, keepdims=True)
    return residual / jnp.maximum(norms, jnp.finfo(residual.dtype).tiny)


# By the values of the option `residual`.
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "columns": gum_optax.normalize_columns,
    "rows": lambda: _sized(_unit_rows),
    "sign": lambda: _sized(jnp.sign),
    "plain": lambda: _sized(lambda residual: residual),
}
