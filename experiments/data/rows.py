"""The rows of JSON files, one object a line, read within bounds by Python's own parser.

That of PyArrow, which `datasets` uses, ends the process on brackets that are nested deeply.
"""

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from experiments.trainer.files import check_regular, parse_json
from experiments.trainer.options import ConfigError, one_line, reason

_MOST_IN_LINE, _MOST_KEPT = 2**24, 2**30  # characters


def read(file: Path, option: str, *, kept: bool) -> Iterator[dict[str, Any]]:
    """The objects in a file, which may be compressed by xz, or be one JSON list of them.

    Args:
      file: a `.jsonl`, `.jsonl.xz` or `.json` file.
      option: the option that named it, for messages.
      kept: whether all rows will be in memory together; then there may be a gigabyte of them.

    Raises:
      ConfigError: it cannot be read, or holds anything else; the message has the line's number.
    """
    opened = lzma.open if file.suffix == ".xz" else open
    try:
        check_regular(file)
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(_lines(lines, kept), 1):
                if file.suffix == ".json" and line.lstrip().startswith("["):
                    yield from _list(line + lines.read(_MOST_IN_LINE))
                elif line.strip():
                    yield _object(line, number)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConfigError(f"`{option}`: cannot read {file}: {_why(error)}") from error


def _lines(file: TextIO, kept: bool) -> Iterator[str]:
    """The lines of a file. A small one may be compressed from endless text, so all is counted."""
    total = 0
    while line := file.readline(_MOST_IN_LINE + 1):
        total += len(line) if kept else 0
        if len(line) > _MOST_IN_LINE:
            raise ValueError(f"a line has more than {_MOST_IN_LINE:,} characters")
        if total > _MOST_KEPT:
            raise ValueError(f"it has more than {_MOST_KEPT:,} characters")
        yield line


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object, but {one_line(line, 80)}")
    return row


def _list(text: str) -> list[dict[str, Any]]:
    rows = parse_json(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its list holds something other than objects")
    return rows


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
