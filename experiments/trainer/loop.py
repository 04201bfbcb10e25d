"""The training loop that pretraining and fine-tuning share: steps, validation, checkpoints.

A caller makes a `Material` (batches), a `Loss` (from weights and a batch to a sum and a count) and
the first weights. `start` compiles the step and places the first state on the devices; `run` takes
the steps. The state is donated to each step, so the state before a step no longer exists after it.
"""

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
from experiments.trainer import compatibility, losses, methods, optimizers, processes
from experiments.trainer import mesh as meshes
from experiments.trainer.config import Training
from experiments.trainer.losses import Loss
from experiments.trainer.metrics import Report, Silence, metrics_path, read_metrics


class Result(NamedTuple):
    """Outcome of a run, with its last weights.

    Attributes:
      step: steps done.
      stopped_by: number of the signal that ended the run; None if it reached its last step.
      validation_loss: the last one, in nats per token; NaN if there was none.
      seconds_per_step: mean over the steps of this process, without compilation, validation and
        checkpoints.
      state_bytes: bytes of the optimizer state, summed over all devices without replicas.
      parameters: number of weights.
      metrics: the records of metrics.jsonl; empty in all processes but the first.
      params: the last weights.
      peak_bytes: largest memory use so far on the first device of this process; None on CPUs.
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
    """Weights and optimizer state: everything that a training step changes."""

    params: Params
    opt_state: optax.OptState


class Material(NamedTuple):
    """The data of a run.

    Attributes:
      batches: an endless iterator with `get_state()` and `set_state()`.
      held_out: the batches that a validation loss is computed on.
      tokens: tokens in a training batch of all processes, for tokens per second.
      digest: hash of the tokens; a resumed run must have the same.
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
    """Returns the first state and the compiled `(state, batch) -> (state, metrics)`.

    The metrics are the scalars `loss` (nats per token) and `grad_norm` (before clipping).

    Args:
      config: the optimizer and how gradients are computed.
      loss: from weights and a batch to a sum of losses and a count of tokens; steps minimize their
        ratio.
      shapes: shapes and dtypes of the weights.
      place: makes the first weights with the shardings that it is given (None: on one device).
      mesh: the devices, if there are several.
      layers: number of blocks of the model.
    """
    # 1. The step. Compressed gradients need the optimizer's state, which holds the bases, and may
    #    refresh it before the update; full gradients hand the state through.
    optimizer = optimizers.build(config, layers)
    compressed = getattr(config.optimizer, "gradients", "full") == "compressed"
    gradients = (_compressed if compressed else _full)(loss, config, optimizer)

    def step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        value, grads, opt_state = gradients(state.params, state.opt_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), {"loss": value, "grad_norm": _norm(grads)}

    # 2. The first state on one device.
    if mesh is None:
        params = place(None)
        # Committed to the device, as restored arrays are, so that a resumed run compiles the same
        # program.
        state = jax.device_put(State(params, jax.jit(optimizer.init)(params)), jax.devices()[0])
        return state, jax.jit(step, donate_argnums=0)
    # 3. The first state on a mesh; the optimizer's arrays follow the shardings of the weights. The
    #    step's output has the shardings of its input: left to the compiler it could have others,
    #    and the next step would compile again.
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
    """Takes the steps of a run or, with `config.resume`, the steps after its last checkpoint.

    Args:
      config: number of steps, and the intervals of validation and checkpoints.
      material: the data.
      loss: as for `start`; computes the validation loss.
      state: the first state from `start`. Its buffers are deleted or donated.
      step_fn: the compiled step from `start`.
      mesh: the devices, if there are several.
      introduction: text to print before the first step.
      show: whether to print it, and a progress bar.

    Raises:
      ConfigError: the checkpoint to resume from is damaged, or of another run.
    """
    evaluate = jax.jit(loss)
    put = partial(meshes.put, mesh, config.batch_size)
    checkpoints, step, batches = checkpoint.Checkpoints(config), 0, material.batches
    # 1. Restore the state and the data position, which a checkpoint holds together.
    if config.resume:
        step = checkpoints.latest() or 0
        # The caller still holds the first state. Freeing its buffers leaves room for the restored
        # arrays; `restore` needs only shapes and shardings, which outlive the buffers.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        state, position = checkpoints.restore(step, state)
        batches.set_state(position)
    reporter = Report if processes.is_first() else Silence
    with contextlib.ExitStack() as stack:
        # 2. From here on, also while the first step compiles, a signal ends the run with a
        #    checkpoint.
        stop = stack.enter_context(processes.signals(step))
        stack.enter_context(contextlib.closing(checkpoints))
        report = reporter(config, start=step, tokens_per_step=material.tokens, show=show)
        stack.enter_context(contextlib.closing(report))
        report.say(introduction)
        if config.resume and (note := compatibility.other_versions(checkpoints.description(step))):
            report.say(note)
        saved = time.monotonic()
        # 3. Step, validate, save. A run takes at least one step, so that a run that is stopped has
        #    a checkpoint to resume from.
        begun = step
        while step < config.steps and (stop.signal is None or step == begun):
            state, metrics = step_fn(state, put(next(batches)))
            step += 1
            report.step(step, metrics)
            if _due(step, config.validate_every, config):
                report.flush()
                held_out = map(put, material.held_out)
                report.validation(step, mean_loss(evaluate, state.params, held_out))
            # Called at every step: processes agree here on the step after which all of them stop.
            ended = stop.reached(step)
            if ended or _due(step, config.checkpoint_every, config) or _late(saved, config):
                report.flush()
                # After the metrics: a resumed run keeps the records up to its checkpoint.
                checkpoints.save(step, state, batches.get_state())
                saved = time.monotonic()
                report.restart_clock()
    return _result(config, step, stop.signal, report.seconds_per_step, state)


