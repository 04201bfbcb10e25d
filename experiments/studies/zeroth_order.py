"""Fine-tuning without a backward pass: `python -m experiments.studies.zeroth_order`.

Compares MeZO, SubZero and LOZO with AdamW on a task, at equal numbers of forward passes: a gradient
counts as three, an estimate as two. A second AdamW trains only the last blocks, as many as need no
more memory than MeZO. All methods see the same batches. Bytes are the compiler's figures for a step
that overwrites weights and state.

The layers are stacked and run in one loop, so that the program compiles in seconds: with random
numbers for each of 272 leaves it took minutes. Runs that are in the result file are not repeated,
so that the study can be interrupted.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import reporting, tasks
from experiments.data import answers as sft
from experiments.models import llama
from experiments.models.presets import Architecture
from experiments.models.weights import load as pretrained
from experiments.trainer import cli, losses
from experiments.trainer.loop import mean_loss
from experiments.trainer.options import Checked, at_least, option, positive
from experiments.trainer.sweeps import write
from gum_optax import estimators

PROGRAM = "experiments.studies.zeroth_order"
# Ranks and periods of the subspaces in which SubZero and LOZO perturb the weights.
ESTIMATES = {
    "mezo": estimators.gaussian(),
    "subzero": estimators.orthonormal(rank=8, period=1000),
    "lozo": estimators.low_rank(rank=2, period=50),
}
# Forward passes of a step; a backward pass counts as two.
PASSES = dict.fromkeys(ESTIMATES, 2) | {"adamw": 3, "adamw, last blocks": 3}


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Fine-tune with gradients estimated from losses, and with exact gradients."""

    #: Forward passes of each run; its steps are this divided by the passes of a step.
    passes: int = option(36, at_least(6))
    #: Windows of tokens in each step.
    batch_size: int = option(2, at_least(1))
    #: Tokens in a window.
    seq_len: int = option(96, at_least(1))
    #: Seeds of batches and of random directions.
    seeds: tuple[int, ...] = (0,)
    #: Learning rates of MeZO.
    mezo: tuple[float, ...] = option((1e-6, 1e-5), positive)
    #: Learning rates of SubZero.
    subzero: tuple[float, ...] = option((1e-6, 1e-5), positive)
    #: Learning rates of LOZO.
    lozo: tuple[float, ...] = option((1e-6, 1e-5, 1e-4), positive)
    #: Learning rates of AdamW, on all weights and on the last blocks.
    adamw: tuple[float, ...] = option((1e-4,), positive)
    #: Number of blocks that the second AdamW trains.
    last_blocks: int = option(1, at_least(1))
    #: Batches in the loss of held-out answers.
    validation_batches: int = option(4, at_least(1))
    #: The model to fine-tune, as in experiments.finetune.
    model: str = "smollm2-135m"
    #: Result file.
    out: Path = Path("experiments/results/studies/zeroth_order.json")


class Setting(NamedTuple):
    """The parts that all runs share.

    Attributes:
      static: graph definitions of one block and of the model around the blocks.
      params: the pretrained weights, with layers stacked: ``[layers, ...]``.
      batches: maps a seed to training batches.
      held_out: batches for the held-out loss.
    """

    static: Any
    params: Any
    batches: Callable[[int], Any]
    held_out: Sequence[Any]


