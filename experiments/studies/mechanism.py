"""The gain of each part of an update, along a run: `python -m experiments.studies.mechanism`.

The run is low-rank Muon with a column-normalized residual, which has no momentum. At some of its
steps, the held-out loss is computed after the hidden matrices alone have moved along

- *low rank*: P times the update of the projected momentum,
- *residual*: the normalized residual of this one batch,
- *both*: the update of the run,
- *residual with momentum*: the part of full-rank momentum outside of the bases, orthogonalized: the
  directions that GaLore-Muon leaves out, at the size of the residual,
- *Muon*: full-rank momentum, orthogonalized.

The last two use a momentum of the run's gradients that is kept for the measurement alone. All
directions have the learning rate of their step, so that their gains can be compared. The gain of a
single step is not progress: a step along the floor of a valley gains less at once than one down its
walls.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import reporting
from experiments.data import tokens as data
from experiments.models.llama import Params
from experiments.reporting import COLOURS, MARKERS, save
from experiments.studies import gradients
from experiments.trainer import cli, loop, losses, optimizers, pretraining, rest, schedules
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.loop import State

PROGRAM = "experiments.studies.mechanism"
PARTS = ("low rank", "residual", "both", "residual with momentum", "Muon")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the gain of each part of low-rank Muon's update with a column-normalized residual."""

    #: Steps between two measurements, the first of which precedes the first step.
    every: int = 40
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/mechanism.json")
    #: The run, as in experiments.pretrain.
    base: Run = dataclasses.field(
        default_factory=lambda: change(
            gradients.RUN, steps=1000, residual="columns", full_rank_layers=0, restart="rotate",
            validation_batches=8,
        )
    )  # fmt: skip


class Matrix(NamedTuple):
    """A hidden matrix, transposed where needed so that m <= n; arrays are float64."""

    gradient: np.ndarray  # [m, n]
    momentum: np.ndarray  # [m, n]
    basis: np.ndarray  # [m, r]


def main(arguments: Sequence[str]) -> int:
    """Trains and measures, prints a table, writes results and figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    rows = []
    for row in measured(config):
        rows.append(row)
        print(f"step {row['step']}: loss {row['loss']:.4f}", file=sys.stderr, flush=True)
        reporting.write(config.out, config, rows=rows)
    reporting.table(
        "Gain of each part in held-out loss, in thousandths of a nat",
        ("step", "loss", *PARTS, "momentum outside", "cosine"),
        ((str(row["step"]), row["loss"], *_thousandths(row), row["outside"], row["cosine"])
         for row in rows),
    )  # fmt: skip
    print(f"\nresults: {config.out}; figure: {draw(config, rows)}")
    return 0


def measured(config: Config) -> Iterator[dict[str, Any]]:
    """Trains, and yields a row for each measured step, at the weights before it."""
    run = config.base
    arch, tokens = pretraining.prepare(run)
    batches = data.training_batches(tokens, arch.seq_len, run.batch_size, run.seed)
    held_out = data.validation_batches(tokens, arch.seq_len, run.batch_size, run.validation_batches)
    static, state, _ = pretraining.start(run, arch)
    loss = partial(losses.of_windows, static)
    evaluate = jax.jit(loss)
    rate: Any = schedules.schedule(run)
    # Two optimizers share one state. With a scale of 1e-20 the first is as good as without the
    # residual; the difference of their updates is the residual's part.
    alone = optimizers.build(change(run, residual_scale=1e-20), arch.layers)
    whole = optimizers.build(run, arch.layers)

    @jax.jit
    def step(state: State, momentum: Params, batch: jax.Array) -> tuple:
        grads = jax.grad(losses.mean(loss))(state.params, batch)
        grads = optax.clip_by_global_norm(run.clip_norm).update(grads, optax.EmptyState())[0]
        low = alone.update(grads, state.opt_state, state.params)[0]
        updates, opt_state = whole.update(grads, state.opt_state, state.params)
        # M <- 0.95 M + G at full rank, for the measurement alone.
        momentum = jax.tree.map(lambda m, g: 0.95 * m + g, momentum, grads)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), grads, momentum, low, updates

    momentum = jax.tree.map(jnp.zeros_like, state.params)
    for number in range(run.steps):
        # 1. The step of the run. Gains are measured at the weights before it.
        old, before = state, momentum
        state, grads, momentum, low, updates = step(state, momentum, next(batches))
        if number % config.every:
            continue
        bases = gradients.bases(gradients.low_rank_state(state.opt_state))
        # 2. The directions to compare, from this step's gradient, momentum and bases.
        found = _hidden(old.params, grads, momentum, bases)
        directions = {
            "low rank": low,
            "both": updates,
            "residual": jax.tree.map(jnp.subtract, updates, low),
            "residual with momentum": orthogonalized(
                old.params, found, float(rate(number)), outside=True
            ),
            "Muon": orthogonalized(old.params, found, float(rate(number)), outside=False),
        }
        # 3. The gain of each: held-out loss before minus after.
        start = loop.mean_loss(evaluate, old.params, held_out)
        gains = {
            part: start - loop.mean_loss(evaluate, _along(old.params, direction), held_out)
            for part, direction in directions.items()
        }
        # 4. The momentum before this step: the batch that is compared with it must not be in it.
        past = _hidden(old.params, grads, before, bases)
        yield {"step": number, "loss": start, "rate": float(rate(number)), "gains": gains} | {
            "outside": _outside(found),
            "cosine": cosine(past) if number else None,
            "residual": float(
                np.mean([share_outside(m.gradient, m.basis) for m in found.values()])
            ),
        }


def _hidden(
    params: Params, grads: Params, momentum: Params, bases: gradients.ByKind
) -> dict[str, Matrix]:
    """Returns the hidden matrices by path; the bases of a kind are in the order of the layers."""
    found: dict[str, Matrix] = {}
    seen: dict[str, int] = {}  # kind -> index of its last layer so far
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, _), g, m in zip(
        leaves, jax.tree.leaves(grads), jax.tree.leaves(momentum), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = gradients.kind(name)
        if kind in gradients.KINDS:
            layer = seen[kind] = seen.get(kind, -1) + 1
            found[name] = Matrix(gradients.wide(g), gradients.wide(m), bases[kind][layer])
    return found


def orthogonalized(
    params: Params, found: dict[str, Matrix], rate: float, *, outside: bool
) -> Params:
    """Returns the step of orthogonalized momentum: all of it, or its part outside of the bases.

    The polar factor is exact, by a float64 SVD, and scaled to AdamW's size as in the run.
    """

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        matrix = found.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        if matrix is None:
            return jnp.zeros_like(leaf)
        m, rank = matrix.basis.shape
        part = matrix.momentum
        if outside:
            part = gradients.residual(part, matrix.basis)
        left, _, right = np.linalg.svd(part, full_matrices=False)
        kept = m - rank if outside else m  # outside, only m - r directions are not zero
        # 0.2 sqrt(max(m, n)) U V': entries of about the size of AdamW's update.
        direction = 0.2 * max(leaf.shape) ** 0.5 * left[:, :kept] @ right[:kept]
        return jnp.asarray(-rate * _as(leaf, direction), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def _as(leaf: jax.Array, matrix: np.ndarray) -> np.ndarray:
    """Undoes the transposition of `gradients.wide`."""
    return matrix if matrix.shape == leaf.shape else matrix.T


def _along(params: Params, direction: Params) -> Params:
    """Returns the weights after only the hidden matrices have moved along `direction`."""
    kinds: Any = rest.matrix_or_rest(params)
    return jax.tree.map(
        lambda w, u, kind: w + u if kind == "matrix" else w, params, direction, kinds
    )


def share_outside(matrix: np.ndarray, basis: np.ndarray) -> float:
    """Returns ``||M - P P'M||^2 / ||M||^2``, the share of a squared norm outside of the basis."""
    return float(gradients.squares(gradients.residual(matrix, basis)) / gradients.squares(matrix))


