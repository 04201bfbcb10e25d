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

from gum_optax import _mesh
from gum_optax._stacks import Stack


class Compressed(NamedTuple):
    """What the base optimizer sees of one stack.

    Attributes:
      low: ``[*lead, r, n]``, the projected gradient of every matrix; the leading axes are those of
        `LowRankState`.basis: ``[N, r, n]`` unless leaves have several batch axes.
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
    projected = _join(
        stack,
        [
            jnp.einsum("...mr,...mn->...rn", part, _canonical(stack, leaf.astype(basis.dtype)))
            for part, leaf in zip(_split(stack, basis), leaves, strict=True)
        ],
    )
    low = projected / (1.0 - probability)
    if slots is None:
        return Compressed(low, None)

    take = gatherer(stack, leaves, basis.dtype)

    def residual(index: jax.Array) -> jax.Array:
        inside = jnp.minimum(index, stack.count - 1)
        where = jnp.unravel_index(inside, stack.lead)
        missing = take(inside) - _pick(basis, where) @ _pick(projected, where)
        return jnp.where(index < stack.count, missing, 0.0)

    # Not a `map`: that starts from zeros, which XLA's CPU backend makes when the program starts and
    # keeps while gradients are computed. These wait for the slots, and so for the gradients.
    start = jnp.broadcast_to(
        slots[0].astype(basis.dtype), (len(slots), *basis.shape[-2:-1], low.shape[-1])
    )
    full = jax.lax.fori_loop(
        0, len(slots), lambda slot, full: full.at[slot].set(residual(slots[slot])), start
    )
    return Compressed(low, full / probability)


def expand(
    stack: Stack,
    compressed: Compressed,
    basis: jax.Array,
    slots: jax.Array | None,
    dtypes: Sequence[jnp.dtype],
    after: jax.Array | None = None,
) -> list[jax.Array]:
    """Expands a compressed update to the leaves of one stack, one leaf after the other.

    Args:
      stack: the stack.
      compressed: the base's update, shaped as `compress` returns it.
      basis: ``[N, m, r]``.
      slots: ``int32[slots]`` or None.
      dtypes: dtype of each leaf's update.
      after: an update that comes before those of this stack, see `_in_turn`.

    Returns:
      One update per leaf, ``[*batch, rows, columns]``.
    """
    full = compressed.full
    lows = _split(stack, compressed.low)
    updates: list[jax.Array] = []
    for position, (part, dtype) in enumerate(zip(_split(stack, basis), dtypes, strict=True)):
        update = jnp.matmul(part, _in_turn(lows[position], after)).astype(dtype)
        if full is not None and slots is not None:
            if stack.batch:
                update = _overwrite(stack, position, update, full, slots)
            else:
                serves = slots == position
                # Not a `cond`: it costs a round trip to the host on a GPU, and XLA's CPU
                # backend gives each one's inside memory of its own.
                dense = full[jnp.argmax(serves)].astype(dtype)
                update = jnp.where(jnp.any(serves), dense, update)
        after = _canonical(stack, update)
        updates.append(after)
    return updates


def _in_turn(value: jax.Array, after: jax.Array | None) -> jax.Array:
    """``value``, which on CPUs is not ready before ``after`` is.

    XLA's CPU backend schedules breadth first: left to itself it expands all updates before the
    first is applied, and holds as many bytes of them as there are parameters. An
    ``optimization_barrier`` is gone by then. Other backends schedule for memory themselves.
    """
    if after is None or _mesh.on_mesh(value):
        return value

    def wait(value: jax.Array, after: jax.Array) -> jax.Array:
        first = after[(0,) * after.ndim]
        # Always one, which XLA cannot know.
        one = jnp.maximum((first == first).astype(value.dtype), 1)
        return value * one

    return jax.lax.platform_dependent(value, after, cpu=wait, default=lambda value, after: value)


def _overwrite(
    stack: Stack, position: int, update: jax.Array, full: jax.Array, slots: jax.Array
) -> jax.Array:
    """The updates ``[*batch, m, n]`` of a leaf, with those of the slots that it holds put in."""
    local = slots - position * stack.per_leaf
    here = (local >= 0) & (local < stack.per_leaf)
    first, *others = jnp.unravel_index(jnp.where(here, local, 0), stack.batch)
    # What this leaf does not hold is sent out of bounds, and dropped there.
    target = (jnp.where(here, first, stack.batch[0]), *others)
    return update.at[target].set(full.astype(update.dtype), mode="drop")


def gatherer(
    stack: Stack, leaves: Sequence[jax.Array], dtype: jnp.dtype
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function ``index -> matrix [m, n]`` for a traced index into a stack."""

    def take(index: jax.Array) -> jax.Array:
        where = jnp.unravel_index(index % stack.per_leaf, stack.batch) if stack.batch else ()
        matrix = jax.lax.switch(
            index // stack.per_leaf, [lambda leaf=leaf: _pick(leaf, where) for leaf in leaves]
        )
        return _canonical(stack, matrix.astype(dtype))

    return take


def _pick(stacked: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    """The matrix at a traced position of the leading axes.

    A gather, not a dynamic slice: where a leading axis is sharded, XLA turns a gather into a masked
    local one and an all-reduce of one matrix, and a dynamic slice into an all-gather of them all.
    """
    if not where:
        return stacked
    return stacked.at[tuple(index[None] for index in where)].get(mode="promise_in_bounds")[0]


def _canonical(stack: Stack, matrices: jax.Array) -> jax.Array:
    """Turns matrices of leaves into wide ones, and back: ``[..., m, n]``."""
    return matrices.mT if stack.transposed else matrices


def _join(stack: Stack, parts: Sequence[jax.Array]) -> jax.Array:
    """Joins one array per leaf along the leading axes of the stack."""
    return parts[0] if stack.lead == stack.batch else jnp.stack(parts)


def _split(stack: Stack, stacked: jax.Array) -> list[jax.Array]:
    """The inverse of `_join`."""
    return (
        [stacked] if stack.lead == stack.batch else [stacked[i] for i in range(len(stack.leaves))]
    )
