"""The rules of primitives that use weights: products, convolutions and lookups.

See `_usage` for the words.

Tests: tests/library/test_infer.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gum_optax._usage import NONE, Value, View, Walk, mixed, roles_of_all, shape_of


def gather(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """A scalar index leaves an axis as a scan does; an array of indices looks rows up."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, found = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    left = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    remaining = [axis for axis in range(len(shape)) if axis not in left]
    lookups = len(found) > len(numbers.offset_dims)
    views = []
    for view in values[0].views:
        axes = [NONE] * len(found)
        for position, axis in zip(numbers.offset_dims, remaining, strict=True):
            axes[position] = view.axes[axis]
        looked_up = {a for axis in numbers.collapsed_slice_dims for a in view.axes[axis]}
        roles = view.roles
        if view.use is not None:
            for axis, size in enumerate(shape):
                whole = walk.is_whole(view, axis, size)
                if whole is not None and sizes[axis] == 1 and not lookups:
                    walk.uses[view.use].unpacked.add(whole)
        elif lookups and looked_up:
            roles |= {(axis, "gathered") for axis in looked_up}
            walk.record(dataclasses.replace(view, roles=roles), ())
            if values[1].data:
                walk.vocabularies |= {walk.shapes[view.leaf][axis] for axis in looked_up}
        views.append(dataclasses.replace(view, axes=tuple(axes), roles=roles))
    result = mixed(values)
    return [dataclasses.replace(result, data=result.data or lookups).showing(views)]


# Rules of products -------------------------------------------------------------------------------


def dot(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    contracted, batch = equation.params["dimension_numbers"]
    return _product(walk, equation, values[:2], contracted, batch, batch)


def ragged_dot(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Each row is multiplied by the matrix of its group, so that groups are batch axes."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    contracted, (left, right) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    out_batch = (tuple(left), tuple(right))
    return _product(
        walk, equation, values[:2], contracted, (tuple(left), (*right, *groups)), out_batch
    )


def _product(
    walk: Walk,
    equation: Any,
    values: Sequence[Value],
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    out_batch: Sequence[Sequence[int]],
) -> list[Value]:
    """A sum of products; axes of the result are batch axes, then the free ones of each side."""
    ranks = [len(shape_of(atom)) for atom in equation.invars[:2]]
    free = [
        [i for i in range(rank) if i not in {*contracted[side], *batch[side]}]
        for side, rank in enumerate(ranks)
    ]
    # Axes of each side in the result: batch axes first, None where they come from the other side.
    kept = [
        [*out_batch[0], *free[0], *([None] * len(free[1]))],
        [*out_batch[1], *([None] * len(free[0])), *free[1]],
    ]
    views: list[View] = []
    # Learned vectors that are repeated for each example play the part of activations.
    repeated = [_is_repeated(equation.invars[i], values[i], batch[i]) for i in (0, 1)]
    for side in (0, 1):
        mine, other = values[side], values[1 - side]
        for view in mine.views:
            if view.use is not None:
                _follow(walk, equation, view, side, other, contracted, batch)
                continue
            if repeated[side]:
                walk.record(view, roles_of_all(view, "elementwise"))
                continue
            summed = [a for axis in contracted[side] for a in view.axes[axis]]
            if other.weights and not other.data and not repeated[1 - side]:
                # W = A B: a weight made of two, whose shared axis is inner to both.
                roles = view.roles | {(axis, "inner") for axis in summed}
                axes = [NONE if axis is None else view.axes[axis] for axis in kept[side]]
                views.append(dataclasses.replace(view, axes=tuple(axes), roles=roles))
                continue
            role = "gathered" if other.indicator else "contracted"
            if other.indicator and other.data:
                walk.vocabularies |= {walk.shapes[view.leaf][axis] for axis in summed}
            output = {a for axis in free[side] for a in view.axes[axis]}
            if not summed and not output:
                # einsum("bd,d->bd") is a product of batch axes alone.
                walk.record(view, roles_of_all(view, "elementwise"))
                continue
            roles = [(axis, role) for axis in summed] + [(axis, "free") for axis in output]
            use = walk.record(view, roles)
            axes = [
                view.axes[axis] if axis is not None and axis in free[side] else NONE
                for axis in kept[side]
            ]
            views += _trail(walk, view.leaf, use, axes, output)
    result = mixed(values)
    # Constants that are multiplied with weights are inputs that the function has captured.
    alone = result.weights and not all(value.weights for value in values)
    data = result.data or alone or any(repeated)
    return [dataclasses.replace(result, data=data).showing(views)]


def _is_repeated(atom: Any, value: Value, batch: Sequence[int]) -> bool:
    """Whether weights have an axis, summed over or kept, that is no leaf's."""
    weights = [view for view in value.views if view.use is None]
    return bool(weights) and any(
        size > 1 and axis not in batch and not any(view.axes[axis] for view in weights)
        for axis, size in enumerate(shape_of(atom))
    )


def _trail(
    walk: Walk, leaf: int, use: int, axes: Sequence[frozenset[int]], output: set[int]
) -> list[View]:
    """A trail where it can tell something: several free axes, or the size of a vocabulary."""
    size = math.prod(walk.shapes[leaf][axis] for axis in output)
    if len(output) > 1 or size in walk.vocabularies:
        return [View(leaf, tuple(axes), use=use)]
    return []


def _follow(
    walk: Walk,
    equation: Any,
    view: View,
    side: int,
    other: Value,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> None:
    """Ends a trail in a product with other parameters, and tells what it is to them."""
    assert view.use is not None
    use, shape = walk.uses[view.use], shape_of(equation.invars[side])
    weights = [v for v in other.views if v.use is None]
    if weights and any(view.axes[axis] for axis in contracted[side]):
        use.followed = True
    # Experts: each has weights of its own for its part of the product.
    for mine, theirs in zip(batch[side], batch[1 - side], strict=False):
        whole = walk.is_whole(view, mine, shape[mine])
        if whole is not None and any(v.axes[theirs] for v in weights):
            use.unpacked.add(whole)


def convolution(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Kernels are contracted over space and input channels."""
    inputs, kernel = values
    channels_out, channels_in, *space = equation.params["dimension_numbers"].rhs_spec
    shape = shape_of(equation.invars[1])
    window = [shape[axis] for axis in space]
    note = ""
    if equation.params["feature_group_count"] > 1 and shape[channels_in] == 1:
        note = "depthwise convolution"
    elif (
        not inputs.weights
        and math.prod(window) > 1
        and list(equation.params["window_strides"]) == window
    ):
        note = "patch embedding"
    for view in kernel.views:
        if view.use is None:
            summed = {a for axis in (channels_in, *space) for a in view.axes[axis]}
            roles = [(axis, "contracted") for axis in summed]
            roles += [(axis, "free") for axis in view.axes[channels_out]]
            walk.record(view, roles, note)
    walk.forget("conv_general_dilated", [inputs])
    return [dataclasses.replace(mixed(values), data=True)]
