"""Text to batches: documents, a byte-level BPE, a flat token file on disk, shuffled windows.

The token files are made once and kept in a cache directory under a name that is a hash of all
they depend on. Training reads them through `grain`, whose iterator state goes into checkpoints.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.data import text as corpora
from experiments.trainer import locks, seals
from experiments.trainer.config import Config
from experiments.trainer.files import MOST_BYTES, check_regular
from experiments.trainer.options import ConfigError, is_fault, make_directory, reason

END = "<|endoftext|>"
_FORMAT = 2  # raise when the content of the token files changes meaning


class Data(NamedTuple):
    """Token files as memory maps, with the tokenizer that made them."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    digest: str
    directory: Path


class Windows:
    """Windows of `seq_len + 1` tokens that cover a token file; neighbours share one token."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._seq_len

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._seq_len
        return np.asarray(self._tokens[start : start + self._seq_len + 1], np.int32)


class Rows:
    """Windows in order, but of each `batch_size` of them only those at `rows`."""

    def __init__(self, order: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._order, self._batch_size, self._rows = order, batch_size, rows

    def __len__(self) -> int:
        return len(self._order) // self._batch_size * len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        batch, row = divmod(int(index), len(self._rows))
        return np.asarray(self._order[batch * self._batch_size + self._rows[row]])


def prepare(config: Config, vocab_size: int) -> Data:
    """The token files of `config`, made now or found in the cache.

    Raises:
      ConfigError: the corpus or the tokenizer cannot be read, or there is too little text.
    """
    sources = corpora.find(config.corpus)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    spec = [
        _FORMAT,
        [corpora.fingerprint(source) for source in sources],
        config.text_field,
        tokenizer.to_str() if tokenizer else [vocab_size, config.tokenizer_chars],
        config.validation_fraction,
        config.max_tokens,
    ]
    name = hashlib.blake2b(json.dumps(spec).encode(), digest_size=12).hexdigest()
    directory = cache_directory(config) / name
    if not seals.is_intact(directory):
        make_directory("cache_dir", directory.parent)
        # Of several jobs that need the same tokens one makes them, and the others wait.
        with _writing(directory), locks.held(directory.with_name(f"{name}.lock"), wait=True):
            if not seals.is_intact(directory):
                _build(directory, config, sources, tokenizer, vocab_size)
    return _open(directory)


def training_batches(
    data: Data, seq_len: int, batch_size: int, seed: int, rows: Sequence[int] | None = None
):
    """An endless iterator of int32 `[len(rows), seq_len + 1]`, shuffled anew in each epoch.

    Its `get_state()` and `set_state()` resume it exactly; the state is the number of batches read,
    whatever the rows: a process that reads some of them goes on where one that read all stopped.
    """
    windows = _windows(data.train, seq_len, batch_size, "training")
    order = grain.MapDataset.source(windows).shuffle(seed).repeat()
    batches = _batches(order, batch_size, rows)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(
    data: Data, seq_len: int, batch_size: int, limit: int, rows: Sequence[int] | None = None
) -> list[np.ndarray]:
    """At most `limit` batches of held-out windows, the same at every call."""
    windows = _windows(data.validation, seq_len, batch_size, "held-out")
    batches = _batches(grain.MapDataset.source(windows).shuffle(0), batch_size, rows)
    return [np.asarray(batches[i]) for i in range(min(limit, len(batches)))]


def cache_directory(config: Config) -> Path:
    """Where token files are kept.

    Raises:
      ConfigError: there is no home directory, as in a container whose user has none.
    """
    try:
        if config.cache_dir:
            return Path(config.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base, "gum_optax").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"`cache_dir`: {error} Name a directory for the tokens") from error


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json, with the token that ends a document.

    Raises:
      ConfigError: there is no such file, it holds no tokenizer, or a token has no row in a model.
    """
    if not Path(path).is_file():
        raise ConfigError(f"`tokenizer`: there is no file {path}")
    try:
        check_regular(Path(path), MOST_BYTES)
        tokenizer = Tokenizer.from_file(path)
    except BaseException as error:  # the library raises bare `Exception`, or less
        if not is_fault(error):
            raise
        raise ConfigError(f"`tokenizer`: {path} is no tokenizer.json: {reason(error)}") from error
    if tokenizer.token_to_id(END) is None:
        tokenizer.add_special_tokens([END])
    # A model has a row for each token; one beyond the end would silently be the last.
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if last >= size:
        raise ConfigError(f"`tokenizer`: {path} has {size} tokens, and one with number {last}")
    return tokenizer


