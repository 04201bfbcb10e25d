"""A small real file of each kind that training reads, and the function that reads it.

Each file is written by the library that writes such files in practice: safetensors, gguf,
tokenizers, pyarrow, Orbax. `KINDS` has the functions that make and read each kind.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.data import answers, tokens
from experiments.data import text as corpora
from experiments.models import llama
from experiments.models.presets import Architecture
from experiments.models.weights import huggingface
from experiments.models.weights import load as pretrained
from experiments.tasks.base import Example
from experiments.trainer.checkpoints import Checkpoints
from experiments.trainer.config import Config

# Width 16, MLP 24, 2 layers, 4 heads, of which 2 of keys and values: a model of a few kilobytes.
ARCH = Architecture(16, 24, 2, 4, 2, vocab_size=300, seq_len=64, norm_eps=1e-5)
CHAT = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
_TEXTS = [f"{i} times {i} is {i * i}, and {i} plus {i} is {2 * i}.\n" for i in range(40)]
_EXAMPLE = Example("3 plus 4?", "7")


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      make: writes the files into an empty directory.
      target: the files to damage, as a pattern below the directory.
      read: reads the directory as training does, checks values where it can, and returns them.
    """

    make: Callable[[Path], None]
    target: str
    read: Callable[[Path], Any]


