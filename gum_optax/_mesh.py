"""Meshes: shardings of arrays and their parts, and computation on Explicit axes.

A mesh axis is in one of two modes. On an *Auto* axis XLA propagates shardings, and while a function
is traced they are unknown. On an *Explicit* axis they are part of an array's type, and an operation
whose result's sharding does not follow from its operands' is an error. The library is written for
Auto axes; `in_auto_mode` runs it on Explicit ones.

The *entries* of a sharding are those of its ``PartitionSpec``: one for each array axis, the mesh
axis (or axes) that shard it, or None.

Tests: tests/library/test_sharding.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gum_optax._paths import PyTree

Entries: TypeAlias = Sequence[Any]


def sharding_of(leaf: Any) -> NamedSharding | None:
    """The sharding of an array, a ``ShapeDtypeStruct`` or a traced array; None where unknown."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if _is_explicit(sharding.mesh) else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def common_sharding(leaves: Sequence[Any]) -> NamedSharding | None:
    """The sharding that leaves of equal shape share; an axis on which they differ is replicated."""
    shardings = [sharding_of(leaf) for leaf in leaves]
    # Leaves on different meshes, or without one, have nothing in common.
    first = shardings[0]
    if first is None or any(s is None or s.mesh != first.mesh for s in shardings):
        return None
    # One tuple of entries for each distinct sharding; then axis by axis, the entry that all share.
    specs = {spec_entries(sharding, leaves[0].ndim) for sharding in shardings if sharding}
    agreed = [
        entries[0] if len(set(entries)) == 1 else None for entries in zip(*specs, strict=True)
    ]
    return sharding_like(first, agreed)


def spec_entries(sharding: NamedSharding | None, ndim: int) -> tuple[Any, ...]:
    """The entries of a sharding, one for each of ``ndim`` axes; all None without a sharding."""
    spec = tuple(sharding.spec) if sharding else ()
    return spec + (None,) * (ndim - len(spec))


def sharding_like(like: NamedSharding | None, entries: Entries) -> NamedSharding | None:
    """A sharding with the given entries on the mesh of another; None if there is none."""
    return None if like is None else NamedSharding(like.mesh, PartitionSpec(*entries))


def parts(sharding: NamedSharding | None, entry: Any) -> int:
    """The number of parts into which an entry of a sharding cuts an axis."""
    if sharding is None or entry is None:
        return 1
    axes = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def merged_entry(entries: Entries, sizes: Sequence[int]) -> Any:
    """The entry of several array axes merged into one, in row-major order.

    Only the outermost axis longer than one may be sharded: the merged axis is then cut into the
    same contiguous blocks. Otherwise the merged axis is replicated.
    """
    # Axes of length one do not change where a block is cut.
    long = [entry for entry, size in zip(entries, sizes, strict=True) if size > 1]
    return long[0] if long and not any(long[1:]) else None


def on_mesh(array: jax.Array) -> bool:
    """Whether an array, traced or not, is laid out on a mesh."""
    return not jax.typeof(array).sharding.mesh.empty


def gather_rows(matrices: jax.Array) -> jax.Array:
    """Constrains rows of ``[..., m, n]`` to be replicated; columns and batch are left to XLA.

    Products with an m x m matrix on the left are then local, and those along n need one all-reduce.
    Without the constraint, XLA gathers rows again at each of them.
    """
    return gather(matrices, axis=-2)


def gather(array: jax.Array, axis: int) -> jax.Array:
    """Constrains an axis to be replicated, on a mesh of Auto axes; others are left to XLA."""
    mesh = jax.typeof(array).sharding.mesh
    if not on_mesh(array) or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return array
    entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * array.ndim
    entries[axis] = None
    sharding = NamedSharding(mesh, PartitionSpec(*entries))
    return jax.lax.with_sharding_constraint(array, sharding)


def in_auto_mode(function: Callable[..., Any], *args: PyTree, like: Callable[[], PyTree]) -> Any:
    """Calls ``function(*args)`` with every mesh axis in Auto mode.

    Only arguments change mode. A traced array that ``function`` closes over keeps its Explicit
    type, and JAX refuses to mix the two: see `handing_over`.

    Args:
      function: takes trees, and returns a tree of arrays.
      *args: its arguments; leaves that are not arrays reach it as they are.
      like: returns a tree of arrays or their descriptions like the result, whose shardings the
        result gets on Explicit axes; not called without them.
    """
    # 1. Is any argument on Explicit axes? If not, there is nothing to change.
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    meshes = [jax.typeof(array).sharding.mesh for array in arrays.values()]
    mesh = next((mesh for mesh in meshes if _is_explicit(mesh)), None)
    if mesh is None:
        return function(*args)

    # 2. `auto_axes` takes arrays alone, so that other leaves are put back inside.
    def call(arrays: dict[int, jax.Array]) -> Any:
        all_leaves = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(treedef, all_leaves))

    # 3. On the way out each result needs a stated sharding; an unknown one is replicated.
    def sharding(leaf: Any) -> NamedSharding:
        known = sharding_of(leaf)
        return NamedSharding(mesh, known.spec if known else PartitionSpec())

    return jax.sharding.auto_axes(call, out_sharding=jax.tree.map(sharding, like()))(arrays)


def handing_over(
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs],
    make_inner: Callable[..., optax.GradientTransformation],
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """``wrap(make_inner(**hyperparameters))``, for a ``wrap`` that runs in Auto mode.

    Under ``optax.inject_hyperparams`` a hyperparameter is a traced array, which an inner
    transformation would close over with its Explicit type. So it travels as an extra argument of
    ``update``, and the inner transformation is made of it inside. Plain numbers need no such help.
    """
    # Made at once in any case, so that a value that cannot work raises at once.
    inner = make_inner(**hyperparameters)
    if not any(isinstance(value, jax.Array) for value in hyperparameters.values()):
        return wrap(inner)

    def inner_update(updates, state, params=None, *, inner_hyperparameters, **extra_args):
        made = optax.with_extra_args_support(make_inner(**inner_hyperparameters))
        return made.update(updates, state, params, **extra_args)

    given: Any = optax.GradientTransformationExtraArgs(inner.init, inner_update)  # pyright: ignore[reportArgumentType]
    wrapped = wrap(given)

    def update(updates, state, params=None, **extra_args):
        extra_args["inner_hyperparameters"] = hyperparameters
        return wrapped.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types
