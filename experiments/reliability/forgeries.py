"""Files made to do harm: a good file of each kind, changed on purpose.

`FORGERIES` has, for each kind of `material.KINDS`, functions by name that change the files of a
directory. They aim at crashes, endless reads, memory, files outside of the directory, and code that
runs while a file is read.
"""

import json
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Forgery = Callable[[Path], None]  # changes the files of a directory

# Python's `int` of a million digits takes quadratic time, and parsers recurse at each bracket.
_DIGITS = "9" * 10**6
_NESTED = "[" * 10**5 + "]" * 10**5
# A Jinja template of ten billion turns.
_ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def _write(name: str, content: str | bytes) -> Forgery:
    """Writes a file with this content in place of the good one."""

    def forge(directory: Path) -> None:
        file = directory / name
        data = content.encode() if isinstance(content, str) else content
        file.unlink(missing_ok=True)
        file.write_bytes(data)

    return forge


def _replaced(name: str, path: Callable[[Path], Any]) -> Forgery:
    """Puts a symbolic link in place of a file."""

    def forge(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(path(directory))

    return forge


def _pipe(name: str) -> Forgery:
    """Puts a pipe without a writer in place of a file: opening it waits forever."""

    def forge(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return forge


def _odd_places(name: str) -> dict[str, Forgery]:
    """Returns forgeries that put something else in place of a regular file."""
    return {
        "a link to nothing": _replaced(name, lambda _: "nothing"),
        "a link to itself": _replaced(name, lambda _: name),
        "a link to a directory": _replaced(name, lambda directory: directory),
        "a link to a device without end": _replaced(name, lambda _: "/dev/zero"),
        "a link to a file outside": _replaced(name, lambda d: d.parents[1] / "outside" / "secret"),
        "a pipe": _pipe(name),
        "an empty file": _write(name, b""),
    }


def _edited(name: str, **values: Any) -> Forgery:
    """Changes values of a JSON file."""

    def forge(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return forge


def _number(name: str, field: str, digits: str) -> Forgery:
    """Writes a number of a JSON file in digits that Python's JSON would not write."""

    def forge(directory: Path) -> None:
        # A placeholder in quotes, which the digits then replace.
        _edited(name, **{field: "HERE"})(directory)
        file = directory / name
        file.write_text(file.read_text().replace('"HERE"', digits))

    return forge


def _header(**changes: Any) -> Forgery:
    """Changes the description of the first tensor of a safetensors file."""

    def forge(directory: Path) -> None:
        file = directory / "model.safetensors"
        content = file.read_bytes()
        # The format: the length of the header (u64), the header in JSON, the tensors' bytes.
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        header[name] |= changes
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return forge


def _safetensors(header: bytes, length: int | None = None) -> Forgery:
    """Writes a safetensors file of a header alone, whose stated length may be another."""
    size = struct.pack("<Q", len(header) if length is None else length)
    return _write("model.safetensors", size + header)


def _index(weight_map: Any) -> Forgery:
    """Replaces the one safetensors file by an index, which names the files of its shards."""

    def forge(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)

    return forge


def _gguf(fields: bytes, count: int = 1, tensors: int = 0) -> Forgery:
    """Writes a GGUF file of these bytes behind a header of version 3."""
    # The header: magic, version (u32), number of tensors (u64), number of fields (u64).
    return _write("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields)


def _field(name: str, kind: int, value: bytes) -> bytes:
    """Returns a GGUF field: the name with its length (u64), type (u32), value."""
    # Types: 0 an unsigned byte, 8 a string, 9 an array.
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def _patched(old: bytes, new: bytes) -> Forgery:
    """Replaces the first occurrence of some bytes in a GGUF file."""

    def forge(directory: Path) -> None:
        file = directory / "model.gguf"
        content = file.read_bytes()
        assert old in content  # else the forgery would be the good file
        file.write_bytes(content.replace(old, new, 1))

    return forge


def _llama(name: str, value: int) -> Forgery:
    """Changes a number in the metadata of a GGUF file."""

    def forge(directory: Path) -> None:
        file = directory / "model.gguf"
        content, key = file.read_bytes(), f"llama.{name}".encode()
        start = content.index(key) + len(key) + 4  # behind the field's type
        file.write_bytes(content[:start] + struct.pack("<I", value) + content[start + 4 :])

    return forge


def _all(directory: Path, pattern: str, change: Callable[[Path], None]) -> None:
    """Changes all files that match a pattern."""
    # Listed before the first change, since pipes match the pattern as well.
    for file in [f for f in directory.glob(pattern) if f.is_file()]:
        change(file)


def _cached(change: Callable[[Path], None]) -> Forgery:
    return lambda directory: _all(directory, "cache/*/*", change)


def _linked_cache(directory: Path) -> None:
    """Makes a damaged cache a link to a directory outside, which repairing it must not empty."""
    (cache,) = (directory / "cache").iterdir()
    (cache / "digest").write_text("damaged")
    cache.rename(directory / "elsewhere")
    cache.symlink_to(directory.parents[1] / "outside")


def _to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _nested(file: Path) -> None:
    file.write_text(_NESTED)


def _bomb(directory: Path) -> None:
    """Writes a compressed file of 150 kB that holds a line of a gigabyte."""
    compressor = lzma.LZMACompressor()
    with open(directory / "rows.jsonl.xz", "wb") as file:
        for _ in range(1000):
            file.write(compressor.compress(b"a" * 10**6))
        file.write(compressor.flush())
    (directory / "rows.jsonl").unlink()


def _rows(**values: str) -> Forgery:
    """Writes 40 rows whose columns have these JSON texts."""
    row = {"prompt": '"a"', "answer": '"b"', "text": '"c"'} | values
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}\n"
    return _write("rows.jsonl", text * 40)


# Sizes that are not positive, too large for memory or for 64 bits, or no integers: each in each
# field that decides a shape.
_CONFIG: dict[str, Forgery] = {
    f"{field} {value}": _edited("config.json", **{field: value})
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "vocab_size", "max_position_embeddings", "intermediate_size", "head_dim")
    for value in (-1, 0, 10**9, 2**63, 1.5, True)
}  # fmt: skip
_CONFIG |= {
    "a million digits": _number("config.json", "hidden_size", _DIGITS),
    "a fraction of a million digits": _number("config.json", "rms_norm_eps", f"0.{_DIGITS}"),
    "not a number": _number("config.json", "rms_norm_eps", "NaN"),
    "rope_theta 0": _edited("config.json", rope_theta=0.0),
    "rope_theta infinite": _number("config.json", "rope_theta", "1e999"),
    "deep nesting": _write("config.json", _NESTED),
    "deep nesting in a field": _number("config.json", "custom", _NESTED),
    # transformers would import and run the file that `auto_map` names.
    "a class of its own": _edited("config.json", auto_map={"AutoConfig": "code.Config"}),
    "attributes of Python": _edited("config.json", __class__="a", to_dict=3, __init__=None),
    "another family": _edited("config.json", model_type=["llama"]),
    "a long text": _edited("config.json", hidden_act="\u001b[31m\n" * 10**6),
    **_odd_places("config.json"),
}

# Chat templates are programs: without end, without bounds on memory, out of the sandbox, or reading
# other files.
_TEMPLATES = {
    "endless": _ENDLESS,
    "a power without end": "{{ 9 ** (9 ** 9) }}",
    "memory": "{{ 'a' * 10 ** 10 }}",
    "text without end": "{% for i in range(99999) %}{{ messages }}{{ 'a' * 9999 }}{% endfor %}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "nesting": "{{" + "(" * 10**4 + "1" + ")" * 10**4 + "}}",
    "a million digits": "{{ " + _DIGITS + " }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a program": "{{ cycler.__init__.__globals__.os.system('touch /tmp/harm') }}",
    "another file": "{% include '/etc/passwd' %}",
}

FORGERIES: dict[str, dict[str, Forgery]] = {
    "safetensors": {
        "a header beyond the file": _safetensors(b"{}", 2**63),
        "a header of -1 bytes": _safetensors(b"{}", 2**64 - 1),
        "deep nesting": _safetensors(_NESTED.encode()),
        "a million digits": _safetensors(b'{"a": ' + _DIGITS.encode() + b"}"),
        "a huge shape": _header(shape=[2**40, 2**40]),
        "a negative shape": _header(shape=[-1, 24]),
        "a shape that overflows to the right size": _header(shape=[2**63, 2, 24]),
        "offsets beyond the file": _header(data_offsets=[0, 2**60]),
        "offsets the wrong way round": _header(data_offsets=[100, 0]),
        "an unknown type": _header(dtype="PICKLE"),
        "integers": _header(dtype="I32"),
        # Shards that lie outside of the model's directory, or are no files in it.
        "a shard above the directory": _index({"a": "../../outside/secret"}),
        "a shard at an absolute path": _index({"a": "/etc/passwd"}),
        "a shard that is the directory": _index({"a": "."}),
        "a shard with a line break": _index({"a": "a\nb.safetensors"}),
        "a shard that is a number": _index({"a": 3}),
        "no shards": _index({}),
        **_odd_places("model.safetensors"),
    },
    "gguf": {
        # Counts and lengths beyond the end of the file: none may be allocated before it is checked.
        "2^63 fields": _gguf(b"", count=2**63),
        "2^63 tensors": _gguf(b"", count=0, tensors=2**63),
        "a string of 2^63 bytes": _gguf(_field("a", 8, struct.pack("<Q", 2**63))),
        "an array of 2^60": _gguf(_field("a", 9, struct.pack("<IQ", 0, 2**60)) + b"a" * 99),
        "an array of a hundred million": _gguf(
            _field("a", 9, struct.pack("<IQ", 0, 10**7)) + b"a" * 10**7
        ),
        "arrays of arrays": _gguf(_field("a", 9, struct.pack("<IQ", 9, 1) * 10**5)),
        "an unknown type": _gguf(_field("a", 99, b"")),
        "the same field twice": _gguf(_field("a", 0, b"a") * 2, count=2),
        "a version of the future": _write("model.gguf", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)),
        "a thousand axes": _gguf(struct.pack("<Q", 1) + b"a" + struct.pack("<I", 1000), 0, 1),
        "lengths that overflow": _gguf(
            struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0), 0, 1
        ),
        # Metadata that contradict the tensors.
        "a billion blocks": _llama("block_count", 10**9),
        "no blocks": _llama("block_count", 0),
        "no heads": _llama("attention.head_count", 0),
        "a width that no head divides": _llama("embedding_length", 17),
        "a huge context": _llama("context_length", 2**32 - 1),
        # Vocabularies that are incomplete, no UTF-8, or ambiguous.
        "no kind of merges": _patched(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"),
        "a word that is no text": _patched(b"<10>", b"\xff\xfe\xff\xfe"),
        "a word twice": _patched(b"<10>", b"<11>"),
        **_odd_places("model.gguf"),
    },
    "config": _CONFIG,
    "tokenizer": {
        "a million digits": _number("tokenizer.json", "version", _DIGITS),
        "deep nesting": _write("tokenizer.json", _NESTED),
        "deep nesting beside it": _write("tokenizer_config.json", _NESTED),
        "a class of its own": _edited(
            "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": "code.Own"}
        ),
        "a file above the directory": _edited(
            "tokenizer_config.json", tokenizer_file="../../outside/secret", vocab_file="/etc/passwd"
        ),
        "a token beyond the model": _edited("tokenizer.json", added_tokens=[{
            "id": 10**6, "content": "<far>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }]),
        "a pattern that explodes": _edited("tokenizer.json", pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a*)*$" * 20}, "behavior": "Isolated",
            "invert": False,
        }),
        "a template that is a list": _edited("tokenizer_config.json", chat_template=[3]),
        "a template beside it": _pipe("chat_template.jinja"),
        **_odd_places("tokenizer.json"),
        **{f"{name} beside it": f for name, f in _odd_places("tokenizer_config.json").items()},
    },
    "tokenizer of a corpus": {
        "a million digits": _number("tokenizer.json", "version", _DIGITS),
        "deep nesting": _write("tokenizer.json", _NESTED),
        "a token beyond the model": _edited("tokenizer.json", added_tokens=[{
            "id": 10**6, "content": "<far>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }]),
        **_odd_places("tokenizer.json"),
    },
    "chat template": {
        **{name: _write("chat_template.jinja", text) for name, text in _TEMPLATES.items()},
        **_odd_places("chat_template.jinja"),
    },
    "jsonl of a task": {
        # Numbers and nesting inside rows, rows that are no objects, and lines beyond any memory.
        "a million digits": _rows(answer=_DIGITS),
        "a million digits in a text": _rows(answer=f'"#### {_DIGITS}"'),
        "an infinite number": _rows(answer="1e999"),
        "deep nesting": _rows(answer=_NESTED),
        "a list": _write("rows.jsonl", "[1]\n" * 40),
        "a long line": _write("rows.jsonl", '{"prompt": "' + "a" * 2 * 10**7 + '"}\n'),
        "a line of a gigabyte, compressed": _bomb,
        **_odd_places("rows.jsonl"),
    },
    "jsonl of a corpus": {
        "a million digits": _rows(text=_DIGITS),
        "an infinite number": _rows(text="1e999"),
        "deep nesting": _rows(text=_NESTED),
        "deep nesting in objects": _rows(text='{"a":' * 10**5 + "1" + "}" * 10**5),
        "a list": _write("rows.jsonl", "[1]\n" * 40),
        "half of a surrogate": _rows(text='"\\ud800"'),
        **_odd_places("rows.jsonl"),
    },
    "parquet": {
        # A Parquet file ends with the length of its footer (i32) and its magic.
        "a footer beyond the file": _write("rows.parquet", b"PAR1" + b"\xff\xff\xff\x7fPAR1"),
        "a footer of -1 bytes": _write("rows.parquet", b"PAR1" + b"\xff\xff\xff\xffPAR1"),
        **_odd_places("rows.parquet"),
    },
    "token cache": {
        "pipes": _cached(_to_pipe),
        "empty files": _cached(_emptied),
        "deep nesting": _cached(_nested),
        "a damaged one that is a link to outside": _linked_cache,
    },
    # Every file of the newest step.
    "checkpoint": {
        name: (lambda directory, change=change: _all(directory, "run/checkpoints/2/**/*", change))
        for name, change in {"pipes": _to_pipe, "empty": _emptied, "deep nesting": _nested}.items()
    },
}  # fmt: skip
