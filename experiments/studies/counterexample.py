"""The counterexample with other settings: `python -m experiments.studies.counterexample`.

`experiments.counterexample` has q = 0.5, K = 20 and projectors as wide as the noise. Here GUM runs
with other q and K, and GUM and GaLore-Muon with other ranks. The rule of the learning rate is kept:
the least that surely reaches the optimum in a fraction q of the steps, times four; so it grows as q
shrinks.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import cli, counterexample, record, tables
from experiments.plots import COLOURS, MARKERS, save

PROGRAM = "experiments.studies.counterexample"
_FLOOR = 1e-12  # of the figure: smaller gaps, and zero, are drawn here


@dataclasses.dataclass(frozen=True)
class Config(counterexample.Config):
    """Vary q, the period and the projectors' rank on the paper's counterexample."""

    probabilities: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    """Probabilities q of a full-rank period."""
    periods: tuple[int, ...] = (5, 20, 100, 500)
    """Periods K, each with every q."""
    ranks: tuple[int, ...] = (4, 8, 12, 16)
    """Ranks of the projectors; q and K are --probability and --period."""
    out: Path = Path("experiments/results/studies/counterexample.json")
    """Result file; the figure is beside it."""


def main(arguments: Sequence[str]) -> int:
    """Runs all settings, prints tables, writes results and figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    draws, ranks = by_draw(config), by_rank(config)
    record.write(config.out, config, draws=draws, ranks=ranks)
    head = ("method", "q", "K", "rank", "median", "least", "largest")
    for title, rows in (("q and K", draws), ("the rank of projectors", ranks)):
        tables.show(
            f"Final gap / gap at the start by {title}, {config.seeds} seeds",
            head,
            ([row[name] for name in head] for row in rows),
        )
    print(f"\nresults: {config.out}; figure: {draw(config, draws, ranks)}")
    return 0


def by_draw(config: Config) -> list[dict[str, Any]]:
    """GUM with every q and K."""
    return [
        final("GUM", dataclasses.replace(config, probability=q, period=period))
        for q in config.probabilities
        for period in config.periods
    ]


def by_rank(config: Config) -> list[dict[str, Any]]:
    """GUM and GaLore-Muon with every rank."""
    return [
        final(method, dataclasses.replace(config, rank=rank))
        for method in ("GUM", "GaLore-Muon")
        for rank in config.ranks
    ]


def final(method: str, config: Config) -> dict[str, Any]:
    """The last relative gap of one method with one setting: every seed's, median and range."""
    direction = counterexample.methods(config)[method]
    gaps = counterexample.relative_gaps(direction, config)[:, -1]
    return {
        "method": method,
        "q": config.probability,
        "K": config.period,
        "rank": config.projector_rank,
        "learning_rate": config.learning_rate,
        "median": float(np.median(gaps)),
        "least": float(gaps.min()),
        "largest": float(gaps.max()),
        "gaps": gaps.tolist(),
    }


def draw(config: Config, draws: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> Path:
    """Draws median and range of the final gap: over K for each q, and over the rank."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.6, 4.0), layout="constrained", sharey=True
    )
    for i, q in enumerate(config.probabilities):
        _series(left, [row for row in draws if row["q"] == q], "K", f"q = {q:g}", i, apart=1.04)
    for i, method in enumerate(("GUM", "GaLore-Muon")):
        _series(right, [row for row in ranks if row["method"] == method], "rank", method, i)
    left.set(xlabel="period K", ylabel="final gap / gap at the start", xscale="log")
    left.set_xticks(config.periods, config.periods, minor=False)
    left.set_xticks([], minor=True)
    left.set(yscale="log", ylim=(_FLOOR / 3, 9))
    left.set_title("GUM: median and range over seeds", fontsize="medium")
    right.axvline(
        config.r, color=COLOURS[-1], linewidth=1, linestyle=":", label="rank of the noise"
    )
    right.set(xlabel="rank of the projectors")
    right.set_xticks(config.ranks)
    right.set_title(
        f"q = {config.probability:g}, K = {config.period} (zero is drawn at {_FLOOR:g})",
        fontsize="medium",
    )
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.3)
    return save(figure, config.out)


def _series(
    axes: Axes, rows: list[dict[str, Any]], x: str, label: str, i: int, apart: float = 1.0
) -> None:
    """Medians with ranges; each series is a factor `apart` from the one before, to be seen."""
    places = [row[x] * apart ** (i - 2) for row in rows]
    least, middle, largest = (
        np.maximum([row[name] for row in rows], _FLOOR) for name in ("least", "median", "largest")
    )
    axes.errorbar(
        places, middle, yerr=(middle - least, largest - middle), fmt=f"{MARKERS[i]}-",
        color=COLOURS[i], label=label, capsize=2, markersize=4, linewidth=1,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
