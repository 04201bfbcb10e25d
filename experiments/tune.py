"""Trains grids of optimizer, learning rate and seed: `python -m experiments.tune --help`.

With `--trials`, a Bayesian search replaces the grid. It searches over the learning rate and over
the ratio of the fallback's learning rate to it. The result file is rewritten after each run, and
runs that it already holds are not repeated: both may be stopped at any time, and the same command
continues.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import reporting
from experiments.trainer import cli
from experiments.trainer.config import Config, Sitting, change
from experiments.trainer.optimizers import Name
from experiments.trainer.options import at_least, option

PROGRAM = "experiments.tune"
RATIOS = 0.1, 10.0  # of the fallback's learning rate to the matrices', in a search


@dataclasses.dataclass(frozen=True)
class Grid(Sitting):
    """Train with every combination of optimizers, learning rates and seeds."""

    #: Runs to train at a time, each on its share of the cores.
    jobs: int = option(1, at_least(1))
    #: Optimizers to compare.
    optimizers: tuple[Name, ...] = ("gum", "adamw")
    #: Peak learning rates.
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    #: Seeds of weights, data order and draws.
    seeds: tuple[int, ...] = (0,)
    #: Runs of a Bayesian search for each optimizer and seed, between the smallest and the largest
    #: of the learning rates, with the fallback's between a tenth and ten times of each. None: a
    #: grid.
    trials: int | None = option(None, at_least(1))
    #: JSON file to write, or to add runs to.
    out: str = "experiments/results/demo_grid.json"
    # No checkpoints by steps: those by minutes suffice to resume.

    #: All other options of the runs, as in experiments.pretrain.
    base: Config = dataclasses.field(
        default_factory=lambda: Config(run_dir="runs/tune", checkpoint_every=1_000_000)
    )


def main(arguments: Sequence[str]) -> int:
    """Trains the missing runs of the grid or search and prints a table; returns the exit code."""
    grid = cli.parse(Grid, PROGRAM, arguments)
    # Imported here because data, checkpoints and the model take seconds; `--help` needs none.
    from experiments.trainer import sweeps

    complete = sweeps.runner(grid, Path(grid.out))
    entries = complete(configurations(grid)) if grid.trials is None else searched(grid, complete)
    print("\n" + table(entries))
    return 0


def configurations(grid: Grid) -> list[Config]:
    """Returns one configuration for each point of the grid, with a directory of its own."""
    from experiments.trainer import sweeps

    # Seeds outermost: a grid that is stopped is complete for the first ones.
    points = [
        change(grid.base, optimizer=optimizer, learning_rate=rate, seed=seed)
        for seed in grid.seeds
        for optimizer in grid.optimizers
        for rate in grid.learning_rates
    ]
    return [sweeps.in_own_directory(point) for point in points]


def searched(grid: Grid, complete: Callable[..., list[dict]]) -> list[dict]:
    """Returns the entries of a search for each optimizer and seed."""
    return [
        entry
        for seed in grid.seeds
        for optimizer in grid.optimizers
        for entry in search_from(
            grid, change(grid.base, optimizer=optimizer, seed=seed), complete, seed
        )
    ]


def search_from(
    grid: Grid, base: Config, complete: Callable[..., list[dict]], seed: int
) -> list[dict]:
    """Returns the entries of one search, in the order of its runs.

    Args:
      grid: gives the number of trials and the ranges.
      base: optimizer and seed of the runs, and all other options.
      complete: trains runs that the result file does not hold, see `sweeps.runner`.
      seed: of the search alone.
    """
    from experiments.trainer import search

    entries = []

    # 1. The loss at a point: a run like those of a grid, so that the result file keeps it.
    def loss(point: dict[str, float]) -> float:
        [entry] = complete([at(base, point["size"], point["ratio"])])
        entries.append(entry)
        return entry["validation_loss"]

    # 2. The coordinates: the size of updates, which covers the grid's learning rates, and the ratio
    #    of the fallback's learning rate to the matrices'.
    scale = search.scale(base)
    rates = min(grid.learning_rates) * scale, max(grid.learning_rates) * scale
    for _ in search.search({"size": rates, "ratio": RATIOS}, loss, grid.trials or 0, seed):
        pass
    return entries


def at(base: Config, size: float, ratio: float) -> Config:
    """Returns the run whose updates have a size and whose fallback has a multiple of their rate."""
    from experiments.trainer import search, sweeps

    run = search.at_size(base, size)
    run = change(run, fallback_learning_rate=float(f"{run.learning_rate * ratio:.3g}"))
    return sweeps.in_own_directory(run)


def table(entries: list[dict]) -> str:
    """Formats the runs as a table, ordered by optimizer and then by loss."""
    best = sorted(entries, key=lambda e: (e["config"]["optimizer"], e["validation_loss"]))
    return reporting.aligned(
        ("optimizer", "learning rate", "seed", "validation loss", "optimizer state", "s per step"),
        (
            (
                entry["config"]["optimizer"],
                entry["config"]["learning_rate"],
                entry["config"]["seed"],
                f"{entry['validation_loss']:.4f}",
                reporting.size(entry["state_bytes"]),
                f"{entry['seconds_per_step']:.3f}",
            )
            for entry in best
        ),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