def _make_model(directory: Path) -> None:
    """Writes a Hugging Face model: configuration, weights, tokenizer and chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens.train_tokenizer(iter(_TEXTS), ARCH.vocab_size),
        eos_token=tokens.END,
        chat_template=CHAT,
    )
    config = {
        "model_type": "llama",
        "hidden_size": ARCH.width,
        "intermediate_size": ARCH.hidden,
        "num_hidden_layers": ARCH.layers,
        "num_attention_heads": ARCH.heads,
        "num_key_value_heads": ARCH.kv_heads,
        "vocab_size": ARCH.vocab_size,
        "max_position_embeddings": ARCH.seq_len,
        "rms_norm_eps": ARCH.norm_eps,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    pretrained.save(directory, _weights(), config, tokenizer)


def _weights() -> llama.Params:
    """Draws weights with NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: llama.create(ARCH)[1])
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def _make_gguf(directory: Path) -> None:
    """Writes the same model as a GGUF file, in the names and metadata of llama.cpp."""
    import gguf

    # 1. The vocabulary of a byte-level BPE, with one token ("ab") that a merge makes.
    texts = [f"<{i}>" for i in range(40)] + list("0123456789abcdefghijklmnopqrstuvwxyzĠĊ.,?")
    texts += ["ab", tokens.END]
    # 2. Metadata: the architecture, then the tokenizer. Type 3 is a control token, type 1 a word.
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(ARCH.layers)
    writer.add_context_length(ARCH.seq_len)
    writer.add_embedding_length(ARCH.width)
    writer.add_feed_forward_length(ARCH.hidden)
    writer.add_head_count(ARCH.heads)
    writer.add_head_count_kv(ARCH.kv_heads)
    writer.add_layer_norm_rms_eps(ARCH.norm_eps)
    writer.add_vocab_size(ARCH.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types([3 if text == tokens.END else 1 for text in texts])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(texts) - 1)
    writer.add_chat_template(CHAT)
    # 3. Tensors, whose names the gguf library translates from those of Hugging Face.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, ARCH.layers)
    rng = np.random.default_rng(0)
    for name, shape in huggingface.expected_shapes(ARCH).items():
        stored = names.get_name(name, (".weight",))
        assert stored
        writer.add_tensor(stored, rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_model(path: Path) -> Any:
    """Reads a whole model, and encodes an example with its chat template."""
    loaded = pretrained.load(str(path))
    answers.encode([_EXAMPLE], loaded.tokenizer, 1000)
    return loaded.params


def _read_config(directory: Path) -> Any:
    """Reads a model without rendering its template, whose process takes longer than the rest."""
    return pretrained.load(str(directory)).params


def _make_jsonl(directory: Path) -> None:
    rows = [{"prompt": f"{i}?", "answer": f"#### {i}", "text": t} for i, t in enumerate(_TEXTS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_task(directory: Path) -> Any:
    """Reads examples of a task, and grades the answers of the held-out ones."""
    # A forgery may have written the rows under another suffix.
    (file,) = directory.glob("rows.*")
    task = tasks.load(str(file), train_examples=8, eval_examples=2, seed=0)
    return [task.correct(example.answer, example) for example in task.held_out]


def _make_parquet(directory: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": _TEXTS}), directory / "rows.parquet")


def _read_corpus(directory: Path) -> Any:
    """Reads all documents of a corpus, from the column `text`."""
    (file,) = directory.glob("rows.*")
    return [
        text
        for source in corpora.find([str(file)])
        for text in corpora.documents(source, "text")
    ]  # fmt: skip


def _make_tokenizer(directory: Path) -> None:
    tokens.train_tokenizer(iter(_TEXTS), 300).save(str(directory / "tokenizer.json"))


def _read_tokenizer(directory: Path) -> Any:
    tokenizer = tokens.load_tokenizer(str(directory / "tokenizer.json"))
    # Training stores token ids in 16 or 32 bits and looks them up in an embedding: an id beyond the
    # vocabulary must not pass.
    ids = tokenizer.encode("3 plus 4 is 7", add_special_tokens=False).ids
    assert all(0 <= number < tokenizer.get_vocab_size() for number in ids), "a number beyond"


def _cache_config(directory: Path) -> Config:
    return Config(
        corpus=((directory / "corpus is in").read_text(),), cache_dir=str(directory / "cache"),
        validation_fraction=0.3,
    )  # fmt: skip


def _make_cache(directory: Path) -> None:
    corpus = directory / "corpus"
    corpus.mkdir()
    for i, text in enumerate(_TEXTS):
        (corpus / f"{i}.txt").write_text(text)
    # The cache's name depends on the path of the corpus, so the corpus stays here when a case
    # copies the directory, and the copy finds it by this file.
    (directory / "corpus is in").write_text(str(corpus.absolute()))
    digest = tokens.prepare(_cache_config(directory), 280).digest
    (directory / "digest").write_text(digest)


def _read_cache(directory: Path) -> Any:
    """Prepares tokens, which must be those of the corpus whatever the cache contains."""
    data = tokens.prepare(_cache_config(directory), 280)
    assert data.digest == (directory / "digest").read_text(), "the tokens are not those of the text"
    assert max(np.max(data.train), np.max(data.validation)) < data.tokenizer.get_vocab_size()


# Arrays of the dtypes in an optimizer's state: float32, int32, a key's uint32, and bfloat16.
_STATE = {
    "basis": np.arange(24, dtype=np.float32).reshape(2, 4, 3),
    "count": np.int32(7),
    "key": np.array([0, 7], np.uint32),
    "momentum": np.linspace(0, 1, 512, dtype=np.float32).astype(jnp.bfloat16),
}


@contextlib.contextmanager
def _opened(directory: Path) -> Any:
    """The trainer's own checkpoints, in the directory of a run."""
    with contextlib.closing(Checkpoints(Config(run_dir=str(directory / "run")))) as checkpoints:
        yield checkpoints


def _make_checkpoint(directory: Path) -> None:
    """Saves two steps, of which cases change the second and newest."""
    state = jax.device_put(_STATE)
    with _opened(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"position": step})


def _read_checkpoint(directory: Path) -> Any:
    """Restores the second step; a changed bit must be noticed or change nothing."""
    with _opened(directory) as checkpoints:
        state, position = checkpoints.restore(2, jax.device_put(_STATE))
    for name, array in _STATE.items():
        assert np.asarray(state[name]).tobytes() == array.tobytes(), f"{name} is another one"
    assert position == {"position": 2}, "the position is another one"


# Kind -> how it is made, which of its files are damaged, and how it is read. Kinds that share a
# maker differ in the file that is damaged.
KINDS = {
    "safetensors": Kind(_make_model, "model.safetensors", _read_config),
    "gguf": Kind(_make_gguf, "model.gguf", lambda path: _read_config(path / "model.gguf")),
    "config": Kind(_make_model, "config.json", _read_config),
    "tokenizer": Kind(_make_model, "tokenizer*.json", _read_config),
    "tokenizer of a corpus": Kind(_make_tokenizer, "tokenizer.json", _read_tokenizer),
    "chat template": Kind(_make_model, "chat_template.jinja", _read_model),
    "jsonl of a task": Kind(_make_jsonl, "rows.jsonl", _read_task),
    "jsonl of a corpus": Kind(_make_jsonl, "rows.jsonl", _read_corpus),
    "parquet": Kind(_make_parquet, "rows.parquet", _read_corpus),
    "token cache": Kind(_make_cache, "cache/*/*", _read_cache),
    "checkpoint": Kind(_make_checkpoint, "run/checkpoints/2/**/*", _read_checkpoint),
}
