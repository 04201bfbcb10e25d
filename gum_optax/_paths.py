"""Names of leaves: key paths as text, without the Flax boxes around arrays.

A leaf's *name* is its key path joined by ``/``, as in ``layers/3/attn/q/kernel``. A *box* is a
container of one array, such as a Flax NNX variable or a Linen ``Partitioned``: it appears in the
key path at ``init`` and not always at ``update``, so names leave it out.

Tests: tests/library/test_groups.py, tests/library/test_flax_nnx.py.
"""

import collections.abc
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from gum_optax._projected import is_projected

PyTree: TypeAlias = Any
"""Any tree of arrays: parameters, updates, states."""


def leaves_with_names(tree: PyTree) -> list[tuple[str, Any]]:
    """Flattens a tree into (name, leaf) pairs, in the order of ``jax.tree.leaves``."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_projected)[0]
    return [(path_name(path), leaf) for path, leaf in flat]


def path_name(path: Sequence[Any]) -> str:
    """Joins the entries of a key path by ``/``; a bare array is called ``param``."""
    if path and _opens_box(path[-1]):
        path = path[:-1]
    return "/".join(map(_entry_name, path)) or "param"


def unzip(tree: PyTree, pairs: Sequence[tuple[Any, Any]]) -> tuple[PyTree, PyTree]:
    """Returns the first and the second of each pair, as two trees of the structure of ``tree``."""
    treedef = jax.tree.structure(tree)
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return treedef.unflatten(first), treedef.unflatten(second)


def is_attribute(path: Sequence[Any], name: str) -> bool:
    """Returns whether a key path ends with an attribute of an object, boxed or not."""
    # The last two entries: behind the attribute, a box may add one of its own.
    return any(
        isinstance(entry, jax.tree_util.GetAttrKey) and entry.name == name for entry in path[-2:]
    )


def is_box(node: Any) -> bool:
    """Returns whether a node is a container of one array in an attribute ``value``."""
    # Only the node itself is opened, so `path` has one entry for each child.
    if is_projected(node):
        return False
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) != 1:
        return False
    [(path, child)] = children
    is_leaf = jax.tree_util.all_leaves([child], is_leaf=is_projected)
    return bool(path) and _opens_box(path[-1]) and is_leaf


def is_stand_in(tree: PyTree) -> bool:
    """Returns whether a tree is only a placeholder for parameters, as in ``optax.tree.map_params``.

    That function calls ``init`` with an object of its own that has no leaves and is no container.
    Its type is private, so it is recognized by these two properties. An empty dict is a container:
    a model without matrices, and no placeholder. A user's own node without leaves passes for a
    placeholder, which does no harm: without leaves there is no state to keep.
    """
    if tree is None or isinstance(tree, collections.abc.Collection):
        return False
    return not jax.tree.leaves(tree) and not jax.tree_util.all_leaves([tree])


def _opens_box(entry: Any) -> bool:
    # The attributes in which Linen's `Partitioned` and variables of NNX hold their arrays.
    return getattr(entry, "name", None) in ("value", "raw_value")


def _entry_name(entry: Any) -> str:
    # Dict keys, positions in sequences, and attributes have one of these each.
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
