"""The time of 8-bit AdamW on a CPU: `python -m experiments.benchmarks.moments`.

One table, the largest array of a small model, is updated in place. Its gradient is made by the same
program, as in training: an update that reads a gradient from outside can be fused into one pass
over memory, which flatters AdamW in float32. The ways are timed by turns.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import optax

import gum_optax
from experiments import reporting
from experiments.benchmarks import timing
from experiments.trainer import cli
from gum_optax import storages

PROGRAM = "experiments.benchmarks.moments"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a step of AdamW on one table, with moments in float32 and in 8 bits."""

    #: Rows of the table.
    rows: int = 32_000
    #: Columns of the table.
    columns: int = 512
    #: Parts in which `layer_by_layer` updates the table.
    parts: int = 32
    #: Timed repetitions of a step; medians and ratios are reported.
    repeats: int = 25
    #: Result file.
    out: Path = Path("experiments/results/moments.json")


def main(arguments: Sequence[str]) -> int:
    """Times all ways; prints and writes seconds and ratios; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    eight = gum_optax.quantized(optax.adamw(1e-3))
    linear = gum_optax.quantized(optax.adamw(1e-3), storages.int8())
    at_random = gum_optax.quantized(optax.adamw(1e-3), storages.at_random(storages.float8()))
    ways = {
        "SGD": optax.sgd(1e-3),  # the floor: the gradient and one pass over the parameters
        "AdamW": optax.adamw(1e-3),
        "8-bit AdamW": eight,
        "linear 8-bit AdamW": linear,
        "8-bit AdamW, rounded at random": at_random,
        "8-bit AdamW, in parts": gum_optax.layer_by_layer(eight, gum_optax.InParts(config.parts)),
    }
    seconds = timing.by_turns(
        {name: _step(config, tx) for name, tx in ways.items()}, config.repeats
    )
    rows = {
        name: {
            "seconds": timing.summary(each),
            "over_adamw": timing.ratio(each, seconds["AdamW"]),
        }
        for name, each in seconds.items()
    }
    reporting.write(config.out, config, rows=rows)
    reporting.table(
        f"A step of a table of {config.rows} x {config.columns}, in place",
        ("way", "ms", "over AdamW", "least", "largest"),
        (
            (name, 1000 * row["seconds"]["median"], *row["over_adamw"].values())
            for name, row in rows.items()
        ),
    )
    return 0


def _step(config: Config, tx: optax.GradientTransformation) -> Callable[[], None]:
    """Returns a step on random parameters, whose gradient is a product of thin matrices."""
    keys = jax.random.split(jax.random.key(0), 3)
    left = jax.random.normal(keys[0], (config.rows, 4))
    right = 1e-2 * jax.random.normal(keys[1], (4, config.columns))
    params = jax.random.normal(keys[2], (config.rows, config.columns))
    state = jax.jit(tx.init)(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: jax.Array, state: optax.OptState, left: jax.Array, right: jax.Array
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(left @ right, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, left, right))  # pyright: ignore[reportArgumentType]

    return step


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
