"""The README's first figure and table: `python -m experiments.results.overview` makes both.

The numbers are those of `contenders`: each contender at its best learning rate, as the difference
from Muon's loss with the same seed. Points are labelled directly instead of in a legend.
"""

import statistics
from pathlib import Path

from experiments import reporting
from experiments.reporting import COLOURS, STYLES, Style
from experiments.results import contenders

RESULTS = Path(__file__).parent
# Contender -> its style, and the offset of its label on each corpus, in points right and up.
SHOWN = {
    "muon": (STYLES["muon"], (8, 7), (8, 7)),
    "muon_rows8": (Style("Muon, 8 bits", COLOURS[2], "P"), (8, 7), (4, -16)),
    "muon_int6": (Style("6 bits", COLOURS[2], "*"), (-44, -4), (7, 5)),
    "muon_rows4": (Style("Muon, 4 bits", COLOURS[2], "X"), (9, 4), (10, -4)),
    "polar_4_int8": (
        Style("low rank + polar, 8 bits", COLOURS[3], "D"), (-86, -22), (-112, 13)
    ),
    "columns_rotate": (Style("low rank + columns", COLOURS[3], "h"), (-116, -4), (-116, -4)),
    "gum": (STYLES["gum"], (9, -4), (9, -4)),
    "galore_muon": (STYLES["galore_muon"], (10, -4), (10, -4)),
    "adamw": (STYLES["adamw"], (-56, -4), (-56, -4)),
    "scale": (STYLES["scale"], (12, 4), (9, -4)),
    "swan": (STYLES["swan"], (12, 17), (9, -4)),
    "racs": (STYLES["racs"], (9, -8), (9, -4)),
}  # fmt: skip
# Contender -> the situation in which to choose it, and the code that makes it.
CHOICES = {
    "muon": ("the reference", "`optax.contrib.muon(3e-3, consistent_rms=0.2)`"),
    "muon_rows8": ("**full-rank Muon's loss**", "`muon(3e-3, consistent_rms=0.2)`"),
    "muon_int6": (
        "the same in a tenth of AdamW's bytes",
        "`muon(3e-3, storages.int6(), consistent_rms=0.2)`",
    ),
    "polar_4_int8": (
        "**the least loss below half a byte**",
        "`gum(3e-3, compact(rank=32), consistent_rms=0.2)`",
    ),
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
    "swan": ("no state at all (SWAN)", "`swan(1.2e-2, consistent_rms=0.2)`"),
    "racs": (
        "a number for each row and column (RACS)",
        # The study's 6e-3, and a factor of 0.2 on its updates.
        "`for_matrices(scale_by_racs(), 1.2e-3)`",
    ),
    "scale": ("no state at all (SCALE)", "`for_matrices(normalize_columns(), 1e-3)`"),
    "galore_muon": (
        "GaLore with Muon",
        "`gum(3e-3, galore(rank=32), consistent_rms=0.2)`",
    ),
}
TITLES = {"stdlib": "Python's standard library", "runs/sotu": "State of the Union speeches"}


def table() -> str:
    """Returns a table of all contenders and their code, in Markdown; the least loss first."""
    first, second = contenders.points().values()
    rows = []
    for key in sorted(SHOWN, key=lambda key: statistics.mean(first[key].above)):
        situation, constructor = CHOICES[key]
        above = ", ".join(_signed(of[key].above) for of in (first, second))
        rows.append((situation, constructor, f"{first[key].bytes:.1f}", above))
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

    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.9), layout="constrained")
    for number, (corpus, of) in enumerate(contenders.points().items()):
        each = axes[number]
        # Muon's own loss.
        each.axhline(0, color="0.75", linewidth=1, zorder=0)
        for key, (style, *beside) in SHOWN.items():
            point = of[key]
            mean = statistics.mean(point.above)
            each.errorbar(
                point.bytes, mean,
                yerr=[[mean - min(point.above)], [max(point.above) - mean]],
                fmt=style.marker, color=style.colour, markersize=8, capsize=3, linewidth=1.4,
            )  # fmt: skip
            each.annotate(
                style.name, (point.bytes, mean), beside[number], textcoords="offset points",
                color=style.colour, fontsize=10, fontweight="bold",
            )  # fmt: skip
        # Logarithmic from a quarter of a byte on, linear below: some methods keep no state.
        each.set_xscale("symlog", base=2, linthresh=0.25, linscale=0.8)
        ticks = (0, 0.25, 0.5, 1, 2, 4, 8)
        each.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        each.set(
            xlabel="state of hidden matrices, bytes per parameter", title=TITLES[corpus],
            xlim=(-0.06, 11),
        )  # fmt: skip
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Muon in 6 and 8 bits is level with Muon; with fewer bytes, low rank + polar leads",
        fontsize=13,
    )
    axes[0].set(ylabel="validation loss above Muon's (nats per token)")
    return reporting.save(figure, RESULTS / "overview")


if __name__ == "__main__":
    print(table(), draw(), sep="\n\n")
