"""The ledger: while one is open, ``init`` functions write down what they keep for which leaves.

`memory_plan` describes any transformation by running its ``init`` on shapes with a ledger open. So
treatments, their reasons and their bytes are told by the code that decides them, however deep it
sits inside chains, masks and wrappers.

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
      name: the group's name, or for fallback leaves their role.
      treatment: ``sampled``, ``low rank``, ``uncompressed``, ``fallback``, or ``shared`` (step
        counts, keys, and whatever wrappers keep).
      why: the reason, where the treatment is no compression: for example ``rank 128 >= 64``.
      count: number of matrices, or of fallback leaves.
      shape: a matrix's shape as stored, or a fallback leaf's.
      rank: r, or None where nothing is projected.
      slots: number of slots, or None where nothing is sampled.
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
_packed: contextvars.ContextVar[Callable[[PyTree], PyTree]] = contextvars.ContextVar(
    "packed", default=lambda state: state
)


@contextlib.contextmanager
def opened() -> Iterator[list[PlanRow]]:
    """Opens a ledger, and gives the list that rows are written to."""
    rows: list[PlanRow] = []
    token = _open.set(rows)
    try:
        yield rows
    finally:
        _open.reset(token)


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """Closes the ledger: what is written meanwhile is written nowhere."""
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)


def write(rows: Callable[[], Iterator[PlanRow]]) -> None:
    """Writes rows to the open ledger; without one, ``rows`` is not even called."""
    ledger = _open.get()
    if ledger is None:
        return
    # Rows are made with the ledger closed: counting bytes runs `init` functions again.
    with closed():
        ledger.extend(rows())


def count() -> int:
    """The rows that the open ledger has, 0 without one."""
    return len(_open.get() or ())


@contextlib.contextmanager
def resting(pack: Callable[[PyTree], PyTree]) -> Iterator[None]:
    """Counts states as a wrapper packs them, in rows that are written by what it wraps."""
    outer = _packed.get()
    token = _packed.set(lambda state: outer(pack(state)))
    try:
        yield
    finally:
        _packed.reset(token)


def bytes_at_rest(init: Callable[..., PyTree], *args: Any) -> int:
    """Bytes of the state ``init(*args)`` between two steps; nothing is allocated."""
    packed = _packed.get()
    return bytes_of(jax.eval_shape(lambda *args: packed(init(*args)), *args))


def bytes_of(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, or of their descriptions."""
    return sum(
        math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_beyond(init: Callable[[Any], PyTree], params: PyTree, nothing: PyTree) -> int:
    """Bytes that a state of ``params`` has beyond one of ``nothing``; nothing is allocated.

    An ``init`` that only works on the whole tree, such as that of ``optax.flatten`` or of a mask,
    says nothing about a part of it: 0, which leaves its bytes to the row of all that is shared.
    """
    try:
        return bytes_at_rest(init, params) - bytes_at_rest(init, nothing)
    except Exception:
        return 0
