"""Checkpoints: Orbax' v1 API with a sharded and quantized state, and weights of Hugging Face.

1. Orbax' v1 API saves the optimizer state, quantized and sharded over four devices, in the middle
   of a period. Restored on four devices, training continues bit for bit; it is restored on two as
   well.
2. transformers 5 no longer has Flax models, but their names live on in checkpoints and code. With
   SmolLM2-135M in the tree of `FlaxLlamaForCausalLM`, Flax's convention finds all matrices.

It runs in this project's own environment: `python -m experiments.clients.checkpoints`.
"""

import functools
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from experiments.clients.checks import bytes_per_device, check, letters

# isort: split
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental import v1 as orbax

import gum_optax
from experiments.models.weights import load
from gum_optax import LowRank, dimension_numbers, fallbacks, storages

WIDTH, HIDDEN, LAYERS = 32, 64, 4


# 1. Orbax v1 -------------------------------------------------------------------------------------


def _mesh(devices: int) -> Mesh:
    # Auto axes: XLA chooses the shardings of intermediate results.
    return jax.make_mesh(
        (devices,),
        ("fsdp",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def _model() -> tuple[Any, Callable[[Any, Any], jax.Array]]:
    """Returns parameters, with layers stacked ``[L, in, out]``, and a loss of them and x [b, n]."""
    rng = np.random.default_rng(0)
    params = {
        "layers": {
            "up": rng.normal(size=(LAYERS, WIDTH, HIDDEN)).astype(np.float32) / 6,
            "down": rng.normal(size=(LAYERS, HIDDEN, WIDTH)).astype(np.float32) / 8,
        },
        "head": {"bias": np.zeros(WIDTH, np.float32)},
    }

    def loss(params: Any, x: Any) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

        y, _ = jax.lax.scan(layer, x, params["layers"])
        return jnp.mean((y + params["head"]["bias"] - jnp.cumsum(x, axis=-1)) ** 2)

    return params, loss


def orbax_v1() -> None:
    """Saves on four devices, restores on four and on two."""
    # 1. An optimizer with everything in its state that may go wrong: codes and scales of low-rank
    #    momentum, of slots and of the fallback, bases and draws.
    params, loss = _model()
    tx = gum_optax.gum(
        3e-3,
        LowRank(rank=8, period=5, storage=storages.int8()),
        fallback=fallbacks.adamw(storage=storages.int8()),
        weight_dimension_numbers=dimension_numbers.scanned_layers,
        consistent_rms=0.2,
    )
    x = np.random.default_rng(1).normal(size=(32, WIDTH)).astype(np.float32)

    # 2. Parameters are sharded along one side; the state's shardings are derived from theirs.
    def places(mesh: Mesh) -> tuple[Any, Any]:
        weights = jax.tree.map(
            lambda p: NamedSharding(mesh, P(None, "fsdp") if p.ndim == 3 else P()), params
        )
        return weights, gum_optax.state_shardings(tx, params, weights)

    def run(mesh: Mesh, start: tuple[Any, Any], steps: int) -> tuple[Any, Any]:
        @functools.partial(jax.jit, out_shardings=places(mesh))
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        params, state = start
        with jax.set_mesh(mesh):
            for _ in range(steps):
                params, state = step(params, state)
        return params, state

    # 3. The uninterrupted run.
    four = _mesh(4)
    weights, where = places(four)
    start = jax.device_put(params, weights)
    state = jax.jit(tx.init, out_shardings=where)(start)
    # Seven steps: two into the second period, so that bases, draws and codes all matter.
    halfway = run(four, (start, state), 7)
    expected = run(four, halfway, 6)

    # 4. Save after seven steps, and restore into described arrays, whose shardings may be others.
    with tempfile.TemporaryDirectory() as directory:
        orbax.save(f"{directory}/7", {"params": halfway[0], "state": halfway[1]})

        def restored(mesh: Mesh) -> Any:
            shapes = (params, jax.eval_shape(tx.init, params))
            target = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                shapes,
                places(mesh),
            )
            found = orbax.load(
                f"{directory}/7", dict(zip(("params", "state"), target, strict=True))
            )
            return found["params"], found["state"]

        # 5. On the same mesh, everything is equal to the bit.
        back = restored(four)
        check("Orbax v1: restored to the bit, codes and scales too", _equal(back, halfway))
        same = [a.sharding == b.sharding for a, b in _pairs(back[1], halfway[1])]
        each, whole = bytes_per_device(back[1]), sum(x.nbytes for x in jax.tree.leaves(back[1]))
        detail = f"{each} of {whole} bytes on each of 4 devices"
        check("Orbax v1: every array has the sharding it was saved with", all(same), detail)
        check("Orbax v1: six more steps, bit for bit", _equal(run(four, back, 6), expected))

        # 6. On another mesh, numbers differ by rounding.
        two = run(_mesh(2), restored(_mesh(2)), 6)
        gap = max(
            float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
            for a, b in _pairs(two[0], expected[0])
        )
        # Sums in another order may change codes: 5e-4 is a sixth of one step.
        check("Orbax v1: it continues on two devices", gap < 5e-4, f"largest gap {gap:.1e}")


def _pairs(one: Any, other: Any) -> Any:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def _equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in _pairs(one, other))


# 2. Hugging Face ---------------------------------------------------------------------------------


def flax_names(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Returns the tree of a Flax Llama of transformers, as shapes, from PyTorch's names and shapes.

    Every ``weight`` of shape [out, in] becomes a ``kernel`` of shape [in, out].
    """
    flat = {}
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        if "embed_tokens" in parents:
            last = "embedding"
        elif len(shape) == 2:
            last, shape = "kernel", shape[::-1]
        flat["/".join([*parents, last])] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def hugging_face() -> None:
    """Checks SmolLM2-135M in the tree that transformers' Flax models had."""
    gone = not any(name.startswith("Flax") for name in dir(transformers))
    version = importlib.metadata.version("transformers")
    check(f"transformers {version}: no Flax models are left", gone)

    tensors = load.open_checkpoint(load.SMOLLM2).tensors
    params = flax_names(tensors.shapes)
    found = letters(params, dimension_numbers.flax)
    matrices = {role: axes for role, axes in found.items() if axes}
    check("SmolLM2 in Flax names: every matrix", set(matrices.values()) == {"io"}, matrices)
    check("SmolLM2 in Flax names: seven roles", len(matrices) == 7)
    check("SmolLM2 in Flax names: the default agrees", letters(params, None) == found)
    plan = gum_optax.memory_plan(gum_optax.gum(3e-3, LowRank(rank=128)), params)
    share = f"{plan.total_bytes / plan.adamw_bytes:.2f} of AdamW's bytes"
    check("SmolLM2 in Flax names: planned without a warning", not plan.notes, share)


def main() -> None:
    """Runs all parts, or those named as arguments: ``orbax_v1``, ``hugging_face``."""
    parts = {"orbax_v1": orbax_v1, "hugging_face": hugging_face}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
