"""EasyDeL: GUM registered among its optimizers, trained in its `EasyDeLState` and its `Trainer`.

EasyDeL 0.3.0 needs Python 3.11 or newer, jax below 0.10, and PyTorch, since it imports
transformers; any build of PyTorch suffices, also one for CPUs. The package's docstring gives the
commands. `main` takes a minute or a few, since each of four trainers compiles its step.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import dataclasses
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments.clients.checks import bytes_per_device, check, letters
from gum_optax import dimension_numbers

# isort: split
import datasets
import easydel
from eformer.optimizers import OptimizerBuilder, register_optimizer
from flax import nnx

VOCABULARY, TOKENS = 320, 16
# Steps after which the trainer saves: amid a period, so that a resumed run needs the whole state.
SAVED = 7


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


def state() -> None:
    """Checks matrices, the optimizer of a training configuration, sharding, and `EasyDeLState`."""
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


class RecordingTrainer(easydel.Trainer):
    """EasyDeL's trainer, which also keeps the loss of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Must exist before the base class runs.
        self.losses: dict[int, float] = {}
        super().__init__(*args, **kwargs)

    def on_step_end(self, state: Any, metrics: Any, step: int) -> Any:
        self.losses[step] = float(metrics.loss)
        return super().on_step_end(state, metrics, step)


# A user's code for EasyDeL: a trainer that shards the low-rank state like its matrices.
class ShardingTrainer(RecordingTrainer):
    """A trainer whose optimizer state has the shardings of `state_shardings`."""

    def _configure_state(self) -> None:
        super()._configure_state()
        state = self.model_state
        where = gum_optax.state_shardings(
            self.tx, state.graphstate, jax.tree.map(lambda x: x.sharding, state.graphstate)
        )
        self.model_state = state.replace(
            opt_state=jax.tree.map(jax.device_put, state.opt_state, where)
        )
        # The trainer compiles its step for these shardings of input and output.
        self.state_shardings = self.model_state.shardings


def trained(kind: Any, directory: str, start: int) -> tuple[Any, list[float]]:
    """Trains for twelve steps by a trainer, which must start at a step.

    Args:
      kind: a class of trainers.
      directory: the directory of checkpoints; one is saved after `SAVED` steps.
      start: the step at which the trainer must start.

    Returns:
      The state at the end, and the losses of the steps after `start`.
    """
    # Eight sequences make two batches, so that twelve steps are six epochs.
    rows = np.random.default_rng(0).integers(1, VOCABULARY, (8, TOKENS)).astype(np.int32)
    data = datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    )
    trainer = kind(
        arguments=easydel.TrainingArguments(
            model_name="client",
            save_directory=directory,
            save_steps=SAVED,
            # A trainer resumes from the newest checkpoint, which must not be the end.
            do_last_save=False,
            optimizer="gum",
            extra_optimizer_kwargs={"rank": 8, "period": 3},
            learning_rate=3e-3,
            scheduler="none",
            num_train_epochs=6,
            total_batch_size=4,
            max_length=TOKENS,
            use_wandb=False,
        ),
        model=model().shard_model(),
        dataset_train=data,
    )
    # If a checkpoint cannot be read, EasyDeL starts anew with a warning.
    step = int(trainer.model_state.step)
    check(f"EasyDeL: `{kind.__name__}` starts at step {start}", step == start, f"({step})")
    state = trainer.train().state
    return state, [trainer.losses[step] for step in range(start + 1, 13)]


def train() -> None:
    """Checks EasyDeL's `Trainer` on a data set in memory: it learns, saves, and resumes."""
    losses: dict[str, list[float]] = {}
    state_bytes: dict[str, int] = {}
    for kind in (RecordingTrainer, ShardingTrainer):
        name = kind.__name__
        with tempfile.TemporaryDirectory() as directory:
            # 1. Twelve steps. Two batches alternate, and both losses must fall.
            state, values = trained(kind, directory, 0)
            falls = values[-1] < values[1] and values[-2] < values[0]
            check(f"EasyDeL: `{name}` learns", falls, f"{values[0]:.2f}, {values[-1]:.2f}")

            # 2. A second trainer goes on from the checkpoint.
            resumed, _ = trained(kind, directory, SAVED)
        same = all(
            (np.asarray(a) == np.asarray(b)).all()
            for a, b in zip(
                jax.tree.leaves((resumed.graphstate, resumed.opt_state)),
                jax.tree.leaves((state.graphstate, state.opt_state)),
                strict=True,
            )
        )
        check(f"EasyDeL: `{name}` resumed, weights and state equal to the last digit", same)
        losses[name] = values
        state_bytes[name] = bytes_per_device(state.opt_state)

    # 3. The state's sharding, by EasyDeL's rules and by `state_shardings`.
    theirs, ours = state_bytes.values()
    check(
        "EasyDeL: `ShardingTrainer` shards the state",
        ours < 0.6 * theirs,
        f"{ours} bytes on each of 4 devices, {theirs} by `Trainer`",
    )
    first, second = losses.values()
    check("EasyDeL: with the same losses", np.allclose(first, second, rtol=1e-4), second[-1])


def main() -> None:
    """Runs all parts, or those named as arguments: ``state``, ``train``."""
    parts = {"state": state, "train": train}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
