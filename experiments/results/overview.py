"""The README's first figure and table: `python -m experiments.results.overview` makes both.

The numbers come from the result file of `experiments.studies.frontier`: each contender at its best
learning rate, as the difference from Muon's loss with the same seed. Contenders that have one seed
so far (`one_seed`) are marked as such. Points are labelled directly instead of in a legend.
"""

import functools
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments import reporting
from experiments.reporting import COLOURS, STYLES, Style
from experiments.results import one_seed
from experiments.studies import frontier

RESULTS = Path(__file__).parent
SOURCE = RESULTS / "studies/frontier.json"
# Contender -> its style, and the offset of its label from its point, in points right and up.
SHOWN = {
    "muon": (STYLES["muon"], (10, 7)),
    "muon_rows8": (Style("Muon, 8 bits", COLOURS[2], "P"), (9, -14)),
    "muon_rows4": (Style("Muon, 4 bits", COLOURS[2], "X"), (10, -4)),
    "columns_rotate": (Style("low-rank Muon + columns", COLOURS[3], "h"), (10, -4)),
    "gum": (STYLES["gum"], (10, -4)),
    "galore_muon": (STYLES["galore_muon"], (10, -4)),
    "adamw": (STYLES["adamw"], (-58, -4)),
    "scale": (STYLES["scale"], (8, -21)),
}
# Contender -> the situation in which to choose it, and the code that makes it.
CHOICES = {
    "muon": ("the reference", "`optax.contrib.muon(3e-3, consistent_rms=0.2)`"),
    "muon_rows8": ("**full-rank Muon's loss**", "`muon(3e-3, consistent_rms=0.2)`"),
    "muon_rows4": (
        "less than a byte, better than AdamW",
        "`muon(3e-3, storages.int4(), consistent_rms=0.2)`",
    ),
    "columns_rotate": (
        "AdamW's loss from low-rank momentum",
        "`gum(3e-3, LowRank(rank=32, residual=residuals.through(normalize_columns()), "
        "carry=carries.rotate), consistent_rms=0.2)`",
    ),
    "adamw": ("for comparison", "`optax.adamw(1e-3)`"),
    "gum": (
        "an unbiased gradient estimate (GUM)",
        "`gum(3e-3, LowRank(rank=32), consistent_rms=0.2)`",
    ),
    "scale": ("no state at all (SCALE)", "`for_matrices(normalize_columns(), 1e-3)`"),
    "galore_muon": (
        "GaLore with Muon",
        "`gum(3e-3, galore(rank=32), consistent_rms=0.2)`",
    ),
}
# Contenders with one seed: style, offset of the label on each corpus, situation and code.
NEW = {
    "polar_4": (
        Style("low-rank Muon + polar", COLOURS[3], "o"),
        {"stdlib": (9, -4), "runs/sotu": (9, 12)},
        (
            "near Muon's loss from low-rank momentum, one seed",
            "`gum(3e-3, LowRank(rank=32, residual=residuals.orthogonalized(), "
            "carry=carries.rotate), consistent_rms=0.2)`",
        ),
    ),
    "swan": (
        STYLES["swan"]._replace(colour=COLOURS[6], marker="o"),
        {"stdlib": (8, -8), "runs/sotu": (8, -17)},
        ("no state at all (SWAN), one seed", "`swan(1.2e-2, consistent_rms=0.2)`"),
    ),
}
TITLES = {"stdlib": "Python's standard library", "runs/sotu": "State of the Union speeches"}
# The search of the result file: every rate on all seeds and both corpora, at full length.
CONFIG = frontier.Config(
    contenders=tuple(SHOWN), tuning_runs="all", tuning_steps=frontier.STEPS, out=SOURCE
)


class Point(NamedTuple):
    """One contender on one corpus.

    Attributes:
      bytes: state of the hidden matrices, bytes per parameter.
      above: for each seed, the loss above Muon's with the same seed, nats per token.
    """

    bytes: float
    above: list[float]


