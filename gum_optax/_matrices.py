"""`for_matrices`: builds an optimizer of a whole model from a direction for its matrices.

A *direction* is a transformation without learning rate and sign. `for_matrices` divides a tree of
parameters into matrices, which get the direction, and all other leaves, which get the *fallback*.
Dimension numbers name the axes of a leaf that are a matrix's rows and columns, see
`dimension_numbers`; the direction sees every matrix as ``[*batch, rows, columns]``.

Tests: tests/library/test_recipes.py, tests/library/test_dimension_numbers.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import optax

from gum_optax import _checks, _ledger, _mesh, _sources, fallbacks
from gum_optax import dimension_numbers as dims
from gum_optax._advice import warn_of_matrices
from gum_optax._groups import by_role, find_groups, state_key
from gum_optax._low_rank import keep_dtypes
from gum_optax._nnx import with_sharding_metadata
from gum_optax._paths import PyTree, is_box, is_stand_in, leaves_with_names
from gum_optax._projected import Projected, described, is_projected
from gum_optax._rates import Mask, ScalarOrSchedule, decoupled_decay
from gum_optax.fallbacks import Fallback


def for_matrices(
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: dims.DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | Fallback | None = None,
    fallback_learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer of a whole model from a direction for its matrices.

    Matrices get the direction, decoupled weight decay and the learning rate; everything else gets
    the fallback. By default the matrices are the 2-D leaves that are not embeddings, heads,
    position tables or stacks of vectors (`dimension_numbers.default`). Leaves with three or more
    axes go to the fallback, unless ``weight_dimension_numbers`` describes them. ``init`` warns once
    of leaves that may be matrices and are not compressed, with the argument that would compress
    them: under the default if there are any, under a rule if they are most of the model.
    `memory_plan` shows where each leaf goes, and why.

    Args:
      direction: a transformation of matrices ``[*batch, rows, columns]`` without learning rate and
        sign, such as `scale_by_polar`, or `low_rank` around another transformation.
      learning_rate: a number, or a schedule of the step count.
      weight_decay: decoupled weight decay >= 0, multiplied by the learning rate. It applies to the
        matrices and, with the same mask, to a `Fallback`.
      weight_decay_mask: a tree, prefix tree or function; True where weight decay applies.
      weight_dimension_numbers: ``optax.contrib.MuonDimensionNumbers`` for the parameters, a tree or
        prefix tree of them (None: fallback), or a function from the parameters to one; axes in
        neither list are batch axes. See `dimension_numbers` for ready functions.
      fallback: the optimizer of everything else: one of `fallbacks`, by default
        ``fallbacks.adamw()``, or a transformation with its own learning rate and weight decay.
      fallback_learning_rate: the learning rate of a `Fallback`, by default ``learning_rate``.
        Embedding, head and norms often need a larger one than matrices.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; updates have the dtypes of the gradients, and
      the state keeps the dtypes of ``init``.

    Raises:
      TypeError, ValueError: if an argument is malformed, or if ``fallback_learning_rate`` is given
        beside a transformation as ``fallback``, which has its own; from ``init``, if
        ``weight_dimension_numbers`` does not fit the parameters; from ``update``, if the state was
        made for other parameters.

    Example:
      Muon with six Newton-Schulz steps on compressed gradients, and Adafactor's second moment for
      all other leaves:

      >>> import optax
      >>> import gum_optax
      >>> muon = optax.chain(optax.trace(0.95), gum_optax.scale_by_polar(ns_steps=6))
      >>> tx = gum_optax.for_matrices(
      ...     gum_optax.low_rank(muon, gum_optax.LowRank(rank=64)), 0.02,
      ...     fallback=gum_optax.fallbacks.factored(), fallback_learning_rate=1e-3)
    """
    _checks.transformation("direction", direction)
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    _checks.hyperparameter("weight_decay", weight_decay)
    # 1. The fallback: a `Fallback` gets its rate and decay here, a transformation has its own.
    if fallback is None:
        fallback = fallbacks.adamw()
    if isinstance(fallback, Fallback):
        rate = learning_rate if fallback_learning_rate is None else fallback_learning_rate
        _checks.scalar_or_schedule("fallback_learning_rate", rate)
        fallback = fallback.make(rate, weight_decay, weight_decay_mask)
    elif fallback_learning_rate is not None:
        raise ValueError(
            f"`fallback_learning_rate` must be left out if `fallback` is a transformation, got "
            f"{fallback_learning_rate!r}: it is the learning rate of one of "
            "`gum_optax.fallbacks`."
        )
    _checks.transformation("fallback", fallback)
    fallback = _with_checked_state(fallback)
    decay = decoupled_decay(weight_decay, weight_decay_mask)

    # 2. U -> -learning_rate * (U + weight_decay * W), for the matrices alone.
    def matrix_optimizer(numbers: PyTree) -> optax.GradientTransformation:
        return optax.chain(
            as_matrices(direction, numbers), decay, optax.scale_by_learning_rate(learning_rate)
        )

    return with_sharding_metadata(_divide(matrix_optimizer, fallback, weight_dimension_numbers))


