"""Text to batches: documents, a byte-level BPE, flat token files on disk, shuffled windows.

1. `prepare` makes the token files of a corpus once: it trains a tokenizer, or loads one, and writes
   all documents end to end, each followed by the token `END`. They stay in a cache directory, under
   a name that is a hash of everything that they depend on.
2. `training_batches` and `validation_batches` cut them into windows of `seq_len + 1` tokens, which
   `grain` shuffles and batches. The state of its iterator goes into checkpoints.
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
    """The token files of a corpus.

    Attributes:
      tokenizer: the tokenizer that made them.
      train: tokens to train on, a memory map uint16 or uint32 `[tokens]`.
      validation: held-out tokens, the same.
      digest: hash of both.
      directory: their place in the cache.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    digest: str
    directory: Path


class Windows:
    """Windows of `seq_len + 1` tokens that cover a token file, as a sequence of int32 arrays.

    Neighbours share one token, the target at the end of one and the first input of the next, so
    that each token but the first is a target once. A remainder at the end is left out.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._seq_len

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._seq_len
        return np.asarray(self._tokens[start : start + self._seq_len + 1], np.int32)


class Rows:
    """Windows in order, but only those at `rows` in each batch of `batch_size`.

    A process reads the rows that its devices hold, and not the others.
    """

    def __init__(self, order: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._order, self._batch_size, self._rows = order, batch_size, rows

    def __len__(self) -> int:
        return len(self._order) // self._batch_size * len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        # Window index -> (batch, number of the row within `rows`) -> place in the whole order.
        batch, row = divmod(int(index), len(self._rows))
        return np.asarray(self._order[batch * self._batch_size + self._rows[row]])


def prepare(config: Config, vocab_size: int) -> Data:
    """Makes the token files of `config`, or finds them in the cache.

    Raises:
      ConfigError: the corpus or the tokenizer cannot be read, or there is too little text.
    """
    # 1. The name: a hash of everything that decides the tokens.
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
    # 2. Make the files if they are missing or damaged.
    if not seals.is_intact(directory):
        make_directory("cache_dir", directory.parent)
        # Of several jobs that need the same tokens, one makes them and the others wait for it: they
        # look again once they have the lock.
        with _writing(directory), locks.held(directory.with_name(f"{name}.lock"), wait=True):
            if not seals.is_intact(directory):
                _build(directory, config, sources, tokenizer, vocab_size)
    return _open(directory)


def training_batches(
    data: Data, seq_len: int, batch_size: int, seed: int, rows: Sequence[int] | None = None
):
    """Returns an endless iterator of int32 `[len(rows), seq_len + 1]`, reshuffled in each epoch.

    Its `get_state()` and `set_state()` resume it exactly. The state is the number of batches read,
    whatever the rows: a process that reads some rows can resume a run of one that read all.

    Args:
      data: the token files.
      seq_len: tokens in a window; a row has one more, for the last target.
      batch_size: windows in a batch of all processes.
      seed: seed of the order.
      rows: the rows of each batch that this process reads. None: all.

    Raises:
      ConfigError: there are fewer windows than one batch has.
    """
    windows = _windows(data.train, seq_len, batch_size, "training")
    order = grain.MapDataset.source(windows).shuffle(seed).repeat()
    batches = _batches(order, batch_size, rows)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(
    data: Data, seq_len: int, batch_size: int, limit: int, rows: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Returns at most `limit` batches of held-out windows, the same in every call.

    Args:
      data: the token files.
      seq_len: tokens in a window.
      batch_size: windows in a batch of all processes.
      limit: number of batches, at most.
      rows: the rows of each batch that this process reads. None: all.

    Raises:
      ConfigError: there are fewer windows than one batch has.
    """
    # A fixed shuffle, so that a few batches are a sample of all documents.
    windows = _windows(data.validation, seq_len, batch_size, "held-out")
    batches = _batches(grain.MapDataset.source(windows).shuffle(0), batch_size, rows)
    return [np.asarray(batches[i]) for i in range(min(limit, len(batches)))]


