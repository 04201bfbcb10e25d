"""Contenders of the frontier study over three seeds: `python -m experiments.results.contenders`.

It prints tables of their losses and of the stable ranks of their weights. Learning rates were found
in four ways, each a search of the study.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import reporting
from experiments.studies import frontier
from experiments.trainer import sweeps
from experiments.trainer.config import change

SOURCE = Path(__file__).parent / "studies/frontier.json"
SEARCHES = (
    # 1. Every rate on all seeds and both corpora, at full length.
    frontier.Config(
        contenders=(
            "muon", "muon_rows8", "muon_rows4", "joint", "columns_rotate", "columns_20",
            "columns_16", "adamw", "gum", "galore_muon", "scale",
        ),
        tuning_runs="all", tuning_steps=frontier.STEPS, out=SOURCE,
    ),
    # Its best rate is half of the one where searches on fewer steps begin.
    frontier.Config(
        contenders=("swan",), tuning_runs="all", tuning_steps=frontier.STEPS, first=-1, out=SOURCE
    ),
    # 2. Every rate on the first seed and corpus, at full length.
    frontier.Config(
        contenders=("polar_4", "polar_4_int8"), tuning_steps=frontier.STEPS, out=SOURCE
    ),
    # 3. The same over 1,000 steps.
    frontier.Config(contenders=("racs",), first=1, out=SOURCE),
    # 4. None: they have the best rate of their relatives.
    frontier.Config(
        contenders=("muon_int6", "gum_1", "gum_4", "gum_20", "gum_1000", "galore_20"),
        tuning_runs="none", out=SOURCE,
    ),
)  # fmt: skip
# Twice the blocks, at the rate that is best for Muon.
DEEP = frontier.Config(
    contenders=("muon", "muon_rows8", "muon_int6", "polar_4", "gum"), tuning_runs="none", first=-1,
    base=change(frontier.BASE, preset="deep"), out=SOURCE.with_name("frontier_deep.json"),
)  # fmt: skip
CORPORA = frontier.Config().corpora


class Point(NamedTuple):
    """One contender on one corpus.

    Attributes:
      bytes: state of the hidden matrices, bytes per parameter.
      above: for each seed, the loss above Muon's with the same seed, nats per token.
      rate: its best learning rate.
    """

    bytes: float
    above: list[float]
    rate: float


@functools.cache
def finished() -> tuple[dict[str, float], dict[str, dict[str, list[sweeps.Entry]]]]:
    """Returns the best rates, and corpus -> contender -> the entries of its seeds."""
    best: dict[str, float] = {}
    found: dict[str, dict[str, list[sweeps.Entry]]] = {corpus: {} for corpus in CORPORA}
    for search in SEARCHES:
        rates, entries = frontier.finished(search)
        best |= rates
        for corpus, of in entries.items():
            found[corpus] |= of
    return best, found


@functools.cache
def points() -> dict[str, dict[str, Point]]:
    """Returns corpus -> contender -> its point, at the best learning rate."""
    best, entries = finished()
    # Bytes are the same on every corpus and seed.
    hidden = {
        key: frontier.hidden_bytes(
            frontier.point(SEARCHES[0], key, rate, 0, CORPORA[0], frontier.STEPS)
        )
        for key, rate in best.items()
    }
    # AdamW's state is two float32 moments: eight bytes for each parameter.
    parameters = hidden["adamw"] / 8
    return {
        corpus: {
            key: Point(hidden[key] / parameters, _above(each, of["muon"]), best[key])
            for key, each in of.items()
        }
        for corpus, of in entries.items()
    }


def _above(entries: Sequence[sweeps.Entry], muon: Sequence[sweeps.Entry]) -> list[float]:
    """Returns how far the last losses are above Muon's, seed by seed."""
    pairs = zip(entries, muon, strict=True)
    return [entry["validation_loss"] - other["validation_loss"] for entry, other in pairs]


def table() -> str:
    """Returns a table of all contenders in Markdown, the least loss over both corpora first."""
    found = points()

    def over_corpora(key: str) -> float:
        return statistics.mean(gap for of in found.values() for gap in of[key].above)

    rows = []
    for key in sorted(found[CORPORA[0]], key=over_corpora):
        of = [found[corpus][key] for corpus in CORPORA]
        rows.append((
            frontier.CONTENDERS[key].name, f"{of[0].bytes:.1f}", f"{of[0].rate:g}",
            *(_cell(point.above) for point in of),
        ))  # fmt: skip
    return reporting.markdown(
        ("optimizer", "bytes per parameter", "learning rate", "above Muon: library", "speeches"),
        rows,
    )


def deep_table() -> str:
    """Returns a table of contenders on 16 blocks in Markdown, the least loss first."""
    _, entries = frontier.finished(DEEP)
    above = {
        key: [_above(of[key], of["muon"]) for of in entries.values()] for key in DEEP.contenders
    }
    return reporting.markdown(
        ("16 blocks", "above Muon: library", "speeches"),
        (
            (frontier.CONTENDERS[key].name, *map(_cell, above[key]))
            for key in sorted(above, key=lambda key: sum(map(sum, above[key])))
        ),
    )


@functools.cache
def stable_ranks() -> dict[str, dict[str, float]]:
    """Returns corpus -> contender -> the mean stable rank of its last weights.

    Each kind of matrix (q, gate, ...) has the same weight in the mean. Contenders that ran before
    stable ranks were kept are left out.
    """
    _, found = finished()
    return {
        corpus: {
            key: statistics.mean(rank for e in entries for rank in e["stable_rank"].values())
            for key, entries in of.items()
            if all("stable_rank" in e for e in entries)
        }
        for corpus, of in found.items()
    }


def ranks_table() -> str:
    """Returns stable ranks beside losses, in Markdown; the largest rank first."""
    gaps = points().values()
    first, second = stable_ranks().values()
    return reporting.markdown(
        ("weights trained by", "stable rank: library", "speeches", "above Muon (nats)"),
        (
            (
                frontier.CONTENDERS[key].name, f"{first[key]:.1f}", f"{second[key]:.1f}",
                ", ".join(f"{statistics.mean(of[key].above):.2f}" for of in gaps),
            )
            for key in sorted(first, key=lambda key: -first[key])
        ),
    )  # fmt: skip


def _cell(above: list[float]) -> str:
    """Formats the mean and the standard deviation of the differences of seeds."""
    if not any(above):  # Muon itself
        return "0"
    mean = f"{statistics.mean(above):.3f}".replace("-0.000", "0.000")
    return f"{mean} ({statistics.stdev(above):.3f})"


if __name__ == "__main__":
    print(table(), deep_table(), ranks_table(), sep="\n\n")
