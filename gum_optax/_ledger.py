"""The ledger: a list of rows that ``init`` functions write while it is open.

`memory_plan` describes any transformation by running its ``init`` on shapes with a ledger open.
Each row states the state that is kept for some leaves, its bytes and the reason. It is written by
the code that decides this, however deep that code sits inside chains, masks and wrappers.

A ledger is a context variable, not an argument: ``init`` of an optax transformation takes the
parameters alone, and the wrappers between `memory_plan` and `low_rank` may be anybody's.

Tests: tests/library/test_memory.py.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gum_optax._paths import PyTree


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of a `MemoryPlan`.

    Attributes:
      name: the group's name, or the role of fallback leaves.
      treatment: ``sampled``, ``low rank``, ``uncompressed``, ``fallback``, or ``shared`` (step
        counts, keys, and the state of wrappers).
      why: the reason why there is no compression, for example ``rank 128 >= 64``; empty otherwise.
      count: number of matrices, or of fallback leaves.
      shape: a matrix's shape as stored, or a fallback leaf's shape.
      rank: r, or None without projection.
      slots: number of slots, or None without sampling.
      bytes: optimizer state, in bytes.
      adamw_bytes: the two moments that AdamW keeps for the same leaves, in bytes.
    """

    name: str
    treatment: str
    why: str
    count: int
    shape: tuple[int, ...]
    rank: int | None
    slots: int | None
    bytes: int
    adamw_bytes: int


_open: contextvars.ContextVar[list[PlanRow] | None] = contextvars.ContextVar("ledger", default=None)
# How the wrappers around the running `init` will pack its state: identity without such a wrapper.
_packed: contextvars.ContextVar[Callable[[PyTree], PyTree]] = contextvars.ContextVar(
    "packed", default=lambda state: state
)


@contextlib.contextmanager
def opened() -> Iterator[list[PlanRow]]:
    """Opens a ledger and yields the list to which rows are written."""
    # The token brings back an outer ledger, if one was open.
    rows: list[PlanRow] = []
    token = _open.set(rows)
    try:
        yield rows
    finally:
        _open.reset(token)


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """Closes the ledger: rows that are written meanwhile are discarded."""
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)


def write(rows: Callable[[], Iterator[PlanRow]]) -> None:
    """Writes rows to the open ledger; without one, ``rows`` is not called at all."""
    ledger = _open.get()
    if ledger is None:
        return
    # Rows are made with the ledger closed: counting bytes runs `init` functions again.
    with closed():
        ledger.extend(rows())


def count() -> int:
    """Returns the number of rows in the open ledger, 0 without one."""
    return len(_open.get() or ())


@contextlib.contextmanager
def resting(pack: Callable[[PyTree], PyTree]) -> Iterator[None]:
    """Counts the bytes of packed states in the rows that a wrapped transformation writes."""
    # Wrappers nest: the inner one packs first, as it will at the end of a step.
    outer = _packed.get()
    token = _packed.set(lambda state: outer(pack(state)))
    try:
        yield
    finally:
        _packed.reset(token)


def bytes_at_rest(init: Callable[..., PyTree], *args: Any) -> int:
    """Returns the bytes of the state ``init(*args)`` between two steps; nothing is allocated."""
    packed = _packed.get()
    return bytes_of(jax.eval_shape(lambda *args: packed(init(*args)), *args))


def bytes_of(tree: PyTree) -> int:
    """Returns the bytes of all arrays of a tree, or of their descriptions."""
    # By functions of jnp, since leaves may be Python numbers or NumPy arrays.
    return sum(
        math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_beyond(init: Callable[[Any], PyTree], params: PyTree, nothing: PyTree) -> int:
    """Returns the bytes that a state of ``params`` has beyond one of ``nothing``.

    The difference leaves out step counts and the like, which all leaves share. An ``init`` that
    only works on the whole tree, as for ``optax.flatten`` or a mask, cannot be asked about a part
    of it. Then the result is 0, and the bytes go to the row of shared state. Nothing is allocated.
    """
    try:
        return bytes_at_rest(init, params) - bytes_at_rest(init, nothing)
    # A user's `init` may raise anything on a tree that it was not made for.
    except Exception:
        return 0
