"""Documents of a corpus, and the choice of those that are held out.

A *source* is the standard library, a set of local files, or a streamed Hugging Face data set; it
becomes an iterator of *documents*, which are strings. Local Parquet and Arrow files are read by
`datasets`, as the hub is.
"""

import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.data import rows
from experiments.trainer.files import check_regular
from experiments.trainer.options import ConfigError, one_line, reason

# The reader of a file by its suffix; any other file is read as text.
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT = {".txt", ".md", ".rst", ".py"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LARGE = 64 * 1024  # characters; a text file above this is cut into several documents


class Source(NamedTuple):
    """A reader ("text", "hub" or a `datasets` format) with files, or a hub name and a subset."""

    reader: str
    files: tuple[Path, ...] = ()
    name: str = ""
    subset: str | None = None


def find(corpus: Iterable[str]) -> list[Source]:
    """Resolves the names in the option `corpus`; raises `ConfigError` if one leads nowhere."""
    return [source for name in corpus for source in _find(name)]


def documents(source: Source, text_field: str) -> Iterator[str]:
    """Yields the documents of a source in a fixed order."""
    if source.reader == "text":
        return (part for file in source.files for part in _split(_read(file)))
    return _columns(source, text_field)


def fingerprint(source: Source) -> list:
    """Returns the identity of a source's content: names, sizes and modification times of files."""
    stats = [(str(file), os.stat(file)) for file in source.files]
    files = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return [source.reader, source.name, source.subset, files]


def held_out(document: str, fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone.

    Equal documents are therefore on the same side, whatever their order and whatever else the
    corpus holds.
    """
    # A hash is uniform on [0, 2^64), so it is below fraction * 2^64 with probability `fraction`.
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _find(name: str) -> list[Source]:
    """Resolves one name: the standard library, a directory, a file or, last, a hub name."""
    if name == "stdlib":
        return [Source("text", _stdlib())]
    path = Path(name).expanduser()
    if path.is_dir():
        return _group(sorted(file for file in path.rglob("*") if _known(file)), name)
    if path.is_file():
        # Text may have any suffix; a NUL character shows that a file is binary.
        if not _known(path) and "\0" in _read(path):
            raise ConfigError(f"`corpus`: {name} is no text, .jsonl, .parquet or .arrow file")
        return _group([path], name)
    # A missing file must not be taken for a hub name of the same form.
    if path.suffix in _READERS.keys() | _TEXT or not rows.HUB_NAME.fullmatch(name):
        raise ConfigError(f"`corpus`: there is no file or directory {name}")
    hub, _, subset = name.partition(":")
    return [Source("hub", name=hub, subset=subset or None)]


def _known(file: Path) -> bool:
    return file.is_file() and file.suffix in _READERS.keys() | _TEXT


def _group(files: list[Path], name: str) -> list[Source]:
    """Groups files into one source for each reader."""
    if not files:
        raise ConfigError(f"`corpus`: {name} holds no text, .jsonl, .parquet or .arrow file")
    readers = [_READERS.get(file.suffix, "text") for file in files]
    return [
        Source(reader, tuple(f for f, r in zip(files, readers, strict=True) if r == reader))
        for reader in dict.fromkeys(readers)
    ]


def _stdlib() -> tuple[Path, ...]:
    """Returns the source files of Python's standard library, without its tests."""
    found = []
    for directory, below, names in os.walk(sysconfig.get_path("stdlib")):
        # Pruned during the walk: installed packages have many more files than the library.
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return tuple(sorted(file for file in found if file.is_file()))


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"`corpus`: cannot read {file}: {error.strerror}") from error


def _split(text: str) -> Iterator[str]:
    """Yields the documents of a text file: the file, or pieces of a large one."""
    # A piece ends at the first blank line after `_LARGE / 4` characters, or at the end.
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _LARGE // 4) + 2 if len(text) > _LARGE else len(text)
        cut = cut if cut > 1 else len(text)
        yield text[start:cut]
        start = cut


def _columns(source: Source, field: str) -> Iterator[str]:
    """Yields the text column of a source in JSON, Parquet, Arrow or on the hub."""
    where = source.name or source.files[0]
    try:
        for file in source.files:
            check_regular(file)
        for row in _load(source):
            if not isinstance(text := row.get(field), str):
                raise ConfigError(
                    f"`text_field`: {where} has no text column {field!r}; "
                    f"its columns are {one_line(', '.join(map(str, row)))}"
                )
            # JSON can encode half of a surrogate pair, which no tokenizer reads.
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    except ConfigError:
        raise
    except Exception as error:  # `datasets` raises many types; each means that it cannot be read
        raise ConfigError(f"`corpus`: cannot read {where}: {reason(error)}") from error


def _load(source: Source) -> Iterable[dict]:
    """Returns the rows of a source as a stream."""
    if source.reader == "json":
        return itertools.chain.from_iterable(
            rows.read(file, "corpus", kept=False) for file in source.files
        )
    import datasets  # slow to import, and needed for these sources only

    # Errors are raised too, and reported once.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    if source.reader == "hub":
        return datasets.load_dataset(source.name, source.subset, split="train", streaming=True)
    files = [str(file) for file in source.files]
    return datasets.load_dataset(source.reader, data_files=files, split="train", streaming=True)
