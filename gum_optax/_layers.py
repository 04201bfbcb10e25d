"""`layer_by_layer`: updates the layers of a scanned model, and parts of its tables, in turn.

Tests: tests/library/test_layers.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gum_optax import _checks
from gum_optax import dimension_numbers as dims
from gum_optax._low_rank import keep_dtypes
from gum_optax._paths import PyTree, is_stand_in, leaves_with_names


class LayersState(NamedTuple):
    """State of `layer_by_layer`.

    Attributes:
      layers: number of layers or parts L, as text -> their inner states, stacked along a new first
        axis: ``[L, ...]``.
      rest: the inner state of the other leaves.
    """

    layers: dict[str, optax.OptState]
    rest: optax.OptState


class InParts(NamedTuple):
    """A leaf that `layer_by_layer` updates in parts of equal length.

    Attributes:
      number: the number of parts; it must divide the axis.
      axis: the axis that is cut. In the first one parts lie in one piece.
    """

    number: int
    axis: int = 0


def layer_by_layer(
    inner: optax.GradientTransformation, axes: PyTree | Callable[[PyTree], PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Updates the layers of a scanned model one after the other, in the memory of one layer.

    ``nn.scan``, ``nnx.scan``, MaxText and levanter hold each weight of all L layers in one array.
    An update of such arrays computes on all layers at once, and its temporaries take the memory of
    L layers: a quantized state unpacked to float32, the iterates of Newton-Schulz. This wrapper
    updates layer after layer in a loop, in place:

        for i = 1, ..., L:   U_i, S_i = inner(G_i, S_i, W_i)

    The inner transformation sees a tree like the parameters, in which stacked leaves lack the axis
    of layers and the other leaves are ``optax.MaskedNode``. The other leaves are updated in a
    separate call, with a state of their own. So the result is the same as for separate layers, each
    with its own optimizer. For transformations that treat leaves or matrices separately, such as
    AdamW, Muon, Lion and `quantized` around them, it is also the same as without this wrapper.

    Embedding and head are the largest arrays that are not stacked: unpacked moments of both take 8
    GiB in Llama-3-8B. `InParts` in the place of an axis cuts such a leaf into L parts of equal
    length, which take turns like layers. That suits transformations that treat entries separately,
    such as AdamW, and `quantized` around them.

    A transformation that looks at the whole tree goes around this one:
    ``optax.chain(optax.clip_by_global_norm(1.0), layer_by_layer(...))``. `low_rank`, which groups
    layers and draws among them, does not work inside of it.

    These axes must not be sharded: each turn would fetch its layer from another device.

    Args:
      inner: any ``optax.GradientTransformation``.
      axes: the axis of layers, an int, for each stacked leaf, `InParts` for a leaf that is cut, and
        None for the others: a tree like the parameters, a prefix of it, or a function from the
        parameters to such a tree.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a `LayersState`; updates have the dtypes of
      the gradients.

    Raises:
      TypeError, ValueError: if an argument is malformed; at ``init`` if ``axes`` does not fit the
        parameters.

    Example:
      8-bit AdamW for a model of 12 scanned layers; its embedding is updated in 4 parts:

      >>> import jax, jax.numpy as jnp, optax
      >>> import gum_optax
      >>> params = {"embed": jnp.ones((1000, 64)), "layers": {"up": jnp.ones((12, 64, 256))}}
      >>> adamw = gum_optax.quantized(optax.adamw(1e-3))
      >>> tx = gum_optax.layer_by_layer(adamw, {"embed": gum_optax.InParts(4), "layers": 0})
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> state.layers["12"][0].mu["layers"]["up"].codes.shape
      (12, 64, 256)
      >>> state.layers["4"][0].mu["embed"].codes.shape
      (4, 250, 64)
    """
    _checks.transformation("inner", inner)
    run = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        if is_stand_in(params):
            return jnp.zeros(())  # A prefix of every state: `map_params` changes nothing.
        found = _Stacks(params, axes)
        layers = {}
        for count in found.counts:
            # The state of one layer has the types of one layer's arrays; a loop keeps shardings.
            leaves = found.in_front(found.cut(params), count)
            states = lax.map(lambda one, count=count: run.init(found.tree(one, count)), leaves)
            layers[str(count)] = states
        return LayersState(layers, run.init(found.tree(jax.tree.leaves(params), None)))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if is_stand_in(updates):
            return updates, state
        found = _Stacks(updates if params is None else params, axes)
        leaves = found.cut(updates)
        weights = None if params is None else found.cut(params)

        def tree(leaves: list[Any] | None, count: int | None) -> PyTree:
            return None if leaves is None else found.tree(leaves, count)

        # 1. Leaves that are not stacked, in one call.
        new, rest = run.update(tree(leaves, None), state.rest, tree(weights, None), **extra_args)
        leaves = found.replaced(leaves, new, None)

        # 2. Layer after layer. The update of a layer overwrites its gradient, and its new state
        #    overwrites the old one, so that the loop allocates one layer.
        def turn(count: int, i: jax.Array, carried: Any) -> Any:
            leaves, states = carried
            one = found.layer(leaves, i, count)
            old = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, keepdims=False), states)
            of_weights = None if weights is None else found.layer(weights, i, count)

            def updated() -> Any:
                new, state = run.update(
                    tree(one, count), old, tree(of_weights, count), **extra_args
                )
                return found.replaced(one, new, count), keep_dtypes(state, old)

            # The condition always holds. Without one, XLA fuses an update into each of the writes;
            # a write then reads what another one overwrites, and on CPUs XLA copies all layers at
            # each turn.
            new, state = lax.cond(i < count, updated, lambda: (one, old))
            put = lambda s, value: lax.dynamic_update_index_in_dim(s, value, i, 0)  # noqa: E731
            return found.written(leaves, new, i, count), jax.tree.map(put, states, state)

        layers = {}
        for count in found.counts:
            begin = leaves, state.layers[str(count)]
            leaves, layers[str(count)] = lax.fori_loop(0, count, partial(turn, count), begin)
        treedef = jax.tree.structure(updates)
        return treedef.unflatten(found.whole(leaves)), LayersState(layers, rest)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


