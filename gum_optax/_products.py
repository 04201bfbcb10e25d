"""Rules of primitives that use weights: products, convolutions and lookups.

`_usage` defines the terms (view, use, trail, role).

Tests: tests/library/test_infer.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gum_optax._usage import NONE, Value, View, Walk, mixed, roles_of_all, shape_of


def gather(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """A scalar index drops an axis, as a scan does; an array of indices looks up rows."""
    # 1. Axes of the operand that the result keeps, and whether there is an array of indices: it
    #    adds axes to the result beside the axes of the slices (`offset_dims`).
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, found = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    left = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    remaining = [axis for axis in range(len(shape)) if axis not in left]
    lookups = len(found) > len(numbers.offset_dims)
    views = []
    for view in values[0].views:
        # 2. The leaf's axes in the result, and those that were looked up.
        axes = [NONE] * len(found)
        for position, axis in zip(numbers.offset_dims, remaining, strict=True):
            axes[position] = view.axes[axis]
        looked_up = {a for axis in numbers.collapsed_slice_dims for a in view.axes[axis]}
        roles = view.roles
        # 3. A scalar index into a product takes it apart: q = (x @ W)[..., 0, :].
        if view.use is not None:
            for axis, size in enumerate(shape):
                whole = walk.is_whole(view, axis, size)
                if whole is not None and sizes[axis] == 1 and not lookups:
                    walk.uses[view.use].unpacked.add(whole)
        # 4. A lookup is a use of its own. The view goes on, since experts are multiplied later.
        elif lookups and looked_up:
            roles |= {(axis, "gathered") for axis in looked_up}
            walk.record(dataclasses.replace(view, roles=roles), ())
            # Indices from the data are tokens; others, such as positions, show no vocabulary.
            if values[1].data:
                walk.vocabularies |= {walk.shapes[view.leaf][axis] for axis in looked_up}
        views.append(dataclasses.replace(view, axes=tuple(axes), roles=roles))
    result = mixed(values)
    return [dataclasses.replace(result, data=result.data or lookups).showing(views)]


# Rules of products -------------------------------------------------------------------------------


def dot(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """A product of two arrays (``dot_general``)."""
    contracted, batch = equation.params["dimension_numbers"]
    return _product(walk, equation, values[:2], contracted, batch, batch)


def ragged_dot(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Each row is multiplied by the matrix of its group, so that groups are batch axes."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    contracted, (left, right) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    # The axis over groups is in the right operand alone: rows of the result belong to one each.
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
    """The rule of a sum of products of two operands, called sides here.

    Args:
      walk: collects uses.
      equation: the product.
      values: of both operands.
      contracted: for each side the axes that are summed over.
      batch: for each side its batch axes.
      out_batch: for each side the batch axes that the result has. The axes of the result are
        these, then the free axes of the left side, then the free axes of the right side.
    """
    ranks = [len(shape_of(atom)) for atom in equation.invars[:2]]
    free = [
        [i for i in range(rank) if i not in {*contracted[side], *batch[side]}]
        for side, rank in enumerate(ranks)
    ]
    # For each axis of the result, the axis of this side; None if it comes from the other side.
    kept = [
        [*out_batch[0], *free[0], *([None] * len(free[1]))],
        [*out_batch[1], *([None] * len(free[0])), *free[1]],
    ]
    views: list[View] = []
    # Learned vectors that are repeated for each example, such as queries, act as activations.
    repeated = [_is_repeated(equation.invars[i], values[i], batch[i]) for i in (0, 1)]
    for side in (0, 1):
        mine, other = values[side], values[1 - side]
        for view in mine.views:
            # 1. A trail ends in the next product.
            if view.use is not None:
                _follow(walk, equation, view, side, other, contracted, batch)
                continue
            if repeated[side]:
                walk.record(view, roles_of_all(view, "elementwise"))
                continue
            summed = [a for axis in contracted[side] for a in view.axes[axis]]
            # 2. Weights times weights, W = A B, are a weight, whose shared axis is inner to both.
            if other.weights and not other.data and not repeated[1 - side]:
                roles = view.roles | {(axis, "inner") for axis in summed}
                axes = [NONE if axis is None else view.axes[axis] for axis in kept[side]]
                views.append(dataclasses.replace(view, axes=tuple(axes), roles=roles))
                continue
            # 3. Weights times activations. A product with one-hot vectors is a lookup.
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
    # A constant that is multiplied with weights is an input that the function has captured.
    alone = result.weights and not all(value.weights for value in values)
    data = result.data or alone or any(repeated)
    return [dataclasses.replace(result, data=data).showing(views)]


def _is_repeated(atom: Any, value: Value, batch: Sequence[int]) -> bool:
    """Returns whether weights have an axis, summed over or kept, that is no leaf's."""
    weights = [view for view in value.views if view.use is None]
    return bool(weights) and any(
        size > 1 and axis not in batch and not any(view.axes[axis] for view in weights)
        for axis, size in enumerate(shape_of(atom))
    )


def _trail(
    walk: Walk, leaf: int, use: int, axes: Sequence[frozenset[int]], output: set[int]
) -> list[View]:
    """Starts a trail if it can decide something, or returns no view.

    Several free axes may be unpacked later, and an output as large as a vocabulary may be a head.
    Other products need no trail, and walks are faster without.
    """
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
    """Ends a trail in a product with other parameters, and adds the findings to its use."""
    assert view.use is not None
    use, shape = walk.uses[view.use], shape_of(equation.invars[side])
    weights = [v for v in other.views if v.use is None]
    # 1. Parameters that contract the product: it is no output of the model.
    if weights and any(view.axes[axis] for axis in contracted[side]):
        use.followed = True
    # 2. Experts: along a shared batch axis, each part of the product meets weights of its own.
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
    # 1. Two kinds of kernels are no matrices: one input channel for each group, and the windows of
    #    an image, side by side (the inputs of the model depend on no weights).
    note = ""
    if equation.params["feature_group_count"] > 1 and shape[channels_in] == 1:
        note = "depthwise convolution"
    elif (
        not inputs.weights
        and math.prod(window) > 1
        and list(equation.params["window_strides"]) == window
    ):
        note = "patch embedding"
    # 2. The use of every other kernel: (space and input channels) x output channels.
    for view in kernel.views:
        if view.use is None:
            summed = {a for axis in (channels_in, *space) for a in view.axes[axis]}
            roles = [(axis, "contracted") for axis in summed]
            roles += [(axis, "free") for axis in view.axes[channels_out]]
            walk.record(view, roles, note)
    walk.forget("conv_general_dilated", [inputs])
    return [dataclasses.replace(mixed(values), data=True)]
