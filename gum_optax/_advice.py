"""Warnings of ``init`` about matrices that it cannot find, with the line of code that finds them.

A leaf is *open* if it has three or more axes, no evidence against it and no dimension numbers: it
may well be a matrix, but goes to the fallback uncompressed. A *crowd* is a leaf that dimension
numbers turn into very many tiny matrices, a sign that an axis was mistaken for a side.

Tests: tests/library/test_advice.py.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import optax

from gum_optax import dimension_numbers as dims
from gum_optax._evidence import evidence_against_matrices
from gum_optax._paths import PyTree, leaves_with_names

_MODULE = "gum_optax.dimension_numbers"


def warn_of_matrices(params: PyTree, given: dims.DimensionNumbers | None) -> None:
    """Warns once, in one message, if matrices are probably missed or misread.

    - Open leaves: always under the default rule, and under another rule if they are most of the
      model. A tree of dimension numbers is taken for a deliberate choice.
    - Crowds: stacks of more matrices than a matrix has entries, with a side below 16.
    - Lists without names, in which the default rule cannot recognize tables and heads.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      given: ``weight_dimension_numbers``.
    """
    numbers = dims.resolve(params, given)
    told = [*_of_open_leaves(params, given, numbers), *_of_crowds(params, numbers)]
    if given is None or given is dims.default:
        told += _of_no_names(params, numbers)
    if told:
        message = " ".join([*told, "`gum_optax.memory_plan(tx, params)` shows every leaf."])
        # The level shows the line that calls `init`, not a line of this library.
        warnings.warn(message, stacklevel=4)


def _of_open_leaves(
    params: PyTree, given: dims.DimensionNumbers | None, numbers: Sequence[Any]
) -> Iterator[str]:
    if given is not None and not dims.is_function(given):
        return
    # 1. The share of open leaves among the parameters that may be matrices at all.
    named = leaves_with_names(params)
    evidence = evidence_against_matrices(named)
    hidden = [leaf for (_, leaf), found in zip(named, evidence, strict=True) if not found]
    # Leaves [m, n] without dimension numbers do not count: the rule excluded them deliberately.
    open_leaves = [
        (path, leaf)
        for (path, leaf), found, number in zip(named, evidence, numbers, strict=True)
        if not found and number is None and len(leaf.shape) > 2
    ]
    share = _size(leaf for _, leaf in open_leaves) / max(1, _size(hidden))
    if not open_leaves or (given is not None and share <= 0.5):
        return
    # 2. One sentence that names the largest of them, and one with the remedy.
    yield (
        f"{_percent(share)} of the parameters outside tables and vectors are not compressed and go "
        f"to `fallback`, since it is not clear which of their axes make a matrix: "
        f"{_examples(open_leaves)}. "
    ) + _what_to_write(params, [path for path, _ in open_leaves])


def _what_to_write(params: PyTree, open_leaves: Sequence[str]) -> str:
    """Recommends the ready rule that covers most of the open leaves, and `infer` in any case."""
    # `infer` reads the axes off the program and needs no convention of names, so it always helps.
    infer = (
        f"`weight_dimension_numbers={_MODULE}.infer(function, params, batch)`, from any function "
        "of the parameters such as the loss"
    )
    ready = {
        name: known
        for name in ("flax", "gemma", "equinox_stacked", "scanned_layers")
        if (known := _known(params, name, open_leaves))
    }
    if not ready:
        return f"Write {infer}."
    best = max(ready, key=ready.__getitem__)
    number = "all of them" if ready[best] == len(open_leaves) else f"{ready[best]} of them"
    return f"Write `weight_dimension_numbers={_MODULE}.{best}`, which knows {number}, or {infer}."


def _known(params: PyTree, name: str, open_leaves: Sequence[str]) -> int:
    """Counts the open leaves that a ready rule takes; 0 if the rule must not be recommended."""
    named = leaves_with_names(params)
    shapes = {path: leaf.shape for path, leaf in named}
    # 1. Rules that take any leaf of three axes have to fit the model in another respect, too.
    if name == "scanned_layers":
        # [layers, ..., m, n]: stacks have one number of layers, which is below the sides of their
        # matrices. If it is not, it is a width, as in [embed, layers, mlp], and layers would mix.
        numbers_of_layers = {shapes[path][0] for path in open_leaves}
        sides = min(min(shapes[path][-2:]) for path in open_leaves)
        if len(numbers_of_layers) > 1 or min(numbers_of_layers) >= sides:
            return 0
    # Equinox calls the matrix of every layer `weight`.
    if name == "equinox_stacked" and not any("weight" in path.split("/") for path in open_leaves):
        return 0
    # 2. A rule that produces a crowd anywhere misreads this model.
    numbers = dims.resolve(params, getattr(dims, name))
    if any(_is_crowd(leaf, number) for (_, leaf), number in zip(named, numbers, strict=True)):
        return 0
    pairs = zip(named, numbers, strict=True)
    return sum(number is not None and path in open_leaves for (path, _), number in pairs)


def _of_crowds(params: PyTree, numbers: Sequence[Any]) -> Iterator[str]:
    crowds = [
        (path, leaf)
        for (path, leaf), number in zip(leaves_with_names(params), numbers, strict=True)
        if _is_crowd(leaf, number)
    ]
    if crowds:
        yield (
            "`weight_dimension_numbers` makes more matrices than a matrix has entries of "
            f"{_examples(crowds)}: an axis over layers or heads is probably taken for a side. "
            f"`{_MODULE}.infer(function, params, batch)` finds the axes."
        )


def _is_crowd(leaf: Any, number: optax.contrib.MuonDimensionNumbers | None) -> bool:
    """Returns whether dimension numbers make a leaf a stack of very many very small matrices."""
    if number is None:
        return False
    # [*batch axes, *row axes, *column axes] -> the three products of their sizes.
    batch, rows, columns = (
        math.prod(leaf.shape[axis] for axis in axes) for axes in dims.axes(leaf.shape, number)
    )
    return 0 < min(rows, columns) < 16 and batch > rows * columns


def _of_no_names(params: PyTree, numbers: Sequence[Any]) -> Iterator[str]:
    named = leaves_with_names(params)
    # A list of nothing but matrices needs no names.
    is_model = any(number is None for number in numbers) and any(numbers)
    if is_model and all(part.isdigit() for path, _ in named for part in path.split("/")):
        yield (
            f"The {len(named)} leaves have no names, so that tables, heads and biases of two axes "
            "are taken for matrices. Write "
            f"`weight_dimension_numbers={_MODULE}.infer(function, params, batch)`, from any "
            "function of the parameters such as the loss."
        )


def _examples(leaves: Sequence[tuple[str, Any]]) -> str:
    """Lists the largest three leaves, with paths and shapes, and the number of others."""
    largest = sorted(leaves, key=lambda pair: -math.prod(pair[1].shape))[:3]
    more = len(leaves) - len(largest)
    texts = [f"`{path}` {list(leaf.shape)}" for path, leaf in largest]
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _size(leaves: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.005 else "Less than 1 %"
