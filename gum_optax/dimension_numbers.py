"""Which leaves are matrices, and which of their axes are rows and columns.

Every function here maps parameters to a tree of ``optax.contrib.MuonDimensionNumbers`` (None: not a
matrix, to the fallback) and can be passed as ``weight_dimension_numbers``.

Example:
  Convolution kernels as matrices, and everything else by the default rule:

  >>> import gum_optax
  >>> tx = gum_optax.gum(1e-2, weight_dimension_numbers=gum_optax.dimension_numbers.convolutions)
"""

import operator
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from gum_optax._stacks import leaves_with_names
from gum_optax._typing import DimensionNumbers, PyTree

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers

_Rule = Callable[[str, Any], MuonDimensionNumbers | None]

_LAST_TWO = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_TABLES = {
    *("embed", "embedding", "embeddings", "embedder", "unembed", "unembedding", "wte", "wpe"),
    *("emb", "embs", "unemb", "posemb", "lmhead", "vocab", "logits"),
    *("pos", "position", "positional", "positions"),
}
_VECTORS = {
    *("bias", "biases", "scale", "norm", "norms", "ln"),
    *("layernorm", "rmsnorm", "batchnorm"),
}
_QUERY_KEY_VALUE = {"query", "key", "value", "q", "k", "v"}
_OUTPUT = {"out", "o"}


def default(params: PyTree) -> PyTree:
    """2-D leaves are matrices, unless their path names a table or a stack of vectors.

    Tables are embeddings, heads and position tables; stacks of vectors are biases, scales and norms
    of stacked layers, ``[L, d]``. Leaves with three or more axes are ambiguous and are not
    matrices.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.default({"embed": jnp.ones((8, 4)), "up": jnp.ones((4, 16))})
      {'embed': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    return _apply(_default_rule, params)


def scanned_layers(params: PyTree) -> PyTree:
    """Leaves ``[L, ..., m, n]`` are stacks of matrices (``nn.scan``, experts).

    2-D leaves, and tables and vectors, follow `default`.

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
    return _apply(lambda path, leaf: _LAST_TWO if leaf.ndim > 2 else None, params)


def flax_attention(params: PyTree) -> PyTree:
    """Flax attention kernels, with or without a leading layer axis.

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
        if leaf.ndim < 3 or parts[-1] != "kernel":
            return None
        if _QUERY_KEY_VALUE & set(parts):
            return MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
        if _OUTPUT & set(parts):
            return MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
        return None

    return _apply(rule, params)


def convolutions(params: PyTree) -> PyTree:
    """Flax convolution kernels ``[*spatial, in, out]``: the matrix is (spatial * in) x out.

    Leaves of three or more axes are taken as such kernels. Other leaves follow `default`.

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
        if leaf.ndim < 3:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return _apply(rule, params)


def resolve(
    params: PyTree, dimension_numbers: DimensionNumbers | None
) -> list[MuonDimensionNumbers | None]:
    """Returns the dimension numbers of each leaf, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``s.
      dimension_numbers: a tree or prefix tree, a callable that gives one, or None for `default`.

    Raises:
      TypeError, ValueError: if the tree does not fit ``params`` or axes overlap, repeat or exceed.
    """
    if dimension_numbers is None:
        dimension_numbers = default
    tree = dimension_numbers(params) if callable(dimension_numbers) else dimension_numbers
    leaves, treedef = jax.tree.flatten(params)
    try:
        full = jax.tree.map(
            lambda numbers, part: jax.tree.map(lambda _: numbers, part),
            tree,
            params,
            is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
        )
        resolved = treedef.flatten_up_to(full)
    except ValueError as error:
        raise ValueError(
            f"`weight_dimension_numbers` must be a tree like the parameters, or a prefix: {error}"
        ) from None
    for (path, _), leaf, numbers in zip(leaves_with_names(params), leaves, resolved, strict=True):
        _check(path, leaf, numbers)
    return resolved


def warn_of_ambiguous_leaves(params: PyTree) -> None:
    """Warns once of the leaves that `default` sends to the fallback for their number of axes."""
    names = [
        f"`{path}` {list(leaf.shape)}"
        for path, leaf in leaves_with_names(params)
        if len(leaf.shape) > 2 and not _is_named(path)
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
    """Returns the batch, reduction and output axes of a leaf as non-negative ints."""
    reduction = _normalize(len(shape), numbers.reduction_axis)
    output = _normalize(len(shape), numbers.output_axis)
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    return batch, reduction, output


def _apply(rule: _Rule, params: PyTree) -> PyTree:
    """Maps a rule over named leaves; tables and vectors excepted, the default rule comes second."""

    def numbers(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        if _is_named(path):
            return None
        return rule(path, leaf) or _default_rule(path, leaf)

    named = leaves_with_names(params)
    return jax.tree.unflatten(
        jax.tree.structure(params), [numbers(path, leaf) for path, leaf in named]
    )


def _default_rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
    del path
    return _LAST_TWO if leaf.ndim == 2 else None


def _is_named(path: str) -> bool:
    """Whether some part of a path is named like a table or a stack of vectors."""
    return any(_is_table_or_vector(_words(part)) for part in path.split("/"))


def _is_table_or_vector(words: list[str]) -> bool:
    # `lm_head` is a head, `MultiHeadAttention` is not; `b` and `b_q` are biases, `lora_b` is not.
    is_head = words[-1:] == ["head"] and "multi" not in words
    return is_head or words[:1] == ["b"] or not (_TABLES | _VECTORS).isdisjoint(words)


def _words(part: str) -> list[str]:
    """The words of a name, in lower case: ``LayerNorm_1`` has layer and norm."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", part)
    return [word.lower() for word in re.findall(r"[A-Za-z]+", spaced)]


def _check(path: str, leaf: Any, numbers: Any) -> None:
    if numbers is None:
        return
    where = f"`weight_dimension_numbers` of the leaf `{path}` with shape {tuple(leaf.shape)}"
    if not isinstance(numbers, MuonDimensionNumbers):
        raise TypeError(
            f"{where} must be optax.contrib.MuonDimensionNumbers or None, got {numbers!r}."
        )
    if len(leaf.shape) < 2:
        raise ValueError(f"{where}: a matrix needs at least two axes; use None for the fallback.")
    try:
        _, reduction, output = axes(leaf.shape, numbers)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error} in {numbers}.") from None
    if not reduction or not output:
        raise ValueError(f"{where}: both sides need an axis, got {numbers}.")
    if len(set(reduction + output)) < len(reduction + output):
        raise ValueError(f"{where}: an axis is used more than once in {numbers}.")


def _normalize(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    given = tuple(map(operator.index, np.atleast_1d(axis)))
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for {ndim} axes")
    return tuple(a % ndim for a in given)
