"""The cost of accumulating gradients: `python -m experiments.benchmarks.accumulation`.

`optax.MultiSteps` calls the update at every mini-step and discards all but the last result. The
alternative sums the gradients of the mini-steps first, as `optax.microbatching` does, and calls the
update once. Both are timed by turns in one process, on random gradients, without a backward pass.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax
from experiments import reporting
from experiments.trainer import cli

PROGRAM = "experiments.benchmarks.accumulation"

# Kind of step -> GUM's period: with 1 every step refreshes, with a million none after the first.
PERIODS = {"refresh": 1, "ordinary": 1_000_000}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time GUM's update under two ways of accumulating gradients."""

    #: Number of matrices, which form one group.
    layers: int = 8
    #: Rows of each matrix.
    rows: int = 256
    #: Columns of each matrix.
    columns: int = 704
    #: Rank of GUM.
    rank: int = 32
    #: Mini-steps whose gradients one step accumulates.
    mini_steps: int = 8
    #: Timed repetitions of a step; the median is reported.
    repeats: int = 9
    #: Seed of the gradients.
    seed: int = 0
    #: Result file.
    out: Path = Path("experiments/results/accumulation.json")


def main(arguments: Sequence[str]) -> int:
    """Times both ways for both kinds of step; prints and writes the seconds and their ratios."""
    config = cli.parse(Config, PROGRAM, arguments)
    seconds = {step: _compare(config, period) for step, period in PERIODS.items()}
    ratios = {step: times["MultiSteps"] / times["sum first"] for step, times in seconds.items()}
    reporting.write(config.out, config, median_seconds=seconds, ratio=ratios)
    for step, times in seconds.items():
        cells = ", ".join(f"{way} {1000 * value:.1f} ms" for way, value in times.items())
        print(f"{step:<9} {cells}, ratio {ratios[step]:.1f}")
    return 0


def _compare(config: Config, period: int) -> dict[str, float]:
    """Returns the median seconds of a step for both ways, timed by turns."""
    # Every mini-step has the same gradients: a list of [rows, columns] arrays.
    shape = (config.layers, config.rows, config.columns)
    gradients = list(jax.random.normal(jax.random.key(config.seed), shape))
    optimizer = gum_optax.scale_by_gum(gum_optax.LowRank(config.rank, period))
    ways = {
        "MultiSteps": multi_steps(optimizer, gradients, config.mini_steps),
        "sum first": sum_first(optimizer, gradients, config.mini_steps),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        step()  # compiles, and has the refresh of the first step, which is not timed
    # By turns, so that a machine that slows down affects both ways alike.
    for _ in range(config.repeats):
        for name, step in ways.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def multi_steps(optimizer: Any, gradients: Any, mini_steps: int) -> Callable[[], Any]:
    """Returns a step of `optax.MultiSteps`, which computes one update per mini-step."""
    multi = optax.MultiSteps(optimizer, mini_steps)
    update = jax.jit(multi.update, donate_argnums=1)
    state = multi.init(gradients)

    def step() -> None:
        nonlocal state
        updates = None
        for _ in range(mini_steps):
            updates, state = update(gradients, state)
        jax.block_until_ready((updates, state))

    return step


def sum_first(optimizer: Any, gradients: Any, mini_steps: int) -> Callable[[], Any]:
    """Returns a step that sums the gradients of its mini-steps and updates once."""
    add = jax.jit(optax.tree.add, donate_argnums=0)
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(gradients)

    def step() -> None:
        # 1. Sum the gradients of the mini-steps, in place.
        nonlocal state
        total = jax.tree.map(jnp.zeros_like, gradients)
        for _ in range(mini_steps):
            total = add(total, gradients)
        # 2. One update, of their mean.
        updates, state = update(jax.tree.map(lambda g: g / mini_steps, total), state)
        jax.block_until_ready((updates, state))

    return step


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