def prepare(config: Config) -> Setting:
    """Loads the model and encodes the task."""
    # 1. The weights, with the layers stacked.
    base = pretrained.load(config.model, dtype="float32")
    layers = [base.params["layers"][n] for n in range(base.arch.layers)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
    static = _static(base.arch)
    # 2. The task, packed into windows of `seq_len` tokens.
    task = tasks.load("chain_sum", train_examples=4096, eval_examples=200, seed=0)
    train, held_out = (
        sft.encode(items, base.tokenizer, config.seq_len) for items in (task.train, task.held_out)
    )
    shape = config.seq_len, config.batch_size
    return Setting(
        static,
        base.params | {"layers": stacked},
        lambda seed: sft.batches(train, *shape, seed),
        sft.held_out_batches(held_out, *shape)[: config.validation_batches],
    )


def _static(arch: Architecture) -> tuple[Any, Any]:
    """Returns the graph definitions of one block, and of the model without its blocks."""
    found = []

    def create() -> None:
        model = llama.Llama(arch, jnp.dtype("float32"), nnx.Rngs(0), remat=False)
        block = nnx.split(model.layers[0])[0]
        model.layers = nnx.List([])
        found.extend([block, nnx.split(model)[0]])

    # Only structure is needed, so no weights are created.
    jax.eval_shape(create)
    return found[0], found[1]


def of_answers(static: tuple[Any, Any], params: Any, batch: Any) -> losses.Sum:
    """Returns (sum of losses, number of answer tokens), as in `losses`, with stacked layers."""
    block, around = static
    others = nnx.merge(around, {k: v for k, v in params.items() if k != "layers"})
    tokens_BxL, segments_BxL = batch["tokens"], batch["segments"]
    positions_BxL = batch["positions"][:, :-1]
    mask_BxLxL = llama.same_segment(segments_BxL[:, :-1])

    def layer(x_BxLxD: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return nnx.merge(block, weights)(x_BxLxD, positions_BxL, mask_BxLxL, None)[0], None

    # One loop over the stacked layers: the block is compiled once.
    x_BxLxD, _ = jax.lax.scan(layer, others.embed(tokens_BxL[:, :-1]), params["layers"])
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(
        others.logits(x_BxLxD), tokens_BxL[:, 1:]
    )
    # A token counts if it belongs to an answer and its predecessor to the same example.
    counts_BxL = batch["answer"][:, 1:] & (segments_BxL[:, 1:] == segments_BxL[:, :-1])
    return (loss_BxL * counts_BxL).sum(), counts_BxL.sum().astype(jnp.float32)


def method(config: Config, name: str, rate: float, setting: Setting) -> tuple[Any, Any]:
    """Returns the weights that a method trains, and the pair of its step and transformation.

    The step maps (trained weights, state, other weights, batch, t, seed) to (trained weights,
    state, loss).
    """
    loss = losses.mean(partial(of_answers, setting.static))
    if name in ESTIMATES:
        # 1. An estimate has SGD as its optimizer, w <- w - rate * estimate, and no state.
        estimate = estimators.zeroth_order(loss, ESTIMATES[name])

        def zeroth(trained: Any, state: Any, others: Any, batch: Any, t: Any, seed: Any) -> Any:
            value, slope = estimate(trained, batch, key=seed, step=t)
            return (
                optax.apply_updates(trained, jax.tree.map(lambda g: -rate * g, slope)),
                state,
                value,
            )

        return setting.params, (zeroth, optax.identity())
    # 2. AdamW, on all weights or on the last blocks, with the others as constants.
    whole = name == "adamw"
    last = jax.tree.map(lambda w: w[-config.last_blocks :], setting.params["layers"])
    trained = setting.params if whole else last
    tx = optax.adamw(rate, b2=0.95, weight_decay=0.0)

    def first(trained: Any, state: Any, others: Any, batch: Any, t: Any, seed: Any) -> Any:
        def of_trained(trained: Any) -> Any:
            return loss(trained if whole else _with_blocks(others, trained), batch)

        value, gradient = jax.value_and_grad(of_trained)(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return trained, (first, tx)


def _with_blocks(params: Any, last: Any) -> Any:
    """Replaces the last blocks of a model; ``params["layers"]`` and `last` are stacks."""

    def joined(all_blocks: Any, last: jax.Array) -> jax.Array:
        return jnp.concatenate([all_blocks[: -len(last)], last])

    return params | {"layers": jax.tree.map(joined, params["layers"], last)}


def run(config: Config, name: str, rate: float, seed: int, setting: Setting) -> dict[str, Any]:
    """Runs one method at one rate; returns its losses, seconds, and the compiler's bytes."""
    trained, (step, tx) = method(config, name, rate, setting)
    # The step overwrites its arguments: without a copy the first run would destroy the weights that
    # all runs begin with.
    trained = jax.tree.map(lambda w: jnp.array(w, copy=True), trained)
    state = tx.init(trained)
    batches = setting.batches(seed)
    batch = next(batches)
    # The other weights are an argument, since XLA would fold constants into the program.
    others = setting.params if name == "adamw, last blocks" else None
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, others, batch, 0, seed).compile()
    )
    found: Any = compiled.memory_analysis()
    evaluate = jax.jit(partial(of_answers, setting.static))

    def held_out(trained: Any) -> float:
        whole = _with_blocks(setting.params, trained) if name == "adamw, last blocks" else trained
        return mean_loss(evaluate, whole, setting.held_out)

    # Equal forward passes, not equal steps. The time is of steps alone: compilation is over, and
    # the held-out loss comes after it.
    steps = config.passes // PASSES[name]
    before, values, started = held_out(trained), [], time.process_time()
    for t in range(steps):
        trained, state, value = compiled(trained, state, others, batch, t, seed)
        values.append(float(value))
        batch = next(batches)
    seconds = time.process_time() - started
    return {
        "method": name, "rate": rate, "seed": seed, "steps": steps, **settings(config),
        "before": before, "after": held_out(trained), "losses": values,
        "processor_seconds_per_step": seconds / steps,
        "temporary_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
    }  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """Returns the options that affect a run's numbers, beside method, rate and seed."""
    names = ("passes", "batch_size", "seq_len", "last_blocks", "validation_batches", "model")
    return {name: getattr(config, name) for name in names}


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing and prints a table; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    # Method -> rates, in the order of the runs.
    rates = {
        "lozo": config.lozo, "adamw": config.adamw, "adamw, last blocks": config.adamw,
        "subzero": config.subzero, "mezo": config.mezo,
    }  # fmt: skip
    wanted = [
        {"method": name, "rate": rate, "seed": seed, **settings(config)}
        for seed in config.seeds
        for name in rates
        for rate in rates[name]
    ]
    entries = json.loads(config.out.read_text()) if config.out.exists() else []
    setting = None  # the model is loaded only if a run is missing
    for each in wanted:
        if any(each.items() <= entry.items() for entry in entries):
            continue
        setting = setting or prepare(config)
        entries.append(run(config, each["method"], each["rate"], each["seed"], setting))
        write(config.out, entries)
        print(table(entries[-1:]), flush=True)
    print(table([e for e in entries if any(w.items() <= e.items() for w in wanted)]))
    return 0


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Returns a table with one row for each run."""
    head = ("method", "rate", "seed", "steps", "loss before", "after", "GiB", "CPU s per step")
    return reporting.aligned(
        head,
        (
            (
                e["method"],
                f"{e['rate']:g}",
                e["seed"],
                e["steps"],
                f"{e['before']:.3f}",
                f"{e['after']:.3f}",
                f"{(e['argument_bytes'] + e['temporary_bytes']) / 2**30:.2f}",
                f"{e['processor_seconds_per_step']:.1f}",
            )
            for e in entries
        ),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
