"""Text to batches: tokenizer, coverage, shuffling, resuming, formats, hold-out, clear errors."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from experiments.data import text as corpus
from experiments.data import tokens as data
from experiments.trainer.config import Config
from experiments.trainer.options import ConfigError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()  # noqa: SIM905


def texts(count=60):
    rng = np.random.default_rng(0)
    return [f"{i}: " + " ".join(rng.choice(WORDS, 40)) + "\n" for i in range(count)]


def write_text(path, lines):
    path.mkdir()
    for i, line in enumerate(lines):
        (path / f"{i:03}.txt").write_text(line)
    return path


def write_jsonl(path, lines):
    file = path.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def write_parquet(path, lines):
    file = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pa.table({"text": lines}), file)
    return file


def write_arrow(path, lines):
    file, table = path.with_suffix(".arrow"), pa.table({"text": lines})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return file


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow": write_arrow,
}


def config_of(tmp_path, *names, **options):
    cache = str(tmp_path / "cache")
    config = Config(corpus=tuple(map(str, names)), cache_dir=cache, validation_fraction=0.3)
    return dataclasses.replace(config, **options)


@pytest.fixture
def prepared(tmp_path):
    return data.prepare(config_of(tmp_path, write_text(tmp_path / "text", texts())), 300)


@pytest.mark.parametrize("text", ["", "plain", "  tabs\tand\n\nlines ", "Zürich, 数学, 🙂", "\x00"])
def test_the_tokenizer_loses_nothing(text):
    tokenizer = data.train_tokenizer(iter(texts()), 300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_the_tokenizer_is_repeatable_and_reaches_its_size():
    first, again = (data.train_tokenizer(iter(texts()), 300) for _ in range(2))
    assert first.to_str() == again.to_str()
    assert first.get_vocab_size() == 300
    assert len(first.encode("alpha beta").ids) < len("alpha beta")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside `datasets`, on some versions
@pytest.mark.parametrize("kind", WRITERS)
def test_each_format_gives_the_same_documents(tmp_path, kind):
    lines = texts(20)
    (source,) = corpus.find([str(WRITERS[kind](tmp_path / "corpus", lines))])
    assert list(corpus.documents(source, "text")) == lines


def test_a_directory_may_mix_formats(tmp_path):
    write_text(tmp_path / "a", texts(5))
    write_jsonl(tmp_path / "a" / "more", ["one more"])
    found = [
        text for s in corpus.find([str(tmp_path / "a")]) for text in corpus.documents(s, "text")
    ]
    assert found == [*texts(5), "one more"]


def test_a_hub_name_is_streamed_with_its_subset(monkeypatch):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (source,) = corpus.find(["allenai/c4:en"])
    assert list(corpus.documents(source, "text")) == ["a", "b"]
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_a_large_text_file_is_cut_at_blank_lines_without_loss(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "x" * 500 for i in range(400))
    (tmp_path / "large.txt").write_text(text)
    (source,) = corpus.find([str(tmp_path / "large.txt")])
    parts = list(corpus.documents(source, "text"))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_the_standard_library_comes_without_its_tests():
    (source,) = corpus.find(["stdlib"])
    assert len(source.files) > 300
    parts = {part for file in source.files for part in file.parts}
    assert not parts & {"site-packages", "tests", "__pycache__"}


def test_training_and_held_out_documents_are_disjoint_and_complete(prepared):
    end = prepared.tokenizer.token_to_id(data.END)

    def documents(tokens):
        pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        return {prepared.tokenizer.decode(piece.tolist()) for piece in pieces if len(piece)}

    train, held_out = documents(prepared.train), documents(prepared.validation)
    assert train | held_out == set(texts())
    assert not train & held_out
    assert held_out == {text for text in texts() if corpus.held_out(text, 0.3)}


def test_windows_cover_the_tokens():
    tokens = np.arange(103, dtype=np.uint16)
    windows = data.Windows(tokens, 10)
    assert len(windows) == 10
    inputs = np.concatenate([windows[i][:-1] for i in range(10)])
    targets = np.concatenate([windows[i][1:] for i in range(10)])
    np.testing.assert_array_equal(inputs, tokens[:100])
    np.testing.assert_array_equal(targets, tokens[1:101])


def test_batches_are_repeatable_and_an_epoch_has_each_window_once(prepared):
    def batches(seed, count):
        stream = data.training_batches(prepared, 8, 4, seed)
        return np.stack([next(stream) for _ in range(count)])

    windows = data.Windows(prepared.train, 8)
    epoch = len(windows) // 4
    first, other = batches(0, 2 * epoch), batches(1, 2 * epoch)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, batches(0, 2 * epoch))
    assert np.any(first != other)
    assert np.any(first[:epoch] != first[epoch:])
    seen = {row.tobytes() for row in first.reshape(-1, 9)[: len(windows)]}
    assert seen == {windows[i].tobytes() for i in range(len(windows))}


def test_a_restored_iterator_goes_on_exactly(prepared):
    stream = data.training_batches(prepared, 8, 4, 0)
    for _ in range(7):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(200)]
    restored = data.training_batches(prepared, 8, 4, 0)
    restored.set_state(state)
    np.testing.assert_array_equal(expected, [next(restored) for _ in range(200)])


def test_validation_batches_are_fixed(prepared):
    first, again = (data.validation_batches(prepared, 8, 4, 3) for _ in range(2))
    assert len(first) == 3
    np.testing.assert_array_equal(first, again)


def test_the_cache_is_used_until_a_file_changes(tmp_path, monkeypatch):
    directory = write_text(tmp_path / "text", texts())
    config = config_of(tmp_path, directory)
    first = data.prepare(config, 300)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_build", lambda *_: pytest.fail("built again"))
        assert data.prepare(config, 300).directory == first.directory
    (directory / "000.txt").write_text("something else entirely")
    assert data.prepare(config, 300).digest != first.digest


def test_a_saved_tokenizer_is_loaded(tmp_path, prepared):
    path = prepared.directory / "tokenizer.json"
    config = config_of(tmp_path, tmp_path / "text", tokenizer=str(path))
    loaded = data.prepare(config, 12345)
    assert loaded.tokenizer.to_str() == prepared.tokenizer.to_str()
    np.testing.assert_array_equal(loaded.train, prepared.train)


def test_max_tokens_limits_the_training_tokens(tmp_path):
    directory = write_text(tmp_path / "text", texts())
    full = data.prepare(config_of(tmp_path, directory), 300)
    cut = data.prepare(config_of(tmp_path, directory, max_tokens=500), 300)
    np.testing.assert_array_equal(cut.train, full.train[:500])


def test_a_vocabulary_above_sixteen_bits_is_stored_in_32(tmp_path):
    tokenizer = data.train_tokenizer(iter(texts()), 300)
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    tokenizer.save(str(tmp_path / "wide.json"))
    directory = write_text(tmp_path / "text", [*texts(), f"<{2**16 - 1}>" * 3])
    config = config_of(tmp_path, directory, tokenizer=str(tmp_path / "wide.json"))
    prepared = data.prepare(config, 300)
    assert prepared.train.dtype == np.uint32
    everything = np.concatenate([prepared.train, prepared.validation])
    assert np.sum(everything == tokenizer.token_to_id(f"<{2**16 - 1}>")) == 3


def broken_jsonl(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return {"corpus": (str(tmp_path / "bad.jsonl"),)}


def jsonl_with_another_field(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "fine", "id": 3}\n')
    return {"corpus": (str(tmp_path / "other.jsonl"),)}


def no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    return {"tokenizer": str(tmp_path / "tokenizer.json")}


def no_text(tmp_path):
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\x00\x00")
    return {"corpus": (str(tmp_path / "picture.bin"),)}


def unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return {"cache_dir": str(tmp_path / "file" / "cache")}


def too_little_text(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    return {"corpus": (str(tmp_path / "one.txt"),)}


MISTAKES = {
    "missing file": (lambda _: {"corpus": ("nowhere.jsonl",)}, "no file or directory nowhere"),
    "missing directory": (lambda _: {"corpus": ("/no/where",)}, "no file or directory /no/where"),
    "empty directory": (lambda path: {"corpus": (str(path),)}, "holds no text"),
    "broken jsonl": (broken_jsonl, "cannot read .*bad.jsonl"),
    "other field": (
        jsonl_with_another_field,
        "`text_field`: .* no text column 'text'; .* body, id",
    ),
    "missing tokenizer": (lambda _: {"tokenizer": "/no/t.json"}, "there is no file /no/t.json"),
    "bad tokenizer": (no_tokenizer, "`tokenizer`: .* is no tokenizer.json"),
    "no text": (no_text, "picture.bin is no text"),
    "cache": (unwritable_cache, "`cache_dir`: cannot make .*file/cache: Not a directory"),
    "too little": (too_little_text, "too few for one batch"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(tmp_path, mistake):
    make, message = MISTAKES[mistake]
    config = dataclasses.replace(Config(cache_dir=str(tmp_path / "cache")), **make(tmp_path))
    with pytest.raises(ConfigError, match=message) as caught:
        data.training_batches(data.prepare(config, 300), 128, 16, 0)
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache"
    assert not list(cache.glob("making-*")), "a failed preparation left files behind"
