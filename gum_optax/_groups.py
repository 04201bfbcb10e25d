"""Groups: the matrices of one role, which share a rank, a draw and an entry of the state.

A *group* is N matrices m x n of equal shape and dtype whose names differ in numbers alone, such as
the query kernels of all layers. They may be N separate leaves, one leaf ``[L, m, n]`` of stacked
layers, or several leaves with batch axes. The mathematics is stated for *wide* matrices, m <= n;
*tall* leaves are transposed on the way in and out.

A group that cannot gain from compression is *uncompressed*: the inner transformation runs on its
leaves themselves.

Tests: tests/library/test_groups.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gum_optax import _mesh
from gum_optax._numerics import at_least_float32
from gum_optax._paths import PyTree, leaves_with_names

GroupBy: TypeAlias = Callable[[str, Any], str]
"""``(path, leaf) -> role of the leaf's group``."""


def by_role(path: str, leaf: Any) -> str:
    """Groups matrices whose paths are equal once their numbers are replaced by ``*``.

    Args:
      path: the leaf's path, its parts joined by ``/``.
      leaf: the array, or anything with a shape and a dtype.

    Returns:
      The group's role; the key of its state is the same with ``.`` in the place of ``/``.

    Example:
      >>> from gum_optax import by_role
      >>> by_role("layers/3/attn/q/kernel", None)
      'layers/*/attn/q/kernel'
    """
    del leaf
    return re.sub(r"\d+", "*", path)


def by_shape(path: str, leaf: Any) -> str:
    """Groups matrices of equal shape, whatever their role (q with o, gate with up).

    Fewer, larger groups have fewer slots in total and a smaller sampling probability.

    Args:
      path: the leaf's path, its parts joined by ``/``.
      leaf: the array, or anything with a shape.

    Returns:
      The group's role.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import by_shape
      >>> by_shape("layers/3/attn/q/kernel", jnp.zeros((8, 4)))
      '8x4'
    """
    del path
    return "x".join(map(str, leaf.shape))


@dataclasses.dataclass(frozen=True)
class Group:
    """The N matrices of one role, as a rank function or a residual rule sees them.

    Attributes:
      name: the key of the group's state: its role with ``.`` in the place of ``/``.
      leaves: positions of its leaves among the tree's flattened leaves.
      shape: a leaf's shape ``[*batch, rows, columns]``.
      dtype: the leaves' dtype.
      sharding: the leaves' sharding, None where it is unknown.
      rank: r, the number of columns of a basis; 0 until it is decided.
      uncompressed: the reason why the group is uncompressed; empty for a compressed group.
      role: the name from ``group_by``, such as ``layers/*/attn/q``; draws are seeded by it.

    Example:
      Rank 32 for attention, a quarter of the short side for everything else:

      >>> import gum_optax
      >>> def rank(group):
      ...     return 32 if "attn" in group.name else group.m // 4
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=rank))
    """

    name: str
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | None = None
    rank: int = 0
    uncompressed: str = ""
    role: str = ""

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of a leaf's batch axes."""
        return self.shape[:-2]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes of the group's state.

        One axis over the leaves, then their batch axes, which are not merged, so that each can be
        sharded as in the leaf. The first axis is left out if the group is a single leaf with batch
        axes.
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
    def tall(self) -> bool:
        """True if the leaves have more rows than columns, so that they are transposed."""
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
    def compute_dtype(self) -> np.dtype:
        """Float32, or float64 for float64 leaves: a bfloat16 basis is not orthonormal."""
        return at_least_float32(self.dtype)

    @property
    def basis_sharding(self) -> NamedSharding | None:
        """Sharding of bases ``[*lead, m, r]``: lead and m as in the leaves, r replicated."""
        return self._inherit("lead", "m", None)

    @property
    def low_sharding(self) -> NamedSharding | None:
        """Sharding of projected values ``[*lead, r, n]``: lead and n as in the leaves.

        The mesh axes of m cut n as well: the sum over m then ends in a part on each device, in the
        place of all values on every device.
        """
        return self._longer(self._inherit("lead", None, "n"), by="m")

    @property
    def slots_sharding(self) -> NamedSharding | None:
        """Sharding of slots ``[slots, m, n]``: both sides as in the leaves.

        A slot serves any layer, so it has no leading axes. Their mesh axes cut n as well: otherwise
        every device would hold all slots and orthogonalize them.
        """
        return self._longer(self._inherit(None, "m", "n"), by="lead")

    @property
    def wide_sharding(self) -> NamedSharding | None:
        """Sharding of a leaf's wide matrices ``[*batch, m, n]``."""
        return self._inherit("batch", "m", "n")

    def _inherit(self, *sides: str | None) -> NamedSharding | None:
        """Returns the leaves' sharding for an array with the named sides; None: replicated."""
        if self.sharding is None:
            return None
        # 1. The mesh axes of each axis of the leaf, [*batch, rows, columns], as sides m <= n.
        *batch, rows, columns = _mesh.spec_entries(self.sharding, len(self.shape))
        m, n = (columns, rows) if self.tall else (rows, columns)
        # 2. The mesh axes of each named side.
        # The axis over separate leaves is new, so no mesh axis shards it.
        lead = [None] * (len(self.lead) - len(batch)) + batch
        entries = {"lead": lead, "batch": batch, "m": [m], "n": [n], None: [None]}
        return _mesh.sharding_like(self.sharding, [e for side in sides for e in entries[side]])

    def _longer(self, sharding: NamedSharding | None, by: str) -> NamedSharding | None:
        """Returns a sharding of ``[..., n]`` with n cut along a side as well, if possible."""
        side = self._inherit(by)
        if sharding is None or side is None:
            return None
        *others, n = sharding.spec
        more = [axis for axis in _mesh.axes_in([*side.spec]) if sharding.mesh.shape[axis] > 1]
        axes = [*_mesh.axes_in([n]), *more]
        if more and self.n % _mesh.parts(sharding, tuple(axes)) == 0:
            n = axes[0] if len(axes) == 1 else tuple(axes)
        return _mesh.sharding_like(sharding, [*others, n])


