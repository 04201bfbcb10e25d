"""A GGUF file of a LLaMA as a Hugging Face checkpoint: config, tensors and tokenizer.

Quantized tensors are read as the float32 numbers that they stand for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.models.weights import huggingface
from experiments.trainer.options import ConfigError, reason

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedTokenizerFast

_SPECIAL, _USER_DEFINED = 3, 4  # types of tokens that are never split

# How text is cut into words before the merges, by the name that the file has for it.
_PRE_TOKENIZERS: dict[str, Callable[[Any], list]] = {
    "gpt-2": lambda pre: [pre.ByteLevel(add_prefix_space=False)],
    "smollm": lambda pre: [pre.Digits(individual_digits=True), *_PRE_TOKENIZERS["gpt-2"](pre)],
}


class Contents(NamedTuple):
    """What a directory of a Hugging Face checkpoint holds."""

    config: dict
    tensors: huggingface.Tensors
    tokenizer: "PreTrainedTokenizerFast"


def read(file: Path) -> Contents:
    """Opens `file`; its tensors are read and dequantized one by one, when asked for.

    Raises:
      ConfigError: it is no GGUF file, not a LLaMA, or has settings or a tokenizer not supported.
    """
    reader = _open(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if (family := metadata.get("general.architecture")) != "llama":
        raise ConfigError(f"`model`: {file} holds the architecture {family!r}; only llama is read")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in by_name)
    return Contents(config, _tensors(by_name, config), _tokenizer(metadata))


def _open(file: Path) -> "GGUFReader":
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            # The tokens of a vocabulary are cut from the file one by one, which takes seconds from
            # a memory map, for its slices are maps too, and a third of that from a plain array.
            self.data = np.asarray(self.data)
            return super()._build_fields(offs, count)

    try:
        return Reader(file)
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise ConfigError(f"`model`: cannot read {file} as GGUF: {reason(error)}") from error


def _config(metadata: dict[str, Any], tied: bool) -> dict:
    """The config.json of this model, with the names that every version of `transformers` reads."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{name}", default)

    if (scaling := get("rope.scaling.type", "none")) != "none":
        raise ConfigError(f"`model`: not supported: llama.rope.scaling.type is {scaling!r}")
    heads, width = get("attention.head_count"), get("embedding_length")
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
        "head_dim": get("attention.key_length") or (width and heads and width // heads),
        "vocab_size": get("vocab_size", len(tokens)),
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


def _decimal(value: float | None) -> float | None:
    """The number that was meant by a float32 one: 1e-05, not 9.999999747378752e-06."""
    return None if value is None else float(str(np.float32(value)))


def _tensors(by_name: dict[str, "ReaderTensor"], config: dict) -> huggingface.Tensors:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    wanted = huggingface.expected_shapes(huggingface.architecture(config))
    renamed = {names.get_name(name, (".weight",)): name for name in wanted}
    # A tensor that is not wanted keeps its own name, for the error that names it.
    tensors = {renamed.get(name, name): tensor for name, tensor in by_name.items()}
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }

    def read(name: str) -> np.ndarray:
        values = _dequantize(tensors[name])
        role = name.split(".")[-2]
        return _unpermute(values, heads[role]) if role in heads else values

    return huggingface.Tensors(shapes, read)


def _dequantize(tensor: "ReaderTensor") -> np.ndarray:
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(
            f"`model`: {tensor.name} is quantized as {tensor.tensor_type.name}, which is not read"
        ) from error


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the two channels that rotary positions turn together half a head apart.

    They are `(2 i, 2 i + 1)` of each head in a GGUF file and `(i, i + E / 2)` in our model.
    """
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(metadata: dict[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    _check_tokenizer(get("model"), get("pre", "gpt-2"), get("add_bos_token", False))
    texts = get("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=merges))
    steps = _PRE_TOKENIZERS[get("pre", "gpt-2")](pre_tokenizers)
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([
        AddedToken(text, special=kind == _SPECIAL, normalized=False)
        for text, kind in zip(texts, get("token_type"), strict=True)
        if kind in (_SPECIAL, _USER_DEFINED)
    ])  # fmt: skip
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
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"`model`: the GGUF file's tokenizer is {kind!r} with the words of {pre!r}; "
            f"read are 'gpt2' with those of {', '.join(_PRE_TOKENIZERS)}"
        )
    if adds_start:
        raise ConfigError("`model`: not supported: tokenizer.ggml.add_bos_token is true")
