"""The training loop: `train(config)` prepares the data, runs the steps, saves and measures."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gum_optax
from experiments import checkpoint, compatibility, data, model, optimizers, processes
from experiments import mesh as meshes
from experiments.config import Config, check
from experiments.report import Report, Silence, metrics_path, read_metrics


class Result(NamedTuple):
    """Outcome of a run, with its last weights. `stopped_by` is the signal that ended it, if any."""

    step: int
    stopped_by: int | None
    validation_loss: float
    seconds_per_step: float
    state_bytes: int
    parameters: int
    metrics: list[dict]
    params: model.Params


class State(NamedTuple):
    """All that a step changes."""

    params: model.Params
    opt_state: optax.OptState


def train(config: Config, *, show: bool = True) -> Result:
    """Trains from the start or, with `config.resume`, from the last checkpoint.

    SIGINT and SIGTERM end the run after the current step, with a checkpoint.

    Args:
      config: everything about the run.
      show: whether to print a progress bar and what happens.

    Raises:
      ConfigError: an option cannot work; the message is one line.
    """
    check(config)
    mesh = meshes.build(config.mesh)
    with meshes.use(mesh):
        return _train(config, mesh, show)


def _train(config: Config, mesh: Mesh | None, show: bool) -> Result:
    arch = model.architecture(config)
    rows = meshes.rows(mesh, config.batch_size)
    put = partial(meshes.put, mesh, config.batch_size)
    checkpoint.check_run_directory(config)
    tokens = processes.in_turn(lambda: data.prepare(config, arch.vocab_size))
    processes.check_equal("--corpus: the text", tokens.digest)
    arch = dataclasses.replace(arch, vocab_size=tokens.tokenizer.get_vocab_size())
    batches = data.training_batches(tokens, arch.seq_len, config.batch_size, config.seed, rows)
    held_out = data.validation_batches(
        tokens, arch.seq_len, config.batch_size, config.validation_batches, rows
    )
    if config.resume:
        checkpoint.check_same_data(config, tokens.digest)
    elif processes.is_first():
        checkpoint.write_description(config, tokens.digest)

    static, state, step_fn = start(config, arch, mesh)
    evaluate = jax.jit(partial(model.loss, static))
    checkpoints, step = checkpoint.Checkpoints(config), 0
    if config.resume:
        step = checkpoints.latest() or 0
        state, position = checkpoints.restore(step, state)
        batches.set_state(position)
    reporter = Report if processes.is_first() else Silence
    tokens_per_step = config.batch_size * arch.seq_len
    report = reporter(config, start=step, tokens_per_step=tokens_per_step, show=show)
    report.say(_introduction(config, arch, tokens, state, mesh))
    if config.resume and (note := compatibility.other_versions(checkpoints.description(step))):
        report.say(note)
    closing = contextlib.closing
    with closing(report), closing(checkpoints), processes.signals(step) as stop:
        while step < config.steps and stop.signal is None:
            state, metrics = step_fn(state, put(next(batches)))
            step += 1
            report.step(step, metrics)
            if _due(step, config.validate_every, config):
                report.flush()
                report.validation(step, _mean_loss(evaluate, state.params, map(put, held_out)))
            if stop.reached(step) or _due(step, config.checkpoint_every, config):
                report.flush()
                checkpoints.save(step, state, batches.get_state())
                report.restart_clock()
    return _result(config, step, stop.signal, report.seconds_per_step, state)


def start(
    config: Config, arch: model.Architecture, mesh: Mesh | None = None
) -> tuple[Any, State, Callable]:
    """The static model, the first state, and the compiled `(state, batch) -> (state, metrics)`."""
    create = partial(model.create, arch, dtype=config.dtype, seed=config.seed)
    optimizer = optimizers.build(config)

    def first() -> tuple[Any, State]:
        static, params = create()
        return static, State(params, optimizer.init(params))

    def step(state: State, batch_BxL: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(partial(model.loss, static))(state.params, batch_BxL)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    if mesh is None:
        static, state = first()
        return static, state, jax.jit(step, donate_argnums=0)
    _, shapes = jax.eval_shape(create)
    params = meshes.param_shardings(mesh, shapes)
    shardings = State(params, gum_optax.state_shardings(optimizer, shapes, params))
    static, state = jax.jit(first, out_shardings=(None, shardings))()
    metrics = NamedSharding(mesh, PartitionSpec())
    return static, state, jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))


def state_bytes(opt_state: optax.OptState) -> int:
    """Bytes of all arrays in an optimizer state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))


def _due(step: int, every: int, config: Config) -> bool:
    return step % every == 0 or step == config.steps


def _mean_loss(evaluate: Callable, params: model.Params, batches: Iterable[Any]) -> float:
    return float(np.mean([evaluate(params, batch) for batch in batches]))


def _introduction(
    config: Config, arch: model.Architecture, tokens: data.Data, state: State, mesh: Mesh | None
) -> str:
    epochs = config.steps * config.batch_size * arch.seq_len / len(tokens.train)
    rank, layers = config.rank, config.full_rank_layers
    plan = str(gum_optax.memory_plan(state.params, rank=rank, full_rank_layers=layers))
    if config.optimizer in optimizers.FULL_RANK:
        plan = "\n".join(plan.splitlines()[-2:])  # the comparison, without GUM's stacks
    return (
        f"{config.preset}: {model.parameter_count(state.params):,} parameters, "
        f"{arch.layers} blocks of width {arch.width}, vocabulary {arch.vocab_size:,}, "
        f"windows of {arch.seq_len} tokens\n"
        f"{' '.join(config.corpus)}: {len(tokens.train):,} training tokens (this run reads them "
        f"{epochs:.2f} times), {len(tokens.validation):,} held out\n"
        f"memory plan of GUM (rank {rank}, {layers} full-rank per role):\n{plan}\n"
        f"this run, {config.optimizer}: {state_bytes(state.opt_state) / 2**20:.1f} MiB of "
        f"optimizer state, peak learning rate {config.learning_rate:g}, "
        f"on {jax.devices()[0].device_kind}"
        + (f"\n{meshes.describe(mesh, state.params)}" if mesh else "")
    )


def _result(
    config: Config, step: int, stopped_by: int | None, seconds_per_step: float, state: State
) -> Result:
    metrics = read_metrics(metrics_path(config)) if processes.is_first() else []
    losses = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    return Result(
        step=step,
        stopped_by=stopped_by,
        validation_loss=losses[-1] if losses else float("nan"),
        seconds_per_step=seconds_per_step,
        state_bytes=state_bytes(state.opt_state),
        parameters=model.parameter_count(state.params),
        metrics=metrics,
        params=state.params,
    )
