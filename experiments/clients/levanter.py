"""levanter: an `OptimizerConfig` that builds GUM, in its `Trainer`, sharded and resumed.

marin-levanter requires optax below 0.2.7, and this library 0.2.8 or newer, so pip cannot resolve
both; the package's docstring gives the commands. It needs Python 3.12. `train` takes some minutes,
since each of four trainers compiles its initial state, its step, and a step that computes norms
(levanter's `watch`, every tenth step).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import dataclasses
import functools
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
from levanter.checkpoint import CheckpointerConfig
from levanter.data.dataset import ListAsyncDataset
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


# A user's code for levanter: a trainer that shards the low-rank state like its matrices.
class ShardingTrainer(Trainer):
    """A trainer whose optimizer state has the shardings of `state_shardings`.

    levanter shards named arrays only, and its `named_jit` replicates all other results. So the step
    is compiled by Equinox, with constraints inside.
    """

    def initial_state(self, *args: Any, **kwargs: Any) -> Any:
        state = super().initial_state(*args, **kwargs)
        arrays = eqx.filter(state.trainable_model, eqx.is_array)
        where = jax.tree.map(lambda x: x.sharding, arrays)
        self.where = gum_optax.state_shardings(self.optimizer, arrays, where)
        placed = jax.tree.map(jax.device_put, state.opt_state, self.where)
        return dataclasses.replace(state, opt_state=placed)

    def _placed_step(self, state: Any, batch: Any, options: Any, **kwargs: Any) -> Any:
        result = self._train_step(state, batch, options, **kwargs)
        placed = jax.lax.with_sharding_constraint(result.new_state.opt_state, self.where)
        new_state = dataclasses.replace(result.new_state, opt_state=placed)
        return dataclasses.replace(result, new_state=new_state)

    @functools.cached_property
    def _jit_train_step_fn(self) -> Any:
        return eqx.filter_jit(self._placed_step, donate="all")

    @functools.cached_property
    def _jit_train_step_fn_no_hook(self) -> Any:
        return eqx.filter_jit(functools.partial(self._placed_step, _no_hooks=True), donate="all")


def trained(kind: Any, directory: str, start: int) -> tuple[Any, list[float]]:
    """Trains for twelve steps by a trainer, which must start at a step.

    Args:
      kind: a class of trainers.
      directory: the directory of logs and checkpoints; one is saved after seven steps.
      start: the step at which the trainer must start.

    Returns:
      The trainer's state at the end, and the losses of the steps from `start` on.
    """
    steps = 12
    config = TrainerConfig(
        id="client",
        tracker=NoopConfig(),
        num_train_steps=steps,
        train_batch_size=BATCH,
        # Counts from zero: the step of index six is the seventh.
        checkpointer=CheckpointerConfig(base_path=directory, keep=[{"every": 6}]),
        log_dir=Path(directory),
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
    )
    # The same batch for all steps: the loss must fall.
    rows = [LmExample.causal(hax.named(row, MODEL.max_Pos.name)) for row in tokens()]
    losses = []
    with kind(config, optimizer(steps), loss) as trainer:
        state = trainer.initial_state(jax.random.PRNGKey(1), model_init=create)
        step = int(state.step)
        check(f"levanter: `{kind.__name__}` starts at step {start}", step == start, f"({step})")
        loader = trainer.data_loader(ListAsyncDataset(rows * steps)).iter_from_step(step)
        # Unlike `trainer.train`, this saves no checkpoint at the end, from which to resume.
        for info in trainer.training_steps(state, loader):
            state = info.state
            losses.append(info.loss)
    return state, losses


def train() -> None:
    """Checks levanter's `Trainer` on four devices that shard parameters along `embed`; resumes."""
    losses: dict[str, list[float]] = {}
    # Bytes on one device: of the matrices' state and of the fallback's.
    state_bytes: dict[str, tuple[int, int]] = {}
    whole = 0
    for kind in (Trainer, ShardingTrainer):
        name = kind.__name__
        with tempfile.TemporaryDirectory() as directory:
            # 1. Twelve steps.
            state, values = trained(kind, directory, 0)
            falls = values[-1] < values[0]
            check(f"levanter: `{name}` learns", falls, f"{values[0]:.2f}, {values[-1]:.2f}")

            # 2. A second trainer goes on from the checkpoint.
            resumed, _ = trained(kind, directory, 7)
        same = all(
            (np.asarray(a) == np.asarray(b)).all()
            for a, b in zip(
                jax.tree.leaves(eqx.filter((resumed.model, resumed.opt_state), eqx.is_array)),
                jax.tree.leaves(eqx.filter((state.model, state.opt_state), eqx.is_array)),
                strict=True,
            )
        )
        check(f"levanter: `{name}` resumed, weights and state equal to the last digit", same)
        parts = [state.opt_state.inner_states[part] for part in ("matrix", "fallback")]
        losses[name] = values
        state_bytes[name] = (bytes_per_device(parts[0]), bytes_per_device(parts[1]))
        whole = sum(x.nbytes for x in jax.tree.leaves(parts[0]))

    # 3. The state's sharding, by levanter and by `state_shardings`.
    (theirs, fallback), (ours, other) = state_bytes.values()
    check(
        "levanter: `Trainer` shards the fallback's state and replicates the matrices'",
        theirs == whole,
        f"{theirs} bytes of the matrices' on each of 4 devices, {fallback} of the fallback's",
    )
    smaller = ours < 0.4 * theirs and other == fallback
    check("levanter: `ShardingTrainer` shards both", smaller, f"{ours} and {other} bytes")
    first, second = losses.values()
    check("levanter: with the same losses", np.allclose(first, second, rtol=1e-4), second[-1])


def main() -> None:
    """Runs all parts, or those named as arguments: ``names``, ``types``, ``train``."""
    parts = {"names": names, "types": types, "train": train}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
