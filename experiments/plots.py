"""Loss curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*P"


def loss_curves(runs: dict[str, list[dict]], path: Path, title: str) -> Path:
    """Draws training loss (thin) and validation loss (marked) of each run over the steps.

    Args:
      runs: label to the records of a metrics file.
      path: the PNG to write.
      title: what the picture shows.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (label, records) in enumerate(runs.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(*_series(records, "loss"), color=colour, alpha=0.35, linewidth=0.8)
        held_out = _series(records, "validation_loss")
        axes.plot(*held_out, color=colour, marker=marker, label=f"{label}, validation")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)


def save(figure: Figure, results: Path) -> Path:
    """Writes a figure beside a result file and frees it; returns where it is."""
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]
