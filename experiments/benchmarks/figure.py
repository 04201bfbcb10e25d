"""The figure of the benchmarks: one panel for each result file that exists."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullLocator

from experiments.benchmarks import step, training
from experiments.reporting import COLOURS, MARKERS, STYLES, Style, save

# The styles of contenders: those of all figures, and more for contenders of the benchmarks alone.
_STYLES = STYLES | {
    "optax muon": STYLES["muon"],
    "optax galore": Style("optax GaLore", COLOURS[3], "s"),
    "parameters": Style("parameters", COLOURS[6], "*"),
    "gum, compressed gradients": Style("GUM, compressed gradients", COLOURS[5], "o"),
}
_COLUMNS = 2
_INCHES = (4.2, 3.4)  # size of a panel: two side by side are legible at half the width of a page
_GIB = 2**30


def draw(results: Path, path: Path) -> Path | None:
    """Draws a panel for each result in a directory.

    Args:
      results: the directory of the benchmarks.
      path: of the PNG.

    Returns:
      The path of the PNG, or None if there are no results.
    """
    # 1. Read the results. Those of `step` and `training` are spread over several files.
    found = {name: results / f"{name}.json" for name in PANELS}
    content = {name: json.loads(file.read_text()) for name, file in found.items() if file.exists()}
    if (timed := step.stored(results))["pairs"]:
        content = {"step": timed} | content
    if trained := training.stored(results):
        content["training"] = trained
    panels = [(panel, content[name]) for name in content for panel in PANELS[name]]
    if not panels:
        return None
    # 2. Lay out the panels in rows of two; a place without panel stays empty.
    rows = -(-len(panels) // _COLUMNS)
    size = (_INCHES[0] * _COLUMNS, _INCHES[1] * rows)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for each, (panel, result) in zip(axes.flat, panels, strict=False):
        panel(each, result)
        each.grid(alpha=0.3)
    for empty in axes.flat[len(panels) :]:
        empty.set_axis_off()
    return save(figure, path)


def _update(axes: Axes, result: dict[str, Any]) -> None:
    """Seconds of GUM's update over another optimizer's, against the size of the model."""
    # Pairs with a note were not timed. GUM with SVD is no other optimizer, so it is left out.
    pairs = [p for p in result["pairs"] if p["layout"] == "separate" and "note" not in p]
    pairs = [p for p in pairs if p["other"] != "gum, svd"]
    for name in dict.fromkeys(p["other"] for p in pairs):
        ratios = {p["preset"]: p["amortized_ratio"] for p in pairs if p["other"] == name}
        _line(axes, list(ratios), list(ratios.values()), name, name)
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="LLaMA", ylabel="seconds, GUM / other", yscale="log", ylim=(0.05, 30))
    _numbers(axes.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20))
    _finish(
        axes,
        "An update, refreshes spread over their period",
        loc="upper right",
        bbox_to_anchor=(1, 0.8),
    )


def _state(axes: Axes, result: dict[str, Any]) -> None:
    """Bytes of state against the size of the model."""
    sizes = {p: layouts["separate"] for p, layouts in result["state_bytes"].items()
             if "separate" in layouts}  # fmt: skip
    for name in dict.fromkeys(name for each in sizes.values() for name in each):
        known = {preset: each[name] / _GIB for preset, each in sizes.items() if name in each}
        _line(axes, list(known), list(known.values()), name, name)
    axes.set(xlabel="LLaMA", ylabel="GiB", yscale="log")
    _finish(axes, "Optimizer state")


def _growth(axes: Axes, result: dict[str, Any]) -> None:
    """Seconds of tracing and compiling against the number of layers."""
    rows = result["growth"]
    for name, layout in dict.fromkeys((r["contender"], r["layout"]) for r in rows):
        mine = [r for r in rows if (r["contender"], r["layout"]) == (name, layout)]
        seconds = [r["trace_seconds"] + r["compile_seconds"] for r in mine]
        # Matplotlib leaves out of the legend labels that begin with an underscore.
        line, label = ("--", "_") if layout == "stacked" else ("-", name)
        _line(axes, [r["depth"] for r in mine], seconds, label, name, line)
    axes.set(xlabel="layers", ylabel="seconds", xscale="log", yscale="log")
    _numbers(axes.xaxis, sorted({r["depth"] for r in rows}))
    _finish(axes, "Tracing and compiling (dashed: stacked layers)")


def _sweep(axes: Axes, result: dict[str, Any]) -> None:
    """Milliseconds of GUM's update against its rank."""
    rows = result["rank"]
    ranks = [row["rank"] for row in rows]
    _line(axes, ranks, [1000 * row["plain"]["median"] for row in rows], "plain step")
    _line(axes, ranks, [1000 * row["refresh"]["median"] for row in rows], "refresh")
    _line(axes, ranks, [1000 * row["amortized_seconds"] for row in rows], "amortized")
    preset = result["config"]["sweep_preset"]
    axes.set(xlabel="rank", ylabel="milliseconds", xscale="log", ylim=(0, None))
    _numbers(axes.xaxis, ranks)
    _finish(axes, f"GUM's update, {preset}")