def begin(config: Training, digest: str, what: str) -> None:
    """Writes config.json for a new run; checks that a resumed run has the same data.

    Args:
      config: the run.
      digest: hash of its data.
      what: names the data in error messages.

    Raises:
      ConfigError: the data have changed since the run began, or differ between processes.
    """
    processes.check_equal(what, digest)
    if config.resume:
        checkpoint.check_same_data(config, digest, what)
    elif processes.is_first():
        checkpoint.write_description(config, digest)


def state_bytes(opt_state: optax.OptState) -> int:
    """Returns the bytes of an optimizer state, given as arrays or as their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))


def device_peak() -> int | None:
    """Returns the peak memory of the first local device in bytes; None on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def mean_loss(loss: Callable, params: Params, batches: Iterable[Any]) -> float:
    """Returns the mean loss over all tokens that count in `batches`, in nats per token.

    Sums are divided once at the end: batches of packed answers have different numbers of tokens,
    so a mean of their means would weigh tokens unequally.
    """
    totals, counts = zip(*(loss(params, batch) for batch in batches), strict=True)
    return float(np.sum(jax.device_get(totals), dtype=np.float64) / np.sum(counts))


def introduction(config: Training, state: State, mesh: Mesh | None, layers: int) -> str:
    """Describes the optimizer with its memory plan, the device, and the sharding of the weights."""
    # Optimizers see weights in float32 even where bfloat16 is stored (stochastic rounding).
    wide = jax.eval_shape(lambda: optax.tree.cast(state.params, "float32"))
    plan = str(gum_optax.memory_plan(optimizers.build(config, layers), wide))
    if not isinstance(config.optimizer, methods.Refreshed):
        plan = plan.splitlines()[-1]  # only the total: these optimizers have no groups
    return (
        f"{config.optimizer.name}, peak learning rate {config.learning_rate:g}, "
        f"on {jax.devices()[0].device_kind}\n{plan}"
        + (f"\n{meshes.describe(mesh, state.params)}" if mesh else "")
    )


