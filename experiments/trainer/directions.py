"""The residual without momentum: rules that normalize it, by the names that options have for them.

A residual is E = G - P P'G, the part of a gradient that its basis leaves out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax


def as_adam() -> optax.GradientTransformation:
    """Brings an orthogonal matrix [..., m, n] to the size of Adam's update (2502.16982)."""

    def one(update: jax.Array) -> jax.Array:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def _sized(direction: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """A direction of residuals E [..., m, n], brought to the norm of m - r orthonormal rows.

    That is the size that `gum_optax.normalize_columns` gives them: |E|_F = sqrt(m - r).
    """

    def one(residual: jax.Array, projected: jax.Array) -> jax.Array:
        m, r = residual.shape[-2], projected.shape[-2]
        found = direction(residual)
        norm = jnp.linalg.norm(found, axis=(-2, -1), keepdims=True)
        return (m - r) ** 0.5 * found / jnp.maximum(norm, jnp.finfo(found.dtype).tiny)

    def update(
        updates: Any, state: Any, params: Any = None, *, projected: Any = None, **_: Any
    ) -> Any:
        del params
        return jax.tree.map(one, updates, projected), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _unit_rows(residual: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(residual, axis=-1, keepdims=True)
    return residual / jnp.maximum(norms, jnp.finfo(residual.dtype).tiny)


DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "columns": gum_optax.normalize_columns,
    "rows": lambda: _sized(_unit_rows),
    "sign": lambda: _sized(jnp.sign),
    "plain": lambda: _sized(lambda residual: residual),
}
