"""Stacks: the matrices of one role, over which layers are sampled."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gum_optax import _mesh
from gum_optax._typing import PyTree

StackBy = Callable[[str, Any], str]
"""``(path, leaf) -> name of the leaf's stack``."""


def by_role(path: str, leaf: Any) -> str:
    """Stacks matrices whose paths are equal after their numbers are replaced by ``*``.

    Args:
      path: the leaf's path, its parts joined by ``/``.
      leaf: the array, or anything with a shape and a dtype.

    Returns:
      The stack's name.

    Example:
      >>> from gum_optax import by_role
      >>> by_role("layers/3/attn/q/kernel", None)
      'layers/*/attn/q/kernel'
    """
    del leaf
    return re.sub(r"\d+", "*", path)


def by_shape(path: str, leaf: Any) -> str:
    """Stacks matrices of equal shape, whatever their role (q with o, gate with up).

    Fewer, larger stacks: fewer dense slots in all, and a smaller sampling probability.

    Args:
      path: the leaf's path, its parts joined by ``/``.
      leaf: the array, or anything with a shape.

    Returns:
      The stack's name.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import by_shape
      >>> by_shape("layers/3/attn/q/kernel", jnp.zeros((8, 4)))
      '8x4'
    """
    del path
    return "x".join(map(str, leaf.shape))


@dataclasses.dataclass(frozen=True)
class Stack:
    """``count`` matrices of one role, in one or several leaves of equal shape and dtype.

    Attributes:
      name: the key of the stack's state.
      leaves: positions of its leaves among the tree's flattened leaves.
      shape: a leaf's shape ``[*batch, rows, columns]``.
      dtype: the leaves' dtype.
      sharding: the leaves' sharding, where it is known.
    """

    name: str
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of a leaf's batch axes."""
        return self.shape[:-2]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes of the stack's state.

        One axis over the leaves, then their batch axes, which stay apart so that each can be
        sharded as the leaf's is; without the first if the stack is a single leaf with batch axes.
        """
        alone = len(self.leaves) == 1 and self.batch
        return self.batch if alone else (len(self.leaves), *self.batch)

    @property
    def per_leaf(self) -> int:
        """Number of matrices in one leaf: the product of its batch axes."""
        return math.prod(self.batch)

    @property
    def count(self) -> int:
        """Number of matrices, N."""
        return self.per_leaf * len(self.leaves)

    @property
    def transposed(self) -> bool:
        """Whether the leaves are tall; the algorithm is stated for m <= n."""
        return self.shape[-2] > self.shape[-1]

    @property
    def m(self) -> int:
        """The short side of a matrix."""
        return min(self.shape[-2:])

    @property
    def n(self) -> int:
        """The long side of a matrix."""
        return max(self.shape[-2:])

    @property
    def basis_sharding(self) -> NamedSharding | None:
        """That of bases ``[*lead, m, r]``: the leading and the m axis are sharded as the leaves."""
        return self._inherit("lead", "m", None)

    @property
    def low_sharding(self) -> NamedSharding | None:
        """That of low-rank values ``[*lead, r, n]``."""
        return self._inherit("lead", None, "n")

    @property
    def full_sharding(self) -> NamedSharding | None:
        """That of dense slots ``[slots, m, n]``."""
        return self._inherit(None, "m", "n")

    def _inherit(self, *sides: str | None) -> NamedSharding | None:
        """The leaves' sharding, for an array with the named sides; None is replicated."""
        if self.sharding is None:
            return None
        *batch, rows, columns = _mesh.axes(self.sharding, len(self.shape))
        m, n = (columns, rows) if self.transposed else (rows, columns)
        lead = [None] * (len(self.lead) - len(batch)) + batch
        entries = {"lead": lead, "m": [m], "n": [n], None: [None]}
        return _mesh.named(self.sharding, [e for side in sides for e in entries[side]])

    @property
    def compute_dtype(self) -> np.dtype:
        """Float32, or float64 for float64 leaves: a bfloat16 basis is not orthonormal."""
        return jnp.promote_types(self.dtype, jnp.float32)


def find_stacks(tree: PyTree, stack_by: StackBy) -> tuple[Stack, ...]:
    """Groups the leaves of a tree into stacks; empty leaves belong to none.

    Leaves that the key function puts together but that differ in shape or dtype become several
    stacks, told apart by a suffix of the name.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``s; the last two axes are a matrix, others are batch.
      stack_by: the key function, for example `by_role`.

    Raises:
      ValueError: if a leaf has fewer than two axes.
      TypeError: if a leaf is not real floating point, or the key function returns no str.
    """
    groups: dict[str, dict[tuple[Any, Any], list[int]]] = {}
    named = leaves_with_names(tree)
    for position, (path, leaf) in enumerate(named):
        _check_matrix(path, leaf)
        if math.prod(leaf.shape) == 0:
            continue
        key = stack_by(path, leaf)
        if not isinstance(key, str):
            raise TypeError(f"`stack_by` must return a str, got {key!r} for the leaf `{path}`.")
        kinds = groups.setdefault(key, {})
        kinds.setdefault((leaf.shape, jnp.dtype(leaf.dtype)), []).append(position)
    stacks: dict[str, Stack] = {}
    for key, kinds in groups.items():
        for (shape, dtype), positions in kinds.items():
            name = _stack_name(key, shape, dtype, list(kinds))
            while name in stacks:  # A suffixed name can be another stack's own.
                name += "'"
            sharding = _mesh.common([named[position][1] for position in positions])
            stacks[name] = Stack(name, tuple(positions), shape, dtype, sharding)
    return tuple(stacks.values())


def _stack_name(key: str, shape: tuple[int, ...], dtype: Any, kinds: Sequence[Any]) -> str:
    if len({kind[0] for kind in kinds}) > 1:
        key += f"[{','.join(map(str, shape))}]"
    if len({kind[1] for kind in kinds if kind[0] == shape}) > 1:
        key += f":{dtype.name}"
    return key


def _check_matrix(path: str, leaf: Any) -> None:
    if len(leaf.shape) < 2:
        raise ValueError(
            f"The leaf `{path}` has shape {leaf.shape}, and a matrix needs at least two axes; use "
            "`gum_optax.gum`, which sends such leaves to `fallback`, or `optax.masked`."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"The leaf `{path}` has dtype {leaf.dtype}; low-rank projection is defined here for "
            "real floating-point leaves."
        )


def leaves_with_names(tree: PyTree) -> list[tuple[str, Any]]:
    """Flattens a tree into (path, leaf) pairs, in the order of ``jax.tree.leaves``.

    Containers that hold one array in an attribute ``value`` (Flax NNX variables, Linen boxes) show
    it in the path at ``init`` and not always at ``update``, so it is left out.
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def is_box(node: Any) -> bool:
    """Whether a node is such a container of one array."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) != 1:
        return False
    [(path, child)] = children
    return bool(path) and _opens_box(path[-1]) and jax.tree_util.all_leaves([child])


def _opens_box(entry: Any) -> bool:
    return getattr(entry, "name", None) in ("value", "raw_value")


def path_name(path: Sequence[Any]) -> str:
    """The parts of a key path, joined by ``/``."""
    if path and _opens_box(path[-1]):
        path = path[:-1]
    return "/".join(map(_entry_name, path)) or "param"


def _entry_name(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
