"""The training loop that pretraining and fine-tuning share: steps, validation, checkpoints."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.microbatching import AccumulationType, microbatch

import gum_optax
from experiments.models.llama import Params, parameter_count
from experiments.trainer import checkpoints as checkpoint
from experiments.trainer import compatibility, losses, optimizers, processes
from experiments.trainer import mesh as meshes
from experiments.trainer.config import Training
from experiments.trainer.losses import Loss
from experiments.trainer.metrics import Report, Silence, metrics_path, read_metrics


class Result(NamedTuple):
    """Outcome of a run, with its last weights.

    `stopped_by` is the signal that ended it, if any; `peak_bytes` the most that arrays have taken
    on the first device of this process, None on CPUs.
    """

    step: int
    stopped_by: int | None
    validation_loss: float
    seconds_per_step: float
    state_bytes: int
    parameters: int
    metrics: list[dict]
    params: Params
    peak_bytes: int | None = None


class State(NamedTuple):
    """All that a step changes."""

    params: Params
    opt_state: optax.OptState


class Material(NamedTuple):
    """What a run reads.

    Attributes:
      batches: an endless iterator with `get_state()` and `set_state()`.
      held_out: the batches of a validation loss.
      tokens: how many a training batch has, for tokens per second.
      digest: tells one text from another.
    """

    batches: Any
    held_out: Sequence[Any]
    tokens: int
    digest: str


def start(
    config: Training,
    loss: Loss,
    shapes: Params,
    place: Callable[[Any], Params],
    mesh: Mesh | None,
    layers: int,
) -> tuple[State, Callable]:
    """The first state, and the compiled `(state, batch) -> (state, metrics)`.

    Args:
      config: the optimizer and how gradients are computed.
      loss: what is minimized: its mean over the tokens of a batch.
      shapes: shapes and dtypes of the weights.
      place: makes the first weights, where the shardings that it is given say (None: one device).
      mesh: the devices, if there are several.
      layers: how many blocks the model has.
    """
    optimizer = optimizers.build(config, layers)
    compressed = getattr(config.optimizer, "gradients", "full") == "compressed"
    gradients = (_compressed if compressed else _full)(loss, config, optimizer)

    def step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        value, grads, opt_state = gradients(state.params, state.opt_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), {"loss": value, "grad_norm": _norm(grads)}

    if mesh is None:
        params = place(None)
        # Committed to the device, as restored arrays are: a resumed run compiles the same program.
        state = jax.device_put(State(params, jax.jit(optimizer.init)(params)), jax.devices()[0])
        return state, jax.jit(step, donate_argnums=0)
    where = meshes.param_shardings(mesh, shapes)
    shardings = State(where, gum_optax.state_shardings(optimizer, shapes, where))
    params = place(where)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    metrics = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))
    return State(params, opt_state), compiled


def run(
    config: Training,
    material: Material,
    loss: Loss,
    state: State,
    step_fn: Callable,
    *,
    mesh: Mesh | None,
    introduction: str,
    show: bool = True,
) -> Result:
    """Takes the steps of a run or, with `config.resume`, those after its last checkpoint."""
    evaluate = jax.jit(loss)
    put = partial(meshes.put, mesh, config.batch_size)
    checkpoints, step, batches = checkpoint.Checkpoints(config), 0, material.batches
    if config.resume:
        step = checkpoints.latest() or 0
        # Callers still hold the first state; shapes and shardings outlive its buffers.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        state, position = checkpoints.restore(step, state)
        batches.set_state(position)
    reporter = Report if processes.is_first() else Silence
    with contextlib.ExitStack() as stack:
        # From here on a signal ends the run with a checkpoint, also while the first step compiles.
        stop = stack.enter_context(processes.signals(step))
        stack.enter_context(contextlib.closing(checkpoints))
        report = reporter(config, start=step, tokens_per_step=material.tokens, show=show)
        stack.enter_context(contextlib.closing(report))
        report.say(introduction)
        if config.resume and (note := compatibility.other_versions(checkpoints.description(step))):
            report.say(note)
        saved = time.monotonic()
        # At least one step is taken, so that a run that is stopped has something to go on from.
        begun = step
        while step < config.steps and (stop.signal is None or step == begun):
            state, metrics = step_fn(state, put(next(batches)))
            step += 1
            report.step(step, metrics)
            if _due(step, config.validate_every, config):
                report.flush()
                held_out = map(put, material.held_out)
                report.validation(step, mean_loss(evaluate, state.params, held_out))
            ended = stop.reached(step)
            if ended or _due(step, config.checkpoint_every, config) or _late(saved, config):
                report.flush()
                checkpoints.save(step, state, batches.get_state())
                saved = time.monotonic()
                report.restart_clock()
    return _result(config, step, stop.signal, report.seconds_per_step, state)


def begin(config: Training, digest: str, what: str) -> None:
    """Notes what a new run is, or checks that a resumed one goes on with the same data.

    Args:
      config: the run.
      digest: tells its data from others, and must be the same in all processes.
      what: the data, in words.

    Raises:
      ConfigError: the data have changed, or differ between processes.
    """
    processes.check_equal(what, digest)
    if config.resume:
        checkpoint.check_same_data(config, digest, what)
    elif processes.is_first():
        checkpoint.write_description(config, digest)


def state_bytes(opt_state: optax.OptState) -> int:
    """Bytes of all arrays in an optimizer state, or of their descriptions."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))


