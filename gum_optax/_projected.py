"""`Projected`: the gradient of one leaf in low-rank coordinates, as the backward pass gives it.

A tree of gradients may hold one wherever it may hold the array of a matrix, see `backward`.

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

    All arrays are linear in G, for one basis P and one draw: such gradients can be added, averaged
    and scaled like others, as long as they are of one period.

    Attributes:
      low: ``P'G``, ``[*batch, r, n]``, float32 (float64 for float64 parameters).
      drawn: ``G - P P'G`` of the matrices that the group's slots serve, ``[slots, m, n]``, zero in
        empty slots. The first leaf of a group holds them for all of its leaves; others have None,
        as have groups without slots.
      residual: ``G - P P'G`` of every matrix, in the leaf's own shape and dtype, for residual rules
        that read it; otherwise None.
      shape: the shape of the leaf.
      dtype: the dtype of the leaf.
    """

    low: jax.Array
    drawn: jax.Array | None
    residual: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of axes of the leaf."""
        return len(self.shape)


def is_projected(node: Any) -> bool:
    """Whether a node of a tree is a `Projected` gradient, and so a leaf of that tree."""
    return isinstance(node, Projected)


def described(tree: Any, like: Any = None) -> Any:
    """The tree with an array, or the description of one, in the place of each `Projected` gradient.

    Args:
      tree: gradients.
      like: the parameters, which know their shardings; None: descriptions without one.
    """
    if like is not None and has_projected(tree):
        return like

    def describe(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_projected(leaf) else leaf

    return jax.tree.map(describe, tree, is_leaf=is_projected)


def has_projected(tree: Any) -> bool:
    """Whether any leaf is `Projected`."""
    return any(map(is_projected, jax.tree.leaves(tree, is_leaf=is_projected)))
