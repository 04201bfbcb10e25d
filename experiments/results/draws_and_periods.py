"""Drawn layers and periods over 20 periods: `python -m experiments.results.draws_and_periods`.

It draws the figure of two questions. Is it the draw that brings low rank closer to Muon? Does an
old basis cost loss? The numbers are those of `contenders`.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

from experiments import reporting
from experiments.reporting import COLOURS, STYLES, Style
from experiments.results import contenders, overview


class Line(NamedTuple):
    """Contenders that differ in one number.

    Attributes:
      style: the style of the line.
      keys: the number -> the contender.
    """

    style: Style
    keys: dict[int, str]


# Question -> its lines. The first contender of GUM's draws has none: it is GaLore-Muon.
QUESTIONS = {
    "layers drawn at full rank, of 8": (
        Line(STYLES["gum"], {0: "galore_muon", 1: "gum_1", 2: "gum", 4: "gum_4"}),
    ),
    "period K, steps": (
        Line(STYLES["galore_muon"], {20: "galore_20", 200: "galore_muon"}),
        Line(STYLES["gum"], {20: "gum_20", 200: "gum", 1000: "gum_1000"}),
        Line(
            Style("low-rank Muon + columns", COLOURS[3], "h"),
            {20: "columns_20", 200: "columns_rotate"},
        ),
    ),
}


def draw() -> Path:
    """Draws loss above Muon's (mean, least to largest): a column for each question."""
    import matplotlib.pyplot as plt

    points = contenders.points()
    figure, axes = plt.subplots(
        len(points), len(QUESTIONS), figsize=(9.0, 6.6), layout="constrained", sharey="row"
    )
    for down, (corpus, of) in enumerate(points.items()):
        for across, (question, lines) in enumerate(QUESTIONS.items()):
            each = axes[down][across]
            # Equally far apart: periods differ by factors, and there may be no drawn layer.
            numbers = sorted({number for line in lines for number in line.keys})
            for line in lines:
                places = [numbers.index(number) for number in line.keys]
                above = [of[key].above for key in line.keys.values()]
                means = [statistics.mean(gaps) for gaps in above]
                least = [mean - min(gaps) for mean, gaps in zip(means, above, strict=True)]
                most = [max(gaps) - mean for mean, gaps in zip(means, above, strict=True)]
                each.errorbar(
                    places, means, yerr=[least, most], color=line.style.colour,
                    marker=line.style.marker, capsize=3, linewidth=1.4, label=line.style.name,
                )  # fmt: skip
            each.set_xticks(range(len(numbers)), [f"{number:,}" for number in numbers])
            each.set(xlabel=question, title=overview.TITLES[corpus])
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
        axes[down][0].set(ylabel="validation loss above Muon's (nats)", ylim=(0, None))
    axes[0][-1].legend(frameon=False, fontsize="small")
    return reporting.save(figure, contenders.SOURCE.parents[1] / "draws_and_periods")


if __name__ == "__main__":
    print(draw())
