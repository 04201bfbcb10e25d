"""Sources: every `low_rank` in an optimizer, with its matrices and the place of its state.

The backward pass can only project gradients if it knows which leaves are matrices, along which
axes, in which group, and where in the optimizer's state their bases are. As in `_ledger`, the code
that decides this writes it down while ``init`` is traced, so it is correct for any chains, masks
and wrappers.

Tests: tests/library/test_backward.py.
"""

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax

from gum_optax import dimension_numbers as dims
from gum_optax._groups import Group
from gum_optax._paths import PyTree, leaves_with_names


@dataclasses.dataclass(frozen=True)
class Source:
    """One `low_rank` of an optimizer, and the matrices that reach it.

    Attributes:
      groups: its compressed groups. Their leaves are positions in the tree that it was given.
      names: the names of the leaves of that tree, in order.
      compression: its `LowRank`.
      unpack: ``(group, packed basis, lead) -> [*lead, m, r]``, which unpacks the basis of a group;
        of codes also a part, with other leading axes.
      renewed: ``(state, basis, slots) -> state``, which moves a state to a new period.
      state: the state that its ``init`` made; in the result of `find`, descriptions of its arrays.
      place: the position of that state among all states of `low_rank` in the optimizer's state.
    """

    groups: Sequence[Group]
    names: Sequence[str]
    compression: Any
    unpack: Callable[[Group, Any, tuple[int, ...]], jax.Array]
    renewed: Callable[..., Any]
    state: Any
    place: int = -1


@dataclasses.dataclass
class Notes:
    """A record of one trace of ``init``.

    Attributes:
      sources: every `low_rank`.
      numbers: name of a leaf -> the axes that are its rows and columns. A leaf without an entry
        reaches its `low_rank` unchanged.
    """

    sources: list[Source] = dataclasses.field(default_factory=list)
    numbers: dict[str, dims.MuonDimensionNumbers] = dataclasses.field(default_factory=dict)


_open: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)


def write(make_source: Callable[[], Source]) -> None:
    """Adds a `low_rank` to the open notes; without open notes, ``make_source`` is not called."""
    if (notes := _open.get()) is not None:
        notes.sources.append(make_source())


def write_numbers(params: PyTree, numbers: PyTree) -> None:
    """Adds the axes of matrices to the open notes; the two trees have the same masked leaves."""
    if (notes := _open.get()) is not None:
        given = jax.tree.leaves(
            numbers, is_leaf=lambda node: isinstance(node, dims.MuonDimensionNumbers)
        )
        names = [name for name, _ in leaves_with_names(params)]
        notes.numbers.update(zip(names, given, strict=True))


@contextlib.contextmanager
def opened(notes: Notes | None) -> Iterator[None]:
    """Opens notes for the time being; None: writes nothing, as for an ``init`` that only probes."""
    token = _open.set(notes)
    try:
        yield
    finally:
        _open.reset(token)


def find(
    tx: optax.GradientTransformation, params: PyTree, kind: type
) -> tuple[list[Source], dict[str, dims.MuonDimensionNumbers]]:
    """Traces ``tx.init`` on shapes, and returns its sources and dimension numbers.

    Args:
      tx: any optimizer.
      params: arrays or their descriptions.
      kind: the type of the states of `low_rank`.

    Raises:
      ValueError: if a state of `low_rank` cannot be found in the state of ``tx``.
    """
    notes = Notes()
    places: list[int | None] = []

    # 1. Trace `init` with open notes. A state of `low_rank` is recognized in the whole state by the
    #    identity of its traced arrays, wherever wrappers have put it.
    def init(params: PyTree) -> Any:
        state = tx.init(params)
        known = [_identity(found) for found in states(state, kind)]
        for source in notes.sources:
            own = _identity(source.state)
            places.append(known.index(own) if own in known else None)
        # Only their shapes leave the trace: traced arrays would leak from it.
        notes.sources[:] = [
            dataclasses.replace(source, state=jax.tree.map(_described, source.state))
            for source in notes.sources
        ]
        return state

    with opened(notes), warnings.catch_warnings():
        # The caller's own `init` has warned of uncompressed matrices already.
        warnings.simplefilter("ignore", UserWarning)
        jax.eval_shape(init, params)
    # 2. A wrapper that packs the state, such as `quantized`, has arrays of its own: no place.
    if not notes.sources or None in places:
        raise ValueError(
            "`tx` has no compressed gradients that can be found from outside: "
            + ("no `low_rank` is in it." if not notes.sources else "a wrapper packs their state.")
        )
    return [
        dataclasses.replace(source, place=place)
        for source, place in zip(notes.sources, places, strict=True)
        if place is not None
    ], notes.numbers


def _described(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _identity(state: Any) -> list[int]:
    return [id(leaf) for leaf in jax.tree.leaves(state)]


def states(state: Any, kind: type) -> list[Any]:
    """Returns the states of a type in a tree of states, in order."""
    is_one = lambda node: isinstance(node, kind)  # noqa: E731
    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def with_states(state: Any, kind: type, new: Sequence[Any]) -> Any:
    """Replaces the states of a type in a tree of states by new ones, in order."""
    is_one = lambda node: isinstance(node, kind)  # noqa: E731
    left = iter(new)

    def on_node(node: Any) -> Any:
        # Only the arrays are replaced: a wrapper may keep them in boxes, as for Flax NNX.
        if is_one(node):
            return jax.tree.structure(node).unflatten(jax.tree.leaves(next(left)))
        return node

    return jax.tree.map(on_node, state, is_leaf=is_one)
