"""Sharding metadata of Flax NNX: what trainers read to decide where an optimizer state belongs.

An NNX variable names the mesh axes of its parameter (``out_sharding``), and states of its shape
inherit them. A low-rank state has arrays of other shapes, which trainers would replicate, so they
get variables of their own: ``nnx.get_partition_spec`` reads from them what `state_shardings` knows.

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

# How MaxText says that a parameter of scanned layers has one axis more than its metadata.
_SCAN_AXIS, _LAYERS = "param_scan_axis", "partition_name"


def with_sharding_metadata(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Gives the state of NNX variables with sharding metadata such metadata, too.

    Other parameters, and states that hold arrays alone (as ``nnx.Optimizer`` passes them to
    ``update``), are passed on as they are.

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
        trees = (_unboxed(tree) for tree in (updates, state, params))
        new_updates, new_state = tx.update(*trees, **extra_args)
        return _boxed_like(described(updates), new_updates), _boxed_like(state, new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _specs_of_state(tx: Any, params: PyTree) -> list[PartitionSpec]:
    """One spec for each array of the state, whose entries are those of the parameters' metadata.

    `state_shardings` wants axes of a mesh, and metadata may name logical axes, which rules map to
    mesh axes later. So each entry becomes an axis of length one of a mesh made for the purpose; a
    further axis has the devices of the mesh that is set, whose number must not change.
    """
    entries = [_entries(box) for box in _boxes(params)]
    distinct = list(dict.fromkeys(e for of_leaf in entries for e in of_leaf if e is not None))
    axes = {entry: f"axis{i}" for i, entry in enumerate(distinct)}
    devices = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
    mesh = AbstractMesh((1,) * len(distinct) + (devices,), (*axes.values(), "devices"))
    specs = [PartitionSpec(*(e and axes[e] for e in of_leaf)) for of_leaf in entries]
    treedef = jax.tree.structure(params, is_leaf=_is_variable)
    plain = treedef.unflatten([_described(box) for box in _boxes(params)])
    with warnings.catch_warnings(), _ledger.closed(), _sources.opened(None):
        # What there is to tell of these parameters, the first call of `init` has told.
        warnings.simplefilter("ignore", UserWarning)
        found = jax.tree.leaves(state_shardings(tx, plain, treedef.unflatten(specs), mesh))
    entry_of = {axis: entry for entry, axis in axes.items()}
    return [PartitionSpec(*(e and entry_of[e] for e in sharding.spec)) for sharding in found]


def _annotated(state: Any, specs: Sequence[PartitionSpec], like: Any) -> Any:
    """Puts arrays that are sharded at all into variables that say so; others stay arrays.

    A moment of a parameter's shape is in a variable already. One of another shape may be, as of a
    kernel that is seen as a matrix: its metadata are replaced.
    """
    nnx = sys.modules["flax.nnx"]
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
        # A quantized moment is several arrays in one variable, and each gets its own.
        return treedef.unflatten(map(of_array, leaves, own))

    def of_array(array: Any, spec: PartitionSpec) -> Any:
        if not any(spec):
            return array
        # Where the array is, its own sharding decides; metadata describe it.
        return nnx.Variable(array, out_sharding=tuple(spec), eager_sharding=False, **shared)

    return jax.tree.map(of_box, state, is_leaf=_is_variable)


def _trimmed(entries: Sequence[Any]) -> tuple[Any, ...]:
    """Without the axes at the end that are not sharded."""
    last = max((i for i, entry in enumerate(entries) if entry is not None), default=-1)
    return tuple(entries[: last + 1])


# Variables ---------------------------------------------------------------------------------------


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # A variable can only come from a Flax that is loaded.
    return nnx is not None and isinstance(node, nnx.Variable)


def _boxes(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_variable)


def _names(box: Any) -> Any:
    """The mesh axes, or logical axes, that a variable's metadata name; () for none."""
    return (_is_variable(box) and box.get_metadata().get("out_sharding")) or ()


def _entries(box: Any) -> tuple[Any, ...]:
    """The entries of a variable's metadata, one for each axis of its array."""
    leaves = jax.tree.leaves(box)
    rank = len(leaves[0].shape) if leaves else 0
    names = _names(box)
    spec = getattr(names, "spec", names)
    entries = [tuple(e) if isinstance(e, list) else e for e in spec]
    metadata = box.get_metadata() if _is_variable(box) else {}
    if len(entries) < rank and _LAYERS in metadata and metadata[_LAYERS] not in entries:
        entries.insert(metadata.get(_SCAN_AXIS, 0), metadata[_LAYERS])
    # An entry that is used twice would not be a sharding.
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
    """The leaves of a tree in the containers of another that has its leaves in the same order."""
    return jax.tree.structure(like).unflatten(jax.tree.leaves(tree))
