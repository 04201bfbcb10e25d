"""Checks the header of a GGUF file before it is read: every length in it must be possible.

The package `gguf` believes the lengths in a file. It makes several Python objects for each entry of
an array, so that a small file could ask for hundreds of times its size in memory, and it silently
cuts a string that goes beyond the end of the file. The walk here only moves an offset.

A header is laid out as follows, with a string as its length (8 bytes) and its bytes::

    "GGUF", version (4 bytes), number of tensors (8), number of fields (8)
    for each field:  name (string), type (4), value
    for each tensor: name (string), number of axes (4), lengths (8 each), type (4), offset (8)
"""

import struct
from pathlib import Path
from typing import BinaryIO

# Bytes of a scalar by the number of its type; type 8 is a string and 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

# Bounds far above real files: the largest vocabularies have 262,000 tokens and 500,000 merges, the
# largest models some thousands of tensors.
_MOST_ENTRIES, _MOST_COUNT, _MOST_AXES = 2_000_000, 65_536, 4


def check(file: Path) -> None:
    """Walks over the metadata and the descriptions of the tensors in `file`.

    Raises:
      ValueError: a length goes beyond the file's end, or a count is larger than in any model.
      OSError: the file cannot be read.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        _Walk(opened, size).header()


class _Walk:
    """A position in a file, and the byte order of its numbers."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._order = file, size, "<"

    def header(self) -> None:
        """Walks from the start to the end of the header."""
        if self._file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        _at_most(tensors, _MOST_COUNT, "tensors")
        _at_most(fields, _MOST_COUNT, "fields")
        for _ in range(fields):
            self._string()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._string()
            axes = self._number("I")
            _at_most(axes, _MOST_AXES, "axes of a tensor")
            self._skip(8 * axes + 4 + 8)  # lengths, type and offset

    def _value(self, kind: int) -> None:
        """Skips a value of the type `kind`."""
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array()
        else:
            self._skip(_size(kind))

    def _array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        _at_most(count, _MOST_ENTRIES, "entries of an array")
        if kind == _ARRAY:
            raise ValueError("it has an array of arrays, which no LLaMA has")
        # Scalars are skipped at once; each string has a length of its own.
        if kind != _STRING:
            self._skip(count * _size(kind))
            return
        for _ in range(count):
            self._string()

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, code: str) -> int:
        content = self._file.read(struct.calcsize(code))
        if len(content) < struct.calcsize(code):
            raise ValueError("it ends within its header")
        return struct.unpack(self._order + code, content)[0]

    def _skip(self, count: int) -> None:
        # Compared before the seek: one beyond the end of a file succeeds.
        if count > self._size - self._file.tell():
            raise ValueError(f"a length of {count} bytes in its header is beyond its end")
        self._file.seek(count, 1)


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return _SIZES[kind]


def _at_most(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"its header has {count} {what}; at most {most} are supported")