def cache_directory(config: Config) -> Path:
    """Returns the directory of token files.

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
    """Trains a byte-level BPE, which encodes and decodes any text without loss.

    Args:
      texts: the documents to train on.
      vocab_size: number of tokens; little text gives fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        # All 256 bytes, also those that the training text lacks.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.json, and adds the token `END` if it is missing.

    Raises:
      ConfigError: there is no such file, it holds no tokenizer, or an id is beyond the vocabulary.
    """
    if not Path(path).is_file():
        raise ConfigError(f"`tokenizer`: there is no file {path}")
    try:
        check_regular(Path(path), MOST_BYTES)
        tokenizer = Tokenizer.from_file(path)
    except BaseException as error:  # the library raises bare `Exception`, or `PanicException`
        if not is_fault(error):
            raise
        raise ConfigError(f"`tokenizer`: {path} is no tokenizer.json: {reason(error)}") from error
    if tokenizer.token_to_id(END) is None:
        tokenizer.add_special_tokens([END])
    # A model has a row for each token; an id beyond the end would silently read the last row.
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if last >= size:
        raise ConfigError(f"`tokenizer`: {path} has {size} tokens, but one has the id {last}")
    return tokenizer


def _windows(tokens: np.ndarray, seq_len: int, batch_size: int, kind: str) -> Windows:
    """Returns the windows of a token file; raises `ConfigError` if they do not fill a batch."""
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
    """Returns a data set of full batches, or of their given rows."""
    if rows is None or len(rows) == batch_size:
        return order.batch(batch_size, drop_remainder=True)
    return grain.MapDataset.source(Rows(order, batch_size, rows)).batch(len(rows))


def _documents(sources: list[corpora.Source], config: Config) -> Iterator[tuple[str, bool]]:
    """Yields each document with whether it is held out."""
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
    """Writes the token files under a temporary name, then renames the directory: all or none."""
    prefix = f"making-{directory.name}-"
    # 1. Under the lock nobody else is at work, so scratch directories of killed processes can go.
    for left in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=prefix))
    try:
        # 2. The tokenizer, from training documents alone.
        if tokenizer is None:
            texts = (text for text, held_out in _documents(sources, config) if not held_out)
            tokenizer = train_tokenizer(_take(texts, config.tokenizer_chars), vocab_size)
        (scratch / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
        # 3. A second pass over the documents, which sources give in the same order.
        digest = _tokenize(_documents(sources, config), tokenizer, config.max_tokens, scratch)
        (scratch / "digest").write_text(digest)
        # 4. Seal, and publish.
        seals.write(scratch)
        _publish(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns an `OSError` of writing, as on a full disk, into a `ConfigError`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or reason(error)
        raise ConfigError(f"`cache_dir`: cannot write {directory}: {why}") from error


def _publish(scratch: Path, directory: Path) -> None:
    """Gives the directory its final name, in place of a damaged one."""
    if directory.exists() and not seals.is_intact(directory):
        print(f"the tokens in {directory} were damaged and are made again", file=sys.stderr)
        shutil.rmtree(directory)
    try:
        os.rename(scratch, directory)
    except OSError:
        # On file systems without locks another process may have been faster, with equal files.
        if not directory.exists():
            raise


def _open(directory: Path) -> Data:
    """Opens token files as memory maps: a corpus may be larger than memory."""

    def tokens(split: str) -> np.ndarray:
        return np.load(directory / f"{split}.npy", mmap_mode="r")

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    digest = (directory / "digest").read_text()
    return Data(tokenizer, tokens("train"), tokens("validation"), digest, directory)


def _take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yields texts until they have `characters` in all; the last one is cut."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


class _TokenFile:
    """A `.npy` file of a vector that grows.

    NumPy pads its headers, so that the final one, with the length, fits over the first, with zero.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file, self._dtype, self._hash = file, dtype, hashlib.blake2b()
        self.length = 0
        self._header()

    def append(self, ids: list[int]) -> None:
        """Appends tokens to the file and to the hash."""
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
    # Two bytes a token suffice for vocabularies up to 65,536.
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
    """Appends each document, followed by `END`, to the file of its split."""
    end = tokenizer.encode(END, add_special_tokens=False).ids
    # 64 documents at a time: `encode_batch` uses several threads. Documents after the last training
    # token are not read, so that validation ends there too.
    while train.length < max_tokens and (chunk := list(itertools.islice(documents, 64))):
        encoded = tokenizer.encode_batch([text for text, _ in chunk], add_special_tokens=False)
        for encoding, (_, held_out) in zip(encoded, chunk, strict=True):
            if held_out:
                validation.append(encoding.ids + end)
            else:
                train.append((encoding.ids + end)[: max_tokens - train.length])
