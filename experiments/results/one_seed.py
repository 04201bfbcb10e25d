"""Methods that ran on one seed: `python -m experiments.results.one_seed` prints their table.

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
from experiments.studies import frontier
from experiments.trainer import sweeps
from experiments.trainer.config import Config as Run

STUDIES = Path(__file__).parent / "studies"
STDLIB, SPEECHES = "stdlib", "runs/sotu"
SOURCES = {
    STDLIB: (STUDIES / "frontier_fallbacks.json", STUDIES / "frontier.json"),
    SPEECHES: (STUDIES / "frontier_speeches.json", STUDIES / "frontier.json"),
}
# Contenders that have no three seeds yet, in no order, and Muon.
PEERS = (
    "muon", "swan_momentum", "normuon", "mud", "polar_8", "rmnp", "apollo", "fira", "adalomo",
    "columns_slots", "columns_1000",
)  # fmt: skip
_CONFIG = frontier.Config()


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
def found(key: str, corpus: str = SPEECHES) -> Found:
    """Returns the best run of a contender on a corpus, of all learning rates.

    Raises:
      LookupError: there is no run.
    """
    runs = [
        (ended.loss - _runs(source, "muon", corpus)[0].loss, ended)
        for source in SOURCES[corpus]
        for ended in _runs(source, key, corpus)[:1]
    ]
    if not runs:
        raise LookupError(f"no run of {key} has {frontier.STEPS} steps")
    above, (loss, run) = min(runs, key=lambda each: each[0])
    bytes_per_parameter = frontier.hidden_bytes(run) / _parameters()
    return Found(above, loss, run.learning_rate, bytes_per_parameter)


class _Ended(NamedTuple):
    loss: float
    run: Run


def _runs(source: Path, key: str, corpus: str) -> list[_Ended]:
    """Returns the contender's runs of a file at all learning rates, the best one first."""
    runs = []
    for entry in _entries(source):
        rate = entry["config"]["learning_rate"]
        run = frontier.point(_CONFIG, key, rate, 0, corpus, frontier.STEPS)
        if sweeps.is_of(entry, run):
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


if __name__ == "__main__":
    print(table())
