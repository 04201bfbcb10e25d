"""The order of work on several matrices, where memory or speed depends on it.

Functions for two places in which XLA's own order costs memory:

- `in_turn` and `one_by_one` apply a function to the matrices of *one* array in a loop, so that only
  the temporaries of one matrix exist at a time.
- `in_sequence` makes calls on *separate* arrays wait for one another, on CPUs.

Neither changes the mathematics; a loop and a batch of products may round differently.

On CPUs, decompositions of *batches* (QR, Cholesky, SVD) must wait for one another, too, by
`scheduled_after`: otherwise a program can hang forever. Such a decomposition occupies a thread of
XLA's pool until other threads of the same pool have worked through its batch. If as many run at a
time as the pool has threads, all of them wait (seen in jaxlib 0.10.2, `ParallelBatchMap`). A single
matrix is decomposed in its own thread and waits for nobody, so loops over matrices are safe.

Tests: tests/library/test_scheduling.py.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from gum_optax import _mesh

LARGE_SIDE = 256
"""Matrices whose short side exceeds this length are large, see `is_large`."""


def is_large(matrices: jax.Array) -> bool:
    """Returns whether each matrix of ``[..., m, n]`` keeps the machine busy by itself.

    Batching makes products of small matrices faster. For large matrices it gains nothing, and
    temporaries of several times the size of the batch can exhaust the memory.
    """
    return min(matrices.shape[-2:]) > LARGE_SIDE


def takes_turns(matrices: jax.Array) -> bool:
    """Returns whether a loop over the matrices of ``[..., m, n]`` saves memory and costs no time.

    A single matrix needs no loop, and a loop over a sharded batch axis would gather it.
    """
    return matrices.ndim > 2 and is_large(matrices) and not _mesh.on_mesh(matrices)


def one_by_one(
    function: Callable[..., jax.Array], matrices: jax.Array, *others: jax.Array
) -> jax.Array:
    """Applies a function to one matrix after the other, and skips those that are zero.

    Empty slots of sampled layers hold zero matrices, so they cost no more than a comparison.

    Args:
      function: as for `in_turn`, and maps **zero to zero**: it is not called for a zero matrix,
        which is returned unchanged.
      matrices: as for `in_turn`.
      *others: as for `in_turn`.

    Returns:
      The results ``[..., m, n]``.
    """

    def unless_zero(matrix: jax.Array, *others: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(matrix != 0), function, _zeros_like_first, matrix, *others)

    return in_turn(unless_zero, matrices, *others)


def in_turn(
    function: Callable[..., jax.Array], matrices: jax.Array, *others: jax.Array
) -> jax.Array:
    """Applies a function to one matrix after the other.

    Args:
      function: maps a matrix ``[m, n]``, and one of each of ``others``, to one of the same shape
        and dtype.
      matrices: ``[..., m, n]``, with the batch axes unsharded: a loop over a sharded axis would
        gather it.
      *others: arrays ``[..., p, q]`` with the same batch axes.

    Returns:
      The results ``[..., m, n]``.
    """
    if matrices.size == 0:
        return matrices
    batch = math.prod(matrices.shape[:-2])
    flat = matrices.reshape(batch, *matrices.shape[-2:])  # [batch, m, n]
    beside = [other.reshape(batch, *other.shape[-2:]) for other in others]

    # The loop carries the batch and overwrites it in place: no second copy of it exists.
    def in_place(i: jax.Array, flat: jax.Array) -> jax.Array:
        row = [at(each, i) for each in (flat, *beside)]  # [m, n], and one of each other array
        return put(flat, i, function(*row))

    # XLA would unroll a loop of one turn, whose results then lie beside their arguments.
    turns = jax.lax.optimization_barrier(jnp.int32(1)) if batch == 1 else batch
    return jax.lax.fori_loop(0, turns, in_place, flat).reshape(matrices.shape)


def _zeros_like_first(matrix: jax.Array, *others: jax.Array) -> jax.Array:
    del others
    return jnp.zeros_like(matrix)


def at(stacked: jax.Array, index: jax.Array) -> jax.Array:
    """Returns ``stacked[index]`` for a traced index >= 0, without ``[]``'s check of its sign."""
    return jax.lax.dynamic_index_in_dim(
        stacked, index, keepdims=False, allow_negative_indices=False
    )


def put(stacked: jax.Array, index: jax.Array, entry: jax.Array) -> jax.Array:
    """Returns ``stacked.at[index].set(entry)`` for a traced index >= 0, without that check."""
    return jax.lax.dynamic_update_index_in_dim(
        stacked, entry, index, axis=0, allow_negative_indices=False
    )


def in_sequence(
    function: Callable[..., jax.Array],
    *columns: Iterable[Any],
    after: jax.Array | None = None,
) -> list[jax.Array]:
    """Maps a function over rows of arguments; on CPUs each call waits for the previous result.

    Args:
      function: takes one entry of each column and returns an array.
      *columns: iterables of equal length. The entries of the first are arrays; the entries of the
        others may be anything.
      after: an array that the first call waits for, or None.

    Returns:
      ``[function(*row) for row in zip(*columns, strict=True)]``.

    Raises:
      ValueError: if the columns differ in length.
    """
    results: list[jax.Array] = []
    for first, *others in zip(*columns, strict=True):
        after = function(scheduled_after(first, after), *others)
        results.append(after)
    return results


def as_data(array: jax.Array) -> jax.Array:
    """Returns the array, under ``jit`` hidden from XLA's constant folding.

    XLA would evaluate the packing of zeros while it compiles, on one core: half a minute for the
    state of an embedding of 16,000 tokens.
    """
    return jax.lax.optimization_barrier(array) if isinstance(array, jax.core.Tracer) else array


def scheduled_after(value: jax.Array, after: jax.Array | None) -> jax.Array:
    """Returns ``value``, scheduled after ``after`` on CPUs.

    XLA's CPU backend schedules breadth first. By itself it computes all updates before it applies
    the first, and then holds as many bytes of updates as there are parameters. The backend drops an
    ``optimization_barrier`` before it schedules, so the order has to be a data dependence. Other
    backends schedule for memory themselves.

    Args:
      value: an array of any shape.
      after: a floating-point array of any shape, or None for no order.

    Returns:
      ``value``, unchanged. On a mesh there is no order.
    """
    if after is None or after.size == 0 or _mesh.on_mesh(value):
        return value
    return _waiting(value, after)


# `jit`, so that it is traced once for each pair of shapes; `inline`, so that no call is left in the
# program.
@partial(jax.jit, inline=True)
def _waiting(value: jax.Array, after: jax.Array) -> jax.Array:
    def wait(value: jax.Array, after: jax.Array) -> jax.Array:
        # One entry of `after` is enough. The factor max(first == first, 1) is always one, even for
        # a NaN. XLA does not simplify it, since a NaN differs from itself, and so it computes
        # `after` first.
        first = after[(0,) * after.ndim]
        one = jnp.maximum((first == first).astype(value.dtype), 1)
        return value * one

    return jax.lax.platform_dependent(value, after, cpu=wait, default=lambda value, after: value)
