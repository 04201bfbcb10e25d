"""Peers, draws and periods on one seed: `python -m experiments.results.one_seed` draws the figure.

The runs of 4,000 steps are in result files of `experiments.studies.frontier`, trained on CPUs and,
`frontier.json`, on a GPU. The same run of Muon differs by 0.006 between the two, and the library by
its version, so each loss is compared with Muon's in its own file. One seed does not tell methods
apart whose losses differ by less than 0.02.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

from experiments import reporting
from experiments.reporting import COLOURS
from experiments.studies import frontier
from experiments.trainer import sweeps
from experiments.trainer.config import Config as Run

STUDIES = Path(__file__).parent / "studies"
STDLIB, SPEECHES = "stdlib", "runs/sotu"
SOURCES = {
    STDLIB: (STUDIES / "frontier_fallbacks.json", STUDIES / "frontier.json"),
    SPEECHES: (STUDIES / "frontier_speeches.json", STUDIES / "frontier.json"),
}
# Optimizers of other papers, and ours to compare with, in no order.
PEERS = (
    "muon", "swan_momentum", "normuon", "muon_int6", "polar_4", "polar_8", "mud", "swan", "rmnp",
    "apollo", "fira", "adamw", "scale", "columns_rotate", "gum", "galore_muon", "joint",
)  # fmt: skip
# Line of the left panel -> number of drawn layers of 8 -> contender.
DRAWS = {
    "GUM": {0: "galore_muon", 1: "gum_1", 2: "gum", 4: "gum_4"},
    "low-rank Muon + columns": {0: "columns_rotate", 2: "columns_slots"},
}
# Line of the right panel -> period K -> contender.
PERIODS = {
    "GaLore-Muon": {20: "galore_20", 200: "galore_muon", 1000: "galore_1000"},
    "GUM": {20: "gum_20", 200: "gum", 1000: "gum_1000"},
    "low-rank Muon + columns": {20: "columns_20", 200: "columns_rotate", 1000: "columns_1000"},
}

_CONFIG = frontier.Config()
_RATE = 3e-3  # of all runs of the figure: the best one of all methods based on Muon


class Found(NamedTuple):
    """The best run of a contender at full length.

    Attributes:
      above: its loss above Muon's best one in the same result file, nats per token.
      loss: its last validation loss.
      rate: its learning rate.
      bytes: state of the hidden matrices, bytes per parameter.
    """

    above: float
    loss: float
    rate: float
    bytes: float


@functools.cache
def found(key: str, rate: float | None = None, corpus: str = SPEECHES) -> Found:
    """Returns the best run of a contender on a corpus, of one learning rate or of all.

    Raises:
      LookupError: there is no run.
    """
    runs = [
        (ended.loss - _runs(source, "muon", rate, corpus)[0].loss, ended)
        for source in SOURCES[corpus]
        for ended in _runs(source, key, rate, corpus)[:1]
    ]
    if not runs:
        raise LookupError(f"no run of {key} has {frontier.STEPS} steps")
    above, (loss, run) = min(runs, key=lambda each: each[0])
    bytes_per_parameter = frontier.hidden_bytes(run) / _parameters()
    return Found(above, loss, run.learning_rate, bytes_per_parameter)


class _Ended(NamedTuple):
    loss: float
    run: Run


def _runs(source: Path, key: str, rate: float | None, corpus: str) -> list[_Ended]:
    """Returns the contender's runs of a file at one or all learning rates, the best one first."""
    runs = []
    for entry in _entries(source):
        its_rate = entry["config"]["learning_rate"]
        run = frontier.point(_CONFIG, key, its_rate, 0, corpus, frontier.STEPS)
        if rate in (None, its_rate) and sweeps.is_of(entry, run):
            runs.append(_Ended(entry["validation_loss"], run))
    return sorted(runs, key=lambda ended: ended.loss)


@functools.cache
def _entries(source: Path) -> list[sweeps.Entry]:
    return [e for e in json.loads(source.read_text()) if math.isfinite(e["validation_loss"])]


@functools.cache
def _parameters() -> float:
    """Returns the number of parameters of the hidden matrices: AdamW has 8 bytes for each."""
    run = frontier.point(_CONFIG, "adamw", 1e-3, 0, SPEECHES, frontier.STEPS)
    return frontier.hidden_bytes(run) / 8


def table() -> str:
    """Returns a table of peers in Markdown, the least loss on the speeches first."""
    rows = sorted(((key, found(key)) for key in PEERS), key=lambda row: row[1].above)
    return reporting.markdown(
        ("optimizer", "bytes per parameter", "rate: above Muon, speeches", "and the library"),
        (
            (frontier.CONTENDERS[key].name, f"{of.bytes:.1f}", _cell(of), _on_library(key))
            for key, of in rows
        ),
    )


def _on_library(key: str) -> str:
    """Returns the cell of a contender on the library, which is empty if it has no run there."""
    try:
        return _cell(found(key, corpus=STDLIB))
    except LookupError:
        return ""


def _cell(of: Found) -> str:
    return f"{of.rate:g}: {of.above:.3f}"


def draw() -> Path:
    """Draws loss above Muon's against the number of drawn layers (left) and the period (right)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
    styles = {
        "GUM": {"color": COLOURS[0], "marker": "o"},
        "GaLore-Muon": {"color": COLOURS[4], "marker": "v"},
        "low-rank Muon + columns": {"color": COLOURS[3], "marker": "h"},
    }
    for axes, lines in ((left, DRAWS), (right, PERIODS)):
        for name, points in lines.items():
            above = [found(key, _RATE).above for key in points.values()]
            axes.plot(list(points), above, label=name, **styles[name])
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    left.set(
        xlabel="drawn layers of 8; 0 is GaLore-Muon, or columns alone",
        ylabel="validation loss above Muon's (nats per token)",
        xticks=sorted(DRAWS["GUM"]),
    )
    right.set(xlabel="period K (steps)", xscale="log")
    right.set_xticks(list(PERIODS["GUM"]), [str(k) for k in PERIODS["GUM"]])
    right.minorticks_off()
    right.legend(frameon=False, fontsize="small")
    return reporting.save(figure, Path(__file__).parent / "draws_and_periods")


if __name__ == "__main__":
    print(table(), draw(), sep="\n\n")
