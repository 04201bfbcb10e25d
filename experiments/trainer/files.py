"""Small files: reading untrusted ones within bounds, and writing files of a run atomically."""

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20
"""Upper bound of JSON files that are read; the tokenizer of a vocabulary of 256,000 has 35 MB."""


def check_regular(path: Path, most: int | None = None) -> None:
    """Raises `OSError` unless a path leads to a regular file of at most `most` bytes.

    Reading a pipe or a device might never end. Links are followed: the cache of the Hugging Face
    hub consists of them.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file", str(path))
    if most is not None and found.st_size > most:
        raise OSError(0, f"it has {found.st_size} bytes, more than {most}", str(path))


def read_text(path: Path) -> str:
    """Reads a small text file in UTF-8.

    Raises:
      OSError: the file is missing, not regular, or larger than `MOST_BYTES`.
      ValueError: the file is not in UTF-8.
    """
    check_regular(path, MOST_BYTES)
    return path.read_text("utf-8")


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
      ValueError: the text is not JSON, has a number of thousands of digits, or is nested too
      deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:  # no ValueError, and so missed by handlers of damaged files
        raise ValueError("it is nested too deeply") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file completely or not at all: under another name first, which then replaces it."""
    scratch = path.with_suffix(".scratch")
    scratch.write_text(text)
    os.replace(scratch, path)
