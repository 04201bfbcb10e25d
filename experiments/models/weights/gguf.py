"""A GGUF file of a LLaMA as a Hugging Face checkpoint: config, tensors and tokenizer.

Quantized tensors are read as the float32 numbers that they stand for.
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
    metadata, tensors = _open(file)
    if (family := metadata.get("general.architecture")) != "llama":
        raise ConfigError(
            f"`model`: {file} holds the architecture {one_line(repr(family), 80)}; only llama is "
            "read"
        )
    by_name = {tensor.name: tensor for tensor in tensors}
    config = _config(metadata, tied="output.weight" not in by_name)
    return Contents(config, _tensors(by_name, config), _tokenizer(metadata, file))


def _open(file: Path) -> tuple[dict[str, Any], list["ReaderTensor"]]:
    """The metadata and the tensors of a file, the latter still on the disk."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            # The tokens of a vocabulary are cut from the file one by one, which takes seconds from
            # a memory map, for its slices are maps too, and a third of that from a plain array.
            self.data = np.asarray(self.data)
            return super()._build_fields(offs, count)

    try:
        check_regular(file)
        gguf_header.check(file)
        with np.errstate(all="raise"):  # products of lengths that do not fit 64 bits
            reader = Reader(file)
        # Each tensor lies in the file, but many of them may claim the same place.
        if sum(tensor.n_bytes for tensor in reader.tensors) > file.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many types; each means: not as the format wants it
        raise ConfigError(f"`model`: cannot read {file} as GGUF: {reason(error)}") from error
    return metadata, reader.tensors


def _config(metadata: dict[str, Any], tied: bool) -> dict:
    """The config.json of this model, with the names that every version of `transformers` reads."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{name}", default)

    if (scaling := get("rope.scaling.type", "none")) != "none":
        raise ConfigError(
            f"`model`: not supported: llama.rope.scaling.type is {one_line(repr(scaling), 80)}"
        )
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
    """The number that was meant by a float32 one: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tensors(by_name: dict[str, "ReaderTensor"], config: dict) -> huggingface.Tensors:
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = huggingface.architecture(config)
    huggingface.check_layers(arch, len(by_name))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, arch.layers)
    wanted = huggingface.expected_shapes(arch)
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


def _tokenizer(metadata: dict[str, Any], file: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer that the metadata describe."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    _check_tokenizer(get("model"), get("pre", "gpt-2"), get("add_bos_token", False))
    try:
        return _assembled(get, metadata)
    except BaseException as error:  # missing and odd values, and whatever `tokenizers` raises
        if not is_fault(error):
            raise
        raise ConfigError(f"`model`: the tokenizer in {file}: {reason(error)}") from error


def _assembled(get: Callable[..., Any], metadata: dict[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = get("tokens")
    if len(set(texts)) < len(texts):
        raise ValueError("a token is there twice")
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
    if kind != "gpt2" or pre not in list(_PRE_TOKENIZERS):
        raise ConfigError(
            f"`model`: the GGUF file's tokenizer is {one_line(repr(kind), 80)} with the words of "
            f"{one_line(repr(pre), 80)}; read are 'gpt2' with those of {', '.join(_PRE_TOKENIZERS)}"
        )
    if adds_start:
        raise ConfigError("`model`: not supported: tokenizer.ggml.add_bos_token is true")
