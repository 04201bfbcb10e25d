"""Translates between Hugging Face checkpoints (config.json and tensors) and our models.

A tensor has the path of its parameter as its name, word by word (`_WORDS`). A matrix is stored as
`[out, in]`, the transpose of ours. There is no other difference, for loading or for saving.

Checkpoints may come from anyone: sizes, names and types are checked before anything is allocated or
traced, and messages quote at most a few characters of them.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import llama, presets
from experiments.trainer.files import check_regular, parse_json, read_text
from experiments.trainer.options import ConfigError, one_line, reason

SHARD_BYTES = 5_000_000_000
"""Bytes of a file of weights, at most; a larger checkpoint is written as several files."""

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FAMILIES = ("llama", "qwen2")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_MOST = 2**24  # bound on the length of an axis and on the number of layers
_MOST_TOLD = 50  # problems listed in one message
_QUICKLY_TRACED = 100  # layers of a model that is traced without further questions
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Our word for a module or parameter -> theirs; other words, such as numbers of layers, are the
# same.
_WORDS = {
    "embed": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "attn": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "embedding": "weight",
    "kernel": "weight",
    "scale": "weight",
}


class Tensors(NamedTuple):
    """The tensors of a checkpoint by Hugging Face names: all shapes, and a function to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def architecture(config: dict) -> presets.Architecture:
    """Returns the architecture that a config.json describes.

    `transformers` parses it: missing settings have the defaults of their family, and both the older
    `rope_theta` and `rope_scaling` and the newer `rope_parameters` are read.

    Args:
      config: content of a config.json.

    Raises:
      ConfigError: the family or a setting is not supported, or the sizes are impossible.
    """
    # 1. Refuse settings that would make another model of the same weights.
    parsed = _parse(config)
    rope = parsed.rope_parameters
    if bad := [f"{name} is {one_line(repr(value), 80)}" for name, value in _unsupported(parsed)]:
        raise ConfigError(f"`model`: not supported in its config.json: {', '.join(bad)}")
    # 2. Translate, then check the sizes against each other.
    arch = presets.Architecture(
        width=parsed.hidden_size,
        hidden=parsed.intermediate_size,
        layers=parsed.num_hidden_layers,
        heads=parsed.num_attention_heads,
        kv_heads=parsed.num_key_value_heads,
        vocab_size=parsed.vocab_size,
        seq_len=parsed.max_position_embeddings,
        tied=parsed.tie_word_embeddings,
        rope_theta=float(rope["rope_theta"]),
        head_dim=getattr(parsed, "head_dim", None),
        qkv_bias=parsed.model_type == "qwen2",  # no setting: every Qwen2.5 has them
        norm_eps=parsed.rms_norm_eps,
        rope_scaling=_rope_scaling(rope),
    )
    _check_possible(arch)
    return arch


def is_size(value: Any) -> bool:
    """Whether a value can be the length of an axis; a bool, which is an int in Python, cannot."""
    return type(value) is int and 0 < value <= _MOST


def check_layers(arch: presets.Architecture, tensors: int) -> None:
    """Raises `ConfigError` if there are more layers than tensors, beyond `_QUICKLY_TRACED`.

    It must be called before the model is traced: a million layers would take hours and all memory.
    """
    if arch.layers > max(tensors, _QUICKLY_TRACED):
        raise ConfigError(
            f"`model`: its config has {arch.layers} layers, but there are {tensors} tensors"
        )


def tensor_name(path: jax.tree_util.KeyPath) -> str:
    """Returns the Hugging Face name of the parameter at `path`."""
    words = (str(getattr(entry, "key", entry)) for entry in path)
    return ".".join(_WORDS.get(word, word) for word in words)


