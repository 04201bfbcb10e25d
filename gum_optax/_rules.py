"""Ready rules: which axes of a leaf are a matrix, by conventions of names and shapes.

A *layout* has a letter for each axis of a leaf: ``i`` for the input (reduction) side, ``o`` for the
output side, ``b`` for batch axes; ``ioo`` is a query kernel ``[embed, heads, head_dim]``. Layouts
are aligned to the right: axes on their left are batch axes. A table maps a pattern for a part of
the path, one for each kind of module, to a layout.

Every rule leaves tables, heads and vectors to the fallback, by the evidence of `_evidence`.

Tests: tests/library/test_rules.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax

from gum_optax._evidence import evidence_against_matrices, stacks_of_scales
from gum_optax._paths import PyTree, is_attribute, leaves_with_names

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers
_OfLeaf: TypeAlias = Callable[[str, Any], MuonDimensionNumbers | None]

_INPUT_OUTPUT = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_OUTPUT_INPUT = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


# The rules ---------------------------------------------------------------------------------------


def default(params: PyTree) -> PyTree:
    """Takes 2-D leaves as matrices, except tables, heads and stacks of vectors.

    Names decide first: embeddings, position tables, heads, biases, scales and norms. If a name
    decides nothing, shapes do. A leaf such as ``norm_attn`` ``[L, d]`` is a stack of vectors if
    leaves with three or more axes show that there are L layers. The only other leaf with the sizes
    of the embedding ``[V, d]`` is the head, whatever its name. Leaves with three or more axes are
    ambiguous and are not taken as matrices.

    A matrix is ``[in, out]``, or ``[out, in]`` if it is the attribute ``weight`` of an object, as
    in Equinox.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.default({"embed": jnp.ones((8, 4)), "up": jnp.ones((4, 16))})
      {'embed': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}

      A function of your own, passed as ``weight_dimension_numbers``, can correct this for a weight
      with a misleading name. None sends a leaf to the fallback:

      >>> def mine(params):
      ...     numbers = dimension_numbers.default(params)
      ...     return {**numbers, "embed_gate": dimension_numbers.MuonDimensionNumbers(-2, -1)}
      >>> mine({"embed_gate": jnp.ones((4, 4)), "norm": jnp.ones(4)})
      {'embed_gate': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), 'norm': None}
    """
    return _apply(_unknown, params)


def scanned_layers(params: PyTree, *, layer_axis: int = 0) -> PyTree:
    """Takes the last two axes of leaves with three or more axes as matrices.

    This is for models with stacks of plain matrices, such as ``nn.scan`` over ``nn.Dense``, and
    experts; `flax` knows attention kernels as well. 2-D leaves, tables, heads and vectors follow
    `default`.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      layer_axis: the axis over layers: ``[L, ..., m, n]``, or with 1 ``[m, L, n]``.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.scanned_layers({"up": jnp.ones((6, 4, 16)), "bias": jnp.ones((6, 16))})
      {'bias': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}
      >>> dimension_numbers.scanned_layers({"up": jnp.ones((4, 6, 16))}, layer_axis=1)
      {'up': MuonDimensionNumbers(reduction_axis=0, output_axis=2)}
    """

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        if len(leaf.shape) < 3:
            return None
        return _INPUT_OUTPUT if layer_axis == 0 else _of_layout("io", leaf.shape, layer_axis)

    return _apply(rule, params)


def convolutions(params: PyTree) -> PyTree:
    """Takes Flax convolution kernels ``[*spatial, in, out]`` as matrices (spatial * in) x out.

    Every leaf with three or more axes counts as such a kernel, whatever the name of its module;
    `flax` finds convolutions by name. Other leaves follow `default`.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.convolutions({"kernel": jnp.ones((3, 3, 8, 16))})
      {'kernel': MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)}
    """

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        return _of_convolution(leaf.shape) if len(leaf.shape) > 2 else None

    return _apply(rule, params)


def flax(params: PyTree, *, layer_axis: int | None = None) -> PyTree:
    """Takes the kernels of Flax models as matrices, by the names of their modules.

    It knows the following kernels of Linen and NNX, and of models with their conventions
    (big_vision, nanodo, MaxText, tunix, bonsai, Hugging Face):

    - ``query``, ``key``, ``value``, ``q_proj``, ...: ``[embed, heads, head_dim]``;
    - ``out``, ``o_proj``, ``attn_out_proj``, ...: ``[heads, head_dim, embed]``;
    - fused kernels (``qkv``, ``qkv_proj``): ``[embed, 3, heads, head_dim]``, three matrices;
    - experts: ``[experts, in, out]``;
    - convolutions, except depthwise ones: ``[*spatial, in, out]``;
    - all of these, and dense kernels, with an additional axis over scanned layers.

    Patch embeddings are input layers and go to the fallback, like tables. Other leaves follow
    `default`.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      layer_axis: the axis over scanned layers; by default axis 0 or 1, along which all leaves
        with an additional axis have the same size.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.flax({"query": {"kernel": jnp.ones((64, 4, 16))}})
      {'query': {'kernel': MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))}}
      >>> scanned = {"query": {"kernel": jnp.ones((64, 6, 4, 16))}, "up": jnp.ones((64, 6, 256))}
      >>> numbers = dimension_numbers.flax(scanned)
      >>> numbers["query"]["kernel"], numbers["up"].reduction_axis, numbers["up"].output_axis
      (MuonDimensionNumbers(reduction_axis=0, output_axis=(2, 3)), 0, 2)
    """
    return _apply(_flax_rule(params, layer_axis), params)


def maxtext(params: PyTree) -> PyTree:
    """Takes the kernels of MaxText models as matrices, scanned (over axis 1, its default) or not.

    The result equals the tree of MaxText's own ``get_muon_weight_dimension_numbers`` where that is
    correct; it can also be passed as ``weight_dimension_numbers``. This rule works without MaxText.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> layers = {"wi_0": jnp.ones((64, 6, 256)), "norm": jnp.ones((64, 6))}
      >>> dimension_numbers.maxtext(layers)["wi_0"]
      MuonDimensionNumbers(reduction_axis=0, output_axis=2)
    """
    return flax(params, layer_axis=1)


def gemma(params: PyTree) -> PyTree:
    """Takes the einsum weights of Gemma as matrices, as in google-deepmind/gemma and tunix.

    - ``q_einsum``: ``[heads, embed, head_dim]``;
    - ``kv_einsum``: ``[2, heads, embed, head_dim]``, two matrices, and ``qkv_einsum``, three;
    - ``attn_vec_einsum``: ``[heads, head_dim, embed]``;
    - ``gating_einsum``: ``[2, hidden, embed]`` or ``[2, embed, hidden]``, two matrices. The weight
      ``linear`` of the same module shows which of the two it is.

    Other leaves follow `flax`.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> dimension_numbers.gemma({"q_einsum": {"w": jnp.ones((4, 64, 16))}})
      {'q_einsum': {'w': MuonDimensionNumbers(reduction_axis=1, output_axis=(0, 2))}}
    """
    # Module -> hidden width, the input side of its `linear` [*experts, hidden, embed].
    hidden = {
        _parent(path, "linear"): leaf.shape[-2]
        for path, leaf in leaves_with_names(params)
        if _parent(path, "linear") is not None and len(leaf.shape) > 1
    }

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        parent = _parent(path, "gating_einsum")
        if parent is not None and len(leaf.shape) > 2:
            transposed = leaf.shape[-2] == hidden.get(parent)
            return _OUTPUT_INPUT if transposed else _INPUT_OUTPUT
        layout = _kind(_GEMMA, path)
        return _of_layout(layout, leaf.shape) if layout else None

    return _apply(rule, params, otherwise=_flax_rule(params, None))


def equinox_stacked(params: PyTree) -> PyTree:
    """Takes weights ``[out, in]`` as matrices, as in Equinox and levanter, stacked or not.

    In q, k and v projections all axes but the last are the output side (heads and their size); in o
    projections all axes but the first are the input side. Stacked layers (``eqx.filter_vmap``,
    haliax' ``Stacked``) have an additional first axis over layers, which is recognized by norms
    ``[L, d]``.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> layers = {"q_proj": jnp.ones((6, 4, 16, 64)), "norm": jnp.ones((6, 64))}
      >>> dimension_numbers.equinox_stacked(layers)["q_proj"]
      MuonDimensionNumbers(reduction_axis=3, output_axis=(1, 2))
    """
    layers = {shape[0] for shape in stacks_of_scales(leaves_with_names(params))}

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        shape = leaf.shape
        batch = int(len(shape) > 2 and shape[0] in layers)
        # A side with heads takes all remaining axes: "oi" is "oooi" for grouped queries.
        others = len(shape) - batch - 1
        layout = _kind(_EQUINOX, path) or ("oi" if others == 1 else "")
        layout = {"oi": "o" * others + "i", "io": "o" + "i" * others}.get(layout, "")
        return _of_layout(layout, shape) if layout and others else None

    return _apply(rule, params)


# Tables of layouts: a pattern that a part of the path matches in full, and a layout ---------------

_FLAX = {
    # The first match counts, so fused kernels come before their parts.
    r"(fused_)?(qkv|kv)(_proj|_projection)?|query_key_value|c_attn|wqkv": "iboo",
    r"(q|k|v|query|key|value)(_proj|_projection)?|w[qkv]|w(q|kv)_b": "ioo",
    r"(o|out|output|attn_out|attention_out|attention_output)(_proj|_projection)?": "iio",
    r"(?!.*shared)\w*([Mm]o[Ee]|[Ee]xpert)\w*": "bio",
}

_GEMMA = {
    r"q_einsum": "oio",
    r"kv_einsum|qkv_einsum": "boio",
    r"attn_vec_einsum": "iio",
}

_EQUINOX = {
    r"(q|k|v|query|key|value)_proj": "oi",
    r"(o|out|output)_proj": "io",
}

_CONVOLUTION = re.compile(r"[Cc]onv")


def _kind(table: Mapping[str, str], path: str) -> str:
    """Returns the layout of the module of a leaf, or ""; the innermost matching part decides."""
    for part in reversed(path.split("/")):
        for pattern, layout in table.items():
            if re.fullmatch(pattern, part):
                return layout
    return ""


def _parent(path: str, module: str) -> str | None:
    """Returns the path of the module that holds ``module``, or None for leaves of others."""
    found = re.fullmatch(rf"(.*?)/?{module}(/w|/kernel)?", path)
    return found and found[1]


def _of_layout(
    layout: str, shape: Sequence[int], layer_axis: int | None = None
) -> MuonDimensionNumbers:
    """Returns the dimension numbers of a layout, aligned to the right.

    An axis over layers is skipped, wherever it is, and so becomes a batch axis.
    """
    axes = [axis for axis in range(len(shape)) if axis != layer_axis][-len(layout) :]
    sides = [
        tuple(axis for axis, letter in zip(axes, layout, strict=True) if letter == side)
        for side in "io"
    ]
    inputs, outputs = (side[0] if len(side) == 1 else side for side in sides)
    return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def _of_convolution(shape: Sequence[int]) -> MuonDimensionNumbers:
    # [*spatial, in, out]
    *inputs, output = range(len(shape))
    return MuonDimensionNumbers(tuple(inputs), output)


# Scanned layers of Flax --------------------------------------------------------------------------


def _flax_rule(params: PyTree, layer_axis: int | None) -> _OfLeaf:
    """Returns the rule `flax` for one leaf, after a search for scanned layers in all leaves."""
    named = leaves_with_names(params)
    evidence = evidence_against_matrices(named)
    deep = {
        path: tuple(leaf.shape)
        for (path, leaf), found in zip(named, evidence, strict=True)
        if not found and len(leaf.shape) > 2 and not _CONVOLUTION.search(path)
    }
    # 1. Leaves with more axes than their kind has are scanned, and so are norms [L, d].
    attention = [
        (layout, shape)
        for path, shape in deep.items()
        if (layout := _kind(_FLAX, path)) and layout != "bio" and len(shape) > len(layout)
    ]
    scanned = [shape for _, shape in attention] + stacks_of_scales(named)
    roles = {layout for layout, _ in attention}

    # 2. The axis over layers is the one whose size varies least between leaves. If both sizes are
    #    constant, the smaller one is the number of layers, and the larger one a width.
    def spread(axis: int) -> tuple[int, int]:
        sizes = {shape[axis] for shape in [*scanned, *_of_unknown_kind(deep)]}
        return len(sizes), sum(sizes)

    axis = min((0, 1), key=spread) if layer_axis is None else layer_axis
    layers = {shape[axis] for shape in scanned}

    def rule(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        shape, layout = tuple(leaf.shape), _kind(_FLAX, path)
        if len(shape) < 3:
            return None
        if _CONVOLUTION.search(path):
            # [*space, in, out]; depthwise kernels have one input channel.
            return _of_convolution(shape) if shape[-2] > 1 else None
        # 3. A kernel with exactly the axes of its kind is not scanned if others of its kind have an
        #    additional axis.
        complete = len(shape) == len(layout) and layout in roles
        over = axis if shape[axis] in layers and not complete else None
        # 4. The layout of the axes other than the axis over layers. Fused kernels have other forms,
        #    too, [d, 3, d'] or [d, heads, 3 head_dim]; two axes are a plain matrix.
        rest = [size for i, size in enumerate(shape) if i != over]
        if layout == "iboo" and len(rest) == 3:
            layout = "ibo" if rest[1] == 3 else "ioo"
        if len(rest) == 2:
            layout = "io"
        return _of_layout(layout, shape, over) if 0 < len(layout) <= len(rest) else None

    return rule


def _of_unknown_kind(deep: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns shapes of deep leaves in no known module, which must be stacks of dense kernels."""
    return [shape for path, shape in deep.items() if not _kind(_FLAX, path)]


# Leaf by leaf ------------------------------------------------------------------------------------


def _unknown(path: str, leaf: Any) -> None:
    """A rule that knows no leaf, so that 2-D leaves are matrices and others are not."""


def _apply(rule: _OfLeaf, params: PyTree, otherwise: _OfLeaf = _unknown) -> PyTree:
    """Maps a rule over the leaves that no evidence excludes.

    Leaves that the rule does not know go to ``otherwise``; 2-D leaves are matrices in any case.
    """
    named = leaves_with_names(params)
    evidence = evidence_against_matrices(named)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]

    def two_axes(key_path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        if len(leaf.shape) != 2:
            return None
        return _OUTPUT_INPUT if is_attribute(key_path, "weight") else _INPUT_OUTPUT

    return jax.tree.structure(params).unflatten(
        None if found else rule(path, leaf) or otherwise(path, leaf) or two_axes(key_path, leaf)
        for key_path, (path, leaf), found in zip(paths, named, evidence, strict=True)
    )
