"""Meshes of devices, `--mesh data=2,fsdp=2,tensor=2`, and the shardings of arrays on them.

- `data` divides batches; weights are replicated along it.
- `fsdp` divides batches and one axis of each weight (fully sharded data parallelism).
- `tensor` divides the other axis of each weight (tensor parallelism).

`models.llama.MESH_AXES` is the rule for each weight. A run without a mesh has None in its place:
all arrays are on one device.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.models.llama import MESH_AXES
from experiments.trainer.options import ConfigError
from gum_optax import by_role

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")


def build(text: str | None) -> Mesh | None:
    """Makes the mesh that `text` describes, over the devices of all processes.

    Its axes are Auto: the compiler derives the shardings of activations from those of weights and
    batches, and the model is the same code with and without a mesh. With Explicit axes, every
    gather, reshape and contraction in it would have to state the sharding of its result.

    Args:
      text: axes with their sizes, such as "fsdp=4,tensor=2"; axes that are left out have size 1.

    Raises:
      ConfigError: the text is malformed, or the mesh has not as many devices as there are.
    """
    count = jax.device_count()
    if text is None:
        if jax.process_count() > 1:
            raise ConfigError(f"`mesh`: several processes need one, such as data={count}")
        return None
    # All three axes always exist, so that shardings can name them whatever the text names.
    sizes = _sizes(text)
    if (wanted := math.prod(sizes)) != count:
        raise ConfigError(f"`mesh`: {text} is for {wanted} devices, but there are {count}")
    # Auto: shardings of results are the compiler's choice.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context to trace steps in, which shows the mesh to the optimizer, not only the compiler."""
    # One device has no mesh to set, and needs none.
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Returns a tree like `params` with the sharding of each weight, by its role in the model.

    An axis of a weight is divided along those mesh axes that divide its length, and replicated
    along the others.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*(kept for kept, _ in _layout(mesh, path, leaf))))

    return jax.tree.map_with_path(sharding, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its windows are divided among the data and fsdp axes."""
    return NamedSharding(mesh, P(_BATCH))


def rows(mesh: Mesh | None, batch_size: int, accumulate: int = 1) -> Sequence[int]:
    """Returns the rows of a batch that the devices of this process hold.

    Raises:
      ConfigError: the batch, or a part of it under `accumulate`, cannot be divided among the
        devices.
    """
    if mesh is None:
        return range(batch_size)
    count = math.prod(mesh.shape[axis] for axis in _BATCH)
    if batch_size // accumulate % count:
        parts = f" and `accumulate` {accumulate}" if accumulate > 1 else ""
        raise ConfigError(
            f"`batch_size` is {batch_size}{parts}; `mesh` divides it into {count} parts"
        )
    # Device -> slice of the batch. Devices along `tensor` hold the same rows, hence a set.
    held = batch_sharding(mesh).devices_indices_map((batch_size,))
    here = [held[device][0] for device in mesh.local_devices]
    return sorted({row for part in here for row in range(batch_size)[part]})


def put(mesh: Mesh | None, batch_size: int, batch: Any) -> Any:
    """Assembles the global batch, a tree of arrays, from the rows that this process read."""
    if mesh is None:
        return batch

    def whole(rows: np.ndarray) -> jax.Array:
        # [rows of this process, ...] -> [batch_size, ...]
        shape = batch_size, *rows.shape[1:]
        return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, shape)

    return jax.tree.map(whole, batch)


def describe(mesh: Mesh, params: Any) -> str:
    """Describes the mesh, and the axes of weights that it should divide but cannot."""
    # A dict, as the layers of a model give the same lines.
    lines = dict.fromkeys(
        f"{by_role(_name(path), leaf)} {leaf.shape} is not divided along {axis}"
        for path, leaf in jax.tree.leaves_with_path(params)
        for _, left_out in _layout(mesh, path, leaf)
        for axis in left_out
    )
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return "\n".join([f"mesh {axes}; {jax.process_count()} process(es)", *lines])


def _layout(
    mesh: Mesh, path: jax.tree_util.KeyPath, leaf: Any
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Returns, for each axis of a leaf, the mesh axes that divide it and those that cannot.

    The rule of a kernel has an entry for input and output; a bias takes the last, the output's.
    """
    *_, module, name = _name(path).split("/")
    rule = MESH_AXES.get(module, ())[-1 if name == "bias" else 0 :]
    layout = []
    for axes, size in zip(rule, leaf.shape[: len(rule)], strict=True):
        kept = ()
        # One mesh axis after the other, as far as their product divides the length.
        for axis in axes:
            divides = size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0
            kept += (axis,) if divides else ()
        layout.append((kept, tuple(axis for axis in axes if axis not in kept)))
    return layout


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sizes(text: str) -> tuple[int, ...]:
    """Parses a mesh; returns the size of each of `AXES`, 1 for those that are not named."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise ConfigError(f"`mesh`: {text} names {axis!r}; the axes are {', '.join(AXES)}")
        if axis in sizes:
            raise ConfigError(f"`mesh`: {text} names {axis} twice")
        if not (size.isdecimal() and int(size)):
            raise ConfigError(f"`mesh`: {text} gives {axis} the size {size!r}; write {axis}=2")
        sizes[axis] = int(size)
    return tuple(sizes.get(axis, 1) for axis in AXES)
