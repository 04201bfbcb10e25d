"""Meshes: shardings of arrays and their parts, and computation on Explicit axes.

A mesh axis is in one of two modes. On an *Auto* axis XLA propagates shardings, and they are unknown
while a function is traced. On an *Explicit* axis they are part of an array's type, and an operation
is an error if the sharding of its result does not follow from its operands. The library is written
for Auto axes; `in_auto_mode` runs it on Explicit ones.

The *entries* of a sharding are the entries of its ``PartitionSpec``, one for each array axis: the
mesh axis (or axes) that shards it, or None.

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
"""For each array axis a mesh axis, a tuple of mesh axes, or None."""


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Returns the sharding of an array, traced or not, or of a description; None if unknown."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if _is_explicit(sharding.mesh) else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def common_sharding(leaves: Sequence[Any]) -> NamedSharding | None:
    """Returns the sharding that leaves of equal shape share; axes that differ are replicated."""
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
    """Returns the entries of a sharding, one for each of ``ndim`` axes; None without a sharding."""
    # A spec may be shorter than the array: axes behind its end are replicated.
    spec = tuple(sharding.spec) if sharding else ()
    return spec + (None,) * (ndim - len(spec))


def sharding_like(like: NamedSharding | None, entries: Entries) -> NamedSharding | None:
    """Returns a sharding with the given entries on the mesh of another; None if that is None."""
    return None if like is None else NamedSharding(like.mesh, PartitionSpec(*entries))


def axes_in(entries: Entries) -> tuple[Any, ...]:
    """Returns the mesh axes of entries, in their order."""
    each = (entry if isinstance(entry, tuple) else (entry,) for entry in entries if entry)
    return tuple(axis for entry in each for axis in entry)


def parts(sharding: NamedSharding | None, entry: Any) -> int:
    """Returns the number of parts into which an entry of a sharding cuts an axis."""
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in axes_in([entry]))


def merged_entry(entries: Entries, sizes: Sequence[int]) -> Any:
    """Returns the entry of several array axes merged into one, in row-major order.

    Only the outermost axis longer than one may be sharded: the merged axis is then cut into the
    same contiguous blocks. Otherwise the merged axis is replicated.
    """
    # Axes of length one do not change where a block is cut.
    long = [entry for entry, size in zip(entries, sizes, strict=True) if size > 1]
    return long[0] if long and not any(long[1:]) else None


def on_mesh(array: jax.Array) -> bool:
    """Returns whether an array, traced or not, is laid out on a mesh."""
    return not jax.typeof(array).sharding.mesh.empty


def gather_rows(matrices: jax.Array) -> jax.Array:
    """Constrains rows of ``[..., m, n]`` to be replicated; columns and batch are left to XLA.

    Products with an m x m matrix on the left are then local, and products that sum over n need one
    all-reduce. Without the constraint, XLA gathers rows again for each product.
    """
    return gather(matrices, axis=-2)


def gather(array: jax.Array, axis: int) -> jax.Array:
    """Constrains an axis to be replicated, on a mesh of Auto axes; others are left to XLA."""
    mesh = jax.typeof(array).sharding.mesh
    # On Explicit axes a sharding is part of the type, which a constraint cannot change.
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
      function: takes trees and returns a tree of arrays.
      *args: its arguments; leaves that are not arrays are passed through.
      like: returns a tree like the result, of arrays or descriptions, with the shardings for the
        result on Explicit axes. It is not called if there are no such axes.

    Returns:
      The result of ``function``.
    """
    # 1. If no argument is on Explicit axes, there is nothing to change.
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    meshes = [jax.typeof(array).sharding.mesh for array in arrays.values()]
    mesh = next((mesh for mesh in meshes if _is_explicit(mesh)), None)
    if mesh is None:
        return function(*args)

    # 2. `auto_axes` takes arrays only, so other leaves are put back inside.
    def call(arrays: dict[int, jax.Array]) -> Any:
        all_leaves = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(treedef, all_leaves))

    # 3. Each result needs a stated sharding; one whose sharding is unknown is replicated.
    def sharding(leaf: Any) -> NamedSharding:
        known = sharding_of(leaf)
        return NamedSharding(mesh, known.spec if known else PartitionSpec())

    return jax.sharding.auto_axes(call, out_sharding=jax.tree.map(sharding, like()))(arrays)


def handing_over(
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs],
    make_inner: Callable[..., optax.GradientTransformation],
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``wrap(make_inner(**hyperparameters))``, for a ``wrap`` that runs in Auto mode.

    Under ``optax.inject_hyperparams`` a hyperparameter is a traced array, which an inner
    transformation would close over with its Explicit type. So hyperparameters travel as an extra
    argument of ``update``, and the inner transformation is made inside. Plain numbers do not need
    this.

    Args:
      wrap: makes a transformation from an inner one, and passes extra arguments on to it.
      make_inner: makes the inner transformation from hyperparameters.
      **hyperparameters: numbers or arrays.
    """
    # Made here in any case, so that a malformed value raises now and not in the first step.
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