def device_peak() -> int | None:
    """The most bytes that an accelerator's arrays have taken; None on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def mean_loss(loss: Callable, params: Params, batches: Iterable[Any]) -> float:
    """The mean loss of all tokens that count."""
    totals, counts = zip(*(loss(params, batch) for batch in batches), strict=True)
    return float(np.sum(jax.device_get(totals), dtype=np.float64) / np.sum(counts))


def introduction(config: Training, state: State, mesh: Mesh | None, layers: int) -> str:
    """What the optimizer will hold, and where weights lie."""
    wide = jax.eval_shape(lambda: optax.tree.cast(state.params, "float32"))  # what optimizers see
    plan = str(gum_optax.memory_plan(optimizers.build(config, layers), wide))
    if not isinstance(config.optimizer, optimizers.Refreshed):
        plan = plan.splitlines()[-1]  # the sum: there are no groups
    return (
        f"{config.optimizer.name}, peak learning rate {config.learning_rate:g}, "
        f"on {jax.devices()[0].device_kind}\n{plan}"
        + (f"\n{meshes.describe(mesh, state.params)}" if mesh else "")
    )


# (params, state, batch) -> (mean loss over the tokens of a batch, its gradient, state)
_Gradients = Callable[[Params, Any, Any], tuple[jax.Array, Params, Any]]


def _full(loss: Loss, config: Training, optimizer: optax.GradientTransformation) -> _Gradients:
    """Gradients like the weights."""

    def make(loss: Loss) -> Callable[..., Any]:
        function = jax.value_and_grad(loss, has_aux=config.accumulate > 1)
        return lambda params, state, part: function(params, part)

    mean = _mean(loss, config, make)
    return lambda params, state, batch: (*mean(params, state, batch), state)


def _compressed(
    loss: Loss, config: Training, optimizer: optax.GradientTransformation
) -> _Gradients:
    """Gradients that are projected in the backward pass."""
    value_and_grad = gum_optax.backward.value_and_grad
    make = partial(value_and_grad, tx=optimizer, has_aux=config.accumulate > 1)
    mean = _mean(loss, config, make)
    refresh = gum_optax.backward.refresh(losses.mean(loss), optimizer)

    def gradients(params: Params, state: Any, batch: Any) -> tuple[jax.Array, Params, Any]:
        # Of a batch in parts, every k-th window: as many of each device.
        state = refresh(params, state, jax.tree.map(lambda x: x[:: config.accumulate], batch))
        return (*mean(params, state, batch), state)

    return gradients


def _mean(
    loss: Loss, config: Training, make: Callable[[Any], Callable[..., Any]]
) -> Callable[[Params, Any, Any], tuple[jax.Array, Params]]:
    """The mean loss of a batch and its gradient, summed over the parts of the batch.

    Args:
      loss: the sum over tokens, and their number.
      config: how many parts.
      make: from a loss, ``(params, state, part) -> (value, gradient)``; with more than one part, of
        a loss with aux.
    """
    if config.accumulate == 1:
        return make(losses.mean(loss))

    def of_part(params: Params, state: Any, part: Any) -> tuple[Any, Params]:
        value, grads = make(loss)(params, state, part)
        # Sums of many parts need more digits than weights in bfloat16 have.
        wide: Any = optax.tree.cast(grads, "float32")
        return value, wide

    size = config.batch_size // config.accumulate
    summed = microbatch(of_part, 2, size, AccumulationType.SUM)

    def gradients(params: Params, state: Any, batch: Any) -> tuple[jax.Array, Params]:
        (total, count), grads = summed(params, state, batch)
        return total / count, jax.tree.map(lambda g: g / count, grads)

    return gradients


def _norm(grads: Params) -> jax.Array:
    """Of bfloat16, sums of squares would be off by per cents."""
    return optax.tree.norm(optax.tree.cast(grads, "float32"))


def _late(saved: float, config: Training) -> bool:
    """Whether the last checkpoint is so many minutes old.

    Clocks of several processes differ, and all must save after the same step: they go by steps.
    """
    alone = jax.process_count() == 1
    return alone and time.monotonic() - saved > 60 * config.checkpoint_minutes


def _due(step: int, every: int, config: Training) -> bool:
    return step % every == 0 or step == config.steps


def _result(
    config: Training, step: int, stopped_by: int | None, seconds_per_step: float, state: State
) -> Result:
    metrics = read_metrics(metrics_path(config)) if processes.is_first() else []
    losses = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    return Result(
        step=step,
        stopped_by=stopped_by,
        validation_loss=losses[-1] if losses else float("nan"),
        seconds_per_step=seconds_per_step,
        state_bytes=state_bytes(state.opt_state),
        parameters=parameter_count(state.params),
        metrics=metrics,
        params=state.params,
        peak_bytes=device_peak(),
    )
