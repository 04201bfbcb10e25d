"""Documents: where the text comes from, and which documents are held out.

A source is the standard library, local files, or a streamed Hugging Face data set; each becomes
an iterator of strings. Local Parquet and Arrow files take the same path through `datasets` as the
hub.
"""

import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.data import rows
from experiments.trainer.files import check_regular
from experiments.trainer.options import ConfigError, one_line, reason

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT = {".txt", ".md", ".rst", ".py"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_LARGE = 64 * 1024  # characters; a text file above this is cut into several documents


class Source(NamedTuple):
    """One `datasets` or text reader, and what it reads: files, or a hub name and its subset."""

    reader: str
    files: tuple[Path, ...] = ()
    name: str = ""
    subset: str | None = None


def find(corpus: Iterable[str]) -> list[Source]:
    """Resolves the names given as `--corpus`; raises `ConfigError` if one leads nowhere."""
    return [source for name in corpus for source in _find(name)]


def documents(source: Source, text_field: str) -> Iterator[str]:
    """The texts of a source, in a fixed order."""
    if source.reader == "text":
        return (part for file in source.files for part in _split(_read(file)))
    return _columns(source, text_field)


def fingerprint(source: Source) -> list:
    """What identifies the content of a source: names, sizes and times of change of its files."""
    stats = [(str(file), os.stat(file)) for file in source.files]
    files = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return [source.reader, source.name, source.subset, files]


def held_out(document: str, fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _find(name: str) -> list[Source]:
    if name == "stdlib":
        return [Source("text", _stdlib())]
    path = Path(name).expanduser()
    if path.is_dir():
        return _group(sorted(file for file in path.rglob("*") if _known(file)), name)
    if path.is_file():
        if not _known(path) and "\0" in _read(path):
            raise ConfigError(f"`corpus`: {name} is no text, .jsonl, .parquet or .arrow file")
        return _group([path], name)
    if path.suffix in _READERS.keys() | _TEXT or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"`corpus`: there is no file or directory {name}")
    hub, _, subset = name.partition(":")
    return [Source("hub", name=hub, subset=subset or None)]


def _known(file: Path) -> bool:
    return file.is_file() and file.suffix in _READERS.keys() | _TEXT


def _group(files: list[Path], name: str) -> list[Source]:
    """One source per reader; a suffix that is not known is read as text."""
    if not files:
        raise ConfigError(f"`corpus`: {name} holds no text, .jsonl, .parquet or .arrow file")
    readers = [_READERS.get(file.suffix, "text") for file in files]
    return [
        Source(reader, tuple(f for f, r in zip(files, readers, strict=True) if r == reader))
        for reader in dict.fromkeys(readers)
    ]


def _stdlib() -> tuple[Path, ...]:
    found = []
    for directory, below, names in os.walk(sysconfig.get_path("stdlib")):
        # Cut here, as installed packages are many more files than the library itself.
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return tuple(sorted(file for file in found if file.is_file()))


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"`corpus`: cannot read {file}: {error.strerror}") from error


def _split(text: str) -> Iterator[str]:
    """Documents of a text file: the file, or pieces of a large one, cut at blank lines."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _LARGE // 4) + 2 if len(text) > _LARGE else len(text)
        cut = cut if cut > 1 else len(text)
        yield text[start:cut]
        start = cut


def _columns(source: Source, field: str) -> Iterator[str]:
    """The text column of a `datasets` source, as a stream."""
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
            # JSON can spell half of a character, which no tokenizer reads.
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    except ConfigError:
        raise
    except Exception as error:  # `datasets` raises many types; each means: cannot be read
        raise ConfigError(f"`corpus`: cannot read {where}: {reason(error)}") from error


def _load(source: Source) -> Iterable[dict]:
    if source.reader == "json":
        return itertools.chain.from_iterable(
            rows.read(file, "corpus", kept=False) for file in source.files
        )
    import datasets  # slow to import, and needed for these sources only

    # What goes wrong is raised as well; it is reported once.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    if source.reader == "hub":
        return datasets.load_dataset(source.name, source.subset, split="train", streaming=True)
    files = [str(file) for file in source.files]
    return datasets.load_dataset(source.reader, data_files=files, split="train", streaming=True)
