"""`Projected`: the gradient of one leaf in low-rank coordinates, a result of the backward pass.

A tree of gradients may hold one in the place of a matrix's array, see `backward`.

Tests: tests/library/test_backward.py.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """The gradient G of a leaf of N matrices m x n, without an array of the leaf's size.

    All arrays are linear in G for one basis P and one draw, so that gradients of one period can be
    added, averaged and scaled like arrays.

    Attributes:
      low: ``P'G``, ``[*batch, r, n]``, float32 (float64 for float64 parameters).
      drawn: ``G - P P'G`` of the matrices in the group's slots, ``[slots, m, n]``, zero in empty
        slots. The first leaf of a group holds it for all leaves of the group. It is None in other
        leaves, and in groups without slots.
      residual: ``G - P P'G`` of every matrix, in the leaf's own shape and dtype, for residual rules
        that read it; otherwise None.
      shape: the shape of the leaf.
      dtype: the dtype of the leaf.
    """

    low: jax.Array
    drawn: jax.Array | None
    residual: jax.Array | None
    # Static: part of the tree's structure, which stays known under `jit`.
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of axes of the leaf."""
        return len(self.shape)


def is_projected(node: Any) -> bool:
    """Returns whether a node of a tree is a `Projected` gradient, which counts as one leaf."""
    return isinstance(node, Projected)


def described(tree: Any, like: Any = None) -> Any:
    """Describes each `Projected` gradient of a tree by the shape and dtype of its leaf.

    Args:
      tree: gradients.
      like: the parameters, with their shardings; None: descriptions have no sharding.

    Returns:
      ``like`` if it is given and the tree has projected gradients; otherwise the tree with a
      ``jax.ShapeDtypeStruct`` in the place of each of them.
    """
    # Projections do not know how their leaf is sharded, but its parameter does.
    if like is not None and has_projected(tree):
        return like

    def describe(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_projected(leaf) else leaf

    return jax.tree.map(describe, tree, is_leaf=is_projected)


def has_projected(tree: Any) -> bool:
    """Returns whether any leaf is `Projected`."""
    return any(map(is_projected, jax.tree.leaves(tree, is_leaf=is_projected)))