class _Stacks:
    """The stacked leaves of a tree: along which axis, and with how many layers each.

    In its methods, "leaves of ``count`` layers" are the stacked leaves whose axis of layers has
    this length; ``count=None`` means the leaves that are not stacked. A leaf in parts is a stack of
    its parts, whose axis is a new one in front of the axis that is cut.

    Attributes:
      counts: the numbers of layers that occur, in rising order; most models have one.
    """

    def __init__(self, params: PyTree, axes: PyTree | Callable[[PyTree], PyTree]):
        self._treedef = jax.tree.structure(params)
        named = leaves_with_names(params)
        found = [
            _stack(name, leaf, axis)
            for (name, leaf), axis in zip(named, _broadcast(params, axes), strict=True)
        ]
        self._shapes = [leaf.shape for _, leaf in named]
        self._stacked = [stack.shape for stack in found]
        self._axes = [stack.axis for stack in found]
        self._sizes = [None if s.axis is None else s.shape[s.axis] for s in found]
        self.counts = sorted({size for size in self._sizes if size is not None})

    def cut(self, tree: PyTree) -> list[Any]:
        """Returns the leaves of a tree like the parameters; those in parts are stacks."""
        leaves = zip(jax.tree.leaves(tree), self._stacked, strict=True)
        return [leaf.reshape(shape) for leaf, shape in leaves]

    def whole(self, leaves: list[Any]) -> list[Any]:
        """Returns leaves from `cut` in their own shapes."""
        return [leaf.reshape(shape) for leaf, shape in zip(leaves, self._shapes, strict=True)]

    def tree(self, leaves: list[Any], count: int | None) -> PyTree:
        """Returns the parameters' tree with the leaves of ``count`` layers, the others masked."""
        mine = [
            leaf if size == count else optax.MaskedNode()
            for leaf, size in zip(leaves, self._sizes, strict=True)
        ]
        return jax.tree.unflatten(self._treedef, mine)

    def in_front(self, leaves: list[Any], count: int) -> list[Any]:
        """Returns leaves of ``count`` layers with the axis of layers in front; None for others."""
        parts = zip(leaves, self._axes, self._sizes, strict=True)
        return [jnp.moveaxis(x, a, 0) if size == count else None for x, a, size in parts]  # pyright: ignore[reportArgumentType]

    def layer(self, leaves: list[Any], i: jax.Array, count: int) -> list[Any]:
        """Returns layer i of the leaves of ``count`` layers, and the others unchanged."""
        parts = zip(leaves, self._axes, self._sizes, strict=True)
        return [
            lax.dynamic_index_in_dim(x, i, a, keepdims=False) if size == count else x  # pyright: ignore[reportArgumentType]
            for x, a, size in parts
        ]

    def replaced(self, leaves: list[Any], new: PyTree, count: int | None) -> list[Any]:
        """Replaces the leaves of ``count`` layers by a tree of updates, in their old dtypes."""
        values = iter(jax.tree.leaves(new))
        return [
            next(values).astype(leaf.dtype) if size == count else leaf
            for leaf, size in zip(leaves, self._sizes, strict=True)
        ]

    def written(self, leaves: list[Any], new: list[Any], i: jax.Array, count: int) -> list[Any]:
        """Writes values into layer i of the leaves of ``count`` layers."""
        parts = zip(leaves, new, self._axes, self._sizes, strict=True)
        return [
            lax.dynamic_update_index_in_dim(x, value, i, a) if size == count else x  # pyright: ignore[reportArgumentType]
            for x, value, a, size in parts
        ]


