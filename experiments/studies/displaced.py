"""Gradients at displaced weights, with large batches: `python -m experiments.studies.displaced`.

Compares SAM, extragradient and extrapolation along the past gradient with the plain gradient, on
one model with one optimizer and the same batches, for the same number of steps. SAM and
extragradient compute two gradients in a step, so there is also a run of the plain gradient over
twice the steps. Runs that are in the result file are not repeated, so that the study can be
interrupted.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import reporting
from experiments.data import tokens as data
from experiments.trainer import cli, losses, optimizers, pretraining
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.loop import mean_loss
from experiments.trainer.options import Checked, option, positive
from experiments.trainer.sweeps import identity, write
from gum_optax import displaced, displacements

PROGRAM = "experiments.studies.displaced"
# Variant -> gradients over the steps of the plain run. SAM and extragradient compute a second one
# at displaced weights; the displacement along the past gradient reuses the last step's gradient.
GRADIENTS = {
    "plain": 1,
    "sam": 2,
    "extragradient": 2,
    "past gradient": 1,
    "plain, twice the steps": 2,
}
BASE = dataclasses.replace(
    change(Run(), optimizer="muon"), steps=40, batch_size=32, learning_rate=1e-2,
    validation_batches=4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Train with gradients at displaced weights."""

    #: Sizes of displacements: the norm of SAM's, and the rate of those along a gradient.
    sizes: tuple[float, ...] = option((0.005, 0.05, 0.5), positive)
    #: Seeds of weights and data.
    seeds: tuple[int, ...] = (0,)
    #: Result file.
    out: Path = Path("experiments/results/studies/displaced.json")
    #: The run, as in experiments.pretrain.
    base: Run = dataclasses.field(default_factory=lambda: BASE)


def gradient_of(name: str, size: float | None, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function (weights, batch, previous gradient) -> (loss, gradient) of a variant."""
    plain = jax.value_and_grad(loss)
    if size is None:
        return lambda params, batch, last: plain(params, batch)
    # Only this variant reads the previous gradient, w -> w - rate * previous.
    if name == "past gradient":
        ahead = displaced(plain, displacements.along_previous(size))
        return lambda params, batch, last: ahead(params, batch, previous=last)
    moved = {
        "sam": displaced(plain, displacements.ascent(plain, size)),
        "extragradient": displaced(plain, displacements.extrapolation(plain, size)),
    }[name]
    return lambda params, batch, last: moved(params, batch)


def run(config: Config, name: str, size: float | None, seed: int) -> dict[str, Any]:
    """Trains one variant; returns the loss of every batch and the final held-out loss.

    Args:
      config: the run and its options.
      name: a variant, see `GRADIENTS`.
      size: of the displacement; None: the plain gradient.
      seed: of weights and data.
    """
    # 1. Data, model and optimizer: the same for all variants of a seed.
    steps = config.base.steps * (2 if name == "plain, twice the steps" else 1)
    base = dataclasses.replace(config.base, seed=seed, steps=steps)
    arch, tokens = pretraining.prepare(base)
    batches = data.training_batches(tokens, arch.seq_len, base.batch_size, seed)
    held_out = data.validation_batches(
        tokens, arch.seq_len, base.batch_size, base.validation_batches
    )
    static, state, _ = pretraining.start(base, arch)
    loss = partial(losses.of_windows, static)
    tx, gradient = optimizers.build(base, arch.layers), gradient_of(name, size, losses.mean(loss))

    # 2. One program for a whole step. It overwrites weights, state and the previous gradient.
    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, opt_state: Any, last: Any, batch: Any) -> Any:
        value, grads = gradient(params, batch, last)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, grads, value

    params, opt_state = state
    # 3. Train. Before the first step there is no previous gradient: zero displaces nothing.
    last, values = jax.tree.map(jnp.zeros_like, params), []
    started = time.process_time()
    for _ in range(base.steps):
        params, opt_state, last, value = step(params, opt_state, last, next(batches))
        values.append(float(value))
    seconds = time.process_time() - started  # of all steps and of compiling them
    return {
        "variant": name, "size": size, "seed": seed,
        "config": identity(config.base), "losses": values,
        "validation_loss": mean_loss(jax.jit(loss), params, held_out),
        "processor_seconds": seconds,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing and prints a table; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    entries = json.loads(config.out.read_text()) if config.out.exists() else []
    # The round trip through JSON turns tuples into lists, as in the stored entries.
    base = json.loads(json.dumps(identity(config.base)))
    for seed in config.seeds:
        for name in GRADIENTS:
            for size in (None,) if name.startswith("plain") else config.sizes:
                wanted = {"variant": name, "size": size, "seed": seed, "config": base}
                if not any(wanted.items() <= entry.items() for entry in entries):
                    entries.append(json.loads(json.dumps(run(config, name, size, seed))))
                    write(config.out, entries)
                    print(table(entries[-1:]), flush=True)
    print(table(entries))
    return 0


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Returns a table with one row for each run."""
    return reporting.aligned(
        ("variant", "size", "seed", "steps", "gradients", "validation loss", "processor seconds"),
        (
            (
                entry["variant"],
                entry["size"] or "",
                entry["seed"],
                len(entry["losses"]),
                GRADIENTS[entry["variant"]] * entry["config"]["steps"],
                f"{entry['validation_loss']:.4f}",
                f"{entry['processor_seconds']:.0f}",
            )
            for entry in entries
        ),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
