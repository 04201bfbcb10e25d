"""levanter: an `OptimizerConfig` that builds GUM, in its `Trainer`, sharded and resumed.

marin-levanter requires optax below 0.2.7, and this library 0.2.8 or newer, so pip cannot resolve
both; the package's docstring gives the commands. It needs Python 3.12. `train` has not yet been run
to its end.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
from levanter.checkpoint import load_checkpoint, save_checkpoint
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.optim.config import OptimizerConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from levanter.trainer_state import TrainerState

import gum_optax
from experiments.clients.checks import bytes_per_device, check, letters
from gum_optax import dimension_numbers

BATCH, VOCABULARY = 4, 320
MODEL = LlamaConfig(
    max_seq_len=16,
    hidden_dim=64,
    intermediate_dim=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    tie_word_embeddings=False,
)


# A user's code for levanter: an optimizer that a YAML file selects by `optimizer: type: gum`.
@OptimizerConfig.register_subclass("gum")
@dataclasses.dataclass(frozen=True)
class GumConfig(OptimizerConfig):
    """GUM for levanter, with levanter's schedules."""

    rank: int = 128
    period: int = 200

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        return gum_optax.gum(
            self.lr_scheduler(num_train_steps),
            gum_optax.LowRank(rank=self.rank, period=self.period),
            consistent_rms=0.2,
            # Decays all weights: levanter's own mask does not accept trees with masked leaves.
            weight_decay=self.weight_decay,
            weight_dimension_numbers=dimension_numbers.equinox_stacked,
        )


def example(tokens: np.ndarray) -> LmExample:
    """Returns a batch of windows as levanter's loader makes it."""
    named = hax.named(jnp.asarray(tokens), ("batch", MODEL.max_Pos.name))
    return hax.vmap(LmExample.causal, "batch")(named)


def loss(model: Any, batch: LmExample, *, key: Any = None) -> Any:
    """The mean loss of a batch, in the signature of levanter's trainer."""
    return model.compute_next_token_loss(batch, key=key).scalar()


def create() -> Any:
    """Creates the model; under `eqx.filter_eval_shape`, its shapes."""
    return MODEL.build(hax.Axis("vocab", VOCABULARY), key=jax.random.PRNGKey(0))


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, 16)).astype(np.int32)


def optimizer(steps: int) -> optax.GradientTransformation:
    """Returns GUM as a configuration builds it, with a constant rate."""
    return GumConfig(
        learning_rate=3e-3, weight_decay=0.0, warmup=0.0, lr_schedule="constant", rank=8, period=3
    ).build(steps)


def names() -> None:
    """Checks matrices inferred from the loss against the rule for stacked Equinox modules."""
    # Only arrays: modules also hold functions and settings.
    params = eqx.filter(eqx.filter_eval_shape(create), lambda x: hasattr(x, "shape"))
    numbers = dimension_numbers.infer(loss, params, jax.eval_shape(example, tokens()))
    found = letters(params, numbers)
    matrices = {role: axes for role, axes in found.items() if axes}
    check("levanter: every hidden matrix by its use", len(matrices) == 7, matrices)
    agree = letters(params, dimension_numbers.equinox_stacked) == found
    check("levanter: `equinox_stacked` agrees", agree)


def types() -> None:
    """Checks a step of levanter's `TrainerState`, traced on shapes: nothing is compiled."""
    tx = optimizer(20)

    def init() -> Any:
        return TrainerState.init(
            tx, create(), key=jax.random.PRNGKey(1), mp=jmp.get_policy("f32"), is_trainable=True
        )

    def step(state: Any, batch: Any) -> Any:
        gradients = eqx.filter_grad(loss)(state.model, batch)
        return state.take_step(gradients, key=jax.random.PRNGKey(2))[0]

    # The structure before and after must agree, or the trainer would compile every step anew.
    before = eqx.filter_eval_shape(init)
    after = eqx.filter_eval_shape(step, before, jax.eval_shape(example, tokens()))
    same = jax.tree.structure(before) == jax.tree.structure(after)
    check("levanter: a step of its `TrainerState` keeps the state's structure", same)
    bases = optax.tree.get(before.opt_state, "LowRankState").basis
    check("levanter: seven groups, of rank 8", [b.shape[-1] for b in bases.values()] == [8] * 7)


def train() -> None:
    """Checks levanter's `Trainer` on four devices that shard parameters along `embed`; resumes."""
    with tempfile.TemporaryDirectory() as directory:
        # No tracker, no profiles, no checkpoints of its own: all files go into the directory.
        config = TrainerConfig(
            id="client",
            tracker=NoopConfig(),
            num_train_steps=20,
            train_batch_size=BATCH,
            log_dir=Path(directory),
            log_jaxprs=False,
            log_xla_hlo=False,
            require_accelerator=False,
        )
        # 1. Twelve steps on one batch, with a checkpoint after six.
        built = optimizer(config.num_train_steps)
        with Trainer(config, built, loss) as trainer:
            state = trainer.initial_state(jax.random.PRNGKey(1), model_init=create)
            # One batch for all steps: the loss must fall.
            batch = example(tokens())
            values, saved, halfway = [], None, 6
            for step in range(12):
                if step == halfway:
                    saved = f"{directory}/checkpoint"
                    save_checkpoint(state.saveable_state, step, saved, is_temporary=False)
                info = trainer.train_step(state, batch)
                state = info.state
                values.append(info.loss)
            check(
                "levanter: it learns", values[-1] < values[0], f"{values[0]:.2f}, {values[-1]:.2f}"
            )

            # 2. The bytes of state on each device, and with the shardings of `state_shardings`.
            # `state_shardings` takes the shardings that the trainer gave the parameters.
            arrays = eqx.filter(state.trainable_model, eqx.is_array)
            where = jax.tree.map(lambda x: x.sharding, arrays)
            expected = gum_optax.state_shardings(built, arrays, where)
            # Put there to count bytes; training goes on with the trainer's own sharding.
            wanted = jax.tree.map(jax.device_put, state.opt_state, expected)
            each, ours, whole = (
                bytes_per_device(state.opt_state),
                bytes_per_device(wanted),
                sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
            )
            print(f"     levanter: {each} bytes of state on each of 4 devices, {ours} by ", end="")
            print(f"`state_shardings`, {whole} in all", flush=True)
            check("levanter: the state is sharded", each < 0.7 * whole)

            # 3. Resume from the checkpoint. Arrays come from the file, all else from a fresh state.
            fresh = trainer.initial_state(jax.random.PRNGKey(1), model_init=create)
            assert saved is not None
            resumed = eqx.combine(load_checkpoint(fresh.saveable_state, saved), fresh)
            for _ in range(halfway, 12):
                resumed = trainer.train_step(resumed, batch).state
            same = all(
                (np.asarray(a) == np.asarray(b)).all()
                for a, b in zip(
                    jax.tree.leaves(eqx.filter(resumed.model, eqx.is_array)),
                    jax.tree.leaves(eqx.filter(state.model, eqx.is_array)),
                    strict=True,
                )
            )
            check("levanter: resumed after six steps, equal to the last digit", same)


def main() -> None:
    """Runs all parts, or those named as arguments: ``names``, ``types``, ``train``."""
    parts = {"names": names, "types": types, "train": train}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
