"""One of several processes that update a sharded model together: run by `test_processes.py`.

`python -m tests.one_of_several ADDRESS PROCESSES NUMBER DEVICES OUT` saves its arrays.
"""

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import LowRank, fallbacks, residuals, storages
from tests import helpers

STEPS, LAYERS = 3, 4
SHAPES = {"embed": (32, 8), "layers": [{"up": (8, 24)} for _ in range(LAYERS)]}


def optimizer() -> Any:
    """GUM in 8 bits with a refresh and a draw at every second step, and a lean fallback."""
    compression = LowRank(
        2, 2, residuals.sampled(1), helpers.first_coordinates, storage=storages.int8(4), key=7
    )
    return gum_optax.gum(0.1, compression, fallback=fallbacks.factored())


def tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(place: Any = None) -> tuple[Any, Any]:
    """The updates of the last step, and the state after it."""
    tx = optimizer()

    def put(values: Any) -> Any:
        if place is None:
            return jax.device_put(values)
        # Every process makes the whole array, and keeps the parts of its own devices.
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
            values,
            place,
        )

    params = put(tree(0))
    shardings = None if place is None else gum_optax.state_shardings(tx, params, place)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.jit(tx.update, out_shardings=None if place is None else (place, shardings))
    updates: Any = None
    for number in range(STEPS):
        updates, state = step(put(tree(1 + number)), state, params)
    return updates, state


def named(updates: Any, state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path({"updates": updates, "state": state})[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def main(address: str, processes: str, number: str, devices: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.distributed.initialize(address, int(processes), int(number))
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    place = jax.tree.map(
        lambda _: NamedSharding(mesh, P("fsdp")), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    with jax.set_mesh(mesh):
        held: Any = {
            f"{name} {'x'.join(str(s.start or 0) for s in shard.index)}": np.asarray(shard.data)
            for name, leaf in named(*run(place)).items()
            for shard in leaf.addressable_shards
        }
    np.savez(out, **held)


if __name__ == "__main__":
    main(*sys.argv[1:])