@functools.cache
def points() -> dict[str, dict[str, Point]]:
    """Returns corpus -> contender -> its point, at the best learning rate over both corpora."""
    best, entries = frontier.finished(CONFIG)
    # Bytes are the same on every corpus and seed.
    corpus, seed = CONFIG.corpora[0], CONFIG.seeds[0]
    hidden = {
        key: frontier.hidden_bytes(
            frontier.point(CONFIG, key, best[key], seed, corpus, frontier.STEPS)
        )
        for key in SHOWN
    }
    # AdamW's state is two float32 moments: eight bytes for each parameter.
    parameters = hidden["adamw"] / 8
    found = {}
    for corpus, of in entries.items():
        losses = {key: [entry["validation_loss"] for entry in of[key]] for key in SHOWN}
        found[corpus] = {
            key: Point(
                hidden[key] / parameters,
                [loss - muon for loss, muon in zip(losses[key], losses["muon"], strict=True)],
            )
            for key in SHOWN
        }
    return found


def table() -> str:
    """Returns a table of all contenders and their code, in Markdown; the least loss first."""
    (first, second) = points().values()
    rows = []
    for key in sorted(SHOWN, key=lambda key: statistics.mean(first[key].above)):
        situation, constructor = CHOICES[key]
        above = ", ".join(_signed(of[key].above) for of in (first, second))
        rows.append((situation, constructor, f"{first[key].bytes:.1f}", above))
    # Rows of one seed go behind those with a loss that is at most as high.
    for key, (_, _, choice) in NEW.items():
        gaps = [one_seed.found(key, corpus=corpus).above for corpus in CONFIG.corpora]
        place = sum(statistics.mean(first[other].above) <= gaps[0] for other in SHOWN)
        above = ", ".join(_signed([gap]) for gap in gaps)
        rows.insert(place, (*choice, f"{one_seed.found(key).bytes:.1f}", above))
    return reporting.markdown(
        ("you want", "write", "bytes per parameter", "above Muon (nats)"),
        rows,
    )


def _signed(above: list[float]) -> str:
    """Formats the mean difference, without the sign of a rounded zero."""
    return f"{statistics.mean(above) + 0.0:.2f}".replace("-0.00", "0.00")


def draw() -> Path:
    """Draws loss above Muon's (mean, min to max) against bytes per parameter, by corpus."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.5), layout="constrained")
    for each, (corpus, of) in zip(axes, points().items(), strict=True):
        # Muon's own loss.
        each.axhline(0, color="0.75", linewidth=1, zorder=0)
        for key, point in of.items():
            style, beside = SHOWN[key]
            mean = statistics.mean(point.above)
            each.errorbar(
                point.bytes, mean,
                yerr=[[mean - min(point.above)], [max(point.above) - mean]],
                fmt=style.marker, color=style.colour, markersize=8, capsize=3, linewidth=1.4,
            )  # fmt: skip
            each.annotate(
                style.name, (point.bytes, mean), beside, textcoords="offset points",
                color=style.colour, fontsize=10.5, fontweight="bold",
            )  # fmt: skip
        for key, (style, beside, _) in NEW.items():
            new = one_seed.found(key, corpus=corpus)
            # A hollow marker: there is one seed, and so no bar.
            each.plot(
                new.bytes, new.above, style.marker, color=style.colour, markersize=8, mfc="white"
            )
            each.annotate(
                style.name, (new.bytes, new.above), beside[corpus],
                textcoords="offset points", color=style.colour, fontsize=10.5, fontweight="bold",
            )  # fmt: skip
        each.set(
            xlabel="state of hidden matrices, bytes per parameter",
            title=TITLES[corpus],
            xlim=(-0.5, 9),
        )
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Muon with 8-bit momentum is level with Muon; low rank is not", fontsize=13)
    axes[0].set(ylabel="validation loss above Muon's (nats per token)")
    return reporting.save(figure, RESULTS / "overview")


if __name__ == "__main__":
    print(table(), draw(), sep="\n\n")
