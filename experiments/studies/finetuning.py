"""Fine-tuning, at each optimizer's best rate: `python -m experiments.studies.finetuning`.

Every optimizer has the same examples, steps and grid of learning rates, for all of its parameters;
the grid is run with the first seed, and the rate of the least loss of held-out answers is run with
the others. A seed decides the examples, their order and the draws; held-out items are the same for
all. Runs that the result file holds are not repeated.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import cli, finetune, runs, tables
from experiments.accuracy import wilson
from experiments.config import Optimizer
from experiments.finetune import Config as Run
from experiments.loop import Result
from experiments.plots import COLOURS, MARKERS, save
from experiments.studies.pretraining import NAMES, best_rates

PROGRAM = "experiments.studies.finetuning"
# GoLore is GaLore until its first refresh after half of the steps: in runs of one period, the same.
OPTIMIZERS: tuple[Optimizer, ...] = ("gum", "adamw", "muon", "galore", "galore_muon")
BASE = Run(
    run_dir="runs/finetuning", steps=24, seq_len=128, checkpoint_every=1_000_000, log_every=4,
    validate_every=8, validation_batches=4, eval_batch_size=100,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune with every optimizer on the same grid, then on several seeds."""

    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
    """Optimizers to compare."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """The grid."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of examples, their order and draws; the grid uses the first."""
    out: Path = Path("experiments/results/studies/finetuning.json")
    """Result file; the figure is beside it."""
    jobs: int = 2
    """Runs that train at a time, each on its share of the cores."""
    base: Run = dataclasses.field(default_factory=lambda: BASE)
    """All other options of a run, as in experiments.finetune."""


def tune(config: Any, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Fine-tunes; an entry keeps the right answers before and after."""
    outcome = finetune.finetune(config, show=show)
    if outcome.after is None:  # the caller sees that it was stopped
        return outcome.result, {}
    return outcome.result, {"before": outcome.before, "after": outcome.after.summary()}


def point(config: Config, optimizer: Optimizer, rate: float, seed: int) -> Run:
    """One run; all begin with the same answers, which AdamW's with the first seed asks for."""
    run = dataclasses.replace(
        config.base, optimizer=optimizer, learning_rate=rate, seed=seed,
        baseline=(optimizer, seed) == ("adamw", config.seeds[0]),
    )  # fmt: skip
    return dataclasses.replace(run, run_dir=runs.directory(config.base.run_dir, run))


def grid(config: Config) -> list[Run]:
    """Every optimizer at every learning rate, with the first seed."""
    return [
        point(config, optimizer, rate, config.seeds[0])
        for rate in config.learning_rates
        for optimizer in config.optimizers
    ]


def finals(config: Config, best: dict[str, float]) -> list[Run]:
    """Every optimizer at its best learning rate, with every seed."""
    return [
        point(config, optimizer, best[optimizer], seed)
        for seed in config.seeds
        for optimizer in config.optimizers
    ]


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    options: Any = {"jobs": config.jobs, "trainer": tune}
    tuned = runs.complete(grid(config), config.out, **options)
    found = runs.complete(finals(config, best_rates(tuned)), config.out, **options)
    show(config, tuned, found)
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def finals_of(entries: Sequence[runs.Entry]) -> list[runs.Entry]:
    """Of all stored runs, those at each optimizer's best rate of the grid."""
    first = entries[0]["config"]["seed"]
    best = best_rates(e for e in entries if e["config"]["seed"] == first)
    return [e for e in entries if e["config"]["learning_rate"] == best[e["config"]["optimizer"]]]


def compare(entries: Sequence[runs.Entry]) -> list[dict[str, Any]]:
    """One row for each optimizer: answers over all its seeds, with 95 % limits."""
    names = dict.fromkeys(entry["config"]["optimizer"] for entry in entries)
    return [_row(n, [e for e in entries if e["config"]["optimizer"] == n]) for n in names]


def before(entries: Sequence[runs.Entry]) -> float:
    """The share of right answers before training."""
    return next(e["before"]["share"] for e in entries if e["before"])


def _row(optimizer: str, entries: Sequence[runs.Entry]) -> dict[str, Any]:
    right, of = (sum(e["after"][name] for e in entries) for name in ("right", "of"))
    losses = [e["validation_loss"] for e in entries]
    return {
        "optimizer": optimizer,
        "learning_rate": entries[0]["config"]["learning_rate"],
        "share": right / of,
        "interval": wilson(right, of),
        "of": of,
        "loss": float(np.mean(losses)),
        "losses": losses,
        "state_bytes": entries[0]["state_bytes"],
        "seconds_per_step": float(np.median([e["seconds_per_step"] for e in entries])),
    }


def show(config: Config, tuned: Sequence[runs.Entry], found: Sequence[runs.Entry]) -> None:
    """Prints the grid, and the comparison."""
    by_point = {(e["config"]["optimizer"], e["config"]["learning_rate"]): e for e in tuned}

    def cell(optimizer: str, rate: float) -> str:
        entry = by_point[optimizer, rate]
        return f"{entry['validation_loss']:.4f} ({entry['after']['share']:.0%})"

    tables.show(
        f"Loss of held-out answers, and share of right ones, by learning rate, {config.base.task}",
        ("optimizer", *(f"{rate:g}" for rate in config.learning_rates)),
        ((o, *(cell(o, rate) for rate in config.learning_rates)) for o in config.optimizers),
    )
    rows = compare(found)
    tables.show(
        f"{config.base.model} on {config.base.task}: {config.base.steps} steps, "
        f"{len(config.seeds)} seeds, right before: {before(found):.1%}",
        ("optimizer", "rate", "right", "95 % limits", "loss", "state MiB", "s/step"),
        (
            (NAMES[row["optimizer"]], row["learning_rate"], f"{row['share']:.1%}",
             "{:.1%} to {:.1%}".format(*row["interval"]), row["loss"],
             row["state_bytes"] / 2**20, row["seconds_per_step"])
            for row in rows
        ),
    )  # fmt: skip


def draw(config: Config, found: Sequence[runs.Entry]) -> Path:
    """Draws the loss of held-out answers over steps, and right answers over bytes of state."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    for i, optimizer in enumerate(config.optimizers):
        mine = [e for e in found if e["config"]["optimizer"] == optimizer]
        steps = [step for step, _ in mine[0]["curve"]]
        curves = np.array([[loss for _, loss in e["curve"]] for e in mine])
        left.plot(
            steps, curves.mean(0), marker=MARKERS[i], color=COLOURS[i], markersize=3,
            linewidth=1, label=NAMES[optimizer],
        )  # fmt: skip
        _share(right, i, _row(optimizer, mine))
    right.axhline(
        before(found), color=COLOURS[-1], linewidth=1, linestyle=":",
        label="before training",
    )  # fmt: skip
    left.set(xlabel="step", ylabel="loss of held-out answers (nats per token)", yscale="log")
    left.legend(frameon=False, fontsize="small")
    right.set(xlabel="optimizer state (MiB)", ylabel="right answers", ylim=(0, 1))
    right.set_title("all seeds together, 95 % limits", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save(figure, config.out)


def _share(axes: Axes, i: int, row: dict[str, Any]) -> None:
    low, high = row["interval"]
    axes.errorbar(
        row["state_bytes"] / 2**20, row["share"],
        yerr=[[row["share"] - low], [high - row["share"]]],
        fmt=MARKERS[i], color=COLOURS[i], capsize=3,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
