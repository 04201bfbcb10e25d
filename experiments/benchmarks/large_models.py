"""Optimizer state of models with 7 to 70 billion parameters.

`python -m experiments.benchmarks.large_models` counts bytes from shapes alone, which follow from
the published architectures: nothing is downloaded, allocated or run.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import gum_optax
from experiments import reporting
from experiments.benchmarks import parameters as trees
from experiments.trainer import cli
from experiments.trainer.options import choose
from gum_optax import dimension_numbers

PROGRAM = "experiments.benchmarks.large_models"
_LEARNING_RATE = 1e-3  # does not affect bytes
_GIB = 2**30
# Module -> leaf of embedding and head, whose state is recognized by shape: no other leaf has it.
_WORDS = {"embed": "embedding", "lm_head": "kernel"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Count the bytes of optimizer state, by model and optimizer."""

    #: Models whose parameters are updated.
    models: tuple[str, ...] = ("Llama-3-8B", "Qwen2.5-7B", "Gemma-2-9B", "Llama-3-70B")
    #: Rank of GUM.
    rank: int = 128
    #: Gamma: full-rank layers of each role in a period.
    full_rank_layers: int = 2
    #: Rank of GaLore.
    galore_rank: int = 512
    #: Data type of the parameters; the data type of the state is each optimizer's choice.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    #: Result file.
    out: Path = Path("experiments/results/plans.json")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that determine the shapes of its parameters."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int  # of the MLP
    vocab_size: int
    tied: bool = False  # the embedding is the head, too
    qkv_biases: bool = False
    norms_per_layer: int = 2


# From the published configurations of the models, in the order of the fields above.
MODELS = {
    "Llama-3-8B": Decoder(32, 4096, 32, 8, 128, 14336, 128_256),
    "Qwen2.5-7B": Decoder(28, 3584, 28, 4, 128, 18944, 152_064, qkv_biases=True),
    "Llama-3-70B": Decoder(80, 8192, 64, 8, 128, 28672, 128_256),
    "Gemma-2-9B": Decoder(42, 3584, 16, 8, 256, 14336, 256_000, tied=True, norms_per_layer=4),
}


def main(arguments: Sequence[str]) -> int:
    """Counts all models; writes and prints the plans and a table. Returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    for name in config.models:
        choose("models", name, MODELS)
    found = {name: plan(config, MODELS[name]) for name in config.models}
    reporting.write(config.out, config, models=found)
    for name, each in found.items():
        print(f"\n{name}\n{each['plan']}")
    reporting.table(
        f"Optimizer state, GiB (GUM at rank {config.rank}, GaLore at {config.galore_rank})",
        ("model", "parameters, 10^9", "optimizer", "state", "embedding, head", "share"),
        (
            (name, each["parameters"] / 1e9, optimizer, row["bytes"] / _GIB,
             row["embedding_and_head_bytes"] / _GIB, row["embedding_and_head_bytes"] / row["bytes"])
            for name, each in found.items()
            for optimizer, row in each["state"].items()
        ),
    )  # fmt: skip
    return 0


def plan(config: Config, decoder: Decoder) -> dict[str, Any]:
    """Counts the state of every optimizer for one model; includes GUM's memory plan as text."""
    params = parameters(decoder, jnp.dtype(config.dtype))
    compared = optimizers(config)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameter_bytes": trees.size(params),
        "state": {name: state(tx, params) for name, tx in compared.items()},
        "plan": str(gum_optax.memory_plan(compared["GUM"], params)),
    }


def optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers to compare.

    All leave embedding, head, norms and biases to AdamW, except for the lean ones: these keep
    momentum and bases in 8 bits, and their fallback is a factored second moment without momentum.
    """
    numbers = dimension_numbers.default
    residual = gum_optax.residuals.sampled(config.full_rank_layers)
    compression = gum_optax.LowRank(config.rank, residual=residual)
    int8 = gum_optax.storages.int8()
    in_8_bits = dataclasses.replace(compression, storage=int8, basis_storage=int8)
    factored = gum_optax.fallbacks.factored()
    return {
        "GUM": gum_optax.gum(_LEARNING_RATE, compression),
        "AdamW": optax.adamw(_LEARNING_RATE),
        "Muon": optax.contrib.muon(_LEARNING_RATE, muon_weight_dimension_numbers=numbers),
        "GaLore": gum_optax.adamw(_LEARNING_RATE, gum_optax.galore(config.galore_rank)),
        "8-bit AdamW": gum_optax.quantized(optax.adamw(_LEARNING_RATE)),
        "8-bit Muon, lean": gum_optax.muon(_LEARNING_RATE, fallback=factored),
        "8-bit GUM, lean": gum_optax.gum(_LEARNING_RATE, in_8_bits, fallback=factored),
    }


def state(tx: optax.GradientTransformation, params: Any) -> dict[str, int]:
    """Counts the bytes of the state, and those of embedding and head in it."""
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    words = {params[name][leaf].shape for name, leaf in _WORDS.items() if name in params}
    # 8-bit codes have the shapes of the arrays that they stand for. Their scales have other shapes
    # and are left out of the share; they are few.
    of_words = [leaf for leaf in leaves if leaf.shape in words]
    return {"bytes": trees.size(leaves), "embedding_and_head_bytes": trees.size(of_words)}


def parameters(decoder: Decoder, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Returns the parameters of a model as shapes; kernels are ``[fan_in, fan_out]``."""
    D, V = decoder.width, decoder.vocab_size

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def projection(fan_in: int, fan_out: int, bias: bool = False) -> dict[str, Any]:
        kernel = {"kernel": leaf(fan_in, fan_out)}
        return kernel | {"bias": leaf(fan_out)} if bias else kernel

    def layer() -> dict[str, Any]:
        # Heads may be wider than width / heads (Gemma), and keys and values have fewer of them.
        q, kv = (heads * decoder.head_width for heads in (decoder.heads, decoder.kv_heads))
        inputs = {"q": q, "k": kv, "v": kv}
        biases = decoder.qkv_biases
        return {
            "attn": {name: projection(D, width, biases) for name, width in inputs.items()}
            | {"o": projection(q, D)},
            "mlp": {
                "gate": projection(D, decoder.hidden),
                "up": projection(D, decoder.hidden),
                "down": projection(decoder.hidden, D),
            },
            **{f"norm_{i}": {"scale": leaf(D)} for i in range(decoder.norms_per_layer)},
        }

    # The leaves are named by the conventions from which `dimension_numbers.default` finds matrices.
    whole = {
        "embed": {"embedding": leaf(V, D)},
        "layers": [layer() for _ in range(decoder.layers)],
        "norm": {"scale": leaf(D)},
    }
    return whole if decoder.tied else whole | {"lm_head": projection(D, V)}


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
