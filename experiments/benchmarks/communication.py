"""Communication of an update on eight devices: `python -m experiments.benchmarks.communication`.

Collectives are counted in the compiled programs of GUM's plain and refresh steps, Muon's and
AdamW's; nothing runs. The devices are eight virtual CPU devices, for which XLA partitions a program
as it does for others.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax
from experiments import reporting
from experiments.benchmarks import parameters
from experiments.benchmarks.collectives import Collective, collectives, total_bytes
from experiments.trainer import cli, mesh
from gum_optax import dimension_numbers

PROGRAM = "experiments.benchmarks.communication"


@dataclasses.dataclass(frozen=True)
class Config:
    """Count the collectives of one update of a LLaMA's parameters, by optimizer and mesh."""

    #: Preset of experiments.models.presets whose parameters are updated.
    preset: str = "60m"
    #: Meshes, written as in experiments.pretrain, on which parameters are sharded as there.
    meshes: tuple[str, ...] = ("fsdp=8", "fsdp=4,tensor=2", "tensor=8", "data=8")
    #: Rank of GUM.
    rank: int = 128
    #: Gamma: full-rank layers of each role in a period.
    full_rank_layers: int = 2
    #: Result file.
    out: Path = Path("experiments/results/sharding.json")


def main(arguments: Sequence[str]) -> int:
    """Counts, writes the result and prints a table; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    result = reporting.write(config.out, config, rows=rows(config))
    print(table(result["rows"]))
    return 0


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns one row for each mesh and kind of step."""
    compression = gum_optax.LowRank(
        config.rank, residual=gum_optax.residuals.sampled(config.full_rank_layers)
    )
    gum = gum_optax.gum(1e-3, compression)
    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=dimension_numbers.default)
    # Label -> (optimizer, number of the step): step 0 is a refresh, step 1 is not.
    steps = {
        "GUM": (gum, 1),
        "GUM, refresh": (gum, 0),
        "optax Muon": (muon, 1),
        "AdamW": (optax.adamw(1e-3), 1),
    }
    params = parameters.separate(config.preset)
    return [
        {"mesh": text, "step": name} | summary(sent(tx, count, params, text), params)
        for text in config.meshes
        for name, (tx, count) in steps.items()
    ]


def sent(
    tx: optax.GradientTransformation, count: int, params: Any, mesh_text: str
) -> list[Collective]:
    """Returns the collectives of the update at step `count`, on a mesh."""
    # 1. Shardings: parameters as in training, the state derived from them. Only shapes exist.
    devices = mesh.build(mesh_text)
    assert devices is not None
    placed = mesh.param_shardings(devices, params)
    state = jax.eval_shape(tx.init, params)
    where = gum_optax.state_shardings(tx, params, placed)

    # 2. Compile the update for these shardings, gradients sharded like parameters.
    def step(grads, state, params):
        return tx.update(grads, at_step(state, count), params)

    grads = jax.tree.map(_describe, params, placed)
    lowered = jax.jit(step, out_shardings=(placed, where)).lower(
        grads, jax.tree.map(_describe, state, where), grads
    )
    # The program never runs, so its machine code need not be fast. The partitioning passes, which
    # insert the collectives, do not depend on this level.
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    compiled = lowered.compile(compiler_options=quick)
    return collectives(compiled.as_text() or "")


def at_step(state: optax.OptState, count: int) -> optax.OptState:
    """Makes the step of a state a constant, so that XLA knows whether it is a refresh.

    Step 0 is a refresh. At a later step, the bases are those of the first period.
    """
    state = optax.tree.set(state, count=jnp.int32(count))
    if optax.tree.get(state, "LowRankState", None) is None:
        return state
    # The state also counts the periods for which it has bases: -1 before the first refresh.
    # Without this a plain step would be compiled as a refresh.
    return optax.tree.set(state, period=jnp.int32(-1 if count == 0 else 0))


def summary(found: list[Collective], params: Any) -> dict[str, Any]:
    """Counts collectives, the MiB that a device receives, and the matrices gathered in whole."""
    # A gathered matrix may be transposed and may be one of a stack: compare its last two sides as
    # a set, and count the axes in front of them.
    whole = {frozenset(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    return {
        "collectives": sum(each.times for each in found),
        "MiB": total_bytes(found) / 2**20,
        "gathered_matrices": sum(
            each.times * math.prod(shape[:-2])
            for each in found
            for shape in each.shapes
            if each.kind == "all-gather" and frozenset(shape[-2:]) in whole
        ),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a table in Markdown."""
    return reporting.markdown(
        ("mesh", "step", "collectives", "MiB received per device", "matrices gathered whole"),
        (
            (
                row["mesh"],
                row["step"],
                str(row["collectives"]),
                f"{row['MiB']:.1f}",
                str(row["gathered_matrices"]),
            )
            for row in rows
        ),
    )


def _describe(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


if __name__ == "__main__":
    # Before JAX counts its devices for the first time.
    jax.config.update("jax_num_cpu_devices", 8)
    sys.exit(cli.run(main, PROGRAM))
