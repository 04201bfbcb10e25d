"""What accumulating gradients costs: `python -m experiments.benchmarks.accumulation`.

`optax.MultiSteps` calls the update at every mini-step and keeps the last. Beside it the mini-steps'
gradients are summed first, as `optax.microbatching` does, and the update is called once. Both are
timed by turns in one process, on random gradients, without the backward pass.
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

# The period of each kind of step: every step refreshes, or none after the first.
PERIODS = {"refresh": 1, "ordinary": 1_000_000}


@dataclasses.dataclass(frozen=True)
class Config:
    """Seconds of a real step of GUM's update by two ways of accumulating gradients."""

    layers: int = 8
    """Matrices of the one group."""
    rows: int = 256
    """Rows of each matrix."""
    columns: int = 704
    """Columns of each matrix."""
    rank: int = 32
    """Rank of GUM."""
    mini_steps: int = 8
    """Mini-steps of a real step."""
    repeats: int = 9
    """Real steps that are timed; the median is kept."""
    seed: int = 0
    """Seed of the gradients."""
    out: Path = Path("experiments/results/accumulation.json")
    """Result file."""


def main(arguments: Sequence[str]) -> int:
    """Prints the seconds and their ratios and writes them."""
    config = cli.parse(Config, PROGRAM, arguments)
    seconds = {step: _compare(config, period) for step, period in PERIODS.items()}
    ratios = {step: times["MultiSteps"] / times["sum first"] for step, times in seconds.items()}
    reporting.write(config.out, config, median_seconds=seconds, ratio=ratios)
    for step, times in seconds.items():
        cells = ", ".join(f"{way} {1000 * value:.1f} ms" for way, value in times.items())
        print(f"{step:<9} {cells}, ratio {ratios[step]:.1f}")
    return 0


def _compare(config: Config, period: int) -> dict[str, float]:
    """Median seconds of a real step, both ways by turns."""
    shape = (config.layers, config.rows, config.columns)
    gradients = list(jax.random.normal(jax.random.key(config.seed), shape))
    optimizer = gum_optax.scale_by_gum(gum_optax.LowRank(config.rank, period))
    ways = {
        "MultiSteps": multi_steps(optimizer, gradients, config.mini_steps),
        "sum first": sum_first(optimizer, gradients, config.mini_steps),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        step()  # Compiles, and takes the refresh of the first step.
    for _ in range(config.repeats):
        for name, step in ways.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def multi_steps(optimizer: Any, gradients: Any, mini_steps: int) -> Callable[[], Any]:
    """A real step of `optax.MultiSteps`: as many updates as mini-steps."""
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
    """A real step that sums the gradients of the mini-steps and updates once."""
    add = jax.jit(optax.tree.add, donate_argnums=0)
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(gradients)

    def step() -> None:
        nonlocal state
        total = jax.tree.map(jnp.zeros_like, gradients)
        for _ in range(mini_steps):
            total = add(total, gradients)
        updates, state = update(jax.tree.map(lambda g: g / mini_steps, total), state)
        jax.block_until_ready((updates, state))

    return step


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
