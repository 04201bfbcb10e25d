"""`infer`: finds the matrices of a model from the way in which a function uses its parameters.

`_usage` follows every axis of every leaf through the function's jaxpr. This module compares the
uses of one leaf. They agree on a matrix, they show that the leaf is no matrix, or they leave the
question open, and then a warning names the leaf.

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

    The function is traced on shapes, and each leaf is followed to the products that it takes part
    in. Axes that are contracted with activations are the reduction side, axes that the product
    keeps are the output side, and all others (scanned layers, experts, the parts of a fused kernel
    that is split) are batch axes. So neither names nor conventions matter, and weights
    ``[out, in]`` are told from ``[in, out]``. The following leaves are not matrices:

    - *tables*: looked up by an array of indices, even if they serve as the head, too;
    - *heads*: the kept axes have the size of the vocabulary that a table shows, and no parameter
      is multiplied with the result; or the leaf has a name such as ``lm_head``;
    - *vectors*: only added to activations or multiplied by them, in any number of axes;
    - kernels of depthwise convolutions, and of patch embeddings (applied to the inputs themselves,
      with strides as large as their window).

    If the function computes a gradient, the products of its forward pass decide.

    Args:
      function: any function of the parameters that JAX can trace: ``function(params, *args,
        **kwargs)``.
      params: arrays or ``jax.ShapeDtypeStruct``, in any tree: Linen parameters, the state of an
        NNX model, an Equinox module. Leaves that are no arrays are passed on unchanged.
      *args: further arguments, such as a batch. Only shapes and dtypes of their arrays matter;
        arguments that are no arrays are passed on unchanged.
      **kwargs: further keyword arguments, treated as ``args``.

    Returns:
      A tree like ``params`` of ``MuonDimensionNumbers`` or None, for ``weight_dimension_numbers``
      here or ``muon_weight_dimension_numbers`` of ``optax.contrib.muon``.

    Raises:
      TypeError: if ``function`` cannot be called. Errors of ``function`` itself pass through.

    Warns:
      UserWarning: once, with every leaf that the function leaves open, and the reason: the leaf is
        not used, or is used in two ways, or by a primitive without a rule. These leaves get None.

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
    # 1. All uses of all leaves.
    walk = _walked(function, params, args, kwargs)
    # 2. One verdict for each leaf. The walk counts arrays alone, so `position` does as well.
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
    # 3. One warning for all leaves that are left open.
    open_cases = [
        f"`{path}` {list(leaf.shape)} {verdict.why}"
        for (path, leaf), verdict in zip(named, verdicts, strict=True)
        if not verdict.decided
    ]
    if open_cases:
        warnings.warn(
            f"`infer` cannot decide on {len(open_cases)} of {len(named)} leaves, which get None "
            f"and so the fallback: {'; '.join(open_cases[:8])}"
            f"{'; ...' if len(open_cases) > 8 else ''}. If they are matrices, replace None by "
            "`optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)` in the result.",
            stacklevel=2,
        )
    return jax.tree.structure(params).unflatten([verdict.numbers for verdict in verdicts])


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """The verdict on a leaf: a matrix, no matrix for a reason, or undecided for a reason.

    Attributes:
      why: the reason; empty for a matrix.
      numbers: the axes of a matrix; None otherwise.
      decided: false if the uses contradict each other or show nothing.
    """

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
        # A jaxpr can only return arrays; the function may return anything beside them.
        return [x for x in jax.tree.leaves(function(params, *args, **kwargs)) if _is_array(x)]

    jaxpr = jax.make_jaxpr(of_arrays)([leaves[i] for i in arrays])
    shapes = [tuple(leaves[i].shape) for i in arrays if i < count]
    walk = Walk(shapes, RULES)
    # Each parameter enters as a view of its own leaf, with one axis of the leaf in each of its own;
    # all other arguments are data.
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
    # 1. Products that contract some axes and keep others. The other uses are only needed for the
    #    reason why a leaf is no matrix.
    products = _unmirrored([product for use in uses if (product := _product(use)) is not None])
    gathered = {axis for use in uses for axis, role in use.roles if role == "gathered"}
    in_products = {axis for product in products for axis in product.inputs | product.kept}
    # 2. A table, even if it is the head as well: the axis that is looked up is an axis of its
    #    products. Matrices that are looked up along another axis are experts.
    if gathered & in_products or (gathered and not products):
        return _Verdict("table: looked up by an array of indices")
    if not products:
        return _without_products(uses, lost)
    notes = {product.use.note for product in products if product.use.note}
    if notes:
        return _Verdict(notes.pop())
    # 3. All products must agree. An axis along which the result of one of them is split is a batch
    #    axis for all.
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
    """A use as a product with a matrix.

    Attributes:
      use: the use.
      inputs: the axes of the input side.
      kept: all axes that the product keeps, from which `outputs` is derived.
    """

    use: Use
    inputs: _Axes
    kept: _Axes

    @property
    def outputs(self) -> _Axes:
        """The axes of the output side: a product whose result is split is several products."""
        return (self.kept - self.use.unpacked) or self.kept


def _product(use: Use) -> _Product | None:
    """Returns a use as a product with a matrix, or None if it is none."""

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
    """Returns the verdict on a leaf that is in no product with activations."""
    roles = {role for use in uses for _, role in use.roles}
    if lost:
        return _Verdict(f"is used by {_listed(lost)}, for which there is no rule", decided=False)
    if not roles:
        return _Verdict("is not used in a product or sum with activations", decided=False)
    if "elementwise" in roles:
        return _Verdict("vector: added or multiplied elementwise")
    return _Verdict("vector: all of its axes are contracted, or none")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _described(products: Sequence[_Product]) -> str:
    """Describes products: ``contracted [0], kept [1] and contracted [0, 1], kept [2]``."""
    texts = dict.fromkeys(
        f"contracted {sorted(product.inputs)}, kept {sorted(product.kept)}" for product in products
    )
    return " and ".join(texts)


def _as_given(axes: _Axes) -> int | tuple[int, ...]:
    """Returns one axis as an int and several as a tuple, as in hand-written numbers."""
    first, *others = sorted(axes)
    return (first, *others) if others else first
