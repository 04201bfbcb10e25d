"""Directions of a residual without momentum: transformations that normalize it.

A residual is E = G - P P'G `[m, n]`, the part of a gradient G that its basis P `[m, r]` leaves out.
All directions have the Frobenius norm of m - r orthonormal rows, sqrt(m - r), so that they differ
in shape alone; `energy` has it on average over steps.
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


def _averages_of_columns(params: Any) -> tuple[jax.Array, Any]:
    """Returns a count of steps and a zero for each column of matrices, `[..., 1, n]`."""

    def zeros(leaf: Any) -> jax.Array:
        return jnp.zeros((*leaf.shape[:-2], 1, leaf.shape[-1]), leaf.dtype)

    return jnp.zeros((), jnp.int32), jax.tree.map(zeros, params)


def equal_outputs(decay: float) -> optax.GradientTransformationExtraArgs:
    """Divides columns by the root of a running average of their mean squares, at an RMS of 0.2.

    A column of a kernel `[..., m, n]` holds the weights of one output. The average of each, `[...,
    1, n]`, is corrected for its start at zero, and a matrix keeps the RMS of Adam's updates.

    References:
      Li et al., NorMuon, arXiv 2510.05491.
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        del params
        count, averages = optax.safe_increment(state[0]), state[1]

        # X [..., m, n], v [..., 1, n]:   v <- decay v + (1 - decay) mean_i X_ij^2
        def average(X: jax.Array, v: jax.Array) -> jax.Array:
            return decay * v + (1 - decay) * jnp.mean(X**2, axis=-2, keepdims=True)

        # U = X / sqrt(v / (1 - decay^t)),   U <- 0.2 U / rms(U)
        def one(X: jax.Array, v: jax.Array) -> jax.Array:
            U = X / jnp.maximum(jnp.sqrt(v / (1 - decay**count)), 1e-8)
            rms = jnp.sqrt(jnp.mean(U**2, axis=(-2, -1), keepdims=True))
            return 0.2 * U / jnp.maximum(rms, 1e-8)

        averages = jax.tree.map(average, updates, averages)
        return jax.tree.map(one, updates, averages), (count, averages)

    return optax.GradientTransformationExtraArgs(_averages_of_columns, update)


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


def _by_energy(decay: float = 0.9) -> optax.GradientTransformationExtraArgs:
    """Divides the columns of residuals by a running average of their norms: Alice's scale.

    With p_j an average of |E_j|^2 that is corrected for its start at zero, E_j becomes
    ``sqrt((m - r) / n) E_j / sqrt(p_j)``, so that the whole has the norm sqrt(m - r) on average.

    References:
      Gong et al., arXiv 2502.07752, by secondary sources, without its limit on growing norms.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, projected: Any = None, **_: Any
    ) -> Any:
        del params
        count, averages = optax.safe_increment(state[0]), state[1]

        # E [..., m, n], p [..., 1, n]
        def average(E: jax.Array, p: jax.Array) -> jax.Array:
            return decay * p + (1 - decay) * jnp.sum(E**2, axis=-2, keepdims=True)

        def one(E: jax.Array, R: jax.Array, p: jax.Array) -> jax.Array:
            size = ((E.shape[-2] - R.shape[-2]) / E.shape[-1]) ** 0.5
            divisor = jnp.sqrt(p / (1 - decay**count))
            return size * E / jnp.maximum(divisor, jnp.finfo(E.dtype).tiny)

        averages = jax.tree.map(average, updates, averages)
        return jax.tree.map(one, updates, projected, averages), (count, averages)

    return optax.GradientTransformationExtraArgs(_averages_of_columns, update)


def _unit_rows(residual: jax.Array) -> jax.Array:
    """Divides each row of residuals `[..., m, n]` by its norm; rows of zeros stay zero."""
    norms = jnp.linalg.norm(residual, axis=-1, keepdims=True)
    return residual / jnp.maximum(norms, jnp.finfo(residual.dtype).tiny)


# By the values of the option `residual`.
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "columns": gum_optax.normalize_columns,
    "energy": _by_energy,
    "rows": lambda: _sized(_unit_rows),
    "sign": lambda: _sized(jnp.sign),
    "plain": lambda: _sized(lambda residual: residual),
}
