r"""The linear codec: gradients to compressed values and back.

For one stack of N matrices ``G_i`` (m x n, m <= n), bases ``P_i`` and inclusion probability q:

.. math::
    \text{compress:}\quad L_i = P_i^\top G_i / (1 - q), \qquad
    F_s = (G_i - P_i P_i^\top G_i) / q \quad\text{for the matrix } i \text{ of slot } s

    \text{expand:}\quad U_i = F_s \text{ if slot } s \text{ serves } i, \text{ else } P_i L_i

so that :math:`\mathbb{E}[\text{expand}(\text{compress}(G))_i] = (1-q) P_i P_i^\top G_i / (1-q) +
q (G_i - P_i P_i^\top G_i) / q = G_i` for bases fixed before the draw (arXiv 2510.17802).

Full-size gradients of separate leaves are never stacked: projections are taken leaf by leaf, and
only the matrices of the slots are gathered.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gum_optax._stacks import Stack


class Compressed(NamedTuple):
    """What the base optimizer sees of one stack.

    Attributes:
      low: ``[N, r, n]``, the projected gradient of every matrix.
      full: ``[slots, m, n]``, the residual gradient of the drawn matrices, zero in empty slots;
        None if the stack has no slots.
    """

    low: jax.Array
    full: jax.Array | None


def compress(
    stack: Stack,
    leaves: Sequence[jax.Array],
    basis: jax.Array,
    slots: jax.Array | None,
    probability: float,
) -> Compressed:
    """Compresses the leaves of one stack.

    Args:
      stack: the stack.
      leaves: its leaves, ``[*batch, rows, columns]`` each, in any real dtype.
      basis: ``[N, m, r]``; its dtype is the dtype of the computation and of the result.
      slots: ``int32[slots]``, the matrix of each slot (N: an empty slot), or None.
      probability: q in [0, 1).

    Returns:
      The `Compressed` gradient in the basis's dtype.
    """
    projected = jnp.concatenate(
        [
            jnp.einsum("bmr,bmn->brn", part, matrices)
            for part, matrices in zip(
                _split(stack, basis), _canonical(stack, leaves, basis.dtype), strict=True
            )
        ]
    )
    low = projected / (1.0 - probability)
    if slots is None:
        return Compressed(low, None)

    take = gatherer(stack, leaves, basis.dtype)

    def residual(index: jax.Array) -> jax.Array:
        inside = jnp.minimum(index, stack.count - 1)
        missing = take(inside) - basis[inside] @ projected[inside]
        return jnp.where(index < stack.count, missing, 0.0)

    return Compressed(low, jax.lax.map(residual, slots) / probability)


def expand(
    stack: Stack,
    compressed: Compressed,
    basis: jax.Array,
    slots: jax.Array | None,
    dtypes: Sequence[jnp.dtype],
) -> list[jax.Array]:
    """Expands a compressed update to the leaves of one stack.

    Args:
      stack: the stack.
      compressed: the base's update, shaped as `compress` returns it.
      basis: ``[N, m, r]``.
      slots: ``int32[slots]`` or None.
      dtypes: dtype of each leaf's update.

    Returns:
      One update per leaf, ``[*batch, rows, columns]``.
    """
    parts = zip(_split(stack, basis), _split(stack, compressed.low), dtypes, strict=True)
    expand_leaf = _expand_matrix if stack.per_leaf == 1 else _expand_batch
    return [
        _stored(stack, expand_leaf(part, low, compressed.full, slots, i * stack.per_leaf, dtype))
        for i, (part, low, dtype) in enumerate(parts)
    ]


def _expand_matrix(
    basis: jax.Array,
    low: jax.Array,
    full: jax.Array | None,
    slots: jax.Array | None,
    position: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """The update ``[1, m, n]`` of a leaf that is one matrix: one of two branches is computed."""
    if full is None or slots is None:
        return jnp.matmul(basis, low).astype(dtype)
    serves = slots == position
    return jax.lax.cond(
        jnp.any(serves),
        lambda: full[jnp.argmax(serves)][None].astype(dtype),
        lambda: jnp.matmul(basis, low).astype(dtype),
    )


def _expand_batch(
    basis: jax.Array,
    low: jax.Array,
    full: jax.Array | None,
    slots: jax.Array | None,
    position: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """The updates ``[b, m, n]`` of a leaf that holds b matrices."""
    update = jnp.matmul(basis, low).astype(dtype)
    if full is None or slots is None:
        return update
    size = update.shape[0]
    local = slots - position
    # Negative indices would count from the end; everything outside this leaf must be dropped.
    target = jnp.where((local >= 0) & (local < size), local, size)
    return update.at[target].set(full.astype(dtype), mode="drop")


def gatherer(
    stack: Stack, leaves: Sequence[jax.Array], dtype: jnp.dtype
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function ``index -> matrix [m, n]`` for a traced index into a stack."""

    def take(index: jax.Array) -> jax.Array:
        leaf = jax.lax.switch(
            index // stack.per_leaf,
            [
                lambda leaf=leaf: leaf.reshape(-1, *stack.shape[-2:])[index % stack.per_leaf]
                for leaf in leaves
            ],
        )
        return (leaf.T if stack.transposed else leaf).astype(dtype)

    return take


def _canonical(stack: Stack, leaves: Sequence[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
    """Views the leaves as batches ``[b, m, n]`` of wide matrices."""
    batches = [leaf.reshape(-1, *stack.shape[-2:]).astype(dtype) for leaf in leaves]
    return [batch.mT for batch in batches] if stack.transposed else batches


def _stored(stack: Stack, matrices: jax.Array) -> jax.Array:
    """The inverse of `_canonical` for one leaf."""
    return (matrices.mT if stack.transposed else matrices).reshape(stack.shape)


def _split(stack: Stack, stacked: jax.Array) -> list[jax.Array]:
    """Splits ``[N, ...]`` into one ``[b, ...]`` per leaf."""
    size = stack.per_leaf
    return [stacked[i * size : (i + 1) * size] for i in range(len(stack.leaves))]
