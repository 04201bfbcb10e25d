"""google-tunix: `PeftTrainer` with GUM on a mesh, full training and LoRA, interrupted and resumed.

The package's docstring gives the commands.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import AxisType
from tunix.models.gemma import model as gemma
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import gum_optax
from experiments.clients.checks import bytes_per_device, check, letters
from gum_optax import dimension_numbers

BATCH, TOKENS, VOCABULARY, WIDTH = 4, 16, 320, 64
# Tiny models of three architectures, of the same sizes.
SIZES = {
    "num_layers": 3,
    "embed_dim": WIDTH,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
LLAMA = llama3.ModelConfig(**SIZES, vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-5)
QWEN_EXPERTS = qwen3.ModelConfig(
    **SIZES,
    vocab_size=VOCABULARY,
    rope_theta=10_000,
    norm_eps=1e-6,
    num_experts=4,
    num_experts_per_tok=2,
)
GEMMA = gemma.ModelConfig(
    **SIZES,
    num_embed=VOCABULARY,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(gemma.AttentionType.GLOBAL,) * 3,
)
# The axes that tunix' models name in their metadata.
MESH = jax.make_mesh((4, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def inputs(tokens: Any) -> dict[str, Any]:
    """Makes the inputs of tunix' models from a batch of its trainer, with a causal mask."""
    batch, length = tokens.input_tokens.shape
    return {
        "input_tokens": tokens.input_tokens,
        "input_mask": tokens.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (batch, length)),
        "attention_mask": jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (batch, length, length)
        ),
    }


def batches(count: int) -> list[TrainingInput]:
    """Returns batches of random tokens ``[BATCH, TOKENS]``, the same in every run."""
    rng = np.random.default_rng(0)
    shape = (count, BATCH, TOKENS)
    return [
        TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))
        for tokens in rng.integers(1, VOCABULARY, shape).astype(np.int32)
    ]