def _outside(found: dict[str, Matrix]) -> float:
    """Returns the share of the momentum's squared norm outside of the bases, mean over matrices."""
    return float(np.mean([share_outside(each.momentum, each.basis) for each in found.values()]))


def cosine(past: dict[str, Matrix]) -> float:
    """Returns the cosine of the gradient's and the momentum's residuals, mean over all matrices."""
    found = []
    for each in past.values():
        one = gradients.residual(each.gradient, each.basis)  # G - P P'G
        other = gradients.residual(each.momentum, each.basis)  # M - P P'M
        norms = (gradients.squares(one) * gradients.squares(other)) ** 0.5
        found.append(np.sum(one * other) / norms)
    return float(np.mean(found))


def _thousandths(row: dict[str, Any]) -> list[float]:
    return [1e3 * row["gains"][part] for part in PARTS]


def draw(config: Config, rows: Sequence[dict[str, Any]]) -> Path:
    """Draws gains against the steps, and shares and cosine of the part outside of the bases."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    steps = [row["step"] for row in rows]
    for i, part in enumerate(PARTS):
        # Divided by the rate, which decays: to first order a step half as long gains half as much.
        gains = [row["gains"][part] / row["rate"] for row in rows]
        left.plot(steps, gains, color=COLOURS[i], marker=MARKERS[i], markersize=4, label=part)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="step", ylabel="gain in held-out loss / learning rate (nats)", ylim=(-8, 20))
    # Row key -> label. The cosine needs an earlier momentum, so the first row has none.
    names = {"outside": "momentum, squared norm", "residual": "gradient, squared norm",
             "cosine": "cosine of gradient and momentum"}  # fmt: skip
    for i, (key, label) in enumerate(names.items()):
        values = [np.nan if row[key] is None else row[key] for row in rows]
        right.plot(
            steps, values, color=COLOURS[i + 4], marker=MARKERS[i], markersize=4, label=label
        )
    right.set(xlabel="step", ylabel="outside of the bases", ylim=(-0.2, 0.8))
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    return save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
