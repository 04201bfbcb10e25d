"""Drawn layers and periods over a long run: `python -m experiments.studies.draws_and_periods`.

Is it the draw that brings low rank closer to Muon, and does an old basis cost loss? The frontier
study trained low-rank Muon with 0 to 4 of 8 layers drawn at full rank, without and with a residual
that keeps no state, and with bases that serve for K = 20, 200 and 1,000 steps. This study trains
nothing: it reads those runs and compares each with Muon's of the same seed.
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from experiments import reporting
from experiments.reporting import COLOURS, STYLES, Style
from experiments.results import overview
from experiments.studies import frontier
from experiments.trainer import cli

PROGRAM = "experiments.studies.draws_and_periods"
_COLUMNS = Style("low-rank Muon + columns", COLOURS[3], "h")


class Line(NamedTuple):
    """Contenders of the frontier study that differ in one number.

    Attributes:
      style: how the line is drawn.
      contenders: the number -> the contender's key.
    """

    style: Style
    contenders: dict[int, str]


# Question -> its lines.
QUESTIONS = {
    "drawn layers of 8": (
        Line(STYLES["gum"], {0: "galore_muon", 1: "gum_1", 2: "gum", 4: "gum_4"}),
        Line(
            _COLUMNS, {0: "columns", 1: "columns_slots_1", 2: "columns_slots", 4: "columns_slots_4"}
        ),
    ),
    "period K, steps": (
        Line(
            STYLES["galore_muon"], {20: "galore_20", 200: "galore_muon", 1000: "galore_1000"}
        ),
        Line(STYLES["gum"], {20: "gum_20", 200: "gum", 1000: "gum_1000"}),
        Line(_COLUMNS, {20: "columns_20", 200: "columns_rotate", 1000: "columns_1000"}),
    ),
}  # fmt: skip
_KEYS = {key for lines in QUESTIONS.values() for line in lines for key in line.contenders.values()}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare low-rank Muon by the number of drawn layers and by the period."""

    #: Result file of experiments.studies.frontier.
    frontier: Path = overview.SOURCE
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/draws_and_periods.json")


# Corpus -> question -> a line's name -> the number -> the summary of its runs.
Rows = Mapping[str, Mapping[str, Mapping[str, Mapping[int, dict[str, float]]]]]


def main(arguments: Sequence[str]) -> int:
    """Compares, prints tables, writes the results and the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    rows = compare(config)
    reporting.write(config.out, config, rows=rows)
    for corpus, questions in rows.items():
        for question, lines in questions.items():
            numbers = list(next(iter(lines.values())))
            reporting.table(
                f"{corpus}: loss above Muon's, mean (standard deviation) over seeds, by {question}",
                ("", *map(str, numbers)),
                (
                    (name, *(f"{row['above']:.3f} ({row['deviation']:.3f})" for row in of.values()))
                    for name, of in lines.items()
                ),
            )
    print(f"\nresults: {config.out}; figure: {draw(config, rows)}")
    return 0


def compare(config: Config) -> Rows:
    """Returns how far above Muon each contender ends, from the same seeds.

    Raises:
      ConfigError: a run is missing.
    """
    # All of them have Muon's best rate, which the search found to be the best of GUM, of
    # GaLore-Muon and of the columns, too.
    study = frontier.Config(
        contenders=("muon", *sorted(_KEYS)), tuning_runs="none", out=config.frontier
    )
    _, found = frontier.finished(study)
    return {
        corpus: {
            question: {
                line.style.name: {
                    number: _above(of[key], of["muon"]) for number, key in line.contenders.items()
                }
                for line in lines
            }
            for question, lines in QUESTIONS.items()
        }
        for corpus, of in found.items()
    }


def _above(entries: Sequence[dict[str, Any]], muon: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Summarizes the differences of the last losses from Muon's, seed by seed."""
    apart = [
        entry["validation_loss"] - other["validation_loss"]
        for entry, other in zip(entries, muon, strict=True)
    ]
    return {
        "above": statistics.mean(apart),
        "deviation": statistics.stdev(apart),
        "least": min(apart),
        "largest": max(apart),
    }


def draw(config: Config, rows: Rows) -> Path:
    """Draws loss above Muon's (mean, least to largest) by question and corpus."""
    figure, axes = plt.subplots(
        len(QUESTIONS), len(rows), figsize=(9.0, 6.6), layout="constrained", sharey="col"
    )
    for down, (question, lines) in enumerate(QUESTIONS.items()):
        for across, (corpus, of) in enumerate(rows.items()):
            each = axes[down][across]
            for line in lines:
                found = of[question][line.style.name]
                # Equally far apart: periods differ by factors, and there may be no drawn layer.
                places = range(len(found))
                means = [row["above"] for row in found.values()]
                each.errorbar(
                    places, means,
                    yerr=[
                        [m - row["least"] for m, row in zip(means, found.values(), strict=True)],
                        [row["largest"] - m for m, row in zip(means, found.values(), strict=True)],
                    ],
                    color=line.style.colour, marker=line.style.marker, capsize=3,
                    linewidth=1.4, label=line.style.name,
                )  # fmt: skip
                each.set_xticks(places, [f"{number:,}" for number in found])
            each.set(xlabel=question, ylim=(0, None))
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
            if down == 0:
                each.set_title(overview.TITLES[corpus])
            if across == 0:
                each.set(ylabel="validation loss above Muon's (nats)")
                each.legend(frameon=False, fontsize="small")
    return reporting.save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
