"""`infer`: the matrices of a model, from the way in which a function uses its parameters.

`_usage` follows every axis of every leaf through the function's jaxpr. Here the uses of one leaf
are weighed against each other: they agree on a matrix, they show that the leaf is none, or they
decide nothing, which is told in a warning.

Tests: tests/library/test_infer.py.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _evidence
from gum_optax._paths import PyTree, leaves_with_names
from gum_optax._primitives import RULES
from gum_optax._usage import Use, Value, View, Walk

_Axes = frozenset[int]


def infer(function: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    """Finds matrices by the way in which a function uses them; nothing is computed.

    The function is traced on shapes, and each leaf is followed to the products that it is part of:
    axes that are contracted with activations are the reduction side, axes that the product keeps
    are the output side, and all others (scanned layers, experts, the two halves of a fused kernel
    that is taken apart) are batch axes. So neither names nor conventions matter, and weights
    ``[out, in]`` are told from ``[in, out]``. No matrices are

    - *tables*: looked up by an array of indices, also where they are the head at the same time;
    - *heads*: kept axes of the size of the vocabulary that a table shows, with no parameter behind
      them, or a name such as ``lm_head``;
    - *vectors*: only added to activations or multiplied by them, in any number of axes;
    - kernels of depthwise convolutions, and of patch embeddings (applied to the inputs themselves,
      with strides as large as their window).

    Of a gradient inside the function, the forward products decide.

    Args:
      function: any function of the parameters that JAX can trace: ``function(params, *args,
        **kwargs)``.
      params: arrays or ``jax.ShapeDtypeStruct``, in any tree, such as one of Linen, the state of
        an NNX model or an Equinox module. Leaves that are no arrays are passed on as they are.
      *args: further arguments, such as a batch; only shapes and dtypes of their arrays matter.
        Arguments that are no arrays are passed on as they are.
      **kwargs: likewise.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None, for ``weight_dimension_numbers``
      here or ``muon_weight_dimension_numbers`` of ``optax.contrib.muon``.

    Raises:
      TypeError: if ``function`` cannot be called; whatever it raises on tracers.

    Warns:
      UserWarning: once, with every leaf on which the function decides nothing, and the reason: it
        is not used, or used in two ways, or by a primitive that is not known. They get None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gum_optax import dimension_numbers
      >>> def model(params, tokens):
      ...     x = params["table"][tokens]
      ...     x = x + jnp.tanh(x @ params["up"]) @ params["down"].T
      ...     return x @ params["table"].T
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> params = {"table": f32(100, 8), "up": f32(8, 32), "down": f32(8, 32)}
      >>> numbers = dimension_numbers.infer(model, params, jnp.zeros((2, 5), int))
      >>> numbers["up"], numbers["table"]
      (MuonDimensionNumbers(reduction_axis=0, output_axis=1), None)
      >>> numbers["down"]  # Stored as [out, in].
      MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    """
    if not callable(function):
        raise TypeError(f"`function` must be a function of the parameters, got {function!r}.")
    named = leaves_with_names(params)
    walk = _walked(function, params, args, kwargs)
    # One verdict for each leaf that is an array; others are none of ours.
    shapes = iter(walk.shapes)
    verdicts: list[_Verdict] = []
    position = 0
    for path, leaf in named:
        if not _is_array(leaf):
            verdicts.append(_Verdict("no array"))
            continue
        uses = [use for use in walk.uses if use.leaf == position]
        lost = walk.lost.get(position, ())
        verdict = _verdict(path, next(shapes), uses, lost, walk.vocabularies)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        verdicts.append(verdict if is_float else _Verdict("no floating-point numbers"))
        position += 1
    open_cases = [
        f"`{path}` {list(leaf.shape)} {verdict.why}"
        for (path, leaf), verdict in zip(named, verdicts, strict=True)
        if not verdict.decided
    ]
    if open_cases:
        warnings.warn(
            f"`infer` cannot decide on {len(open_cases)} of {len(named)} leaves, which get None "
            f"and so the fallback: {'; '.join(open_cases[:8])}"
            f"{'; ...' if len(open_cases) > 8 else ''}. Where they are matrices, replace None by "
            "`optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)` in the result.",
            stacklevel=2,
        )
    return jax.tree.structure(params).unflatten([verdict.numbers for verdict in verdicts])


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What a leaf is: a matrix, or none for a reason, or not decided for a reason."""

    why: str = ""
    numbers: optax.contrib.MuonDimensionNumbers | None = None
    decided: bool = True


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _walked(
    function: Callable[..., Any], params: PyTree, args: Sequence[Any], kwargs: dict[str, Any]
) -> Walk:
    """Traces the function on the arrays among its arguments, and walks through the jaxpr."""
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    count = len(jax.tree.leaves(params))
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def of_arrays(values: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        params, args, kwargs = treedef.unflatten(filled)
        # Whatever is returned, its arrays are all that is traced.
        return [x for x in jax.tree.leaves(function(params, *args, **kwargs)) if _is_array(x)]

    jaxpr = jax.make_jaxpr(of_arrays)([leaves[i] for i in arrays])
    shapes = [tuple(leaves[i].shape) for i in arrays if i < count]
    walk = Walk(shapes, RULES)
    views = [
        Value((View(leaf, tuple(frozenset([axis]) for axis in range(len(shape)))),), weights=True)
        for leaf, shape in enumerate(shapes)
    ]
    walk.run(jaxpr, views + [Value(data=True)] * (len(arrays) - len(shapes)))
    return walk


# Weighing the uses of one leaf -------------------------------------------------------------------


def _verdict(
    path: str,
    shape: tuple[int, ...],
    uses: Sequence[Use],
    lost: Collection[str],
    vocabularies: Collection[int],
) -> _Verdict:
    """Decides on one leaf from all of its uses."""
    if len(shape) < 2:
        return _Verdict("vector")
    # 1. Products that contract some axes and keep others; the rest tells why a leaf is no matrix.
    products = _unmirrored([product for use in uses if (product := _product(use)) is not None])
    gathered = {axis for use in uses for axis, role in use.roles if role == "gathered"}
    in_products = {axis for product in products for axis in product.inputs | product.kept}
    # 2. A table, though it may be the head as well; matrices that are looked up are experts.
    if gathered & in_products or (gathered and not products):
        return _Verdict("table: looked up by an array of indices")
    if not products:
        return _without_products(uses, lost)
    notes = {product.use.note for product in products if product.use.note}
    if notes:
        return _Verdict(notes.pop())
    # 3. All products must agree; an axis that one of them takes apart is a batch axis for all.
    inputs = products[0].inputs
    outputs = frozenset.intersection(*(product.outputs for product in products))
    if any(product.inputs != inputs for product in products):
        return _Verdict(f"is contracted in several ways: {_described(products)}", decided=False)
    if inputs & outputs or not outputs:
        return _Verdict(f"has an axis contracted and kept: {_described(products)}", decided=False)
    sizes = [math.prod(shape[axis] for axis in side) for side in (inputs, outputs)]
    if 1 in sizes:
        return _Verdict("vector: one side has length one")
    # 4. The output of the whole model is a head.
    if not any(product.use.followed for product in products):
        kept = {sizes[1], *(shape[axis] for axis in outputs)}
        if kept & {*vocabularies} or _evidence.is_head(path):
            return _Verdict("head")
    return _Verdict(
        numbers=optax.contrib.MuonDimensionNumbers(_as_given(inputs), _as_given(outputs))
    )


@dataclasses.dataclass(frozen=True)
class _Product:
    """A use as a matrix: its input side, all axes that it keeps, and those of them that stay."""

    use: Use
    inputs: _Axes
    kept: _Axes

    @property
    def outputs(self) -> _Axes:
        # A product that is taken apart along one of several axes is several products.
        return (self.kept - self.use.unpacked) or self.kept


def _product(use: Use) -> _Product | None:
    """The product that a use is, or None."""

    def having(role: str) -> _Axes:
        return frozenset(axis for axis, given in use.roles if given == role)

    inputs, kept, inner = having("contracted"), having("free"), having("inner")
    # In W = A B each factor has one side of its own, and the shared axis is the other.
    if not kept:
        kept = inner
    elif not inputs:
        inputs = inner
    return _Product(use, inputs, kept) if inputs and kept else None


def _unmirrored(products: list[_Product]) -> list[_Product]:
    """Leaves out products with the transposed matrix, after one with the matrix itself.

    Backward passes are full of them, and autoencoders with tied weights.
    """
    if not products:
        return []
    first, *others = products
    mirrored = first.kept, first.inputs
    return [first, *(other for other in others if (other.inputs, other.kept) != mirrored)]


def _without_products(uses: Sequence[Use], lost: Collection[str]) -> _Verdict:
    """Why a leaf is not multiplied as a matrix is, and whether that is certain."""
    roles = {role for use in uses for _, role in use.roles}
    if lost:
        return _Verdict(f"is used by {_listed(lost)}, of which no rule is known", decided=False)
    if not roles:
        return _Verdict("is not used in a product or sum with activations", decided=False)
    if "elementwise" in roles:
        return _Verdict("vector: added or multiplied elementwise")
    return _Verdict("vector: all of its axes are contracted, or none")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _described(products: Sequence[_Product]) -> str:
    """For messages: ``contracted [0], kept [1] and contracted [0, 1], kept [2]``."""
    texts = dict.fromkeys(
        f"contracted {sorted(product.inputs)}, kept {sorted(product.kept)}" for product in products
    )
    return " and ".join(texts)


def _as_given(axes: _Axes) -> int | tuple[int, ...]:
    """One axis as an int, several as a tuple, as people write them."""
    first, *others = sorted(axes)
    return (first, *others) if others else first
