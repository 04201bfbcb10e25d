"""Shardings: which the state inherits from the parameters, and how updates run on a mesh.

A mesh axis is in one of two modes. On an *Auto* axis XLA propagates shardings, and while a function
is traced they are unknown. On an *Explicit* axis they are part of an array's type, and an operation
whose result's sharding does not follow from its operands' is an error. The engine is written for
Auto axes; `in_auto_mode` runs it on Explicit ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gum_optax._typing import PyTree

Axes = Sequence[Any]
"""One entry per array axis: the mesh axis (or axes) that shard it, or None."""


def of(leaf: Any) -> NamedSharding | None:
    """The sharding of an array, a ``ShapeDtypeStruct`` or a traced array; None where unknown."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if _explicit(sharding.mesh) else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def common(leaves: Sequence[Any]) -> NamedSharding | None:
    """The sharding that leaves of equal shape share; an axis on which they differ is replicated."""
    shardings = [of(leaf) for leaf in leaves]
    first = shardings[0]
    if first is None or any(s is None or s.mesh != first.mesh for s in shardings):
        return None
    specs = {axes(sharding, leaves[0].ndim) for sharding in shardings if sharding}
    agreed = [
        entries[0] if len(set(entries)) == 1 else None for entries in zip(*specs, strict=True)
    ]
    return named(first, agreed)


def axes(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """A sharding's spec, with one entry for each of ``ndim`` axes."""
    spec = tuple(sharding.spec)
    return spec + (None,) * (ndim - len(spec))


def named(like: NamedSharding | None, entries: Axes) -> NamedSharding | None:
    """A sharding on the mesh of another; None if there is none."""
    return None if like is None else NamedSharding(like.mesh, PartitionSpec(*entries))


def merged(entries: Axes, sizes: Sequence[int]) -> Any:
    """The spec entry of several array axes merged into one, in row-major order.

    Only the outermost axis longer than one may be sharded: the merged axis is then cut into the
    same contiguous blocks. Otherwise the merged axis is replicated.
    """
    long = [entry for entry, size in zip(entries, sizes, strict=True) if size > 1]
    return long[0] if long and not any(long[1:]) else None


def on_mesh(array: jax.Array) -> bool:
    """Whether an array, traced or not, is laid out on a mesh."""
    return not jax.typeof(array).sharding.mesh.empty


def gather_rows(matrices: jax.Array) -> jax.Array:
    """Has the rows of matrices ``[..., m, n]`` unsharded; columns and batch stay as they are.

    Then products with an m x m matrix on the left are local, and those along n need one all-reduce.
    Left to itself, XLA gathers rows again at each of them.
    """
    mesh = jax.typeof(matrices).sharding.mesh
    if not on_mesh(matrices) or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return matrices
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(free,) * (matrices.ndim - 2), None, free)
    return jax.lax.with_sharding_constraint(matrices, NamedSharding(mesh, spec))


def in_auto_mode(function: Callable[..., Any], *args: PyTree, like: PyTree) -> Any:
    """Calls ``function(*args)`` with every mesh axis in Auto mode.

    Args:
      function: takes trees, and returns a tree of arrays.
      *args: its arguments; leaves that are not arrays reach it as they are.
      like: a tree of arrays or their descriptions like its result, whose shardings the result gets
        on Explicit axes.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    meshes = [jax.typeof(array).sharding.mesh for array in arrays.values()]
    mesh = next((mesh for mesh in meshes if _explicit(mesh)), None)
    if mesh is None:
        return function(*args)

    def call(arrays: dict[int, jax.Array]) -> Any:
        all_leaves = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(treedef, all_leaves))

    def sharding(leaf: Any) -> NamedSharding:
        known = of(leaf)
        return NamedSharding(mesh, known.spec if known else PartitionSpec())

    return jax.sharding.auto_axes(call, out_sharding=jax.tree.map(sharding, like))(arrays)


def _explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types
