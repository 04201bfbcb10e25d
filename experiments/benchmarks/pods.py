"""Memory and collectives on slices of TPUs, by their compiler: `experiments.benchmarks.pods`.

As in `experiments.benchmarks.tpu`, no TPU is needed and nothing runs. A Llama with scanned layers
is sharded over all chips of a slice, in one of two ways:

- `width`: every matrix along the axis of the model's width, as MaxText's `fsdp` does;
- `layers`: every stack of layers along the axis of the layers.

In both, embedding and head are sharded along the width, and batches along their windows. The state
of every optimizer has the shardings of `gum_optax.state_shardings`. Rows give the bytes on one
chip, and the bytes that it receives in each kind of collective; loops count by their trips.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments import reporting
from experiments.benchmarks import tpu
from experiments.benchmarks.communication import at_step
from experiments.models import scanned
from experiments.models.presets import Architecture
from experiments.trainer import cli
from experiments.trainer.options import choose
from gum_optax import dimension_numbers

PROGRAM = "experiments.benchmarks.pods"
MIB = 2**20

MODEL = Architecture(2048, 8192, 16, 32, 8, vocab_size=128_256, seq_len=1024)
"""The sizes of Llama-3.2-1B, with a head separate from the embedding."""
TOKENS = 1024
"""Tokens of a window, of which each chip has one."""
LAYOUTS = ("width", "layers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Count bytes and collectives on slices of TPUs, by slice, layout, program and optimizer."""

    #: Slices by the compiler's names, all of whose chips are used.
    slices: tuple[str, ...] = ("v5e:2x2", "v5e:4x4")
    #: Sharded axes: the width, or the layers.
    layouts: tuple[str, ...] = LAYOUTS
    #: Programs to compile, by their names in the table; none: all.
    programs: tuple[str, ...] = ()
    #: Result file. Rows that it has are kept and not compiled again.
    out: Path = Path("experiments/results/pods.json")


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      optimizer: a function from the width of the model to the optimizer.
      step: 0 for a refresh, or 1 for a plain step.
      make: makes a training step, one of the functions in `tpu`; None for the update alone.
    """

    optimizer: Callable[[int], optax.GradientTransformation]
    step: int = 1
    make: Callable[..., Callable[..., Any]] | None = None


def _muon_in_8_bits(width: int) -> optax.GradientTransformation:
    return gum_optax.muon(1e-3, weight_dimension_numbers=dimension_numbers.scanned_layers)


# Float32 optimizers that have both an update and a whole step in the table.
_OPTIMIZERS = {name: tpu.STEPS[name].optimizer for name in ("AdamW", "Muon", "GUM")}
PROGRAMS = {
    **{f"update, {name}": Program(optimizer) for name, optimizer in _OPTIMIZERS.items()},
    "update, GUM, refresh": Program(_OPTIMIZERS["GUM"], step=0),
    "update, 8-bit Muon": Program(_muon_in_8_bits),
    **{
        f"step, {name}": Program(optimizer, make=tpu.full)
        for name, optimizer in _OPTIMIZERS.items()
    },
    "step, GUM, projected": Program(_OPTIMIZERS["GUM"], make=tpu.projected),
}


def main(arguments: Sequence[str]) -> int:
    """Compiles the programs that the result file lacks, and prints all of its rows."""
    config = cli.parse(Config, PROGRAM, arguments)
    for field, known in (("layouts", LAYOUTS), ("programs", PROGRAMS)):
        for name in getattr(config, field):
            choose(field, name, known)
    rows = json.loads(config.out.read_text())["rows"] if config.out.exists() else []
    done = [{key: row[key] for key in ("slice", "layout", "program")} for row in rows]
    for wanted in _wanted(config):
        if wanted not in done:
            rows.append(wanted | measure(*wanted.values()))
            # A program takes minutes: keep each row at once.
            reporting.write(config.out, config, rows=rows)
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    return 0


def _wanted(config: Config) -> Iterator[dict[str, str]]:
    for name in config.programs or PROGRAMS:
        for board in config.slices:
            for layout in config.layouts:
                yield {"slice": board, "layout": layout, "program": name}


def measure(board: str, layout: str, program: str) -> dict[str, Any]:
    """Compiles one program for a slice; returns its bytes and collectives on one chip."""
    # 1. The shapes and shardings of weights and state.
    optimizer, count, make = PROGRAMS[program]
    static, params = scanned.describe(MODEL)
    tx = optimizer(MODEL.width)
    mesh = Mesh(np.array(tpu.devices(board)), ("fsdp",))
    weights = shardings(params, layout, mesh)
    where = gum_optax.state_shardings(tx, params, weights)
    by_window = NamedSharding(mesh, P("fsdp"))
    state = jax.eval_shape(tx.init, params)

    # 2. The program. The number of its step is a constant; otherwise every step would be compiled
    # with the branch of a refresh, whose collectives would be counted.
    def loss(params: Any, windows: Any) -> jax.Array:
        # Activations stay sharded along the windows, whatever the weights' sharding suggests.
        return scanned.loss(
            static, params, windows, lambda x: jax.lax.with_sharding_constraint(x, by_window)
        )

    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, at_step(state, count), params)
        return optax.apply_updates(params, updates), state, jnp.zeros(())

    # 3. Compile it, with parameters and state where they were.
    if make is None:
        found = tpu.cost(update, (params, state, params), weights, weights, where)
    else:
        train = make(loss, tx, 1)
        windows = jax.ShapeDtypeStruct((mesh.size, TOKENS + 1), jnp.int32)
        found = tpu.cost(
            lambda params, state, windows: train(params, at_step(state, count), windows),
            (params, state, windows),
            weights,
            by_window,
            where,
        )
    # `cost` counts the bytes of the whole model; here the bytes on one chip are asked for.
    found["parameter_bytes"] = _bytes_on_a_chip(params, weights)
    found["state_bytes"] = _bytes_on_a_chip(state, where)
    return found


def shardings(params: Any, layout: str, mesh: Mesh) -> Any:
    """Returns the shardings of the weights.

    Args:
      params: a scanned model's: stacks ``[L, rows, columns]``, embedding, head and scales of norms.
      layout: one of `LAYOUTS`.
      mesh: has one axis, ``fsdp``.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = {entry.key for entry in path}
        spec: list[str | None] = [None] * leaf.ndim
        # 1. The scales of norms are small: every chip has all of them.
        if names & {"attn_norm", "mlp_norm", "norm"}:
            return NamedSharding(mesh, P())
        # 2. Stacks along their layers, or all matrices along the width.
        if leaf.ndim == 3 and layout == "layers":
            spec[0] = "fsdp"
        else:
            # The width is the last axis of matrices that write to the residual stream,
            # [L, ., width], and the one before it of those that read from the stream.
            spec[-1 if names & {"o", "down", "embed"} else -2] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _bytes_on_a_chip(tree: Any, where: Any) -> int:
    """Counts the bytes of a tree on one chip, under the shardings in `where`."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True)
    )


_SENT = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a table in Markdown, in MiB on one chip."""

    def mib(size: int | None) -> str:
        return "" if not size else f"{size / MIB:,.0f}"

    # In the order of programs. A column for each kind of collective that any row has.
    rows = sorted(rows, key=lambda row: list(PROGRAMS).index(row["program"]))
    sent = [k for k in _SENT if any(row.get("collective_bytes", {}).get(k) for row in rows)]
    return reporting.markdown(
        ("slice", "sharded", "program", "state", "temporaries", "peak", *sent),
        [
            (
                row["slice"],
                row["layout"],
                row["program"],
                mib(row["state_bytes"]),
                mib(row.get("temp_bytes")),
                row.get("out_of_memory") or mib(row["peak_bytes"]),
                *(mib(row.get("collective_bytes", {}).get(kind)) for kind in sent),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    # With libtpu installed, JAX would look for a TPU to run on.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main, PROGRAM))
