"""Rules of operations on one weight: the axes of its view, and the dense product.

Casts, transposes, reshapes and slices of layers return another view, with the tap of its matrices.
A dense product becomes `_taps.product`, whose backward pass projects without G.

Tests: tests/library/test_interception.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gum_optax import _taps
from gum_optax._interpreter import Interpreter, Met, Rule, View, bind, type_of
from gum_optax._taps import Axis, Site


def _same_axes(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Casts, copies and constraints: the value changes, its axes do not."""
    if len(values) > 1:
        return None
    (view,) = values
    return [dataclasses.replace(view, value=bind(equation, [view.value])[0])]


def _barrier(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """An optimization barrier of any number of arrays."""
    results = bind(equation, [v.value if isinstance(v, View) else v for v in values])
    return [
        dataclasses.replace(value, value=result) if isinstance(value, View) else result
        for value, result in zip(values, results, strict=True)
    ]


def _transpose(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Transposes the axes, and the tap where batch axes change their order."""
    view: View = values[0]
    order = equation.params["permutation"]
    axes = tuple(view.axes[i] for i in order)
    # The new order of the batch axes among themselves: tap arrays are [*batch, ...].
    batch = _taps.positions(view.axes, "batch")
    moved = [batch.index(i) for i in order if i in batch]
    tap = view.tap
    if moved != sorted(moved):
        tap = jax.tree.map(
            lambda leaf: leaf.transpose([*moved, *range(len(moved), leaf.ndim)]), tap
        )
    (value,) = bind(equation, [view.value])
    return [dataclasses.replace(view, value=value, axes=axes, tap=tap)]


def _reshape(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Reshapes that keep rows, columns and batch apart."""
    view = values[0]
    axes = _reshaped(view.axes, equation.outvars[0].aval.shape)
    if axes is None:
        return None
    (value,) = bind(equation, [view.value])
    return [dataclasses.replace(view, value=value, axes=axes)]


def _reshaped(axes: tuple[Axis, ...], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Returns the axes after a reshape, or None if it mixes sides or touches a batch axis.

    For example, a kernel ``[d, heads * size]`` that becomes ``[d, heads, size]`` has two axes of
    the side columns, with the strides ``size`` and 1.
    """
    # Axes of length one come and go, unless they are batch axes, which the tap has too.
    left = [axis for axis in axes if axis.size != 1 or axis.side == "batch"]
    result: list[Axis] = []
    rest: Axis | None = None  # The remainder of an axis that is being split.
    for size in shape:
        # 1. A batch axis stays, and an axis of length one is new.
        if rest is None and left and left[0].side == "batch" and left[0].size == size:
            result.append(left.pop(0))
            continue
        if size == 1:
            result.append(Axis("one", 0, 1))
            continue
        if rest is None:
            if not left:
                return None
            rest = left.pop(0)
        # 2. Merge with the next axis, if the two are neighbours of one side in memory.
        while rest.size < size:
            if not left or rest.side == "batch":
                return None
            inner = left.pop(0)
            if inner.side != rest.side or rest.stride != inner.stride * inner.size:
                return None
            rest = Axis(inner.side, inner.stride, rest.size * inner.size)
        # 3. Split: the outer part is this axis and has the larger stride; the inner part is left
        #    for the next axes.
        if rest.side == "batch" or rest.size % size:
            return None
        inner_size = rest.size // size
        result.append(Axis(rest.side, rest.stride * inner_size, size))
        rest = None if inner_size == 1 else Axis(rest.side, rest.stride, inner_size)
    return tuple(result) if rest is None and not left else None


def _squeeze(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """Drops axes of length one; for a batch axis, this picks its only matrix."""
    (view,) = values
    dropped = set(equation.params["dimensions"])
    batch = _taps.positions(view.axes, "batch")
    # The same index into the batch axes of the tap.
    index = tuple(0 if i in dropped else slice(None) for i in batch)
    (value,) = bind(equation, [view.value])
    return [
        dataclasses.replace(
            view,
            value=value,
            axes=tuple(axis for i, axis in enumerate(view.axes) if i not in dropped),
            tap=jax.tree.map(lambda leaf: leaf[index], view.tap),
        )
    ]


def _slice(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Slices of layers."""
    (view,) = values
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    parts = [slice(*bounds) for bounds in zip(starts, limits, strides, strict=True)]
    (value,) = bind(equation, [view.value])
    return _of_layers(view, value, lambda batch: lambda leaf: leaf[tuple(parts[i] for i in batch)])


def _dynamic_slice(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Slices of layers at traced positions."""
    view, *starts = values
    if not isinstance(view, View):
        return None
    sizes = equation.params["slice_sizes"]
    (value,) = bind(equation, [view.value, *starts])

    def take(batch: list[int]) -> Callable[[jax.Array], jax.Array]:
        def one(leaf: jax.Array) -> jax.Array:
            rest = leaf.shape[len(batch) :]
            at = [*(starts[i] for i in batch), *(0 for _ in rest)]
            return jax.lax.dynamic_slice(leaf, at, [*(sizes[i] for i in batch), *rest])

        return one

    return _of_layers(view, value, take)


def _of_layers(view: View, value: jax.Array, take: Any) -> list[Any] | None:
    """Returns the view of a slice of layers, with the same slice of its tap.

    None if it cuts rows or columns: the tap projects whole matrices.
    """
    if any(
        axis.side != "batch" and axis.size != size
        for axis, size in zip(view.axes, value.shape, strict=True)
    ):
        return None
    axes = tuple(
        axis._replace(size=size) for axis, size in zip(view.axes, value.shape, strict=True)
    )
    tap = jax.tree.map(take(_taps.positions(view.axes, "batch")), view.tap)
    return [dataclasses.replace(view, value=value, axes=axes, tap=tap)]


def _product(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """A dense product of one weight with an activation."""
    # G itself is needed for new bases and for residuals; a product of two weights has no tokens.
    if run.whole or run.residual or all(isinstance(value, View) for value in values):
        return None
    # 1. Which operand is the weight, and which of its axes are contracted or shared.
    of_weight = int(isinstance(values[1], View))
    view, x = values[of_weight], values[1 - of_weight]
    contracting, batch = equation.params["dimension_numbers"]
    contracted, shared = contracting[of_weight], batch[of_weight]
    # 2. The product must be y = x W for each matrix W. Every batch axis of the view must be a batch
    #    axis of the product, and no other axis may be one; exactly one side is contracted, whole.
    if sorted(shared) != _taps.positions(view.axes, "batch"):
        return None
    sides = {view.axes[i].side for i in contracted if view.axes[i].side != "one"}
    free = [i for i in range(len(view.axes)) if i not in contracted and i not in shared]
    if len(sides) != 1 or sides & {view.axes[i].side for i in free}:
        return None
    # 3. The same product with a tap.
    run.met.add(Met(view.leaf, run.place, ""))
    options = {k: v for k, v in equation.params.items() if k != "dimension_numbers"}
    form = _taps.Product(
        site=Site(view.axes, type_of(view.tap.low), view.unpack),
        side=sides.pop(),
        of_weight=of_weight,
        dimension_numbers=equation.params["dimension_numbers"],
        options=tuple(options.items()),
    )
    with equation.ctx.manager:
        tapped: Any = _taps.product(form, x, view.value, view.tap, run.slots.get(view.group))
    y, slots = tapped
    run.keep(view.group, slots)
    return [y]


# Operations that leave the axes of a weight unchanged.
_UNCHANGING = (
    *("convert_element_type", "reduce_precision", "copy", "copy_p"),
    *("sharding_constraint", "mesh_cast", "reshard", "layout_constraint"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGING, _same_axes),
    **dict.fromkeys(("reshape", "broadcast_in_dim"), _reshape),
    "optimization_barrier": _barrier,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dot_general": _product,
}
