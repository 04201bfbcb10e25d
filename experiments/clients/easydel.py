"""EasyDeL: GUM registered among its optimizers, trained in its `EasyDeLState` on a mesh.

EasyDeL 0.3.0 needs Python 3.11 or newer, jax below 0.10, and PyTorch, since it imports
transformers. The package's docstring gives the commands.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments.clients.checks import bytes_per_device, check, letters
from gum_optax import dimension_numbers

# isort: split
import easydel
from eformer.optimizers import OptimizerBuilder, register_optimizer
from flax import nnx

VOCABULARY, TOKENS = 320, 16


@dataclasses.dataclass
class GumSettings:
    """The options of GUM that a training configuration may set."""

    rank: int = 128
    period: int = 200


# A user's code for EasyDeL: registers an optimizer by name, which is built from EasyDeL's schedule.
@register_optimizer("gum")
@dataclasses.dataclass
class GumOptimizer(OptimizerBuilder):
    """GUM, with Flax's convention for its matrices."""

    config: GumSettings

    def build(self, scheduler: optax.Schedule) -> optax.GradientTransformation:
        return gum_optax.gum(
            scheduler,
            gum_optax.LowRank(rank=self.config.rank, period=self.config.period),
            consistent_rms=0.2,
            weight_dimension_numbers=dimension_numbers.flax,
        )


def model() -> Any:
    """A tiny Llama on four devices."""
    config = easydel.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_mechanism="vanilla",
        sharding_axis_dims=(1, 4, 1, 1, 1),
    )
    return easydel.LlamaForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=easydel.Rngs(0)
    )


def main() -> None:
    """Checks matrices, the optimizer of a training configuration, sharding, and training."""
    net = model()
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (4, TOKENS)).astype(np.int32)
    with net.mesh:
        net = net.shard_model()
        graph, params, rest = nnx.split(net, nnx.Param, ...)

        def forward(params: Any, tokens: Any) -> Any:
            return nnx.merge(graph, params, rest)(input_ids=tokens).logits

        # 1. Matrices inferred from the forward pass, and by Flax's convention: q, k, v, o and three
        #    of the MLP.
        found = letters(params, dimension_numbers.infer(forward, params, tokens))
        matrices = {role: axes for role, axes in found.items() if axes}
        check("EasyDeL: every kernel is a matrix", len(matrices) == 7, matrices)
        check("EasyDeL: `flax` agrees", letters(params, dimension_numbers.flax) == found)

        # 2. The optimizer by its name, as EasyDeL's trainers make it.
        arguments = easydel.TrainingArguments(
            model_name="client",
            optimizer="gum",
            extra_optimizer_kwargs={"rank": 8, "period": 3},
            learning_rate=3e-3,
            scheduler="none",
            num_train_epochs=1,
            total_batch_size=4,
            use_wandb=False,
        )
        tx, _ = arguments.get_optimizer_and_scheduler(20)
        state = easydel.EasyDeLState.create(model=net).init_tx(tx)
        low_rank = optax.tree.get(state.opt_state, "LowRankState")
        ranks = {jax.tree.leaves(basis)[0].shape[-1] for basis in low_rank.basis.values()}
        check("EasyDeL: `optimizer='gum'` with its own options", ranks == {8}, ranks)

        # 3. The state's sharding. EasyDeL's partition rules match names of parameters and replicate
        #    everything else, so that the low-rank state needs `state_shardings`.
        replicated = bytes_per_device(state.opt_state)
        where = gum_optax.state_shardings(
            tx, state.graphstate, jax.tree.map(lambda x: x.sharding, state.graphstate)
        )
        state = state.replace(opt_state=jax.tree.map(jax.device_put, state.opt_state, where))
        sharded = bytes_per_device(state.opt_state)
        check(
            "EasyDeL: the state is sharded by `state_shardings`",
            sharded < replicated,
            f"{sharded} bytes on each of 4 devices, {replicated} by its own rules",
        )

        # 4. Training, on one batch.
        @jax.jit
        def step(state: Any, tokens: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = state.merge(params)(input_ids=tokens).logits
                return jnp.mean(
                    optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
                )

            value, gradients = jax.value_and_grad(loss)(state.graphstate)
            return state.apply_gradients(grads=gradients), value

        values = []
        for _ in range(12):
            state, value = step(state, tokens)
            values.append(float(value))
        check("EasyDeL: it learns", values[-1] < values[0], f"{values[0]:.2f}, {values[-1]:.2f}")


if __name__ == "__main__":
    main()
