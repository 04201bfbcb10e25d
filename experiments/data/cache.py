"""Directories of files that are written once: a seal tells whether they are still as written."""

import hashlib
import json
from pathlib import Path

from experiments.trainer.files import check_regular, parse_json, read_text

_SEAL = "seal.json"


def seal(directory: Path) -> None:
    """Notes a hash of every file in a directory."""
    (directory / _SEAL).write_text(json.dumps(_hashes(directory)))


def is_intact(directory: Path) -> bool:
    """Whether a directory has a seal, and exactly the files that were sealed."""
    try:
        return parse_json(read_text(directory / _SEAL)) == _hashes(directory)
    except (OSError, ValueError):
        return False


def _hashes(directory: Path) -> dict[str, str]:
    files = (file for file in sorted(directory.iterdir()) if file.name != _SEAL)
    return {file.name: _hash(file) for file in files}


def _hash(path: Path) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
