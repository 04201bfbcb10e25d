"""`state_shardings`: derives the sharding of an optimizer state from the parameters' sharding.

Tests: tests/library/test_state_shardings.py.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gum_optax._paths import PyTree, leaves_with_names, path_name


def state_shardings(
    tx: Any, params: PyTree, param_shardings: PyTree, mesh: Mesh | AbstractMesh | None = None
) -> PyTree:
    """Derives the shardings of an optimizer state from the shardings of the parameters.

    The result is made for ``jit(tx.init, out_shardings=...)`` and for checkpoints. State with a
    parameter's shape is sharded as the parameter. In the low-rank state of a matrix m x n, bases
    ``[m, r]`` inherit the sharding of the m axis, low-rank values ``[r, n]`` the sharding of the n
    axis, and slots ``[m, n]`` both. All but the slots inherit the sharding of batch axes (stacked
    layers, experts), as far as it is equal for all leaves of a group. Mesh axes that are left over,
    those of m for low-rank values and those of batch axes for slots, cut the n axis as well, if its
    length allows. Everything else is replicated.

    ``tx.init`` is traced with the shardings as part of the arrays' types, so this works for any
    optax transformation with any wrappers. Nothing is computed or allocated.

    Args:
      tx: an ``optax.GradientTransformation``.
      params: the parameters: arrays or ``ShapeDtypeStruct``, also in Flax variables or boxes.
      param_shardings: a tree like ``params`` or a prefix tree, of ``jax.sharding.NamedSharding``,
        or of ``PartitionSpec`` together with ``mesh``. None is replicated.
      mesh: the mesh of the partition specs; by default the mesh of ``jax.set_mesh``.

    Returns:
      A tree like ``tx.init(params)``, of ``NamedSharding``.

    Raises:
      TypeError, ValueError: if a spec is no sharding, names an axis that the mesh does not have,
        uses an axis twice, has more entries than the parameter has axes, or cuts an axis into parts
        of unequal size; if there are shardings of different meshes; if there is no mesh.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import gum_optax
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> params = {"layers": [{"kernel": jnp.ones((64, 176))} for _ in range(4)]}
      >>> tx = gum_optax.scale_by_gum(gum_optax.LowRank(rank=8))
      >>> shardings = gum_optax.state_shardings(tx, params, P("fsdp", "tensor"), mesh)
      >>> shardings.basis["layers.*.kernel"].spec
      P(None, 'fsdp')
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    # 1. One sharding for each parameter, on one mesh.
    treedef = jax.tree.structure(params)
    specs = _specs(params, param_shardings)
    device_mesh = _only_mesh(specs, mesh)
    # 2. The parameters as types with shardings, which only exist on Explicit axes.
    typed_mesh = _explicit(device_mesh)
    typed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_typed(name, leaf, spec, typed_mesh))
        for (name, leaf), spec in zip(leaves_with_names(params), specs, strict=True)
    ]
    # 3. `init` passes the shardings on to the types of the state.
    with jax.sharding.use_abstract_mesh(typed_mesh):
        state = jax.eval_shape(tx.init, treedef.unflatten(typed))

    # 4. The same entries on the real mesh.
    def placed(leaf: Any) -> NamedSharding:
        entries = list(leaf.sharding.spec) if leaf.sharding else []
        while entries and entries[-1] is None:  # The form in which jit states specs of results.
            entries.pop()
        return NamedSharding(device_mesh, PartitionSpec(*entries))

    return jax.tree.map(placed, state)


def _specs(params: PyTree, param_shardings: PyTree) -> list[Any]:
    """Returns one sharding, spec or None for each leaf of the parameters."""
    flat = jax.tree_util.tree_flatten_with_path(param_shardings, is_leaf=_is_spec)[0]
    # Paths are compared, not structures: Flax containers of equal content can differ in metadata.
    if [path_name(path) for path, _ in flat] == [name for name, _ in leaves_with_names(params)]:
        return [spec for _, spec in flat]
    try:
        full = jax.tree.broadcast(param_shardings, params, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(
            f"`param_shardings` must be a tree or a prefix tree of `params`: {error}"
        ) from error
    # Where a parameter is None, so is its sharding.
    paired = jax.tree.map(lambda _, spec: _Box(spec), params, full)
    return [box.spec for box in jax.tree.leaves(paired)]


class _Box:
    """A leaf around a spec or None, which JAX would take for nodes of the tree."""

    def __init__(self, spec: Any):
        self.spec = spec


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, PartitionSpec | jax.sharding.Sharding)


def _only_mesh(specs: list[Any], mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    """Returns the mesh of all shardings, or raises if there is none or more than one."""
    named = {spec.mesh for spec in specs if isinstance(spec, NamedSharding)}
    meshes = named | ({mesh} if mesh is not None else set())
    if len(meshes) > 1:
        raise ValueError(f"`param_shardings` must be of one mesh, got {sorted(map(str, meshes))}.")
    if meshes:
        return meshes.pop()
    current = jax.sharding.get_mesh()
    if current.empty:
        raise ValueError(
            "`mesh` is needed if `param_shardings` holds no NamedSharding and no mesh is set by "
            "`jax.set_mesh`."
        )
    return current


def _explicit(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """Returns the mesh with every axis Explicit, so that types carry shardings."""
    return AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )


def _typed(name: str, leaf: Any, spec: Any, mesh: AbstractMesh) -> NamedSharding:
    """Returns the sharding of one parameter on a mesh, or raises an error with its name."""
    if isinstance(spec, NamedSharding):
        spec = spec.spec
    if spec is None:
        spec = PartitionSpec()
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"`param_shardings` of `{name}` must be a NamedSharding, a PartitionSpec or None, got "
            f"{spec!r}."
        )
    # Each entry as a tuple of mesh axes, even for one axis or none.
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    where = f"`param_shardings` of `{name}` is {spec}"
    if len(entries) > len(leaf.shape):
        raise ValueError(f"{where}, which has more entries than its shape {leaf.shape} has axes.")
    unknown = [axis for entry in entries for axis in entry if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(f"{where}, and the mesh has no axis {unknown[0]!r}: {dict(mesh.shape)}.")
    used = [axis for entry in entries for axis in entry]
    if len(set(used)) < len(used):
        raise ValueError(f"{where}, which uses a mesh axis twice.")
    for size, entry in zip(leaf.shape, entries, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in entry)
        if size % parts:
            raise ValueError(
                f"{where}, which cuts an axis of {size} into {parts} parts of unequal size; its "
                f"shape is {leaf.shape} and the mesh is {dict(mesh.shape)}."
            )
    return NamedSharding(mesh, spec)
