"""The effect of each setting of GUM on its loss: `python -m experiments.studies.ablations`.

One setting is changed at a time, at GUM's learning rate from `experiments.studies.pretraining`. The
biased methods beside it have their own rate, and updates of another scale have a grid of rates. A
seed gives all settings the same weights, data and order, so that settings are compared seed by
seed: seeds differ from each other by more than most settings do.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments import reporting
from experiments.reporting import COLOURS, save
from experiments.studies import pretraining
from experiments.trainer import cli, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change

PROGRAM = "experiments.studies.ablations"
_TOP = 0.1  # nats above the default: worse settings are written at the top of the figure


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Change one setting of GUM at a time."""

    #: Numbers of full-rank layers of each role; at most half of nano's eight layers.
    gammas: tuple[int, ...] = (0, 1, 2, 4)
    #: Steps between refreshes; a period longer than the run keeps its first bases.
    periods: tuple[int, ...] = (10, 50, 200, 1000)
    #: Ranks; at the full rank (nano: 128) GUM is Muon.
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    #: Slopes of the chance of a layer to be drawn, over depth.
    draw_slopes: tuple[float, ...] = (-0.5, 0.5)
    #: Differences of rank between the first half of the layers and the second.
    rank_slopes: tuple[float, ...] = (-16, 0, 16)
    #: Learning rates of updates scaled as in Muon, without matching AdamW's size.
    raw_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    #: Periods of biased GaLore-Muon.
    galore_periods: tuple[int, ...] = (20, 50, 200)
    #: Seeds of weights, data order and draws.
    seeds: tuple[int, ...] = (0, 1)
    #: Result file of experiments.studies.pretraining, which holds the learning rates.
    pretraining: Path = Path("experiments/results/studies/pretraining.json")
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/ablations.json")
    #: All other options of a run, and the values of the settings that are not changed.
    base: Run = dataclasses.field(default_factory=lambda: pretraining.SMALL)


# Panel -> label of a setting -> the options that it changes
Panels = dict[str, dict[str, dict[str, Any]]]


def panels(config: Config, rates: dict[str, float]) -> Panels:
    """Returns the settings to compare, by panel; every panel includes the default."""
    ours: Any = config.base.optimizer
    biased = {"optimizer": "galore_muon", "learning_rate": rates["galore_muon"]}
    return {
        "full-rank layers (gamma)": {str(g): _gamma(g) for g in config.gammas},
        "period K": {str(k): {"period": k} for k in config.periods},
        "rank": {str(r): {"rank": r} for r in config.ranks},
        # Restarting is the paper's rule. `slots` carries momentum into the new basis unrotated.
        "momentum at a refresh": {
            "restarts": {}, "carried": {"restart": "slots"}, "rotated": {"restart": "rotate"},
        },
        "projector": {
            "default": {}, "SVD": {"projector": "svd"},
            "random": {"projector": "random_orthonormal"},
        },
        "sampling": {"fixed size": {}, "Bernoulli": {"sampler": "bernoulli"}},
        "chance of a draw, early : late layers": {"1:1": {}} | {
            f"{1 - s:g}:{1 + s:g}": {"draw_slope": s} for s in config.draw_slopes
        },
        # Each half draws half of the layers, so that all settings have equal bytes.
        "rank, early : late layers": {"one group": {}} | {
            f"{ours.rank + s / 2:g}:{ours.rank - s / 2:g}": {
                "bands": 2, "rank_slope": s, "full_rank_layers": ours.full_rank_layers // 2,
            }
            for s in config.rank_slopes
        },
        # Without matching, an update has another size and so needs rates of its own.
        "scale of updates": {"matched": {}} | {
            f"raw {rate:g}": {"consistent_rms": None, "learning_rate": rate}
            for rate in config.raw_rates
        },
        # Short periods of GaLore-Muon have fresh bases and a bias, long ones of GUM the opposite.
        "staleness or bias": {
            f"GaLore {k}": biased | {"period": k} for k in config.galore_periods
        } | {f"GUM {k}": {"period": k} for k in config.periods if k <= 200},
    }  # fmt: skip


