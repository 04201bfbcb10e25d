"""Reads the GGUF file of a LLaMA as a Hugging Face checkpoint: config, tensors and tokenizer.

Three things differ between the formats and are translated:

1. Names: `llama.block_count` is num_hidden_layers, `blk.0.attn_q` is layers.0.self_attn.q_proj.
2. Order of channels: queries and keys are permuted for another form of rotary positions.
3. Quantization: tensors in few bits are read as the float32 numbers that they stand for.

The file may come from anyone: each size in it is checked before it is believed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.models.weights import gguf_header, huggingface
from experiments.trainer.files import check_regular
from experiments.trainer.options import ConfigError, is_fault, one_line, reason

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PreTrainedTokenizerFast

_SPECIAL, _USER_DEFINED = 3, 4  # types of tokens that are never split

# The steps that cut text into words before the merges, by tokenizer.ggml.pre.
_PRE_TOKENIZERS: dict[str, Callable[[Any], list]] = {
    "gpt-2": lambda pre: [pre.ByteLevel(add_prefix_space=False)],
    "smollm": lambda pre: [pre.Digits(individual_digits=True), *_PRE_TOKENIZERS["gpt-2"](pre)],
}


class Contents(NamedTuple):
    """The contents of a Hugging Face checkpoint: config.json, tensors and tokenizer."""

    config: dict
    tensors: huggingface.Tensors
    tokenizer: "PreTrainedTokenizerFast"


def read(file: Path) -> Contents:
    """Opens `file`; each tensor is read and dequantized when it is asked for.

    Raises:
      ConfigError: the file is no GGUF file, holds no LLaMA, or has a setting or a tokenizer that is
        not supported.
    """
    metadata, tensors = _open(file)
    if (family := metadata.get("general.architecture")) != "llama":
        raise ConfigError(
            f"`model`: {file} has the architecture {one_line(repr(family), 80)}; only llama is "
            "supported"
        )
    by_name = {tensor.name: tensor for tensor in tensors}
    # A file without a head has it tied to the embedding.
    config = _config(metadata, tied="output.weight" not in by_name)
    return Contents(config, _tensors(by_name, config), _tokenizer(metadata, file))


def _open(file: Path) -> tuple[dict[str, Any], list["ReaderTensor"]]:
    """Returns the metadata and the tensors of a file; the tensors stay on the disk."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            # The reader slices the file once for each token of the vocabulary. Slices of a memory
            # map are maps too, which takes seconds; slices of a plain array take a third of that.
            self.data = np.asarray(self.data)
            return super()._build_fields(offs, count)

    try:
        # 1. Check every length in the header before the reader believes it.
        check_regular(file)
        gguf_header.check(file)
        # 2. Read. Products of lengths that overflow 64 bits raise.
        with np.errstate(all="raise"):
            reader = Reader(file)
        # 3. The reader checks that each tensor lies within the file; many may claim the same place.
        if sum(tensor.n_bytes for tensor in reader.tensors) > file.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many types; each means a violation of the format
        raise ConfigError(f"`model`: cannot read {file} as GGUF: {reason(error)}") from error
    return metadata, reader.tensors


def _config(metadata: dict[str, Any], tied: bool) -> dict:
    """Returns the model's config.json, with names that every version of `transformers` reads."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{name}", default)

    if (scaling := get("rope.scaling.type", "none")) != "none":
        raise ConfigError(
            f"`model`: not supported: llama.rope.scaling.type is {one_line(repr(scaling), 80)}"
        )
    # Checked first: the width of a head, below, divides one by the other.
    heads, width = get("attention.head_count"), get("embedding_length")
    if not huggingface.is_size(heads) or not huggingface.is_size(width):
        raise ConfigError(
            "`model`: the GGUF file's llama.attention.head_count and llama.embedding_length are "
            f"{one_line([heads, width], 80)}; they must be positive"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length") or width // heads,
        "vocab_size": get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if missing := [name for name, value in config.items() if value is None and "token" not in name]:
        raise ConfigError(f"`model`: the GGUF file does not state {', '.join(missing)}")
    return config


def _decimal(value: Any) -> Any:
    """Returns the shortest decimal of a float32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tensors(by_name: dict[str, "ReaderTensor"], config: dict) -> huggingface.Tensors:
    """Returns the tensors under their Hugging Face names, each read when it is asked for."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = huggingface.architecture(config)
    huggingface.check_layers(arch, len(by_name))
    # 1. Names. A tensor without a translation keeps its own, for the error that names it.
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, arch.layers)
    wanted = huggingface.expected_shapes(arch)
    renamed = {names.get_name(name, (".weight",)): name for name in wanted}
    tensors = {renamed.get(name, name): tensor for name, tensor in by_name.items()}
    # 2. Shapes: GGUF lists the fastest axis first, NumPy last.
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }

    # 3. Contents. Only queries and keys are rotated, and so permuted.
    def read(name: str) -> np.ndarray:
        values = _dequantize(tensors[name])
        role = name.split(".")[-2]
        return _unpermute(values, heads[role]) if role in heads else values

    return huggingface.Tensors(shapes, read)


def _dequantize(tensor: "ReaderTensor") -> np.ndarray:
    """Returns the float32 numbers of a quantized tensor."""
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(
            f"`model`: {tensor.name} is quantized as {tensor.tensor_type.name}; it is not supported"
        ) from error


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves the two channels of each rotary pair from `(2 i, 2 i + 1)` to `(i, i + E / 2)`.

    The first are neighbours in a head of a GGUF file, the second half a head apart, as in `llama`
    and Hugging Face checkpoints.
    """
    # [heads * E, in] -> [heads, E / 2, 2, in] -> [heads, 2, E / 2, in] -> [heads * E, in]
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(metadata: dict[str, Any], file: Path) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer that the metadata describe."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    _check_tokenizer(get("model"), get("pre", "gpt-2"), get("add_bos_token", False))
    try:
        return _assembled(get, metadata)
    except BaseException as error:  # missing or odd values, and any error of `tokenizers`
        if not is_fault(error):
            raise
        raise ConfigError(f"`model`: the tokenizer in {file}: {reason(error)}") from error


def _assembled(get: Callable[..., Any], metadata: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Builds a byte-level BPE from the tokens, merges and settings of a file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # 1. Vocabulary and merges. Two tokens of one text would share an id.
    texts = get("tokens")
    if len(set(texts)) < len(texts):
        raise ValueError("it has a token twice")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=merges))
    # 2. Cutting into words, and back from bytes to text.
    steps = _PRE_TOKENIZERS[get("pre", "gpt-2")](pre_tokenizers)
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    # 3. Special tokens, which are matched before the text is cut.
    backend.add_tokens([
        AddedToken(text, special=kind == _SPECIAL, normalized=False)
        for text, kind in zip(texts, get("token_type"), strict=True)
        if kind in (_SPECIAL, _USER_DEFINED)
    ])  # fmt: skip
    # 4. The roles of special tokens, and the chat template.
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: get(f"{name}_token_id") for role, name in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{role: texts[i] for role, i in ids.items() if i is not None},
    )


def _check_tokenizer(kind: Any, pre: Any, adds_start: bool) -> None:
    """Raises `ConfigError` unless `_assembled` would give the tokenizer that the file means."""
    if kind != "gpt2" or pre not in list(_PRE_TOKENIZERS):
        raise ConfigError(
            f"`model`: the GGUF file's tokenizer is {one_line(repr(kind), 80)} with pre-tokenizer "
            f"{one_line(repr(pre), 80)}; supported is 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    if adds_start:
        raise ConfigError("`model`: not supported: tokenizer.ggml.add_bos_token is true")
