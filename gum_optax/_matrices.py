"""Sends matrices to one transformation and everything else to another."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import optax

from gum_optax import _mesh
from gum_optax import dimension_numbers as dims
from gum_optax._stacks import is_box
from gum_optax._state import is_placeholder, keep_dtypes
from gum_optax._typing import DimensionNumbers, PyTree


def partition_matrices(
    for_matrices: Callable[[PyTree], optax.GradientTransformation],
    fallback: optax.GradientTransformation,
    weight_dimension_numbers: DimensionNumbers | None,
) -> optax.GradientTransformationExtraArgs:
    """Partitions a tree into matrices and the rest, from the tree that each call is given.

    Labels are worked out at every call (they depend on shapes and paths alone), because a tree of
    labels made at ``init`` does not fit where containers differ between ``init`` and ``update``, as
    under Flax NNX. A leaf in a box is masked with its box: an NNX variable that holds a masked node
    has the metadata of an array and no shape, and ``nnx.eval_shape`` fails on it.

    Args:
      for_matrices: from the tree of dimension numbers, the transformation of the matrices.
      fallback: the transformation of all other leaves.
      weight_dimension_numbers: see `dimension_numbers.resolve`.
    """

    def bind(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        if is_placeholder(tree):
            numbers = labels = {}
        else:
            resolved = dims.resolve(tree, weight_dimension_numbers)
            treedef = jax.tree.structure(tree, is_leaf=is_box)
            labels = treedef.unflatten(["fallback" if x is None else "matrix" for x in resolved])
            numbers = tree_of_numbers(tree, resolved)
        return optax.partition({"matrix": for_matrices(numbers), "fallback": fallback}, labels)

    def init(params: PyTree) -> Any:
        if weight_dimension_numbers is None and not is_placeholder(params):
            dims.warn_of_ambiguous_leaves(params)
        return bind(params).init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        new_updates, new_state = bind(updates).update(updates, state, params, **extra_args)
        # A fallback or a weight decay may promote; the state must not drift, nor the updates.
        return keep_dtypes(new_updates, updates), keep_dtypes(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def tree_of_numbers(tree: PyTree, numbers: Sequence[dims.MuonDimensionNumbers | None]) -> PyTree:
    """Dimension numbers as a tree, ``optax.MaskedNode`` standing for leaves of the fallback."""
    return jax.tree.structure(tree, is_leaf=is_box).unflatten(
        [optax.MaskedNode() if x is None else x for x in numbers]
    )


def describe_matrices(params: PyTree, numbers: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of what `as_matrices` shows to its transformation.

    Args:
      params: arrays or ``ShapeDtypeStruct``s; leaves of the fallback come out as masked nodes.
      numbers: a tree of ``MuonDimensionNumbers`` and ``MaskedNode``s like the parameters.
    """
    return _map_matrices(_describe, numbers, params)


def _map_matrices(function: Callable[..., Any], numbers: PyTree, *trees: PyTree) -> PyTree:
    """``function(numbers, *leaves)`` on each matrix; the trees may hold them in boxes."""

    def on_leaf(number: Any, *boxes: Any) -> Any:
        if isinstance(number, optax.MaskedNode):
            return number
        return jax.tree.map(partial(function, number), *boxes)

    return jax.tree.map(
        on_leaf,
        numbers,
        *trees,
        is_leaf=lambda x: isinstance(x, dims.MuonDimensionNumbers | optax.MaskedNode),
    )


def as_matrices(
    inner: optax.GradientTransformation, numbers: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Shows leaves to ``inner`` as ``[*batch, rows, columns]``, rows being the reduction axes.

    Args:
      inner: a transformation of matrices.
      numbers: a tree of ``MuonDimensionNumbers`` like the parameters.
    """
    inner = optax.with_extra_args_support(inner)

    def encode(tree: PyTree) -> PyTree:
        return _mesh.in_auto_mode(
            lambda tree: _map_matrices(_to_matrix, numbers, tree),
            tree,
            like=describe_matrices(tree, numbers),
        )

    def decode(like: PyTree, matrices: PyTree) -> PyTree:
        return _map_matrices(_from_matrix, numbers, like, matrices)

    def init(params: PyTree) -> Any:
        # Only shapes and shardings matter to a low-rank state, and `params` may hold nothing else.
        return inner.init(params if is_placeholder(params) else describe_matrices(params, numbers))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        encoded, state = inner.update(
            encode(updates), state, None if params is None else encode(params), **extra_args
        )
        return _mesh.in_auto_mode(decode, updates, encoded, like=updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _to_matrix(numbers: dims.MuonDimensionNumbers, leaf: jax.Array) -> jax.Array:
    batch, reduction, output = dims.axes(leaf.shape, numbers)
    sizes = [math.prod(leaf.shape[axis] for axis in side) for side in (reduction, output)]
    ordered = leaf.transpose(batch + reduction + output)
    return ordered.reshape(*ordered.shape[: len(batch)], *sizes)


def _describe(numbers: dims.MuonDimensionNumbers, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of `_to_matrix`, of an array or of a description of one."""
    batch, reduction, output = dims.axes(leaf.shape, numbers)
    sharding = _mesh.of(leaf)
    entries = _mesh.axes(sharding, len(leaf.shape)) if sharding else (None,) * len(leaf.shape)
    shape, spec = [leaf.shape[axis] for axis in batch], [entries[axis] for axis in batch]
    for side in (reduction, output):
        sizes = [leaf.shape[axis] for axis in side]
        shape.append(math.prod(sizes))
        spec.append(_mesh.merged([entries[axis] for axis in side], sizes))
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=_mesh.named(sharding, spec))


def _from_matrix(
    numbers: dims.MuonDimensionNumbers, like: jax.Array, matrix: jax.Array
) -> jax.Array:
    batch, reduction, output = dims.axes(like.shape, numbers)
    order = batch + reduction + output
    ordered = matrix.reshape([like.shape[axis] for axis in order])
    return ordered.transpose([order.index(axis) for axis in range(like.ndim)])