def _gamma(gamma: int) -> dict[str, Any]:
    return {"full_rank_layers": gamma}


def configurations(config: Config, rates: dict[str, float], changes: dict[str, Any]) -> list[Run]:
    """Returns the runs of one setting, one for each seed."""
    options = {"optimizer": "gum", "learning_rate": rates["gum"]} | changes
    points = [change(config.base, **options, seed=seed) for seed in config.seeds]
    return [sweeps.in_own_directory(point) for point in points]


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints a table, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    rates, _ = pretraining.stored(config.pretraining, "pretraining")
    # 1. Run everything, all settings before the next seed: a study cut short compares all of them.
    settings = [c for panel in panels(config, rates).values() for c in panel.values()]
    each = [configurations(config, rates, changes) for changes in settings]
    by_seed = [point for points in zip(*each, strict=True) for point in points]
    complete = sweeps.runner(config, config.out)
    complete(by_seed)
    # 2. Summarize each setting against the default. All runs are in the result file by now, from
    # which `complete` takes them.
    default = losses(complete(configurations(config, rates, {})))
    found = {
        title: {
            label: summary(complete(configurations(config, rates, changes)), default)
            for label, changes in panel.items()
        }
        for title, panel in panels(config, rates).items()
    }
    for title, rows in found.items():
        reporting.table(
            title,
            ("setting", "loss", "minus the default's", "min", "max", "state MiB", "s/step"),
            ((label, row["loss"], row["difference"], min(row["differences"]),
              max(row["differences"]), row["state_bytes"] / 2**20, row["seconds_per_step"])
             for label, row in rows.items()),
        )  # fmt: skip
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def losses(entries: Sequence[sweeps.Entry]) -> list[float]:
    """Returns the final validation loss of each run."""
    return [entry["validation_loss"] for entry in entries]


def summary(entries: Sequence[sweeps.Entry], default: Sequence[float]) -> dict[str, Any]:
    """Summarizes a setting: mean loss, differences from the default by seed, bytes and seconds."""
    differences = [a - b for a, b in zip(losses(entries), default, strict=True)]
    return {
        "loss": statistics.mean(losses(entries)),
        "difference": statistics.mean(differences),
        "differences": differences,
        "state_bytes": entries[0]["state_bytes"],
        "seconds_per_step": statistics.median(e["seconds_per_step"] for e in entries),
    }


def draw(config: Config, found: dict[str, dict[str, dict[str, Any]]]) -> Path:
    """Draws one panel per kind of setting: the loss minus the default's, a dot for each seed."""
    rows = -(-len(found) // 2)  # two panels in a row, rounded up
    size = (8.4, 2.6 * rows)
    figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", sharey=True)
    for each, (title, settings) in zip(axes.flat, found.items(), strict=False):
        _panel(each, title, settings)
    axes[0, 0].set_ylim(top=_TOP)
    for row in axes:
        row[0].set_ylabel("loss minus the default's")
    return save(figure, config.out)


def _panel(axes: Axes, title: str, settings: dict[str, Any]) -> None:
    axes.axhline(0, color=COLOURS[-1], linewidth=1, linestyle=":")
    for place, row in enumerate(settings.values()):
        # A setting with a seed beyond the axis is given as an arrow and its mean.
        inside = [each for each in row["differences"] if each < _TOP]
        axes.scatter([place] * len(inside), inside, s=14, color=COLOURS[0], alpha=0.6)
        if len(inside) == len(row["differences"]):
            axes.plot(place, row["difference"], "_", markersize=18, color=COLOURS[0])
        else:
            off = f"\N{UPWARDS ARROW} mean {row['difference']:+.2f}"
            axes.text(place, 0.95 * _TOP, off, ha="center", va="top", color=COLOURS[1])
    labels = [label.replace(" ", "\n") for label in settings]
    axes.set_xticks(range(len(settings)), labels, fontsize="small")
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
