"""Small files: those of strangers are read within bounds, those of a run are written whole."""

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20
"""Larger than any JSON file that is read: the tokenizer of a vocabulary of 256,000 has 35 MB."""


def check_regular(path: Path, most: int | None = None) -> None:
    """Raises `OSError` unless a path leads to a file, of at most so many bytes.

    A pipe or a device has no end. Links are followed: the cache of the Hugging Face hub has them.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is no regular file", str(path))
    if most is not None and found.st_size > most:
        raise OSError(0, f"it has {found.st_size} bytes, more than {most}", str(path))


def read_text(path: Path) -> str:
    """The text of a small file in UTF-8.

    Raises:
      OSError: it is missing, no regular file, or too large.
      ValueError: it is no UTF-8.
    """
    check_regular(path, MOST_BYTES)
    return path.read_text("utf-8")


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
      ValueError: it is no JSON, has a number of thousands of digits, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside the one that is there, and puts it in its place."""
    scratch = path.with_suffix(".scratch")
    scratch.write_text(text)
    os.replace(scratch, path)
