"""Decides which leaves are matrices, and which of their axes are rows and columns.

A *matrix*, or a stack of matrices, maps hidden features to hidden features; the optimizers project
it. All other leaves go to the *fallback*. With L layers, width d and V tokens they are

- *vectors*: biases, scales and norms ``[d]``, and stacks of them, ``[L, d]``;
- *tables*: one row for each token, ``[V, d]`` (an embedding), or for each position;
- *heads*: the map from the width to the outputs, ``[d, V]``.

Three kinds of evidence speak against a matrix, in this order: a leaf has fewer than two axes, its
path contains a name of a table, a vector or a head, or its shape is that of stacked vectors or of
the vocabulary. `explain` returns the one that decided. Every other 2-D leaf is a matrix.

A function here maps parameters to a tree of ``optax.contrib.MuonDimensionNumbers`` (None: not a
matrix, to the fallback) and can be passed as ``weight_dimension_numbers``.

Example:
  Convolution kernels as matrices, and everything else by the default rule:

  >>> import gum_optax
  >>> tx = gum_optax.gum(1e-2, weight_dimension_numbers=gum_optax.dimension_numbers.convolutions)

Tests: tests/library/test_dimension_numbers.py.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from gum_optax._evidence import evidence_against_matrices
from gum_optax._inference import infer as infer
from gum_optax._paths import PyTree, leaves_with_names

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers

DimensionNumbers: TypeAlias = PyTree | Callable[[PyTree], PyTree]
"""``MuonDimensionNumbers``, a tree or prefix tree of them, or a function that gives one."""

_Rule = Callable[[str, Any], MuonDimensionNumbers | None]

_LAST_TWO = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

_QUERY_KEY_VALUE = {"query", "key", "value", "q", "k", "v"}
_OUTPUT = {"out", "o"}


def default(params: PyTree) -> PyTree:
    """Takes 2-D leaves as matrices, except tables, heads and stacks of vectors.

    Names decide first: embeddings, position tables, heads, biases, scales and norms. Shapes decide
    where names are silent: a leaf such as ``norm_attn`` ``[L, d]`` is a stack of vectors if leaves
    with three or more axes show L layers, and the only other leaf with the sizes of the embedding
    ``[V, d]`` is the head, however it is called. Leaves with three or more axes are ambiguous and
    are not matrices.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.default({"embed": jnp.ones((8, 4)), "up": jnp.ones((4, 16))})
      {'embed': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}

      A weight with a misleading name is overridden by a callable of one's own, which can be passed
      as ``weight_dimension_numbers``. To send a leaf to the fallback, write None:

      >>> def mine(params):
      ...     numbers = dimension_numbers.default(params)
      ...     return {**numbers, "embed_gate": dimension_numbers.MuonDimensionNumbers(-2, -1)}
      >>> mine({"embed_gate": jnp.ones((4, 4)), "norm": jnp.ones(4)})
      {'embed_gate': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), 'norm': None}
    """
    return _apply(_default_rule, params)


def scanned_layers(params: PyTree) -> PyTree:
    """Takes leaves ``[L, ..., m, n]`` as stacks of matrices (``nn.scan``, experts).

    2-D leaves, and tables, heads and vectors, follow `default`.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.scanned_layers({"up": jnp.ones((6, 4, 16)), "bias": jnp.ones((6, 16))})
      {'bias': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    return _apply(lambda path, leaf: _LAST_TWO if len(leaf.shape) > 2 else None, params)


def flax_attention(params: PyTree) -> PyTree:
    """Takes Flax attention kernels as matrices, with or without a leading layer axis.

    ``query``, ``key`` and ``value`` kernels are ``[embed, heads, head_dim]``, ``out`` kernels are
    ``[heads, head_dim, embed]``; the matrix is embed x (heads * head_dim). Other leaves follow
    `default`.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.flax_attention({"query": {"kernel": jnp.ones((64, 4, 16))}})
      {'query': {'kernel': MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))}}
    """

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        parts = path.split("/")
        if len(leaf.shape) < 3 or parts[-1] != "kernel":
            return None
        if _QUERY_KEY_VALUE & set(parts):
            # [..., embed, heads, head_dim]
            return MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
        if _OUTPUT & set(parts):
            # [..., heads, head_dim, embed]
            return MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
        return None

    return _apply(rule, params)


def convolutions(params: PyTree) -> PyTree:
    """Takes Flax convolution kernels ``[*spatial, in, out]`` as matrices (spatial * in) x out.

    Every leaf with three or more axes counts as such a kernel. Other leaves follow `default`.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.convolutions({"kernel": jnp.ones((3, 3, 8, 16))})
      {'kernel': MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)}
    """

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        *inputs, output = range(len(leaf.shape))
        return MuonDimensionNumbers(tuple(inputs), output) if len(inputs) > 1 else None

    return _apply(rule, params)


def resolve(
    params: PyTree, dimension_numbers: DimensionNumbers | None
) -> list[MuonDimensionNumbers | None]:
    """Returns the dimension numbers of each leaf, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.
      dimension_numbers: a tree or prefix tree, a function that returns one, or None for `default`.
        See `is_function` for trees that can be called.

    Returns:
      A list of ``MuonDimensionNumbers`` or None.

    Raises:
      TypeError, ValueError: if the tree does not fit ``params`` or axes overlap, repeat or exceed.

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
    given, prefix = jax.tree.flatten(
        tree, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    try:
        parts = [jax.tree.leaves(part) for part in prefix.flatten_up_to(params)]
    except ValueError as error:
        raise ValueError(
            f"`weight_dimension_numbers` must be a tree like the parameters, or a prefix: {error}"
        ) from None
    # 2. Each entry of a prefix holds for all leaves below it.
    pairs = [(leaf, numbers) for numbers, part in zip(given, parts, strict=True) for leaf in part]
    # 3. Axes must exist, and no axis may be used twice.
    for position, (leaf, numbers) in enumerate(pairs):
        try:
            _check(leaf.shape, numbers)
        except (TypeError, ValueError) as error:
            # Paths cost a walk of their own, so they are worked out for the message alone.
            path = leaves_with_names(params)[position][0]
            raise type(error)(
                f"`weight_dimension_numbers` of the leaf `{path}` with shape {tuple(leaf.shape)}"
                f"{error}"
            ) from None
    return [numbers for _, numbers in pairs]


def explain(params: PyTree, numbers: Sequence[MuonDimensionNumbers | None]) -> list[str]:
    """Returns for each leaf a short reason why it is not a matrix, or "" if it is one.

    The reasons are those of `default`, whichever function or tree the numbers come from:

    - ``vector``: fewer than two axes;
    - ``name: embed``: the word of the path that matched;
    - ``stacked vectors``: ``[L, d]`` under a name such as ``norm_attn``;
    - ``head: vocabulary 32000``: the only unnamed leaf with the sizes of the embedding;
    - ``ambiguous axes``: three or more axes, and no rule for them;
    - ``as given``: `default` takes the leaf as a matrix, and the numbers say None.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.
      numbers: what `resolve` returns for them.

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
    """Tells a function of the parameters from a tree that happens to be callable.

    The root of an Equinox model is a registered tree with a ``__call__``. A function is a leaf.

    Args:
      value: a function or a tree, for example ``weight_dimension_numbers``, a mask or labels.

    Returns:
      True if the value is to be called.

    Example:
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.is_function(dimension_numbers.default)
      True
      >>> dimension_numbers.is_function({"kernel": None})
      False
    """
    return callable(value) and jax.tree_util.all_leaves([value])


def warn_of_ambiguous_leaves(params: PyTree) -> None:
    """Warns once of the leaves that `default` sends to the fallback for their number of axes.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.
    """
    named = leaves_with_names(params)
    names = [
        f"`{path}` {list(leaf.shape)}"
        for (path, leaf), evidence in zip(named, evidence_against_matrices(named), strict=True)
        if len(leaf.shape) > 2 and not evidence
    ]
    if names:
        warnings.warn(
            f"{len(names)} leaves with three or more axes go to `fallback`, since it is not clear "
            f"which axes make a matrix: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. "
            "Pass `weight_dimension_numbers`, for example "
            "`gum_optax.dimension_numbers.scanned_layers`, `flax_attention` or `convolutions`; "
            "`gum_optax.dimension_numbers.default` keeps them in the fallback without a warning.",
            stacklevel=3,
        )


def axes(
    shape: Sequence[int], numbers: MuonDimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the batch, reduction and output axes of a leaf as non-negative ints.

    Args:
      shape: the leaf's shape.
      numbers: its dimension numbers.

    Returns:
      Three tuples of axes; the batch axes are all that the numbers do not mention.

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


# Rules -------------------------------------------------------------------------------------------


def _apply(rule: _Rule, params: PyTree) -> PyTree:
    """Maps a rule over the leaves that no evidence excludes; the default rule comes second."""
    named = leaves_with_names(params)
    return jax.tree.structure(params).unflatten(
        None if evidence else rule(path, leaf) or _default_rule(path, leaf)
        for (path, leaf), evidence in zip(named, evidence_against_matrices(named), strict=True)
    )


def _default_rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
    del path
    return _LAST_TWO if len(leaf.shape) == 2 else None


# Checks ------------------------------------------------------------------------------------------


def _check(shape: Sequence[int], numbers: Any) -> None:
    """Raises an error whose message goes on after the leaf's path and shape."""
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
    given = tuple(map(operator.index, np.atleast_1d(axis)))
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for {ndim} axes")
    return tuple(a % ndim for a in given)