def _training(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Tokens per second over AdamW's, a group of bars for each result; GiB stand on the bars."""
    names = list(results[0]["medians"])
    width = 0.8 / len(names)  # a group takes 0.8 of the distance between two of them
    for i, name in enumerate(names):
        medians = [result["medians"][name] for result in results]
        heights = [training.speeds(result)[name] for result in results]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(results))]
        style = _STYLES[name]
        bars = axes.bar(places, heights, 0.95 * width, color=style.colour, label=style.name)
        # Upright, as they are wider than the bars.
        sizes = [f"{each['program_bytes'] / _GIB:.2f}" for each in medians]
        axes.bar_label(bars, sizes, padding=3, rotation=90, fontsize="small")
    configs = [result["config"] for result in results]
    labels = [f"{c['training_preset']}\n{c['batch_size']} x {c['seq_len']}" for c in configs]
    axes.set_xticks(range(len(configs)), labels)
    axes.set(xlabel="model, tokens in a step", ylabel="tokens per second / AdamW's")
    axes.margins(y=0.5)  # for the sizes and the legend
    _finish(axes, "Training (GiB of the program)", loc="upper center", ncols=2)


def _projectors(axes: Axes, result: dict[str, Any]) -> None:
    """Captured energy over the best subspace's, along the refreshes of a run."""
    rows = result["by_step"]
    steps = [row["step"] for row in rows]
    _line(axes, steps, [row["median"] for row in rows], "median matrix")
    _line(axes, steps, [row["min"] for row in rows], "worst matrix")
    axes.set(xlabel="step of the refresh", ylabel="energy / best subspace's")
    _finish(axes, f"Bases, rank {result['config']['projector_rank']}")


# Result -> its panels.
PANELS: dict[str, tuple[Callable[[Axes, Any], None], ...]] = {
    "step": (_update,),
    "compiled": (_state, _growth),
    "sweep": (_sweep,),
    "training": (_training,),
    "projectors": (_projectors,),
}


def _line(axes: Axes, x: Any, y: Any, label: str, name: str = "", line: str = "-") -> None:
    """Draws a line; an optimizer's `name` has its colour and marker in every panel."""
    i = len(axes.get_lines())
    style = _STYLES.get(name, Style(label, COLOURS[i % 7], MARKERS[i % 7]))
    # A line labelled with its contender's key gets the name that all figures use.
    label = style.name if label == name else label
    axes.plot(x, y, line, color=style.colour, marker=style.marker, label=label)


def _numbers(axis: Axis, ticks: Sequence[float]) -> None:
    """Labels a logarithmic axis with plain numbers at `ticks`, instead of powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())


def _finish(axes: Axes, title: str, **legend: Any) -> None:
    """Adds the title, and a legend if anything is labelled."""
    axes.set_title(title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", frameon=False, **legend)
