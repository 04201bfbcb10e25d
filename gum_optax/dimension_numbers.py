"""Dimension numbers: which leaves are matrices, and which of their axes are rows and columns.

A *matrix*, or a stack of matrices, maps hidden features to hidden features; the optimizers project
it. All other leaves go to the *fallback*. With L layers, width d and V tokens these are

- *vectors*: biases, scales and norms ``[d]``, and stacks of them, ``[L, d]``;
- *tables*: one row for each token, ``[V, d]`` (an embedding), or for each position;
- *heads*: the map from the width to the outputs, ``[d, V]``.

Three kinds of evidence speak against a matrix, in this order: a leaf has fewer than two axes; its
path contains a name of a table, a vector or a head; its shape shows stacked vectors or the
vocabulary. `explain` returns the evidence that decided. Every other 2-D leaf is a matrix.

The rules of this module map parameters to a tree of ``optax.contrib.MuonDimensionNumbers`` (None:
no matrix, to the fallback) and can be passed as ``weight_dimension_numbers``.

Example:
  Convolution kernels as matrices, and everything else by the default rule:

  >>> import gum_optax
  >>> tx = gum_optax.gum(1e-2, weight_dimension_numbers=gum_optax.dimension_numbers.convolutions)

Tests: tests/library/test_dimension_numbers.py.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from gum_optax._evidence import evidence_against_matrices
from gum_optax._inference import infer as infer
from gum_optax._paths import PyTree, leaves_with_names, path_name
from gum_optax._rules import convolutions as convolutions
from gum_optax._rules import default as default
from gum_optax._rules import equinox_stacked as equinox_stacked
from gum_optax._rules import flax as flax
from gum_optax._rules import gemma as gemma
from gum_optax._rules import maxtext as maxtext
from gum_optax._rules import scanned_layers as scanned_layers

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers

DimensionNumbers: TypeAlias = PyTree | Callable[[PyTree], PyTree]
"""``MuonDimensionNumbers``, a tree or prefix tree of them, or a function that returns one."""


def first_of(*rules: DimensionNumbers) -> Callable[[PyTree], PyTree]:
    """Makes a rule that uses, for each leaf, the first of several rules that knows the leaf.

    Args:
      *rules: functions of the parameters, such as the rules of this module, or trees.

    Returns:
      A function from parameters to a tree of ``MuonDimensionNumbers`` or None.

    Raises:
      TypeError, ValueError: from that function, if a rule's tree does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax.dimension_numbers import convolutions, first_of, flax
      >>> rule = first_of(flax, convolutions)
      >>> numbers = rule({"query": {"kernel": jnp.ones((8, 2, 4))}, "stem": jnp.ones((3, 3, 8, 8))})
      >>> numbers["query"]["kernel"].reduction_axis, numbers["stem"].reduction_axis
      (0, (0, 1, 2))
    """

    def rule(params: PyTree) -> PyTree:
        given = [resolve(params, each) for each in rules]
        return jax.tree.structure(params).unflatten(
            next((numbers for numbers in of_leaf if numbers is not None), None)
            for of_leaf in zip(*given, strict=True)
        )

    return rule


def resolve(
    params: PyTree, dimension_numbers: DimensionNumbers | None
) -> list[MuonDimensionNumbers | None]:
    """Returns the dimension numbers of each leaf, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      dimension_numbers: a tree or prefix tree, a function that returns one, or None for `default`.
        `is_function` tells functions from trees that can be called.

    Returns:
      A list of ``MuonDimensionNumbers`` or None.

    Raises:
      TypeError, ValueError: if the tree does not fit ``params``, or if an axis is out of range or
        used twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.resolve({"a": jnp.ones((4, 6)), "b": jnp.ones(6)}, None)
      [MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), None]
    """
    # 1. The tree of dimension numbers, or a prefix of one.
    if dimension_numbers is None:
        dimension_numbers = default
    tree = dimension_numbers(params) if is_function(dimension_numbers) else dimension_numbers
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    given, prefix = jax.tree.flatten(tree, is_leaf=is_leaf)
    try:
        parts = [jax.tree.leaves(part) for part in prefix.flatten_up_to(params)]
    except ValueError as error:
        # Numbers that were made from a Flax model are in boxes, the arrays of an update are not.
        # So the structures differ, but names, which leave out boxes, must be equal.
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]]
        named = leaves_with_names(params)
        if [path_name(path) for path in paths] != [name for name, _ in named]:
            raise ValueError(
                f"`weight_dimension_numbers` must be a tree like the parameters, or a prefix: "
                f"{error}"
            ) from None
        parts = [[leaf] for _, leaf in named]
    # 2. Each entry of a prefix holds for all leaves below it.
    pairs = [(leaf, numbers) for numbers, part in zip(given, parts, strict=True) for leaf in part]
    # 3. Axes must exist, and no axis may be used twice.
    for position, (leaf, numbers) in enumerate(pairs):
        try:
            _check(leaf.shape, numbers)
        except (TypeError, ValueError) as error:
            # Paths cost another walk through the tree, so they are only computed for the message.
            path = leaves_with_names(params)[position][0]
            raise type(error)(
                f"`weight_dimension_numbers` of the leaf `{path}` with shape {tuple(leaf.shape)}"
                f"{error}"
            ) from None
    return [numbers for _, numbers in pairs]


def explain(params: PyTree, numbers: Sequence[MuonDimensionNumbers | None]) -> list[str]:
    """Returns for each leaf a short reason why it is not a matrix, or "" if it is one.

    The reasons follow the rule `default`, even if the numbers come from another function or a tree:

    - ``vector``: fewer than two axes;
    - ``name: embed``: the word of the path that matched;
    - ``stacked vectors``: ``[L, d]`` under a name such as ``norm_attn``;
    - ``head: vocabulary 32000``: the only unnamed leaf with the sizes of the embedding;
    - ``ambiguous axes``: three or more axes, and no rule for them;
    - ``as given``: `default` takes the leaf as a matrix, but the numbers are None.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      numbers: the result of `resolve` for them.

    Returns:
      A list of strings in the order of ``jax.tree.leaves``.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> params = {"embed": jnp.ones((8, 4)), "out": jnp.ones((4, 8)), "up": jnp.ones((4, 16))}
      >>> dimension_numbers.explain(params, dimension_numbers.resolve(params, None))
      ['name: embed', 'head: vocabulary 8', '']
    """
    named = leaves_with_names(params)

    def reason(leaf: Any, number: MuonDimensionNumbers | None, evidence: str) -> str:
        if number is not None:
            return ""
        return evidence or ("ambiguous axes" if len(leaf.shape) > 2 else "as given")

    return [
        reason(leaf, number, evidence)
        for (_, leaf), number, evidence in zip(
            named, numbers, evidence_against_matrices(named), strict=True
        )
    ]


def is_function(value: Any) -> bool:
    """Distinguishes a function of the parameters from a tree that happens to be callable.

    The root of an Equinox model is a registered tree with a ``__call__``; a function is a leaf.

    Args:
      value: a function or a tree, for example ``weight_dimension_numbers``, a mask or labels.

    Returns:
      True for a function, which is to be called with the parameters.

    Example:
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.is_function(dimension_numbers.default)
      True
      >>> dimension_numbers.is_function({"kernel": None})
      False
    """
    return callable(value) and jax.tree_util.all_leaves([value])


def axes(
    shape: Sequence[int], numbers: MuonDimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the batch, reduction and output axes of a leaf as non-negative ints.

    Args:
      shape: the leaf's shape.
      numbers: its dimension numbers.

    Returns:
      Three tuples of axes; the batch axes are the axes without dimension numbers.

    Raises:
      TypeError, ValueError: if an axis is no int or out of range.

    Example:
      >>> from gum_optax import dimension_numbers
      >>> numbers = dimension_numbers.MuonDimensionNumbers(-3, (-2, -1))
      >>> dimension_numbers.axes((6, 64, 4, 16), numbers)
      ((0,), (1,), (2, 3))
    """
    reduction = _normalize(len(shape), numbers.reduction_axis)
    output = _normalize(len(shape), numbers.output_axis)
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    return batch, reduction, output


# Checks ------------------------------------------------------------------------------------------


def _check(shape: Sequence[int], numbers: Any) -> None:
    """Raises if numbers do not fit a shape; the message continues after the leaf's path."""
    if numbers is None:
        return
    if not isinstance(numbers, MuonDimensionNumbers):
        raise TypeError(f" must be optax.contrib.MuonDimensionNumbers or None, got {numbers!r}.")
    if len(shape) < 2:
        raise ValueError(": a matrix needs at least two axes; use None for the fallback.")
    try:
        _, reduction, output = axes(shape, numbers)
    except (TypeError, ValueError) as error:
        raise type(error)(f": {error} in {numbers}.") from None
    if not reduction or not output:
        raise ValueError(f": both sides need an axis, got {numbers}.")
    if len(set(reduction + output)) < len(reduction + output):
        raise ValueError(f": an axis is used more than once in {numbers}.")


def _normalize(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    # One axis or several, from the front or the end -> a tuple of axes from the front.
    given = tuple(map(operator.index, np.atleast_1d(axis)))
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for {ndim} axes")
    return tuple(a % ndim for a in given)
