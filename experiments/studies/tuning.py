"""A Bayesian search against grids: `python -m experiments.studies.tuning`.

Both look for the learning rates of the hidden matrices and of the fallback, of small models on real
text, whose seed is fixed: only the choice of points differs. A grid has one outcome; a search has
one for each of its own seeds. A finer grid shows how far from the best both end.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import reporting, tune
from experiments.trainer import cli, search, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.options import at_least, option

PROGRAM = "experiments.studies.tuning"
BASE = dataclasses.replace(
    change(Run(), rank=8, period=25), preset="tiny", steps=100, run_dir="runs/tuning",
    validate_every=100, validation_batches=8, checkpoint_every=1_000_000, log_every=100,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(tune.Grid):
    """Compare searches with grids of as many runs."""

    #: The optimizers to tune.
    optimizers: tuple[tune.Name, ...] = ("gum",)
    #: The smallest and the largest learning rate.
    learning_rates: tuple[float, ...] = (1e-3, 1e-1)
    #: Sides of the square grids, the last of which is the reference.
    sides: tuple[int, ...] = option((3, 7), at_least(2))
    #: Runs of a search.
    trials: int | None = option(9, at_least(1))
    #: Seeds of searches.
    searches: tuple[int, ...] = (0, 1, 2, 3)
    #: Result file.
    out: str = "experiments/results/studies/tuning.json"
    #: All other options of the runs.
    base: Run = dataclasses.field(default_factory=lambda: BASE)


def points(config: Config, base: Run, side: int) -> list[Run]:
    """Returns the runs of a square grid, evenly spaced in logarithms."""
    sizes = np.geomspace(min(config.learning_rates), max(config.learning_rates), side)
    return [
        tune.at(base, float(size) * search.scale(base), float(ratio))
        for size in sizes
        for ratio in np.geomspace(*tune.RATIOS, side)
    ]


def main(arguments: Sequence[str]) -> int:
    """Trains what is missing and prints a table; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    complete = sweeps.runner(config, Path(config.out))
    rows = []
    for optimizer in config.optimizers:
        base = change(config.base, optimizer=optimizer, seed=config.seeds[0])
        for side in config.sides:
            entries = complete(points(config, base, side))
            rows.append((optimizer, f"grid, {side} x {side}", *summary([entries])))
        found = [tune.search_from(config, base, complete, seed) for seed in config.searches]
        rows.append((optimizer, f"{len(found)} searches", *summary(found)))
    head = ("optimizer", "choice of points", "runs", "best loss", "smallest", "largest")
    reporting.table("Validation loss of the best run", head, rows)
    return 0


def summary(found: Sequence[Sequence[sweeps.Entry]]) -> tuple[int, float, float, float]:
    """Returns the runs of one attempt, and mean, least and largest of the attempts' best losses."""
    losses = [[entry["validation_loss"] for entry in entries] for entries in found]
    # NaN compares false: a run that diverged must not hide the others.
    best = [min(filter(math.isfinite, each), default=math.nan) for each in losses]
    return len(found[0]), statistics.mean(best), min(best), max(best)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