def find_groups(tree: PyTree, group_by: GroupBy) -> list[Group]:
    """Groups the leaves of a tree; empty leaves belong to no group.

    Under `by_role`, a name without a number joins the numbered ones: ``blk`` is the first of
    ``blk_*``. Leaves to which ``group_by`` gives one role but that differ in shape or dtype become
    several groups, whose names have different suffixes.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``; the last two axes are a matrix, others are batch.
      group_by: for example `by_role`.

    Returns:
      The groups, with ranks that are not decided yet (0).

    Raises:
      ValueError: if a leaf has fewer than two axes.
      TypeError: if a leaf is not real floating point, or ``group_by`` returns no str.
    """
    # 1. Positions of leaves by key, and for each key by shape and dtype: role -> kind -> positions.
    keys: dict[str, dict[tuple[Any, Any], list[int]]] = {}
    named = leaves_with_names(tree)
    for position, (path, leaf) in enumerate(named):
        _check_matrix(path, leaf)
        # A leaf without entries has no basis and nothing to update.
        if math.prod(leaf.shape) == 0:
            continue
        key = group_by(path, leaf)
        if not isinstance(key, str):
            raise TypeError(f"`group_by` must return a str, got {key!r} for the leaf `{path}`.")
        kinds = keys.setdefault(key, {})
        kinds.setdefault((leaf.shape, jnp.dtype(leaf.dtype)), []).append(position)
    if group_by is by_role:
        keys = _with_first_of_its_role(keys)
    # 2. One group for each kind. Its name is a key of the state, its role seeds draws, and both
    #    have to be unique: two roles may become one name, since `/` and `.` become the same.
    groups: dict[str, Group] = {}
    roles: set[str] = set()
    for key, kinds in keys.items():
        for (shape, dtype), positions in kinds.items():
            role = _unused(_with_kind(key, shape, dtype, list(kinds)), roles)
            name = _unused(state_key(role), groups)
            # The group's arrays can only follow a sharding that all of its leaves share.
            sharding = _mesh.common_sharding([named[position][1] for position in positions])
            groups[name] = Group(name, tuple(positions), shape, dtype, sharding, role=role)
            roles.add(role)
    return list(groups.values())


def state_key(role: str) -> str:
    """Returns a role as a key of states, without ``/``, which checkpoints put between keys."""
    return role.replace("/", ".")


_Kinds: TypeAlias = dict[tuple[Any, Any], list[int]]
"""(shape, dtype) -> positions of leaves."""


def _with_first_of_its_role(keys: dict[str, _Kinds]) -> dict[str, _Kinds]:
    """Joins ``blk`` to ``blk_*``: Haiku and Keras number layers from the second on.

    Only leaves of equal shape and dtype are joined, under the name with the most stars.
    """

    # `blk_*` and `blk` are both `blk`, in each part of a path.
    def without_numbers(key: str) -> str:
        return re.sub(r"_\*(?=/|$)", "", key)

    # 1. (role without numbers, kind) -> the key with the most stars, which is written last.
    names: dict[tuple[str, Any], str] = {}
    for key in sorted(keys, key=lambda key: key.count("*")):
        names |= {(without_numbers(key), kind): key for kind in keys[key]}
    # 2. The leaves of all keys under that key, in the order of the tree.
    joined: dict[str, _Kinds] = {}
    for key, kinds in keys.items():
        for kind, positions in kinds.items():
            into = joined.setdefault(names[without_numbers(key), kind], {})
            into[kind] = sorted(into.get(kind, []) + positions)
    return joined


def _unused(name: str, taken: Container[str]) -> str:
    """Returns the name, with a mark if it is taken: a suffix can produce another group's name."""
    while name in taken:
        name += "'"
    return name


def _with_kind(key: str, shape: tuple[int, ...], dtype: Any, kinds: Sequence[Any]) -> str:
    """Adds shape and dtype to a key where they are needed to tell its kinds apart."""
    if len({kind[0] for kind in kinds}) > 1:
        key += f"[{','.join(map(str, shape))}]"
    if len({kind[1] for kind in kinds if kind[0] == shape}) > 1:
        key += f":{dtype.name}"
    return key


def _check_matrix(path: str, leaf: Any) -> None:
    if len(leaf.shape) < 2:
        raise ValueError(
            f"The leaf `{path}` has shape {leaf.shape}, and a matrix needs at least two axes; use "
            "`gum_optax.gum` or `gum_optax.for_matrices`, which send such leaves to `fallback`, or "
            "`optax.masked`."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"The leaf `{path}` has dtype {leaf.dtype}; low-rank projection is defined here for "
            "real floating-point leaves."
        )
