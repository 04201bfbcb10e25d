"""Seals: hashes of all files in a directory that is written once, to detect later changes.

A seal is the file seal.json in the directory: an object from the path of each file, relative to the
directory, to its hash. It is written last, so that a directory without one may be incomplete.
"""

import hashlib
import json
import math
from pathlib import Path

from experiments.trainer.files import check_regular, parse_json, read_text

_SEAL = "seal.json"


def write(directory: Path, most: float = math.inf) -> None:
    """Seals a directory: notes the hash of each file, or only its size above `most` bytes."""
    (directory / _SEAL).write_text(json.dumps(_hashes(directory, most)))


def exists(directory: Path) -> bool:
    """Whether a directory has a seal."""
    return (directory / _SEAL).is_file()


def is_intact(directory: Path, most: float = math.inf) -> bool:
    """Whether a directory has a seal and exactly the files that were sealed."""
    return fault(directory, most) is None


def fault(directory: Path, most: float = math.inf) -> str | None:
    """Describes the first difference between a directory and its seal; None if there is none."""
    try:
        sealed, found = parse_json(read_text(directory / _SEAL)), _hashes(directory, most)
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    except ValueError:
        return f"its {_SEAL} is not JSON"
    if not isinstance(sealed, dict):
        return f"its {_SEAL} is not a JSON object"
    # All names of both sides: files that are missing, changed or added.
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if sealed.get(name) != found[name]:
            return f"{name} is not as it was written"
    return None


def _hashes(directory: Path, most: float) -> dict[str, str]:
    """Returns the hash of each file below a directory, except the seal."""
    files = sorted(file for file in directory.rglob("*") if file.name != _SEAL)
    return {
        file.relative_to(directory).as_posix(): _hash(file, most)
        for file in files
        if not file.is_dir()
    }


def _hash(path: Path, most: float) -> str:
    """Returns the first 128 bits of a file's BLAKE2b in hexadecimal; above `most`, its size."""
    check_regular(path)  # a pipe would be read forever
    if (size := path.stat().st_size) > most:
        return f"{size} bytes"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
