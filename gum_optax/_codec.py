r"""The linear codec: from gradients to coordinates in low-rank bases, and back.

For a group of N wide matrices ``G_i`` [m, n] with orthonormal bases ``P_i`` [m, r]:

.. math::
    \text{project:}\quad R_i = P_i^\top G_i, \qquad
    \text{complement:}\quad E_i = G_i - P_i R_i, \qquad
    \text{expand:}\quad P_i R_i

How these three are weighted and combined is a residual rule, see `gum_optax.residuals`.

A *slot* is a place in the state for one full-size matrix; in every period, a new draw decides which
matrix it serves. Full-size gradients of separate leaves are never stacked: projections are taken
leaf by leaf, and only the matrices of the slots are gathered.

Tests: tests/library/test_low_rank.py, tests/library/test_memory.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gum_optax._groups import Group
from gum_optax._projected import Projected
from gum_optax._scheduling import at, put

Leaves: TypeAlias = Sequence[Any]
"""The leaves of a group: arrays ``[*batch, rows, columns]``, in any real dtype, or `Projected`."""


class Compressed(NamedTuple):
    """One group's gradients, or updates, as the inner transformation sees them.

    Attributes:
      low: ``[*lead, r, n]``, the projected values of every matrix, with the same leading axes as
        `LowRankState`.basis: ``[N, r, n]`` unless leaves have several batch axes.
      residual: ``[slots, m, n]``, the residuals of the drawn matrices, zero in empty slots; None in
        a group without slots.
    """

    low: jax.Array
    residual: jax.Array | None


class Frame(NamedTuple):
    """The bases and draws of one group, which are fixed from one refresh to the next.

    Attributes:
      group: the group.
      basis: P, ``[*lead, m, r]``; its dtype is the dtype of the computation.
      slots: ``int32[slots]``, the matrix that each slot serves (N: an empty slot); None in a group
        without slots.
      after: an update that has to be ready before this group's updates are computed, see
        `_scheduling`; None: no order.
    """

    group: Group
    basis: jax.Array
    slots: jax.Array | None
    after: jax.Array | None = None


def wide(group: Group, matrices: jax.Array) -> jax.Array:
    """Transposes the matrices of tall leaves into wide ones, and back: its own inverse."""
    return matrices.mT if group.tall else matrices


def project(frame: Frame, leaves: Leaves) -> jax.Array:
    """Projects every matrix of a group, leaf by leaf: ``R = P'G``, ``[*lead, r, n]``."""
    group, basis = frame.group, frame.basis
    projected = [
        leaf.low.astype(basis.dtype)
        if isinstance(leaf, Projected)
        else _from_left(part, wide(group, leaf.astype(basis.dtype)))
        for part, leaf in zip(split(group, basis), leaves, strict=True)
    ]
    return join(group, projected)


def _from_left(basis: jax.Array, matrices: jax.Array) -> jax.Array:
    """``P'G``: ``[*batch, m, r]``, ``[*batch, m, n]`` -> ``[*batch, r, n]``."""
    batch = tuple(range(basis.ndim - 2))
    rows = (basis.ndim - 2,)
    # A contraction of the rows of both; `basis.mT @ matrices` would leave a transpose to XLA.
    return jax.lax.dot_general(basis, matrices, ((rows, rows), (batch, batch)))


