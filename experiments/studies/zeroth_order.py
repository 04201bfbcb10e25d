"""Fine-tuning without a backward pass: `python -m experiments.studies.zeroth_order`.

MeZO, SubZero and LOZO on a task, beside AdamW, which has as many forward passes: a gradient counts
as three, an estimate as two. A second AdamW trains the last blocks alone, as many as need no more
memory than MeZO. All see the same batches. Bytes are the compiler's, of a step that overwrites
weights and state.

Layers lie in stacks and run in one loop, so that the program is compiled in seconds: random numbers
for each of 272 leaves took minutes. Runs that the result file holds are not repeated: the study
goes on where it was stopped.
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
ESTIMATES = {
    "mezo": estimators.gaussian(),
    "subzero": estimators.orthonormal(rank=8, period=1000),
    "lozo": estimators.low_rank(rank=2, period=50),
}
# Forward passes of a step; a backward pass counts as two.
PASSES = dict.fromkeys(ESTIMATES, 2) | {"adamw": 3, "adamw, last blocks": 3}


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Fine-tune by estimates from losses alone, and by gradients."""

    passes: int = option(36, at_least(6))
    """Forward passes of a run."""
    batch_size: int = option(2, at_least(1))
    """Windows in a step."""
    seq_len: int = option(96, at_least(1))
    """Tokens in a window."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of batches and directions."""
    mezo: tuple[float, ...] = option((1e-6,), positive)
    """Learning rates of MeZO."""
    subzero: tuple[float, ...] = option((1e-6,), positive)
    """Of SubZero."""
    lozo: tuple[float, ...] = option((1e-6, 1e-5), positive)
    """Of LOZO."""
    adamw: tuple[float, ...] = option((1e-4,), positive)
    """Of AdamW, on all weights and on the last blocks."""
    last_blocks: int = option(1, at_least(1))
    """How many blocks the second AdamW trains."""
    validation_batches: int = option(4, at_least(1))
    """Batches of the loss of held-out answers."""
    model: str = "smollm2-135m"
    """As in experiments.finetune."""
    out: Path = Path("experiments/results/studies/zeroth_order.json")
    """Result file."""


class Setting(NamedTuple):
    """What all runs share."""

    static: Any
    params: Any
    batches: Callable[[int], Any]
    held_out: Sequence[Any]


def prepare(config: Config) -> Setting:
    """The model, training batches by seed, and held-out ones."""
    base = pretrained.load(config.model, dtype="float32")
    layers = [base.params["layers"][n] for n in range(base.arch.layers)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
    static = _static(base.arch)
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
    """What is no array: of one block, and of what lies around the blocks."""
    found = []

    def create() -> None:
        model = llama.Llama(arch, jnp.dtype("float32"), nnx.Rngs(0), remat=False)
        block = nnx.split(model.layers[0])[0]
        model.layers = nnx.List([])
        found.extend([block, nnx.split(model)[0]])

    jax.eval_shape(create)
    return found[0], found[1]


def of_answers(static: tuple[Any, Any], params: Any, batch: Any) -> losses.Sum:
    """As in `losses`, of stacked layers."""
    block, around = static
    others = nnx.merge(around, {k: v for k, v in params.items() if k != "layers"})
    tokens_BxL, segments_BxL = batch["tokens"], batch["segments"]
    positions_BxL = batch["positions"][:, :-1]
    mask_BxLxL = llama.same_segment(segments_BxL[:, :-1])

    def layer(x_BxLxD: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return nnx.merge(block, weights)(x_BxLxD, positions_BxL, mask_BxLxL, None)[0], None

    x_BxLxD, _ = jax.lax.scan(layer, others.embed(tokens_BxL[:, :-1]), params["layers"])
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(
        others.logits(x_BxLxD), tokens_BxL[:, 1:]
    )
    counts_BxL = batch["answer"][:, 1:] & (segments_BxL[:, 1:] == segments_BxL[:, :-1])
    return (loss_BxL * counts_BxL).sum(), counts_BxL.sum().astype(jnp.float32)


def method(config: Config, name: str, rate: float, setting: Setting) -> tuple[Any, Any]:
    """The weights that a method trains, and its step: (weights, state, others, batch, t, seed)"""
    loss = losses.mean(partial(of_answers, setting.static))
    if name in ESTIMATES:
        estimate = estimators.zeroth_order(loss, ESTIMATES[name])

        def zeroth(trained: Any, state: Any, others: Any, batch: Any, t: Any, seed: Any) -> Any:
            value, slope = estimate(trained, batch, key=seed, step=t)
            return (
                optax.apply_updates(trained, jax.tree.map(lambda g: -rate * g, slope)),
                state,
                value,
            )

        return setting.params, (zeroth, optax.identity())
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
    """The model with other last blocks; the weights of the others are constants."""

    def joined(all_blocks: Any, last: jax.Array) -> jax.Array:
        return jnp.concatenate([all_blocks[: -len(last)], last])

    return params | {"layers": jax.tree.map(joined, params["layers"], last)}


def run(config: Config, name: str, rate: float, seed: int, setting: Setting) -> dict[str, Any]:
    """One run: its losses, seconds, and bytes by the compiler."""
    trained, (step, tx) = method(config, name, rate, setting)
    trained = jax.tree.map(lambda w: jnp.array(w, copy=True), trained)
    state = tx.init(trained)
    batches = setting.batches(seed)
    batch = next(batches)
    # An argument: as constants the other weights would be folded into the program.
    others = setting.params if name == "adamw, last blocks" else None
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, others, batch, 0, seed).compile()
    )
    found: Any = compiled.memory_analysis()
    evaluate = jax.jit(partial(of_answers, setting.static))

    def held_out(trained: Any) -> float:
        whole = _with_blocks(setting.params, trained) if name == "adamw, last blocks" else trained
        return mean_loss(evaluate, whole, setting.held_out)

    steps = config.passes // PASSES[name]
    before, values, started = held_out(trained), [], time.process_time()
    for t in range(steps):
        trained, state, value = compiled(trained, state, others, batch, t, seed)
        values.append(float(value))
        batch = next(batches)
    return {
        "method": name, "rate": rate, "seed": seed, "steps": steps, **settings(config),
        "before": before, "after": held_out(trained), "losses": values,
        "processor_seconds_per_step": (time.process_time() - started) / steps,
        "temporary_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
    }  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """The options that decide a run's numbers beside method, rate and seed."""
    names = ("passes", "batch_size", "seq_len", "last_blocks", "validation_batches", "model")
    return {name: getattr(config, name) for name in names}


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing and prints a table; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
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
    setting = None
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
    """One row for each run."""
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
