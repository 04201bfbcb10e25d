r"""Second moments of rows and columns, fitted to the squares of gradients together: RACS.

The squares of a gradient G [m, n] are fitted by an outer product ``q s'`` of moments of its rows
and columns. From ``q = 1``, the fit repeats

.. math::
    s_j \leftarrow \frac{\sum_i q_i G_{ij}^2}{\sum_i q_i^2}, \qquad
    q_i \leftarrow \frac{\sum_j s_j G_{ij}^2}{\sum_j s_j^2}

Each line is the least-squares solution for one factor, so this is a power iteration for the leading
singular vectors of the squares.

Tests: tests/library/test_rows_and_columns.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks
from gum_optax._gains import growth, no_norm_yet
from gum_optax._numerics import at_least_float32, norm, safe_scale
from gum_optax._paths import PyTree
from gum_optax._rates import Number


class RacsState(NamedTuple):
    """State of `scale_by_racs`; float32 or wider.

    Attributes:
      count: ``int32[]``, steps taken.
      rows: q, running average of the moments of rows, ``[..., m, 1]`` for each leaf.
      columns: s, that of columns, ``[..., 1, n]``.
      norms: norms of the last updates, ``[...]``.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rows: PyTree
    columns: PyTree
    norms: PyTree


def scale_by_racs(
    beta: Number = 0.9, *, growth_limit: float = 1.01, iterations: int = 5
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the roots of second moments of rows and columns: RACS.

    With q and s fitted to the squares of G in ``iterations`` rounds, see the module,

    .. math::
        \hat q \leftarrow \beta \hat q + (1 - \beta) q, \qquad
        \hat s \leftarrow \beta \hat s + (1 - \beta) s, \qquad
        U_{ij} = G_{ij} \, (1 - \beta^t) / \sqrt{\hat q_i \hat s_j}

    and the norm of U grows by at most the factor ``growth_limit`` per step. If the squares of G are
    an outer product, the root mean square of U is one. There is no momentum; the state is
    ``m + n + 1`` numbers for each matrix.

    Averages are corrected for their start at zero. Without it, the first updates would be
    ``1 / (1 - beta)`` times as large. After an update of norm zero growth is not limited, since a
    matrix whose gradient was once zero would stay frozen.

    Args:
      beta: decay of the averages, in [0, 1).
      growth_limit: the largest ratio of the norms of two successive updates of a matrix, > 0.
      iterations: rounds of the fit, an int >= 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for trees of matrices ``[..., m, n]`` with state
      `RacsState`. Updates have the dtypes of the gradients.

    Raises:
      TypeError, ValueError: if an argument is malformed.
      ValueError: from ``init``, if a leaf has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> tx = gum_optax.scale_by_racs()
      >>> G = jnp.array([[1.0, -2.0], [3.0, 6.0]])  # squares of rank one
      >>> tx.update(G, tx.init(G))[0].round(3)
      Array([[ 1., -1.],
             [ 1.,  1.]], dtype=float32)

    References:
      Gong et al., arXiv 2502.07752, by secondary sources.
    """
    _checks.hyperparameter("beta", beta, below=1.0)
    _checks.hyperparameter("growth_limit", growth_limit)
    _checks.positive_int("iterations", iterations)

    def init(params: PyTree) -> RacsState:
        _checks.matrices("scale_by_racs", params)

        def zeros(axis: int) -> PyTree:
            def of(leaf: jax.Array) -> jax.Array:
                shape = list(leaf.shape)
                shape[axis] = 1
                return jnp.zeros(shape, at_least_float32(leaf.dtype))

            return jax.tree.map(of, params)

        count = jnp.zeros((), jnp.int32)
        return RacsState(count, zeros(-1), zeros(-2), jax.tree.map(no_norm_yet, params))

    def update(
        updates: PyTree, state: RacsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, RacsState]:
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))

        def one(G: jax.Array, q: jax.Array, s: jax.Array, last: jax.Array) -> Any:
            if G.size == 0:
                return G, q, s, last
            g = G.astype(q.dtype)
            # 1. Moments of this gradient's rows [..., m, 1] and columns [..., 1, n]. The scale
            #    of gradients goes to the columns alone; the fit has fourth powers of entries.
            scale = safe_scale(g, (-2, -1))
            fitted_q, fitted_s = _fit((g / scale) ** 2, iterations)
            fitted_s = scale**2 * fitted_s
            # 2. q^ <- beta q^ + (1 - beta) q, and the same for s
            q = (beta * q + (1 - beta) * fitted_q).astype(q.dtype)
            s = (beta * s + (1 - beta) * fitted_s).astype(s.dtype)
            # 3. U = G (1 - beta^t) / sqrt(q^ s^). Roots first: the product could underflow.
            divisor = jnp.sqrt(q) * jnp.sqrt(s)
            started = (1 - beta**count).astype(g.dtype)
            U = started * g / jnp.where(divisor > 0, divisor, 1)
            # 4. |U| <- min(|U|, limit |U| of the step before)
            excess, norms = growth(norm(U, (-2, -1)), last, growth_limit)
            return (U / excess).astype(G.dtype), q, s, norms

        leaves, treedef = jax.tree.flatten(updates)
        states = (treedef.flatten_up_to(part) for part in state[1:])
        results = [one(*each) for each in zip(leaves, *states, strict=True)]
        U, q, s, norms = (treedef.unflatten(r[k] for r in results) for k in range(4))
        return U, RacsState(count, q, s, norms)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _fit(squares: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Returns q ``[..., m, 1]`` and s ``[..., 1, n]``, whose product fits squares [..., m, n]."""

    def least_squares(factor: jax.Array, axis: int) -> jax.Array:
        # Zero squares have the factor zero, and then the other one is zero as well.
        size = jnp.sum(factor**2, axis=axis, keepdims=True)
        return jnp.sum(factor * squares, axis=axis, keepdims=True) / jnp.where(size > 0, size, 1)

    q = jnp.ones_like(squares[..., :1])
    s = jnp.zeros_like(squares[..., :1, :])
    for _ in range(iterations):
        s = least_squares(q, -2)
        q = least_squares(s, -1)
    return q, s
