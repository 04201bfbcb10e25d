"""The singular values of trained weights by optimizer: `python -m experiments.studies.spectra`.

The paper explains GUM's gains by a higher stable rank ``||W||_F^2 / ||W||_2^2`` of its weights.
This study trains nothing: it reads the runs of `experiments.studies.pretraining` on the first
corpus, of each optimizer at its best learning rate, which must have been run.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import reporting
from experiments.reporting import STYLES, save
from experiments.studies import pretraining
from experiments.studies.gradients import KINDS
from experiments.trainer import cli, sweeps
from experiments.trainer.optimizers import Name
from experiments.trainer.options import ConfigError

PROGRAM = "experiments.studies.spectra"


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the singular values of trained weights."""

    #: Optimizers to compare.
    optimizers: tuple[Name, ...] = ("adamw", "muon", "galore", "galore_muon", "gum")
    #: Result file of experiments.studies.pretraining.
    pretraining: Path = Path("experiments/results/studies/pretraining.json")
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/spectra.json")


def main(arguments: Sequence[str]) -> int:
    """Compares, prints a table, writes the results and the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    found = {o: compare(entries) for o, entries in finals(config).items()}
    reporting.write(config.out, config, optimizers=found)
    reporting.table(
        "Stable rank of trained weights, mean over layers and seeds",
        ("optimizer", "validation loss", "seeds", *KINDS),
        (
            (o, each["validation_loss"], each["seeds"],
             *(each["stable_rank"][kind]["mean"] for kind in KINDS))
            for o, each in found.items()
        ),
    )  # fmt: skip
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def finals(config: Config) -> dict[str, list[sweeps.Entry]]:
    """Returns by optimizer its runs at its best learning rate.

    Raises:
      ConfigError: there is no result file, or it has no run of an optimizer.
    """
    best, by_corpus = pretraining.stored(config.pretraining, "pretraining")
    # The first corpus of the file: weights of other data have other spectra.
    first = next(iter(by_corpus.values()))
    for optimizer in config.optimizers:
        if optimizer not in best:
            raise ConfigError(f"`optimizers`: {config.pretraining} has no run of {optimizer}")
    return {o: [e for e in first if e["config"]["optimizer"] == o] for o in config.optimizers}


def compare(entries: Sequence[sweeps.Entry]) -> dict[str, Any]:
    """Summarizes one optimizer: stable ranks by kind, mean distribution of singular values."""
    # One list of quantiles per matrix and seed; their mean weighs all matrices alike.
    quantiles = [s["quantiles"] for entry in entries for s in entry["spectra"].values()]
    return {
        "validation_loss": statistics.mean(entry["validation_loss"] for entry in entries),
        "seeds": len(entries),
        "stable_rank": {kind: _stable_rank(entries, kind) for kind in KINDS},
        "quantiles": np.mean(quantiles, axis=0).tolist(),
    }


def _stable_rank(entries: Sequence[sweeps.Entry], kind: str) -> dict[str, float]:
    """Returns the mean over layers and seeds, and the standard deviation between seeds."""
    # The mean over layers, for each seed.
    means = [
        statistics.mean(
            s["stable_rank"] for n, s in entry["spectra"].items() if n.endswith(f"/{kind}/kernel")
        )
        for entry in entries
    ]
    deviation = statistics.stdev(means) if len(means) > 1 else 0.0
    return {"mean": statistics.mean(means), "deviation": deviation}


def draw(config: Config, found: dict[str, dict[str, Any]]) -> Path:
    """Draws stable ranks by kind of matrix (left) and quantiles of singular values (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
    for i, (optimizer, each) in enumerate(found.items()):
        # Side by side within 0.6 of a unit around each kind, so that error bars do not overlap.
        places = [kind + 0.6 * ((i + 0.5) / len(found) - 0.5) for kind in range(len(KINDS))]
        name, colour, marker = STYLES[optimizer]
        style: dict[str, Any] = {"color": colour, "marker": marker}
        ranks = each["stable_rank"].values()
        left.errorbar(
            places, [rank["mean"] for rank in ranks], yerr=[rank["deviation"] for rank in ranks],
            linestyle="", label=name, capsize=2, **style,
        )  # fmt: skip
        # Relative to the largest value of each matrix: the shape of the spectrum, not its scale.
        quantiles = each["quantiles"]
        right.plot(np.linspace(0, 1, len(quantiles)), quantiles, markersize=4, **style)
    left.set_xticks(range(len(KINDS)), KINDS)
    left.set(xlabel="kind of matrix", ylabel="stable rank of the weights", ylim=(0, None))
    left.legend(frameon=False, fontsize="small")
    right.set(xlabel="quantile", ylabel="singular value / the largest", ylim=(0, 1))
    right.set_title("mean over all matrices", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
