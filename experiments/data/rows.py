"""Reads the rows of JSON files, one object a line, within bounds and by Python's own parser.

PyArrow's parser, which `datasets` uses, ends the process on deeply nested brackets.
"""

import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from experiments.trainer.files import check_regular, parse_json
from experiments.trainer.options import ConfigError, one_line, reason

# A data set of the hub: owner/name, and after a colon the name of a subset.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_MOST_IN_LINE, _MOST_KEPT = 2**24, 2**30  # characters of a line, and of rows kept in memory


def read(file: Path, option: str, *, kept: bool) -> Iterator[dict[str, Any]]:
    """Yields the objects in a file, which may be compressed by xz, or be a JSON list of objects.

    Args:
      file: a `.jsonl`, `.jsonl.xz` or `.json` file.
      option: the option that names the file, for messages.
      kept: whether the caller keeps all rows in memory; then at most 2^30 characters are read.

    Raises:
      ConfigError: the file cannot be read, or holds anything else; the message has the line's
        number.
    """
    opened = lzma.open if file.suffix == ".xz" else open
    try:
        check_regular(file)
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(_lines(lines, kept), 1):
                # A .json file may be a list over many lines: it is read as a whole.
                if file.suffix == ".json" and line.lstrip().startswith("["):
                    yield from _list(line + lines.read(_MOST_IN_LINE))
                elif line.strip():
                    yield _object(line, number)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConfigError(f"`{option}`: cannot read {file}: {_why(error)}") from error


def _lines(file: TextIO, kept: bool) -> Iterator[str]:
    """Yields the lines of a file, within bounds: a small file may decompress to endless text."""
    total = 0
    # One character above the bound is read, to tell a line that exceeds it.
    while line := file.readline(_MOST_IN_LINE + 1):
        total += len(line) if kept else 0
        if len(line) > _MOST_IN_LINE:
            raise ValueError(f"a line has more than {_MOST_IN_LINE:,} characters")
        if total > _MOST_KEPT:
            raise ValueError(f"it has more than {_MOST_KEPT:,} characters")
        yield line


def _object(line: str, number: int) -> dict[str, Any]:
    """Parses a line that must be a JSON object."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    # A number or a list is JSON too.
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object, but {one_line(line, 80)}")
    return row


def _list(text: str) -> list[dict[str, Any]]:
    """Parses a text that must be a JSON list of objects."""
    rows = parse_json(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its list holds something other than objects")
    return rows


def _why(error: Exception) -> str:
    """Returns the cause of an error, without the path that the message has already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
