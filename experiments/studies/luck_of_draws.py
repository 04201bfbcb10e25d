"""The effect of the draws alone on the loss: `python -m experiments.studies.luck_of_draws`.

Weights, data and their order are fixed by one seed. Runs differ only in the seed of GUM's draws,
which the noise in its power iteration shares. For the variance of the estimator itself, see
`experiments.studies.variance`.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments import reporting
from experiments.reporting import COLOURS, save
from experiments.studies import pretraining
from experiments.trainer import cli, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change

PROGRAM = "experiments.studies.luck_of_draws"


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Repeat runs of GUM that differ only in their draws."""

    #: Numbers of full-rank layers of each role; with 0, only the bases depend on the seed.
    gammas: tuple[int, ...] = (0, 1, 2, 4)
    #: Number of seeds 0, 1, ... of the draws.
    draws: int = 4
    #: Result file of experiments.studies.pretraining, which holds the learning rate.
    pretraining: Path = Path("experiments/results/studies/pretraining.json")
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/draws.json")
    #: All other options of a run.
    base: Run = dataclasses.field(default_factory=lambda: pretraining.SMALL)


def configurations(config: Config, rate: float, gamma: int) -> list[Run]:
    """Returns the runs of one gamma, which differ in `draw_seed`."""
    points = [
        change(
            config.base, optimizer="gum", learning_rate=rate, full_rank_layers=gamma, draw_seed=draw
        )
        for draw in range(config.draws)
    ]
    return [sweeps.in_own_directory(point) for point in points]


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints a table, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    # 1. All runs at GUM's best rate, gamma by gamma.
    rates, _ = pretraining.stored(config.pretraining, "pretraining")
    # `draw_seed` changes the draws alone; `seed` would change weights and data order too.
    every = [c for gamma in config.gammas for c in configurations(config, rates["gum"], gamma)]
    entries = sweeps.runner(config, config.out)(every)
    # 2. Entries come in the order of the runs: `draws` of them for each gamma.
    losses = {
        gamma: [e["validation_loss"] for e in entries[i * config.draws : (i + 1) * config.draws]]
        for i, gamma in enumerate(config.gammas)
    }
    # 3. The deviation over draws, to be compared with the deviation over seeds of whole runs.
    reporting.table(
        f"Validation loss over {config.draws} draws, the same weights and data",
        ("gamma", "mean", "deviation", "min", "max"),
        ((g, statistics.mean(v), statistics.stdev(v), min(v), max(v)) for g, v in losses.items()),
    )
    print(f"\nresults: {config.out}; figure: {draw(config, losses)}")
    return 0


def draw(config: Config, losses: dict[int, list[float]]) -> Path:
    """Draws the loss of every draw as a dot, and the mean of each gamma as a line."""
    figure, axes = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    for place, values in enumerate(losses.values()):
        axes.scatter([place] * len(values), values, color=COLOURS[0], s=18, alpha=0.7)
        axes.plot([place - 0.2, place + 0.2], [statistics.mean(values)] * 2, color=COLOURS[1])
    # Gammas are categories: 0 to 4 are evenly spaced, whatever lies between them.
    axes.set_xticks(range(len(losses)), [str(gamma) for gamma in losses])
    axes.set_xlabel("full-rank layers of each role (gamma)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("The same run with other draws (line: mean)", fontsize="medium")
    axes.grid(alpha=0.3)
    return save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