def expected_shapes(arch: presets.Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the names and stored shapes of the tensors in a checkpoint of `arch`."""
    leaves = jax.tree.leaves_with_path(_parameter_shapes(arch))
    return {tensor_name(path): _stored_shape(path, leaf.shape) for path, leaf in leaves}


def assemble(arch: presets.Architecture, tensors: Tensors, dtype: str) -> llama.Params:
    """Reads the parameters of `arch` into host memory, one tensor after the other.

    Args:
      arch: the shape of the model.
      tensors: the checkpoint.
      dtype: dtype of all parameters.

    Returns:
      A tree of NumPy arrays, as `llama.create` returns it.

    Raises:
      ConfigError: tensors are missing, unknown or of another shape; the message names them.
    """
    # 1. Names and shapes, before anything is read.
    check_layers(arch, len(tensors.shapes))
    _check_shapes(expected_shapes(arch), tensors.shapes, arch.tied)
    # A tied checkpoint may store the head again; another matrix there would be lost silently.
    if arch.tied and _HEAD in tensors.shapes:
        _check_tied(tensors)

    # 2. Each parameter: transposed, cast, and in contiguous memory of its own.
    def parameter(path: jax.tree_util.KeyPath, _: Any) -> np.ndarray:
        tensor = tensors.read(tensor_name(path))
        return np.array(tensor.T if _is_matrix(path) else tensor, jnp.dtype(dtype), order="C")

    return jax.tree.map_with_path(parameter, _parameter_shapes(arch))


def open_safetensors(directory: Path) -> Tensors:
    """Opens `model.safetensors`, or the shards that its index names, without reading tensors.

    Raises:
      ConfigError: a file is missing, truncated, or holds a tensor that is not floating-point.
    """
    # 1. The file of each tensor.
    owners = {}
    for file in _shards(directory):
        opened = _open(file)
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            if name in owners:
                raise ConfigError(
                    f"`model`: {one_line(name, 80)} is in more than one file of {directory}"
                )
            owners[name] = opened
    # 2. Dtypes and shapes from the headers. Integers would be the codes of a quantized model.
    slices = {name: opened.get_slice(name) for name, opened in owners.items()}
    if bad := [f"{n} {s.get_dtype()}" for n, s in slices.items() if s.get_dtype() not in _FLOATS]:
        raise ConfigError(
            f"`model`: {directory} has tensors that are not floats: {one_line(', '.join(bad))}"
        )
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return Tensors(shapes, lambda name: owners[name].get_tensor(name))


def write_safetensors(directory: Path, params: llama.Params) -> None:
    """Writes `params` in their own dtypes; older weights in `directory` are replaced.

    A failure before the last tensor is written leaves the older weights as they were.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    # 1. Divide the tensors among files.
    leaves = {tensor_name(path): (path, leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    split = split_state_dict_into_shards_factory(
        {name: leaf for name, (_, leaf) in leaves.items()},
        get_storage_size=lambda leaf: leaf.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    # 2. Write all files under temporary names, one file in memory at a time.
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _stored(*leaves[name]) for name in names}
        save_file(tensors, directory / f"{file}.partial", metadata={"format": "pt"})
    # 3. All is on the disk: replace the older weights.
    for stale in [*directory.glob("model*.safetensors"), directory / _INDEX]:
        stale.unlink(missing_ok=True)
    for file in split.filename_to_tensors:
        (directory / f"{file}.partial").rename(directory / file)
    # 4. The index of several files: tensor name -> file.
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / _INDEX, index)


def read_json(file: Path) -> dict:
    """Reads the JSON object in `file`; raises `ConfigError` if there is none."""
    try:
        content = parse_json(read_text(file))
    except FileNotFoundError as error:
        raise ConfigError(f"`model`: there is no {file.name} in {file.parent}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"`model`: cannot read {file}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"`model`: {file} holds no JSON object")
    return content


def write_json(file: Path, content: dict) -> None:
    """Writes a JSON object in the format of Hugging Face's own tools."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def with_dtype(config: dict, dtype: str) -> dict:
    """Returns `config` for weights of another dtype, under the key that `config` has for it."""
    # `torch_dtype` is the older name.
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}


def _parse(config: dict) -> Any:
    """Returns the configuration object of `transformers`, for a supported family."""
    from transformers import AutoConfig

    family = config.get("model_type")
    if family not in list(_FAMILIES):
        raise ConfigError(
            f"`model`: its model_type is {one_line(repr(family), 80)}; supported are "
            f"{', '.join(_FAMILIES)}"
        )
    try:
        parsed = AutoConfig.for_model(**config)
        float(parsed.rope_parameters["rope_theta"])  # the only number that it does not check
        return parsed
    except Exception as error:  # of many types; each means a malformed config
        raise ConfigError(f"`model`: its config.json: {reason(error)}") from error


def _unsupported(parsed: Any) -> Iterator[tuple[str, Any]]:
    """Returns the settings, with their values, under which our model would compute other logits."""
    # Families lack some settings, hence the defaults; each row has the values that are supported.
    rope, get = parsed.rope_parameters, functools.partial(getattr, parsed)
    slides = "sliding_attention" in (get("layer_types", None) or ())
    settings = [
        ("hidden_act", parsed.hidden_act, ("silu",)),
        ("attention_bias", get("attention_bias", False), (False, None)),
        ("mlp_bias", get("mlp_bias", False), (False, None)),
        ("sliding_window", parsed.sliding_window if slides else None, (None,)),
        ("rope_type", rope["rope_type"], ("default", "llama3")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), (None, 1)),
        ("quantization_config", get("quantization_config", None), (None,)),
    ]
    return ((name, value) for name, value, supported in settings if value not in supported)


def _check_possible(arch: presets.Architecture) -> None:
    """Raises `ConfigError` if no model can have these sizes; the message names them."""
    # 1. Sizes are positive integers, other numbers positive and finite.
    heads = arch.heads, arch.kv_heads
    sizes = {
        "hidden_size": arch.width,
        "intermediate_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.seq_len,
    }
    numbers: dict[str, Any] = {"rope_theta": arch.rope_theta, "rms_norm_eps": arch.norm_eps}
    numbers |= dataclasses.asdict(arch.rope_scaling) if arch.rope_scaling else {}
    bad = [f"{name} is {one_line(repr(n), 80)}" for name, n in sizes.items() if not is_size(n)]
    bad += [
        f"{name} is {one_line(repr(number), 80)}"
        for name, number in numbers.items()
        if not isinstance(number, int | float) or not 0 < number < math.inf
    ]
    # 2. Divisions, each checked only if the numbers before are valid.
    if not bad and arch.heads % arch.kv_heads:
        bad = [f"{heads[0]} heads are not divisible by {heads[1]} key/value heads"]
    if not bad and arch.head_dim is None and arch.width % arch.heads:
        bad = [f"hidden_size {arch.width} is not divisible by {arch.heads} heads"]
    # Rotary positions turn pairs of channels.
    if not bad and (not is_size(head := arch.head_dim or arch.width // arch.heads) or head % 2):
        bad = [f"head_dim is {one_line(repr(head), 80)}, which is not positive and even"]
    if bad:
        raise ConfigError(f"`model`: impossible in its config.json: {', '.join(bad)}")


def _rope_scaling(rope: dict) -> presets.RopeScaling | None:
    """Translates the settings of rotary positions of the types that `_unsupported` allows."""
    if rope["rope_type"] == "default":
        return None
    return presets.RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_length=rope["original_max_position_embeddings"],
    )


@functools.lru_cache(maxsize=1)  # tracing a model of 30 blocks takes a second
def _parameter_shapes(arch: presets.Architecture) -> llama.Params:
    """Returns the tree of shapes and dtypes of a model's parameters."""
    return jax.eval_shape(functools.partial(llama.create, arch))[1]


def _is_matrix(path: jax.tree_util.KeyPath) -> bool:
    return getattr(path[-1], "key", None) == "kernel"


def _stored_shape(path: jax.tree_util.KeyPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in a checkpoint: `[out, in]` for our matrices `[in, out]`."""
    return shape[::-1] if _is_matrix(path) else shape


def _stored(path: jax.tree_util.KeyPath, leaf: jax.Array) -> np.ndarray:
    """Returns a parameter as it is stored; a safetensors file holds contiguous arrays only."""
    array = np.asarray(leaf)
    return np.ascontiguousarray(array.T if _is_matrix(path) else array)


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], tied: bool
) -> None:
    """Raises `ConfigError` with all differences between the expected and the found tensors."""
    missing = expected.keys() - found.keys()
    unknown = {n for n in found.keys() - expected.keys() if not _is_redundant(n, tied)}
    reshaped = {n for n in expected.keys() & found.keys() if expected[n] != found[n]}
    problems = [
        *(f"{n} {list(expected[n])} is missing" for n in missing),
        *(f"{n} {list(found[n])} is unknown" for n in unknown),
        *(f"{n} is {list(found[n])} instead of {list(expected[n])}" for n in reshaped),
    ]
    if problems:
        told = [one_line(problem) for problem in sorted(problems)[:_MOST_TOLD]]
        if len(problems) > _MOST_TOLD:
            told.append(f"and {len(problems) - _MOST_TOLD} more")
        raise ConfigError(f"`model`: the tensors do not match the config: {'; '.join(told)}")


def _is_redundant(name: str, tied: bool) -> bool:
    """Whether a tensor follows from others, or from the config as rotary frequencies do."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == _HEAD)


def _check_tied(tensors: Tensors) -> None:
    if not np.array_equal(tensors.read(_HEAD), tensors.read(_EMBEDDING)):
        raise ConfigError(
            f"`model`: {_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings is true"
        )


def _shards(directory: Path) -> list[Path]:
    """Returns the files of weights in a directory: one, or those that the index names."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise ConfigError(f"`model`: there is neither {_WEIGHTS} nor {_INDEX} in {directory}")
    names = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"`model`: {directory / _INDEX} has no weight_map")
    shards = {str(name) for name in names.values()}
    # A name with a directory in it could lead to any file of the machine.
    if bad := [name for name in sorted(shards) if not _SHARD.fullmatch(name)]:
        raise ConfigError(
            f"`model`: {directory / _INDEX} names {one_line(repr(bad[0]), 80)}, "
            "which is no .safetensors file beside it"
        )
    return [directory / name for name in sorted(shards)]


def _open(file: Path) -> Any:
    """Opens a safetensors file, which checks its header."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(file)
        return safe_open(file, "numpy")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"`model`: cannot read {file}: {reason(error)}") from error
