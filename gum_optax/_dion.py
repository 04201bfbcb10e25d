r"""Dion2: Muon that orthogonalizes only the rows with the largest momentum at each step.

Tests: tests/library/test_neighbours.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _mesh
from gum_optax._orthogonal import scale_by_polar
from gum_optax._paths import PyTree, unzip

_POLAR = scale_by_polar()


def scale_by_dion2(
    fraction: float = 0.25,
    decay: float | jax.Array = 0.95,
    *,
    orthogonalizer: optax.GradientTransformation = _POLAR,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes a fraction of the rows of momentum at every step: Dion2.

    With I the ``ceil(fraction * m)`` rows of the largest L1 norm, m the shorter side,

    .. math::
        M \leftarrow M + G, \qquad O = \text{polar}(M_I), \qquad M_I \leftarrow \text{decay}\, M_I

    Rows in I are updated by O. The other rows are not updated and accumulate gradients until they
    are chosen. The state is the same as Muon's. An orthogonalization takes at most ``fraction`` of
    the arithmetic, and its operand shrinks by the same factor where it is sent between devices.

    Args:
      fraction: the share of rows, in (0, 1]. At 1 it is Muon whose momentum decays after its use.
      decay: the factor of momentum that was used, in [0, 1].
      orthogonalizer: a stateless transformation of matrices, by default `scale_by_polar`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for trees of matrices ``[..., m, n]``; the state
      is M, in the dtypes of the parameters. Updates have the dtypes of the gradients. Those of
      chosen rows have singular values of about one, so a scale by shape and the learning rate come
      after it.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.for_matrices(gum_optax.scale_by_dion2(fraction=0.25), 0.02)

    References:
      Ahn et al., Dion2, arXiv 2512.16928, with rows chosen over a whole matrix ("global" in its
      code, which by default chooses them on each device).
    """
    _checks.hyperparameter("fraction", fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must lie in (0, 1], got {fraction!r}.")
    _checks.hyperparameter("decay", decay)
    _checks.transformation("orthogonalizer", orthogonalizer)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def one(gradient: jax.Array, momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
        # M <- M + G, transposed so that its rows run along the shorter side: [*batch, m, n], m <= n
        tall = gradient.shape[-2] > gradient.shape[-1]
        total = momentum + gradient
        wide = total.mT if tall else total
        rows = math.ceil(fraction * wide.shape[-2])
        # 1. I: the rows with the largest momentum.
        chosen = jax.lax.top_k(jnp.sum(jnp.abs(wide), axis=-1), rows)[1]  # [*batch, rows]
        # 2. The update is their polar factor, zero in the other rows; only they decay.
        used = jnp.take_along_axis(wide, chosen[..., None], axis=-2)  # M_I, [*batch, rows, n]
        polar: Any = orthogonalizer.update(used, orthogonalizer.init(used))[0]
        direction = _put_rows(jnp.zeros_like(wide), chosen, polar)
        left = _put_rows(wide, chosen, (decay * used).astype(wide.dtype))
        direction, left = (direction.mT, left.mT) if tall else (direction, left)
        return direction.astype(gradient.dtype), left.astype(momentum.dtype)

    def run(updates: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(state), strict=True)
        return unzip(updates, [one(gradient, momentum) for gradient, momentum in leaves])

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        return _mesh.in_auto_mode(run, updates, state, like=lambda: (updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def _put_rows(matrices: jax.Array, chosen: jax.Array, rows: jax.Array) -> jax.Array:
    """Puts rows ``[*batch, k, n]`` into matrices ``[*batch, m, n]``."""
    batch = matrices.shape[:-2]
    where = [jnp.expand_dims(index, -1) for index in jnp.indices(batch, sparse=True)]
    return matrices.at[(*where, chosen)].set(rows)