def inferred(model: nnx.Module) -> Any:
    """Infers the dimension numbers of a model from its own forward pass."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    example = inputs(batches(1)[0])

    def forward(params: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        tokens, positions, mask = (
            example[key] for key in ("input_tokens", "positions", "attention_mask")
        )
        return model(tokens, positions, None, mask)[0]

    return dimension_numbers.infer(forward, params)


def create(model_class: Any, config: Any) -> nnx.Module:
    """Creates a model on the mesh, sharded by its own metadata."""

    @nnx.jit
    def make() -> nnx.Module:
        model = model_class(config, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return model

    with MESH:
        return make()


def optimizer(numbers: Any) -> Any:
    """Returns GUM with a small rank; `numbers` is a tree of dimension numbers or a rule."""
    compression = gum_optax.LowRank(rank=8, period=3)
    return gum_optax.gum(3e-3, compression, consistent_rms=0.2, weight_dimension_numbers=numbers)


def train(model: nnx.Module, tx: Any, steps: int, checkpoints: str | None = None) -> PeftTrainer:
    """Trains to step `steps`, from the newest checkpoint if there is one; returns the trainer."""
    # No evaluation within these runs, which are shorter than a hundred steps.
    config = TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=checkpoints
    )
    trainer = PeftTrainer(model, tx, config).with_gen_model_input_fn(inputs)
    with MESH:
        trainer.train(batches(steps))
    trainer.close()
    return trainer


def arrays(node: Any) -> list[np.ndarray]:
    """Returns the parameters of a module as NumPy arrays, for comparison."""
    return [np.asarray(x) for x in jax.tree.leaves(nnx.as_pure(nnx.state(node, nnx.Param)))]


def names_and_use() -> None:
    """Checks that inferred matrices agree with the conventions, for each of tunix' models."""
    # Model -> (class, configuration, convention); None where no convention fits.
    models = {
        "llama3": (llama3.Llama3, LLAMA, dimension_numbers.flax),
        "qwen3, experts": (qwen3.Qwen3, QWEN_EXPERTS, None),
        "gemma": (gemma.Gemma, GEMMA, dimension_numbers.gemma),
    }
    for name, (model_class, config, rule) in models.items():
        # Shapes alone; default arguments bind this turn's class and configuration.
        model = nnx.eval_shape(lambda c=model_class, g=config: c(g, rngs=nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        found = letters(params, inferred(model))
        matrices = {role: axes for role, axes in found.items() if axes}
        check(f"{name}: every kernel is a matrix", len(matrices) >= 6, matrices)
        if rule is not None:
            check(f"{name}: `infer` and `{rule.__name__}` agree", letters(params, rule) == found)


def full() -> None:
    """Checks full training on four devices: sharding by metadata, progress, and exact resuming."""
    # 1. Six steps without interruption.
    model = create(llama3.Llama3, LLAMA)
    before = arrays(model)
    numbers = inferred(model)
    with tempfile.TemporaryDirectory() as directory:
        trainer = train(model, optimizer(numbers), 6)
        moved = any((a != b).any() for a, b in zip(before, arrays(model), strict=True))
        check("PeftTrainer: six steps", moved)

        # 2. The trainer shards the state by its metadata. `state_shardings` also cuts projected
        #    momentum along the axis of the rows, which metadata cannot say.
        params = nnx.state(model, nnx.Param)
        shardings = gum_optax.state_shardings(
            trainer.optimizer.tx, params, nnx.get_named_sharding(params, MESH)
        )
        state = nnx.as_pure(nnx.state(trainer.optimizer, nnx.OptState))["opt_state"]
        got = bytes_per_device(state)
        expected = sum(
            int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize
            for x, sharding in zip(
                jax.tree.leaves(jax.eval_shape(trainer.optimizer.tx.init, params)),
                jax.tree.leaves(shardings),
                strict=True,
            )
        )
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        check(
            "PeftTrainer: state sharded by its metadata",
            expected <= got < 0.4 * whole,
            f"{got} bytes on each of 4 devices, {expected} by `state_shardings`, {whole} in all",
        )

        # 3. Three steps, then new objects that resume from the checkpoint: K = 3, so that the
        #    first step after it is a refresh.
        half = create(llama3.Llama3, LLAMA)
        train(half, optimizer(numbers), 3, directory)
        resumed = create(llama3.Llama3, LLAMA)
        train(resumed, optimizer(numbers), 6, directory)
        equal = all((a == b).all() for a, b in zip(arrays(model), arrays(resumed), strict=True))
        check("PeftTrainer: resumed after three steps, equal to the last digit", equal)


def lora() -> None:
    """Checks LoRA, where the trainer passes only the adapters, which Flax's convention finds."""
    # 1. The model, with adapters at two of its projections.
    model = create(llama3.Llama3, LLAMA)
    provider = qwix.LoraProvider(module_path=".*(q_proj|o_proj).*", rank=16, alpha=2.0)
    example = inputs(batches(1)[0])
    model = qwix.apply_lora_to_model(
        model,
        provider,
        input_tokens=example["input_tokens"],
        positions=example["positions"],
        cache=None,
        attention_mask=example["attention_mask"],
        rngs=nnx.Rngs(1),
    )
    # 2. GUM at a quarter of the adapters' rank.
    adapters = nnx.state(model, nnx.LoRAParam)
    tx = gum_optax.gum(
        3e-3,
        gum_optax.LowRank(rank=4, period=3),
        weight_dimension_numbers=dimension_numbers.flax,
    )
    # 3. Four steps, which must change every adapter.
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.as_pure(adapters))]
    train(model, tx, 4)
    after = [np.asarray(x) for x in jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.LoRAParam)))]
    moved = sum((a != b).any() for a, b in zip(before, after, strict=True))
    check("LoRA: adapters train", moved == len(before), f"{moved} of {len(before)}")


def main() -> None:
    """Runs all parts, or those named as arguments: ``names_and_use``, ``full``, ``lora``."""
    parts = {"names_and_use": names_and_use, "full": full, "lora": lora}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
