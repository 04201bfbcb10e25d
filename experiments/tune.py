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


@dataclasses.dataclass(frozen=True)
class Grid(Sitting):
    """Train with every combination of optimizers, learning rates and seeds."""

    jobs: int = option(1, at_least(1))
    """Runs to train at a time, each on its share of the cores."""
    optimizers: tuple[Name, ...] = ("gum", "adamw")
    """Optimizers to compare."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Peak learning rates."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, data order and draws."""
    trials: int | None = option(None, at_least(1))
    """Runs of a Bayesian search for each optimizer and seed, between the smallest and the largest
    of the learning rates, with the fallback's between a tenth and ten times of each. None: a
    grid."""
    out: str = "experiments/results/demo_grid.json"
    """JSON file to write, or to add runs to."""
    # No checkpoints by steps: those by minutes suffice to resume.
    base: Config = dataclasses.field(
        default_factory=lambda: Config(run_dir="runs/tune", checkpoint_every=1_000_000)
    )
    """All other options of the runs, as in experiments.pretrain."""


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
    home = grid.base.run_dir
    return [dataclasses.replace(p, run_dir=sweeps.directory(home, p)) for p in points]


def searched(grid: Grid, complete: Callable[..., list[dict]]) -> list[dict]:
    """Returns the entries of a search for each optimizer and seed; its runs follow one another."""
    from experiments.trainer import search, sweeps

    entries = []
    for seed in grid.seeds:
        for optimizer in grid.optimizers:
            base = change(grid.base, optimizer=optimizer, seed=seed)

            # 1. The loss at a point: a run like those of a grid, so that the result file keeps it.
            def loss(point: dict[str, float], base: Config = base) -> float:
                run = search.at_size(base, point["size"])
                run = change(
                    run, fallback_learning_rate=float(f"{run.learning_rate * point['ratio']:.3g}")
                )
                home = sweeps.directory(grid.base.run_dir, run)
                # A run that the file holds already is not repeated: its loss comes from there.
                [entry] = complete([dataclasses.replace(run, run_dir=home)])
                entries.append(entry)
                return entry["validation_loss"]

            # 2. The coordinates: the size of updates, which covers the grid's learning rates, and
            #    the ratio of the fallback's learning rate to the matrices'.
            scale = search.scale(base)
            rates = min(grid.learning_rates) * scale, max(grid.learning_rates) * scale
            ranges = {"size": rates, "ratio": (0.1, 10.0)}
            for _ in search.search(ranges, loss, grid.trials or 0, seed):
                pass
    return entries


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