# (params, state, batch) -> (mean loss over the tokens of a batch, its gradient, state)
_Gradients = Callable[[Params, Any, Any], tuple[jax.Array, Params, Any]]


def _full(loss: Loss, config: Training, optimizer: optax.GradientTransformation) -> _Gradients:
    """Makes a function that returns gradients of the weights' shapes, and the state unchanged."""

    def make(loss: Loss) -> Callable[..., Any]:
        function = jax.value_and_grad(loss, has_aux=config.accumulate > 1)
        return lambda params, state, part: function(params, part)

    mean = _mean(loss, config, make)
    return lambda params, state, batch: (*mean(params, state, batch), state)


def _compressed(
    loss: Loss, config: Training, optimizer: optax.GradientTransformation
) -> _Gradients:
    """Makes a function that returns gradients projected in the backward pass, and the new state.

    New bases come from full gradients, so a refresh is a computation of its own, before the
    projected gradients. It does nothing except at the first step of a period.
    """
    value_and_grad = gum_optax.backward.value_and_grad
    make = partial(value_and_grad, tx=optimizer, has_aux=config.accumulate > 1)
    mean = _mean(loss, config, make)
    refresh = gum_optax.backward.refresh(losses.mean(loss), optimizer)

    def gradients(params: Params, state: Any, batch: Any) -> tuple[jax.Array, Params, Any]:
        # With k parts, a refresh reads every k-th window: the memory of one part, and equally many
        # windows of each device.
        state = refresh(params, state, jax.tree.map(lambda x: x[:: config.accumulate], batch))
        return (*mean(params, state, batch), state)

    return gradients


def _mean(
    loss: Loss, config: Training, make: Callable[[Any], Callable[..., Any]]
) -> Callable[[Params, Any, Any], tuple[jax.Array, Params]]:
    """Makes a function that returns the mean loss of a batch and its gradient.

    With k parts the gradient is ``sum_i dL_i / sum_i n_i``, where ``L_i`` is the sum of the losses
    of part i and ``n_i`` its number of tokens: the same as for the whole batch, also where parts
    have unequal numbers of tokens.

    Args:
      loss: from weights and a batch to the sum over tokens and their number.
      config: number of parts.
      make: from a loss to ``(params, state, part) -> (value, gradient)``; with more than one part
        the loss returns the count as its auxiliary output.
    """
    if config.accumulate == 1:
        return make(losses.mean(loss))

    def of_part(params: Params, state: Any, part: Any) -> tuple[Any, Params]:
        value, grads = make(loss)(params, state, part)
        # Sums of many parts need more digits than bfloat16 has.
        wide: Any = optax.tree.cast(grads, "float32")
        return value, wide

    size = config.batch_size // config.accumulate
    summed = microbatch(of_part, 2, size, AccumulationType.SUM)

    def gradients(params: Params, state: Any, batch: Any) -> tuple[jax.Array, Params]:
        (total, count), grads = summed(params, state, batch)
        return total / count, jax.tree.map(lambda g: g / count, grads)

    return gradients


def _norm(grads: Params) -> jax.Array:
    """Returns the global norm, in float32: sums of squares in bfloat16 are off by per cents."""
    return optax.tree.norm(optax.tree.cast(grads, "float32"))


def _late(saved: float, config: Training) -> bool:
    """Whether the last checkpoint is `checkpoint_minutes` old or older.

    Always false with several processes: all must save after the same step, and their clocks
    differ. They save by steps alone.
    """
    alone = jax.process_count() == 1
    return alone and time.monotonic() - saved > 60 * config.checkpoint_minutes


def _due(step: int, every: int, config: Training) -> bool:
    """Whether something that happens every so many steps, and after the last one, is due."""
    return step % every == 0 or step == config.steps


def _result(
    config: Training, step: int, stopped_by: int | None, seconds_per_step: float, state: State
) -> Result:
    # Read from the file: a resumed run returns the metrics of the steps before it, too.
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