def _divide(
    matrix_optimizer: Callable[[PyTree], optax.GradientTransformation],
    fallback: optax.GradientTransformation,
    weight_dimension_numbers: dims.DimensionNumbers | None,
) -> optax.GradientTransformationExtraArgs:
    """Divides a tree into matrices and other leaves, in each call again.

    Labels depend on shapes and paths alone. They are recomputed in every call, because a tree of
    labels from ``init`` does not fit if containers differ between ``init`` and ``update``, as under
    Flax NNX.

    Args:
      matrix_optimizer: maps the tree of dimension numbers to the optimizer of the matrices.
      fallback: the optimizer of all other leaves.
      weight_dimension_numbers: see `dimension_numbers.resolve`.
    """

    def bind(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        # One entry for each leaf: its dimension numbers, or None for the fallback.
        resolved = [] if is_stand_in(tree) else dims.resolve(tree, weight_dimension_numbers)
        # A leaf in a box is masked with its box: an NNX variable that holds a masked node has the
        # metadata of an array and no shape, and `nnx.eval_shape` fails on it.
        treedef = jax.tree.structure(tree, is_leaf=is_box)
        labels = treedef.unflatten(["fallback" if x is None else "matrix" for x in resolved])
        numbers = treedef.unflatten([optax.MaskedNode() if x is None else x for x in resolved])
        return optax.partition(
            {"matrix": matrix_optimizer(numbers), "fallback": fallback},
            # A function, since optax calls whatever can be called: an Equinox module, for example.
            lambda tree: labels,
        )

    def init(params: PyTree) -> Any:
        if not is_stand_in(params):
            warn_of_matrices(params, weight_dimension_numbers)
        _ledger.write(lambda: _fallback_rows(fallback, params, weight_dimension_numbers))
        return bind(params).init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        # Labels are computed on descriptions: a projected gradient stands for one whole leaf.
        shapes = described(updates)
        new_updates, new_state = bind(shapes).update(updates, state, params, **extra_args)
        # A fallback or weight decay may promote dtypes; neither state nor updates may drift.
        return keep_dtypes(new_updates, shapes), keep_dtypes(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_checked_state(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds a check to a transformation: an error names state that belongs to other parameters.

    Transformations of optax do not check. After a parameter was resized they add arrays that do not
    fit, which fails without a name; or one array broadcasts to the other, and training goes on with
    a state of another shape.
    """
    run = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        try:
            new_updates, new_state = run.update(updates, state, params, **extra_args)
        except (TypeError, ValueError):
            # Only now, since tracing `init` takes as long as tracing the update.
            expected = jax.eval_shape(run.init, updates if params is None else params)
            _checks.same_shapes(expected, state)
            raise
        _checks.same_shapes(new_state, state)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def as_matrices(
    inner: optax.GradientTransformation, numbers: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Shows leaves to ``inner`` as ``[*batch, rows, columns]``; rows are the reduction axes.

    Args:
      inner: a transformation of matrices.
      numbers: a tree like the parameters, of ``MuonDimensionNumbers`` or ``MaskedNode``.
    """
    inner = optax.with_extra_args_support(inner)

    # Axes are moved and merged in Auto mode: on Explicit axes a reshape of a sharded axis needs the
    # sharding of its result, which `_describe` knows.
    def encode(tree: PyTree) -> PyTree:
        return _mesh.in_auto_mode(
            lambda tree: _map_matrices(_to_matrix, numbers, tree),
            tree,
            like=lambda: _map_matrices(_describe, numbers, tree),
        )

    def decode(like: PyTree, matrices: PyTree) -> PyTree:
        return _map_matrices(_from_matrix, numbers, like, matrices)

    def init(params: PyTree) -> Any:
        # Only shapes and shardings matter to a low-rank state, and `params` may hold nothing else.
        _sources.write_numbers(params, numbers)
        matrices = _map_matrices(_describe, numbers, params)
        written = _ledger.count()
        state = inner.init(matrices)
        # `low_rank` writes rows for its groups. Without one in `inner`, they are written here.
        if _ledger.count() == written:
            _ledger.write(lambda: _full_rank_rows(inner, matrices))
        return state

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        encoded, state = inner.update(
            encode(updates), state, None if params is None else encode(params), **extra_args
        )
        like = partial(described, updates, params)
        return _mesh.in_auto_mode(decode, updates, encoded, like=like), state

    return optax.GradientTransformationExtraArgs(init, update)


def _map_matrices(function: Callable[..., Any], numbers: PyTree, *trees: PyTree) -> PyTree:
    """Applies ``function(numbers, *leaves)`` to each matrix; the trees may hold boxes."""

    def on_leaf(number: Any, *boxes: Any) -> Any:
        # A leaf of the fallback stays masked; a box is opened, and closed around the result.
        if isinstance(number, optax.MaskedNode):
            return number
        return jax.tree.map(partial(function, number), *boxes, is_leaf=is_projected)

    return jax.tree.map(
        on_leaf,
        numbers,
        *trees,
        is_leaf=lambda x: isinstance(x, dims.MuonDimensionNumbers | optax.MaskedNode),
    )


def _to_matrix(numbers: dims.MuonDimensionNumbers, leaf: Any) -> Any:
    """Returns a leaf as matrices ``[*batch, rows, columns]``."""
    if isinstance(leaf, Projected):
        return _of_matrix(_to_matrix, numbers, leaf)
    batch, rows, columns = dims.axes(leaf.shape, numbers)
    sizes = [math.prod(leaf.shape[axis] for axis in side) for side in (rows, columns)]
    # [*batch axes, *row axes, *column axes] -> [*batch, rows, columns]
    ordered = leaf.transpose(batch + rows + columns)
    return ordered.reshape(*ordered.shape[: len(batch)], *sizes)


def _of_matrix(
    function: Callable[..., Any], numbers: dims.MuonDimensionNumbers, leaf: Projected
) -> Projected:
    """Reshapes the `Projected` gradient of a leaf to the leaf's matrices.

    Only the shape and the residual change: projections ``P'G`` belong to the matrices already.
    """
    shape = _describe(numbers, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    residual = None if leaf.residual is None else function(numbers, leaf.residual)
    return dataclasses.replace(leaf, shape=shape, residual=residual)


def _from_matrix(
    numbers: dims.MuonDimensionNumbers, like: jax.Array, matrix: jax.Array
) -> jax.Array:
    """Returns matrices as a leaf of the shape of ``like``, the inverse of `_to_matrix`."""
    batch, rows, columns = dims.axes(like.shape, numbers)
    # [*batch, rows, columns] -> [*batch axes, *row axes, *column axes] -> axes in the leaf's order
    order = batch + rows + columns
    ordered = matrix.reshape([like.shape[axis] for axis in order])
    return ordered.transpose([order.index(axis) for axis in range(like.ndim)])


def _describe(numbers: dims.MuonDimensionNumbers, leaf: Any) -> Any:
    """Returns shape, dtype and sharding of `_to_matrix` of an array or a description."""
    if isinstance(leaf, Projected):
        return _of_matrix(_describe, numbers, leaf)
    batch, rows, columns = dims.axes(leaf.shape, numbers)
    sharding = _mesh.sharding_of(leaf)
    entries = _mesh.spec_entries(sharding, len(leaf.shape))
    # 1. Axes of the result, each made of axes of the leaf: one for each batch axis, rows, columns.
    sides = [*((axis,) for axis in batch), rows, columns]
    sizes = [[leaf.shape[axis] for axis in side] for side in sides]
    # 2. The mesh axes of rows and columns. Batch axes are not merged and keep theirs.
    spec = [
        _mesh.merged_entry([entries[axis] for axis in side], size)
        for side, size in zip(sides[len(batch) :], sizes[len(batch) :], strict=True)
    ]
    return jax.ShapeDtypeStruct(
        tuple(map(math.prod, sizes)),
        leaf.dtype,
        sharding=_mesh.sharding_like(sharding, [*(entries[axis] for axis in batch), *spec]),
    )


def _full_rank_rows(
    direction: optax.GradientTransformation, matrices: PyTree
) -> Iterator[_ledger.PlanRow]:
    """Yields one row for the matrices of each role, with the bytes that they add to the state."""
    leaves, treedef = jax.tree.flatten(matrices)
    for group in find_groups(matrices, by_role):
        # Two trees: only this group, and no leaf at all. The difference of their states counts.
        alone = [leaf if i in group.leaves else None for i, leaf in enumerate(leaves)]
        trees = treedef.unflatten(alone), treedef.unflatten([None] * len(leaves))
        yield _ledger.PlanRow(
            name=group.name,
            treatment="uncompressed",
            why="full rank",
            count=group.count,
            shape=group.shape[-2:],
            rank=None,
            slots=None,
            bytes=_ledger.bytes_beyond(direction.init, *trees),
            adamw_bytes=2 * group.count * group.m * group.n * group.dtype.itemsize,
        )


def _fallback_rows(
    fallback: optax.GradientTransformation,
    params: PyTree,
    weight_dimension_numbers: dims.DimensionNumbers | None,
) -> Iterator[_ledger.PlanRow]:
    """Yields one row for the fallback leaves of each role, with the bytes that they add."""
    # 1. Leaves with equal name without numbers, shape, dtype and reason share a row.
    numbers = dims.resolve(params, weight_dimension_numbers)
    boxes, treedef = jax.tree.flatten(params, is_leaf=is_box)
    masked = [optax.MaskedNode()] * len(boxes)
    roles: dict[tuple[Any, ...], list[int]] = {}
    reasons = dims.explain(params, numbers)
    for position, (path, leaf) in enumerate(leaves_with_names(params)):
        if numbers[position] is None:
            name = state_key(by_role(path, leaf))
            role = (name, tuple(leaf.shape), leaf.dtype, reasons[position])
            roles.setdefault(role, []).append(position)
    for (name, shape, dtype, why), positions in roles.items():
        # 2. Two trees: only these leaves, and no leaf at all. The difference of states counts.
        alone = [box if i in positions else masked[i] for i, box in enumerate(boxes)]
        trees = treedef.unflatten(alone), treedef.unflatten(masked)
        yield _ledger.PlanRow(
            name=name,
            treatment="fallback",
            why=why,
            count=len(positions),
            shape=shape,
            rank=None,
            slots=None,
            bytes=_ledger.bytes_beyond(fallback.init, *trees),
            adamw_bytes=2 * len(positions) * math.prod(shape) * dtype.itemsize,
        )
