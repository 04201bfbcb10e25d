"""Sharding metadata of Flax NNX, from which trainers derive the sharding of an optimizer state.

An NNX variable names the mesh axes of its parameter (``out_sharding``), and state of the same shape
inherits them. A low-rank state has arrays of other shapes, which trainers would replicate. So these
arrays get variables of their own, from which ``nnx.get_partition_spec`` reads the shardings of
`state_shardings`.

Tests: tests/library/test_flax_nnx.py.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, PartitionSpec

from gum_optax import _ledger, _sources
from gum_optax._paths import PyTree
from gum_optax._projected import described
from gum_optax._sharding import state_shardings

# MaxText's metadata of a parameter of scanned layers, which has one axis more than its spec.
_SCAN_AXIS, _LAYERS = "param_scan_axis", "partition_name"


def with_sharding_metadata(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Adds sharding metadata to the state of NNX variables that have such metadata.

    Nothing changes for other parameters, nor for states of arrays alone, which ``nnx.Optimizer``
    passes to ``update``.

    Args:
      tx: a transformation whose state may have other shapes than the parameters.
    """

    def init(params: PyTree) -> Any:
        state = tx.init(params)
        variables = [x for x in _boxes(params) if _is_variable(x)]
        if not any(_names(variable) for variable in variables):
            return state
        return _annotated(state, _specs_of_state(tx, params), variables[0])

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if not any(map(_is_variable, _boxes(state))):
            return tx.update(updates, state, params, **extra_args)
        # The transformation sees arrays, and the results go back into the variables.
        trees = (_unboxed(tree) for tree in (updates, state, params))
        new_updates, new_state = tx.update(*trees, **extra_args)
        return _boxed_like(described(updates), new_updates), _boxed_like(state, new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _specs_of_state(tx: Any, params: PyTree) -> list[PartitionSpec]:
    """Returns one spec for each array of the state, with entries of the parameters' metadata.

    `state_shardings` needs axes of a mesh, but metadata may name logical axes, which rules map to
    mesh axes later. So each entry becomes an axis of length one of a mesh made for this purpose: an
    axis that cuts nothing, since the number of its parts is unknown. A further axis has the devices
    of the mesh that is set, since their number must not change.
    """
    # 1. A mesh with one axis for each distinct entry.
    entries = [_entries(box) for box in _boxes(params)]
    distinct = list(dict.fromkeys(e for of_leaf in entries for e in of_leaf if e is not None))
    axes = {entry: f"axis{i}" for i, entry in enumerate(distinct)}
    devices = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
    mesh = AbstractMesh((1,) * len(distinct) + (devices,), (*axes.values(), "devices"))
    # 2. The shardings of the state on that mesh. This traces `init` a second time; the first call
    #    has warned already, and has written its rows and sources.
    specs = [PartitionSpec(*(e and axes[e] for e in of_leaf)) for of_leaf in entries]
    treedef = jax.tree.structure(params, is_leaf=_is_variable)
    plain = treedef.unflatten([_described(box) for box in _boxes(params)])
    with warnings.catch_warnings(), _ledger.closed(), _sources.opened(None):
        warnings.simplefilter("ignore", UserWarning)
        found = jax.tree.leaves(state_shardings(tx, plain, treedef.unflatten(specs), mesh))
    # 3. Axes of that mesh back to entries of the metadata.
    entry_of = {axis: entry for entry, axis in axes.items()}
    return [PartitionSpec(*(e and entry_of[e] for e in sharding.spec)) for sharding in found]


def _annotated(state: Any, specs: Sequence[PartitionSpec], like: Any) -> Any:
    """Puts arrays with a sharded axis into variables with such metadata; others stay arrays.

    A moment of a parameter's shape is in a variable already. So may be a moment of another shape,
    for example of a kernel that is reshaped to a matrix; its metadata are replaced.
    """
    nnx = sys.modules["flax.nnx"]
    # Metadata that belong to the model, not to one parameter.
    shared = {
        key: value
        for key, value in like.get_metadata().items()
        if key in ("mesh", "sharding_rules")
    }
    remaining = iter(specs)

    def of_box(box: Any) -> Any:
        leaves, treedef = jax.tree.flatten(_unboxed(box))
        own = [next(remaining) for _ in leaves]
        fits = len(leaves) == 1 and len(_names(box)) <= len(leaves[0].shape)
        if fits and _trimmed(_names(box)) == tuple(own[0]):
            return box
        # A quantized moment is several arrays in one variable; each gets a variable of its own.
        return treedef.unflatten(map(of_array, leaves, own))

    def of_array(array: Any, spec: PartitionSpec) -> Any:
        if not any(spec):
            return array
        # `eager_sharding=False`: metadata only describe the array, they must not move it.
        return nnx.Variable(array, out_sharding=tuple(spec), eager_sharding=False, **shared)

    return jax.tree.map(of_box, state, is_leaf=_is_variable)


def _trimmed(entries: Sequence[Any]) -> tuple[Any, ...]:
    """Returns entries without the unsharded axes at the end."""
    last = max((i for i, entry in enumerate(entries) if entry is not None), default=-1)
    return tuple(entries[: last + 1])


# Variables ---------------------------------------------------------------------------------------


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # A variable can only come from a Flax that is loaded.
    return nnx is not None and isinstance(node, nnx.Variable)


def _boxes(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_variable)


def _names(box: Any) -> Any:
    """Returns the mesh axes, or logical axes, of a variable's metadata; () if there are none."""
    return (_is_variable(box) and box.get_metadata().get("out_sharding")) or ()


def _entries(box: Any) -> tuple[Any, ...]:
    """Returns the entries of a variable's metadata, one for each axis of its array."""
    leaves = jax.tree.leaves(box)
    rank = len(leaves[0].shape) if leaves else 0
    names = _names(box)
    spec = getattr(names, "spec", names)
    entries = [tuple(e) if isinstance(e, list) else e for e in spec]
    metadata = box.get_metadata() if _is_variable(box) else {}
    # MaxText: the axis of scanned layers is named beside the spec, not in it.
    if len(entries) < rank and _LAYERS in metadata and metadata[_LAYERS] not in entries:
        entries.insert(metadata.get(_SCAN_AXIS, 0), metadata[_LAYERS])
    # A mesh axis can shard one axis only, so a second use of an entry is dropped.
    entries = [e if e not in entries[:i] else None for i, e in enumerate(entries)]
    return tuple((entries + [None] * rank)[:rank])


def _described(box: Any) -> Any:
    [leaf] = jax.tree.leaves(box) or [box]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _unboxed(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda box: box.get_value() if _is_variable(box) else box, tree, is_leaf=_is_variable
    )


def _boxed_like(like: PyTree, tree: PyTree) -> PyTree:
    """Puts the leaves of a tree into the containers of another with the same order of leaves."""
    return jax.tree.structure(like).unflatten(jax.tree.leaves(tree))
