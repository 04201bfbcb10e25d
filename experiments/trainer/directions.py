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


def _by_average(
    scaled: Callable[[jax.Array, jax.Array, Any], jax.Array], decay: float
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that scales matrices by running averages of their columns' squares.

    Args:
      scaled: ``(X [..., m, n], v [..., 1, n], R) -> update`` of one matrix, where v is the average
        of ``mean_i X_ij^2``, corrected for its start at zero, and R its projection, or None.
      decay: decay of the average.
    """

    def init(params: Any) -> Any:
        def zeros(leaf: Any) -> jax.Array:
            return jnp.zeros((*leaf.shape[:-2], 1, leaf.shape[-1]), leaf.dtype)

        return jnp.zeros((), jnp.int32), jax.tree.map(zeros, params)

    def update(
        updates: Any, state: Any, params: Any = None, *, projected: Any = None, **_: Any
    ) -> Any:
        del params
        count = optax.safe_increment(state[0])

        # v <- decay v + (1 - decay) mean_i X_ij^2
        def average(X: jax.Array, v: jax.Array) -> jax.Array:
            return decay * v + (1 - decay) * jnp.mean(X**2, axis=-2, keepdims=True)

        def one(X: jax.Array, v: jax.Array, *R: jax.Array) -> jax.Array:
            return scaled(X, v / (1 - decay**count), *R or (None,))

        averages = jax.tree.map(average, updates, state[1])
        beside = () if projected is None else (projected,)
        return jax.tree.map(one, updates, averages, *beside), (count, averages)

    return optax.GradientTransformationExtraArgs(init, update)


def equal_outputs(decay: float) -> optax.GradientTransformationExtraArgs:
    """Divides columns by the root of a running average of their mean squares, at an RMS of 0.2.

    A column of a kernel `[..., m, n]` holds the weights of one output. A matrix keeps the RMS of
    Adam's updates.

    References:
      Li et al., NorMuon, arXiv 2510.05491.
    """

    # U = X / sqrt(v),   U <- 0.2 U / rms(U)
    def scaled(X: jax.Array, v: jax.Array, R: Any) -> jax.Array:
        del R
        U = X / jnp.maximum(jnp.sqrt(v), 1e-8)
        rms = jnp.sqrt(jnp.mean(U**2, axis=(-2, -1), keepdims=True))
        return 0.2 * U / jnp.maximum(rms, 1e-8)

    return _by_average(scaled, decay)


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

    With p_j the average of |E_j|^2, E_j becomes ``sqrt((m - r) / n) E_j / sqrt(p_j)``, so that the
    whole has the norm sqrt(m - r) on average.

    References:
      Gong et al., arXiv 2502.07752, by secondary sources, without its limit on growing norms.
    """

    def scaled(E: jax.Array, v: jax.Array, R: Any) -> jax.Array:
        m, n = E.shape[-2:]
        size = ((m - R.shape[-2]) / n) ** 0.5
        # p = m v, of mean squares v
        return size * E / jnp.maximum(jnp.sqrt(m * v), jnp.finfo(E.dtype).tiny)

    return _by_average(scaled, decay)


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