def complement(basis: jax.Array, low: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns the part of wide matrices outside their bases: ``E = G - P R``, ``[..., m, n]``."""
    return matrices - basis @ low


def left_out(group: Group, basis: jax.Array, low: jax.Array, leaf: Any) -> jax.Array:
    """Returns ``E = G - P R`` of one leaf, ``[*batch, m, n]``; its projections R are ``low``."""
    if isinstance(leaf, Projected):
        assert leaf.residual is not None
        return wide(group, leaf.residual.astype(basis.dtype))
    return complement(basis, low, wide(group, leaf.astype(basis.dtype)))


def whole(group: Group, basis: jax.Array, low: jax.Array, leaf: Any) -> jax.Array:
    """Returns the wide matrices G of one leaf, ``[*batch, m, n]``."""
    if isinstance(leaf, Projected):
        # G = E + P R, where the backward pass has kept E.
        return left_out(group, basis, low, leaf) + basis @ low
    return wide(group, leaf.astype(basis.dtype))


def drawn_complements(frame: Frame, leaves: Leaves, low: jax.Array) -> jax.Array:
    """Gathers ``E = G - P R`` of the drawn matrices: ``[slots, m, n]``, zero in empty slots."""
    group, basis, slots = frame.group, frame.basis, frame.slots
    assert slots is not None
    # The backward pass computed the drawn residuals already, all of a group in its first leaf.
    if isinstance(first := leaves[0], Projected):
        assert first.drawn is not None
        return first.drawn.astype(basis.dtype)
    gradient_at = matrix_at(group, leaves, basis.dtype)

    def one(index: jax.Array) -> jax.Array:
        inside = jnp.minimum(index, group.count - 1)  # An empty slot reads any matrix.
        where = _unravel(inside, group.lead)
        left_out = complement(_pick(basis, where), _pick(low, where), gradient_at(inside))
        return jnp.where(index < group.count, left_out, 0.0)

    # Not a `map`: that starts from zeros, which XLA's CPU backend makes when the program starts and
    # keeps while gradients are computed. These wait for the slots, and so for the gradients.
    start = jnp.broadcast_to(slots[0].astype(basis.dtype), (len(slots), group.m, group.n))
    return jax.lax.fori_loop(
        0, len(slots), lambda slot, found: put(found, slot, one(at(slots, slot))), start
    )


def drawn_bases(frame: Frame) -> jax.Array:
    """Gathers the bases of the drawn matrices: ``[slots, m, r]``; an empty slot has any of them."""
    group, basis, slots = frame.group, frame.basis, frame.slots
    assert slots is not None
    where = _unravel(jnp.minimum(slots, group.count - 1), group.lead)
    # A gather, not a slice, see `_pick`.
    return basis.at[where].get(mode="promise_in_bounds", wrap_negative_indices=False)


def place(
    frame: Frame,
    position: int,
    matrices: jax.Array,
    residual: jax.Array,
    beside: jax.Array | None = None,
) -> jax.Array:
    """Puts the matrices of the slots into one leaf's wide updates.

    Args:
      frame: the group's bases and slots.
      position: the leaf's position in the group.
      matrices: the updates of undrawn matrices, ``[*batch, m, n]``, in the dtype of the result.
      residual: the updates of the slots, ``[slots, m, n]``.
      beside: updates of the shape of ``matrices`` that are added for drawn matrices; None: none.

    Returns:
      ``[*batch, m, n]``.
    """
    group, slots = frame.group, frame.slots
    assert slots is not None
    # 1. A leaf of one matrix: it is drawn if any slot names its position.
    if not group.batch:
        serves = slots == position
        # Not a `cond`: it costs a round trip to the host on a GPU, and XLA's CPU backend gives each
        # one's inside memory of its own.
        drawn = at(residual, jnp.argmax(serves))
        if beside is not None:
            drawn = drawn + beside
        return jnp.where(jnp.any(serves), drawn.astype(matrices.dtype), matrices)
    # 2. A stack with few slots: a choice for each slot, by the number of each matrix in the group.
    if len(slots) <= _FEW:
        numbers = jnp.arange(group.per_leaf).reshape(*group.batch, 1, 1) + position * group.per_leaf
        # [slots, *ones, m, n], so that each has the axes of a stack.
        residual = residual.reshape(len(slots), *[1] * len(group.batch), *residual.shape[-2:])
        for index, drawn in zip(slots, residual, strict=True):
            if beside is not None:
                drawn = drawn + beside
            matrices = jnp.where(numbers == index, drawn.astype(matrices.dtype), matrices)
        return matrices
    # 3. A stack with many slots: one scatter.
    local = slots - position * group.per_leaf  # numbers within this leaf, or out of its range
    here = (local >= 0) & (local < group.per_leaf)
    first, *others = _unravel(jnp.where(here, local, 0), group.batch)
    # A slot that serves another leaf gets an index out of bounds, which the scatter drops.
    target = (jnp.where(here, first, group.batch[0]), *others)
    if beside is not None:
        residual = residual + beside.at[target].get(mode="clip")
    return matrices.at[target].set(residual.astype(matrices.dtype), mode="drop")


# Up to this many slots, the updates of a stack are chosen matrix by matrix. XLA fuses a choice with
# the product before it and with the sum with the parameters after it, so that no update of the
# whole stack exists in memory; a scatter needs two. The price: each choice reads its slot once for
# every matrix of the stack.
_FEW = 4


def matrix_at(group: Group, leaves: Leaves, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the function ``index -> wide matrix [m, n]`` for a traced index into a group."""

    def take(index: jax.Array) -> jax.Array:
        leaf_number, *where = _unravel(index, (len(leaves), *group.batch))
        matrix = jax.lax.switch(leaf_number, [partial(_pick, leaf, where) for leaf in leaves])
        return wide(group, matrix.astype(dtype))

    return take


def join(group: Group, parts: Leaves) -> jax.Array:
    """Joins one array for each leaf, ``[*batch, ...]``, along the group's lead axes."""
    return parts[0] if group.lead == group.batch else jnp.stack(parts)


def split(group: Group, joined: jax.Array) -> list[jax.Array]:
    """The inverse of `join`."""
    if group.lead == group.batch:
        return [joined]
    return [
        jax.lax.index_in_dim(joined, position, keepdims=False)
        for position in range(len(group.leaves))
    ]


def _pick(stacked: jax.Array, where: Sequence[jax.Array]) -> jax.Array:
    """Returns the matrix at a traced position of the leading axes.

    A gather, not a dynamic slice: where a leading axis is sharded, XLA turns a gather into a masked
    local one and an all-reduce of one matrix, but a dynamic slice into an all-gather of all.
    """
    if not where:
        return stacked
    picked = stacked.at[tuple(jnp.expand_dims(index, 0) for index in where)]
    return picked.get(mode="promise_in_bounds", wrap_negative_indices=False).squeeze(0)


def _unravel(index: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, ...]:
    """Splits a flat index >= 0 into positions along axes of these lengths, the last one fastest.

    Python's ``//`` and ``%``, and so `jnp.unravel_index`, round negative numbers down, which costs
    JAX ten operations each. For indices >= 0 the machine's own division gives the same.
    """
    where = []
    for length in map(index.dtype.type, reversed(shape[1:])):
        where.append(jax.lax.rem(index, length))
        index = jax.lax.div(index, length)
    return (index, *reversed(where))