def _broadcast(params: PyTree, axes: PyTree | Callable[[PyTree], PyTree]) -> list[Any]:
    """Returns the entry of ``axes`` for each leaf, in the order of ``jax.tree.leaves``."""
    # A module with axes in the place of weights is a tree, although it is callable.
    chosen = axes(params) if dims.is_function(axes) else axes
    try:
        full = jax.tree.broadcast(
            chosen, params, is_leaf=lambda x: x is None or isinstance(x, InParts)
        )
    except ValueError as error:
        raise ValueError(
            "`axes` must be a tree of ints, `InParts` and None like the parameters, or a prefix: "
            f"{error}"
        ) from error
    return jax.tree.structure(params).flatten_up_to(full)


class _Stack(NamedTuple):
    """A leaf as a stack: its shape, and its axis of layers; None if it is not stacked."""

    shape: tuple[int, ...]
    axis: int | None


def _stack(name: str, leaf: Any, axis: Any) -> _Stack:
    """Returns a leaf as a stack, with its axis of layers counted from the front, or raises."""
    if axis is None:
        return _Stack(leaf.shape, None)
    number = None
    if isinstance(axis, InParts):
        number, axis = _checks.positive_int(f"axes` of `{name}", axis.number), axis.axis
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"`axes` must hold ints, `InParts` and None, got {axis!r} for `{name}`.")
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"`axes` is {axis} for `{name}`, which has {leaf.ndim} axes: {leaf.shape}. Write None "
            "for leaves that are not stacked."
        )
    axis %= leaf.ndim
    if number is None:
        return _Stack(leaf.shape, axis)
    if leaf.shape[axis] % number:
        raise ValueError(
            f"`axes` cuts `{name}` into {number} parts, which must divide axis {axis} of its shape "
            f"{leaf.shape}."
        )
    before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
    return _Stack((*before, number, leaf.shape[axis] // number, *after), axis)
