"""The training loop: `train(config)` prepares the data, runs the steps, saves and measures."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import gum_optax
from experiments import checkpoint, data, model, optimizers
from experiments.config import Config, check
from experiments.report import Report, metrics_path, read_metrics


class Result(NamedTuple):
    """Outcome of a run. `stopped_by` is the signal that ended it early, if one did."""

    step: int
    stopped_by: int | None
    validation_loss: float
    seconds_per_step: float
    state_bytes: int
    parameters: int
    metrics: list[dict]


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
    arch = model.architecture(config)
    checkpoint.check_run_directory(config)
    tokens = data.prepare(config, arch.vocab_size)
    arch = dataclasses.replace(arch, vocab_size=tokens.tokenizer.get_vocab_size())
    batches = data.training_batches(tokens, arch.seq_len, config.batch_size, config.seed)
    held_out = data.validation_batches(
        tokens, arch.seq_len, config.batch_size, config.validation_batches
    )
    if config.resume:
        checkpoint.check_same_data(config, tokens.digest)
    else:
        checkpoint.write_description(config, tokens.digest)

    static, state, step_fn = start(config, arch)
    evaluate = jax.jit(partial(model.loss, static))
    checkpoints, step = checkpoint.Checkpoints(config), 0
    if config.resume:
        step = checkpoints.latest() or 0
        state, position = checkpoints.restore(step, state)
        batches.set_state(position)
    report = Report(config, start=step, tokens_per_step=config.batch_size * arch.seq_len, show=show)
    report.say(_introduction(config, arch, tokens, state))
    with contextlib.closing(report), contextlib.closing(checkpoints), _signals() as stop:
        while step < config.steps and stop.signal is None:
            state, metrics = step_fn(state, next(batches))
            step += 1
            report.step(step, metrics)
            if _due(step, config.validate_every, config):
                report.flush()
                report.validation(step, _mean_loss(evaluate, state.params, held_out))
            if _due(step, config.checkpoint_every, config) or stop.signal:
                report.flush()
                checkpoints.save(step, state, batches.get_state())
                report.restart_clock()
    return _result(config, step, stop.signal, report.seconds_per_step, state)


def start(config: Config, arch: model.Architecture) -> tuple[Any, State, Callable]:
    """The static model, the first state, and the compiled `(state, batch) -> (state, metrics)`."""
    static, params = model.create(arch, dtype=config.dtype, seed=config.seed)
    optimizer = optimizers.build(config)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch_BxL: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(partial(model.loss, static))(state.params, batch_BxL)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return static, State(params, optimizer.init(params)), step


def state_bytes(opt_state: optax.OptState) -> int:
    """Bytes of all arrays in an optimizer state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))


def _due(step: int, every: int, config: Config) -> bool:
    return step % every == 0 or step == config.steps


def _mean_loss(evaluate: Callable, params: model.Params, batches: list[np.ndarray]) -> float:
    return float(np.mean([evaluate(params, batch) for batch in batches]))


@contextlib.contextmanager
def _signals() -> Iterator[SimpleNamespace]:
    """Notes SIGINT or SIGTERM in `.signal`; a second SIGINT interrupts at once."""
    stop = SimpleNamespace(signal=None)

    def note(number: int, _frame) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _introduction(config: Config, arch: model.Architecture, tokens: data.Data, state: State) -> str:
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
    )


def _result(
    config: Config, step: int, stopped_by: int | None, seconds_per_step: float, state: State
) -> Result:
    metrics = read_metrics(metrics_path(config))
    losses = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    return Result(
        step=step,
        stopped_by=stopped_by,
        validation_loss=losses[-1] if losses else float("nan"),
        seconds_per_step=seconds_per_step,
        state_bytes=state_bytes(state.opt_state),
        parameters=model.parameter_count(state.params),
        metrics=metrics,
    )
