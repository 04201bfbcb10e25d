"""Tables for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any


def show(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints rows under a title; the first column is text, and None a dash."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
