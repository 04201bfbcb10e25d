"""Directories of files that are written once: a seal tells whether they are still as written."""

import hashlib
import json
import math
from pathlib import Path

from experiments.trainer.files import check_regular, parse_json, read_text

_SEAL = "seal.json"


def write(directory: Path, most: float = math.inf) -> None:
    """Notes a hash of every file below a directory; of those above `most` bytes, their size."""
    (directory / _SEAL).write_text(json.dumps(_hashes(directory, most)))


def exists(directory: Path) -> bool:
    """Whether a directory was sealed, and its seal is still there."""
    return (directory / _SEAL).is_file()


def is_intact(directory: Path, most: float = math.inf) -> bool:
    """Whether a directory has a seal, and exactly the files that were sealed."""
    return fault(directory, most) is None


def fault(directory: Path, most: float = math.inf) -> str | None:
    """The first file that is not as it was sealed, in words; None if there is none."""
    try:
        sealed, found = parse_json(read_text(directory / _SEAL)), _hashes(directory, most)
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    except ValueError:
        return f"its {_SEAL} is no JSON"
    if not isinstance(sealed, dict):
        return f"its {_SEAL} holds no object"
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if sealed.get(name) != found[name]:
            return f"{name} is not as it was written"
    return None


def _hashes(directory: Path, most: float) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.name != _SEAL)
    return {
        file.relative_to(directory).as_posix(): _hash(file, most)
        for file in files
        if not file.is_dir()
    }


def _hash(path: Path, most: float) -> str:
    check_regular(path)  # a pipe would be read forever
    if (size := path.stat().st_size) > most:
        return f"{size} bytes"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
