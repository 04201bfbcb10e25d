r"""Momentum in the form of a singular value decomposition of rank r: MoFaSGD.

With U [m, r], s [r], V [n, r] the momentum of one matrix, one step is

.. math::
    A = G V, \quad C = G^\top U, \quad K = U^\top A

    [U \mid A] = U' R_U, \quad [V \mid C] = V' R_V \qquad\text{(thin QR)}

    S = R_U \begin{pmatrix} \beta\,\text{diag}(s) - K & I \\ I & 0 \end{pmatrix} R_V^\top
        \approx U'' \text{diag}(s_+) V''^\top \qquad\text{(its r largest)}

    U_+ = U' U'', \quad V_+ = V' V'', \qquad \text{update } U_+ V_+^\top

``U' S V''`` is exactly beta times the momentum plus the part of G in the tangent space of the
rank-r matrices at the momentum. The state keeps the best approximation of rank r.

Tests: tests/library/test_factored_momentum.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _mesh
from gum_optax._numerics import matmul_highest as matmul
from gum_optax._paths import PyTree, unzip
from gum_optax._scheduling import scheduled_after

# Singular values below this share of the largest are rounding: their directions are arbitrary.
_NOISE = 1e-6


class Factored(NamedTuple):
    """Momentum of one leaf, ``left @ diag(values) @ right.mT``.

    Attributes:
      left: U, ``[*batch, m, r]``.
      values: s, ``[*batch, r]``, falling.
      right: V, ``[*batch, n, r]``.
    """

    left: jax.Array
    values: jax.Array
    right: jax.Array


class FactoredMomentumState(NamedTuple):
    """State of `scale_by_factored_momentum`.

    Attributes:
      count: ``int32[]``, steps taken.
      momentum: a `Factored` for each leaf, float32 or wider.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: PyTree


def scale_by_factored_momentum(
    rank: int = 32, beta: float | jax.Array = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps momentum at rank r and updates by its polar factor ``U V'``: MoFaSGD.

    At full rank this is Muon with an exact polar factor. The momentum starts in the r leading
    singular directions of the first gradient. The state is ``r (m + n + 1)`` numbers for each
    matrix; a step takes two thin QRs of ``2 r`` columns and the SVD of a ``2 r x 2 r`` matrix.

    This is the update of the paper. The authors' code divides by clipped singular values instead,
    may add the part of the gradient outside both subspaces, and starts from the singular vectors of
    the weights.

    Args:
      rank: r, an int >= 1, clipped to the short side of each matrix.
      beta: decay of momentum, in [0, 1). Gradients are added with weight one.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for trees of matrices ``[..., m, n]``. Its
      updates have singular values one (zero for a zero momentum), in the dtypes of the gradients.

    Raises:
      TypeError, ValueError: if an argument is malformed; from ``init``, if a leaf has fewer than
        two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> tx = gum_optax.for_matrices(gum_optax.scale_by_factored_momentum(rank=4), 0.02)
      >>> params = {"layers": [{"kernel": jnp.ones((16, 32))}]}
      >>> state = tx.init(params)

    References:
      Mahdavinia and Mahdavi, MoFaSGD, arXiv 2507.08091.
    """
    rank = _checks.positive_int("rank", rank)
    _checks.hyperparameter("beta", beta, below=1.0)

    def init(params: PyTree) -> FactoredMomentumState:
        _checks.matrices("scale_by_factored_momentum", params)

        def zeros(leaf: jax.Array) -> Factored:
            *batch, m, n = leaf.shape
            r, dtype = min(rank, m, n), jnp.promote_types(leaf.dtype, jnp.float32)
            sides = (jnp.zeros((*batch, side, r), dtype) for side in (m, n))
            left, right = sides
            return Factored(left, jnp.zeros((*batch, r), dtype), right)

        return FactoredMomentumState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: PyTree, state: FactoredMomentumState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, FactoredMomentumState]:
        del params, extra
        return _mesh.in_auto_mode(run, updates, state, like=lambda: (updates, state))

    def run(updates: PyTree, state: FactoredMomentumState) -> tuple[PyTree, FactoredMomentumState]:
        def one(
            gradient: jax.Array, old: Factored, after: jax.Array | None
        ) -> tuple[jax.Array, Factored]:
            wide = scheduled_after(gradient.astype(old.left.dtype), after)
            # The state starts with zeros, which are no basis: the first gradient gives one.
            left, right = jax.lax.cond(
                state.count == 0,
                lambda: _leading(wide, old.values.shape[-1]),
                lambda: (old.left, old.right),
            )
            new = _step(old._replace(left=left, right=right), wide, beta)
            # U V', without the directions in which the momentum is zero up to rounding.
            keep = new.values > _NOISE * jnp.max(new.values, axis=-1, keepdims=True)
            direction = matmul(new.left * keep[..., None, :], new.right.mT)
            return direction.astype(gradient.dtype), new

        # One leaf after the other.
        pairs, last = [], None
        old_momentum = jax.tree.leaves(state.momentum, is_leaf=_is_factored)
        for gradient, old in zip(jax.tree.leaves(updates), old_momentum, strict=True):
            pairs.append(one(gradient, old, last))
            last = pairs[-1][1].values
        directions, momentum = unzip(updates, pairs)
        count = jnp.asarray(optax.safe_increment(state.count))
        return directions, FactoredMomentumState(count, momentum)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _step(old: Factored, gradient: jax.Array, beta: Any) -> Factored:
    """Computes one step of the equations above, for matrices ``[*batch, m, n]``."""
    u, s, v = old
    r = s.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(r, dtype=s.dtype), (*s.shape, r))
    # 1. Three sketches are all that a step reads of the gradient: r (m + n) + r^2 numbers.
    a = matmul(gradient, v)  # [m, r]
    c = matmul(gradient.mT, u)  # [n, r]
    k = matmul(u.mT, a)  # [r, r]
    # 2. Bases of both sides, [m, 2r] and [n, 2r] (square where a side is shorter than 2r).
    u_all, r_u = jnp.linalg.qr(jnp.concatenate([u, a], -1))
    #    One decomposition waits for the other, see `_scheduling`.
    v_all, r_v = jnp.linalg.qr(scheduled_after(jnp.concatenate([v, c], -1), u_all))
    # 3. The new momentum in these bases, and its best approximation of rank r.
    top = jnp.concatenate([beta * s[..., None] * eye - k, eye], -1)
    bottom = jnp.concatenate([eye, jnp.zeros_like(eye)], -1)
    middle = jnp.concatenate([top, bottom], -2)  # [2r, 2r]
    core = matmul(matmul(r_u, middle), r_v.mT)
    u_core, values, v_core = jnp.linalg.svd(core, full_matrices=False)
    return Factored(
        matmul(u_all, u_core[..., :r]), values[..., :r], matmul(v_all, v_core.mT[..., :r])
    )


def _leading(matrices: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the leading singular vectors, ``[*batch, m, r]`` and ``[*batch, n, r]``."""
    u, _, vt = jnp.linalg.svd(matrices, full_matrices=False)
    return u[..., :rank], vt.mT[..., :rank]


def _is_factored(node: Any) -> bool:
    return isinstance(node, Factored)
