"""Result files, tables for the terminal and figures of all commands.

A result file records its origin: configuration, versions, device and commit. A figure lies beside
its result file, under the same name.
"""

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from experiments.trainer import compatibility
from experiments.trainer.config import record
from experiments.trainer.options import make_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures are only written to files, never shown. Matplotlib takes a second to import, so functions
# that draw import it.
os.environ.setdefault("MPLBACKEND", "Agg")

# Okabe and Ito's palette: distinct under the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*P"


class Style(NamedTuple):
    """The name, colour and marker of an optimizer in all figures."""

    name: str
    colour: str
    marker: str


# By the names in `trainer.optimizers.OPTIMIZERS`. Where two share a colour, their markers differ.
STYLES = {
    "gum": Style("GUM", COLOURS[0], "o"),
    "adamw": Style("AdamW", COLOURS[1], "s"),
    "muon": Style("Muon", COLOURS[2], "^"),
    "galore": Style("GaLore", COLOURS[3], "D"),
    "galore_muon": Style("GaLore-Muon", COLOURS[4], "v"),
    "golore_muon": Style("GoLore-Muon", COLOURS[5], "*"),
    "unbiased_adamw": Style("unbiased AdamW", COLOURS[6], "P"),
    "golore": Style("GoLore", COLOURS[5], "d"),
    "scale": Style("SCALE", COLOURS[6], "x"),
    "fira": Style("Fira", COLOURS[3], "<"),
    "frugal": Style("FRUGAL", COLOURS[3], ">"),
    "apollo": Style("APOLLO", COLOURS[4], "p"),
    "apollo_mini": Style("APOLLO-Mini", COLOURS[4], "h"),
    "normuon": Style("NorMuon", COLOURS[2], "*"),
    "mud": Style("MUD", COLOURS[2], "d"),
    "rmnp": Style("RMNP", COLOURS[6], "+"),
    "ldadam": Style("LDAdam", COLOURS[3], "H"),
    "subtrack": Style("SubTrack++", COLOURS[3], "8"),
    "swan": Style("SWAN", COLOURS[6], "1"),
    "racs": Style("RACS", COLOURS[6], "2"),
    "adam_mini": Style("Adam-mini", COLOURS[1], "D"),
    "adalomo": Style("AdaLomo", COLOURS[1], "v"),
    "mofasgd": Style("MoFaSGD", COLOURS[2], "P"),
    "joint_muon": Style("joint Muon", COLOURS[2], "X"),
    "ramped_gum": Style("ramped GUM", COLOURS[0], "X"),
}

# Names of corpora in the titles of figures, by the last part of their paths.
CORPORA = {"stdlib": "Python's standard library", "sotu": "speeches"}


def write(path: Path, config: Any, **results: Any) -> dict[str, Any]:
    """Writes a result file; returns its content.

    Args:
      path: the JSON file; its directory is made if needed.
      config: the options, a dataclass.
      **results: further fields, of types that JSON has. `device` describes the device of another
        process; by default this process describes its own.

    Raises:
      ConfigError: the directory cannot be made.
    """
    content = {
        "config": _settings(config),
        "versions": compatibility.versions(),
        "device": results.pop("device", None) or device(),
        "commit": commit(),
        **results,
    }
    make_directory("out", path.parent)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def device() -> dict[str, Any]:
    """Describes the devices that JAX uses, and the CPU of this machine."""
    first = jax.devices()[0]
    described = {
        "platform": first.platform,
        "device_kind": first.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "cpu_model": _cpu_model(),
    }
    memory = (first.memory_stats() or {}).get("bytes_limit")  # None on CPUs
    return described | ({"memory_bytes": memory} if memory else {})


def commit() -> str | None:
    """Returns the checked-out commit, with "+" if files differ from it; None outside a clone.

    Changed result files do not count: one study writes its results before the next one runs.
    """
    here = Path(__file__).parent
    try:
        name = _git("rev-parse", "--short", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--", ":/", ":!results", cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table under a title; its cells are formatted by `cell`."""
    print(f"\n{title}\n{aligned(head, rows)}")


def aligned(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats rows under their heads, in aligned columns for a terminal."""
    cells = [list(head), *([cell(value) for value in row] for row in rows)]
    # Each column is as wide as its longest cell; two spaces between columns.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def size(count: int) -> str:
    """Formats a number of bytes in MiB, the unit of all tables and messages."""
    return f"{count / 2**20:,.1f} MiB"


def title(*names: str) -> str:
    """Joins names for the title of a figure; a path is shortened to its last part."""
    return " ".join(Path(name).name or name for name in names)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats rows under their heads as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def loss_curves(runs: dict[str, list[dict]], path: Path, title: str) -> Path:
    """Draws training loss (thin) and validation loss (marked) of each run over the steps.

    Args:
      runs: records of a metrics file by label; the name of an optimizer gets its style.
      path: the PNG to write; an SVG goes beside it.
      title: title of the figure.

    Returns:
      The path of the PNG.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (label, records) in enumerate(runs.items()):
        # Any other label has a style by its place.
        others = Style(label, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        name, colour, marker = STYLES.get(label, others)
        # Training losses are noisy: thin and pale, without an entry in the legend.
        axes.plot(*_series(records, "loss"), color=colour, alpha=0.35, linewidth=0.8)
        held_out = _series(records, "validation_loss")
        axes.plot(*held_out, color=colour, marker=marker, label=f"{name}, validation")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)


def save(figure: "Figure", results: Path) -> Path:
    """Writes a figure beside a result file as PNG and SVG, frees it, and returns the PNG's path."""
    import matplotlib.pyplot as plt

    path = results.with_suffix(".png")
    figure.savefig(path, dpi=150)
    # Without random ids and a date, the same figure is the same file.
    with plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path


def _settings(config: Any) -> dict[str, Any]:
    """Returns the record of all options except `out`, which may be a private path."""
    fields = record(config)
    fields.pop("out", None)
    return fields


def _cpu_model() -> str | None:
    """Returns the name of the CPU; None on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)


def _git(*arguments: str, cwd: Path) -> str:
    """Returns the output of a git command; raises if it fails."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cell(value: Any) -> str:
    """Formats a value in a table: None as a dash, a float with four digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric, from the records that have it."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]