def _windows(tokens: np.ndarray, seq_len: int, batch_size: int, kind: str) -> Windows:
    windows = Windows(tokens, seq_len)
    if len(windows) < batch_size:
        raise ConfigError(
            f"`corpus`: the {kind} documents hold {len(tokens)} tokens, too few for one batch "
            f"({batch_size} windows of {seq_len + 1}); give more text, or change "
            "`validation_fraction`, `batch_size` or `seq_len`"
        )
    return windows


def _batches(
    order: grain.MapDataset, batch_size: int, rows: Sequence[int] | None
) -> grain.MapDataset:
    """The given rows of each full batch; all of them if none are given."""
    if rows is None or len(rows) == batch_size:
        return order.batch(batch_size, drop_remainder=True)
    return grain.MapDataset.source(Rows(order, batch_size, rows)).batch(len(rows))


def _documents(sources: list[corpora.Source], config: Config) -> Iterator[tuple[str, bool]]:
    """Each document with whether it is held out."""
    for source in sources:
        for text in corpora.documents(source, config.text_field):
            yield text, corpora.held_out(text, config.validation_fraction)


def _build(
    directory: Path,
    config: Config,
    sources: list[corpora.Source],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> None:
    """Writes the token files under a temporary name, then renames: all of them or none."""
    prefix = f"making-{directory.name}-"
    # The lock is ours: whatever began to make these tokens before was killed.
    for left in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=prefix))
    try:
        if tokenizer is None:
            texts = (text for text, held_out in _documents(sources, config) if not held_out)
            tokenizer = train_tokenizer(_take(texts, config.tokenizer_chars), vocab_size)
        (scratch / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
        digest = _tokenize(_documents(sources, config), tokenizer, config.max_tokens, scratch)
        (scratch / "digest").write_text(digest)
        seals.write(scratch)
        _publish(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or reason(error)
        raise ConfigError(f"`cache_dir`: cannot write {directory}: {why}") from error


def _publish(scratch: Path, directory: Path) -> None:
    if directory.exists() and not seals.is_intact(directory):
        print(f"the tokens in {directory} were damaged and are made again", file=sys.stderr)
        shutil.rmtree(directory)
    try:
        os.rename(scratch, directory)
    except OSError:
        # Where file systems know no locks, another process may have been faster: the same files.
        if not directory.exists():
            raise


def _open(directory: Path) -> Data:
    def tokens(split: str) -> np.ndarray:
        return np.load(directory / f"{split}.npy", mmap_mode="r")

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    digest = (directory / "digest").read_text()
    return Data(tokenizer, tokens("train"), tokens("validation"), digest, directory)


def _take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Texts until `characters` of them are taken."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


class _TokenFile:
    """A `.npy` vector that grows: NumPy leaves room in the header to write its length last."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file, self._dtype, self._hash = file, dtype, hashlib.blake2b()
        self.length = 0
        self._header()

    def append(self, ids: list[int]) -> None:
        content = np.asarray(ids, self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.length += len(ids)

    def finish(self) -> str:
        """Writes the length and returns a digest of the tokens."""
        self._file.seek(0)
        self._header()
        return self._hash.hexdigest()[:16]

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"shape": (self.length,), "fortran_order": False, "descr": descr}
        np.lib.format.write_array_header_1_0(self._file, header)


def _tokenize(
    documents: Iterator[tuple[str, bool]], tokenizer: Tokenizer, max_tokens: int, directory: Path
) -> str:
    """Writes `train.npy` (at most `max_tokens`) and `validation.npy`; returns their digest."""
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    with (
        open(directory / "train.npy", "wb") as train_file,
        open(directory / "validation.npy", "wb") as validation_file,
    ):
        train, validation = _TokenFile(train_file, dtype), _TokenFile(validation_file, dtype)
        _encode(documents, tokenizer, max_tokens, train, validation)
        return f"{train.finish()}-{validation.finish()}"


def _encode(
    documents: Iterator[tuple[str, bool]],
    tokenizer: Tokenizer,
    max_tokens: int,
    train: _TokenFile,
    validation: _TokenFile,
) -> None:
    """Appends each document, and the token that ends it, to the file of its split."""
    end = tokenizer.encode(END, add_special_tokens=False).ids
    while train.length < max_tokens and (chunk := list(itertools.islice(documents, 64))):
        encoded = tokenizer.encode_batch([text for text, _ in chunk], add_special_tokens=False)
        for encoding, (_, held_out) in zip(encoded, chunk, strict=True):
            if held_out:
                validation.append(encoding.ids + end)
            else:
                train.append((encoding.ids + end)[: max_tokens - train.length])
