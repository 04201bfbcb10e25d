"""Fine-tuning, at each optimizer's best rate: `python -m experiments.studies.finetuning`.

All optimizers have the same examples, steps and grid of learning rates, for all parameters. With
the first seed, each walks along the grid until both neighbours of a rate have a larger loss of
held-out answers; that rate is run with the other seeds. A seed fixes the examples, their order and
the draws. The held-out items are the same for all seeds, so the confidence intervals cover only the
choice of these items. Runs that are in the result file are not repeated.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import reporting
from experiments.reporting import COLOURS, STYLES, Style, save
from experiments.studies.pretraining import best_rates, rate_of
from experiments.trainer import cli, sweeps
from experiments.trainer.config import change
from experiments.trainer.evaluation import wilson
from experiments.trainer.finetuning import Config as Run
from experiments.trainer.finetuning import finetune
from experiments.trainer.loop import Result
from experiments.trainer.optimizers import Name

PROGRAM = "experiments.studies.finetuning"
# Without GoLore, which is GaLore until its first refresh after half of the steps: in runs of a
# single period, as here, it has none.
OPTIMIZERS: tuple[Name, ...] = ("gum", "adamw", "muon", "galore", "galore_muon")
BASE = Run(
    run_dir="runs/finetuning", steps=24, seq_len=128, checkpoint_every=1_000_000, log_every=4,
    validate_every=8, validation_batches=4, eval_batch_size=100,
)  # fmt: skip


Complete = Callable[[Sequence[Any]], list[sweeps.Entry]]


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Fine-tune with every optimizer on the same grid, then on several seeds."""

    #: Optimizers to compare.
    optimizers: tuple[Name, ...] = OPTIMIZERS
    #: The grid, in ascending order.
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    #: Seeds of examples, their order and draws; the search uses the first.
    seeds: tuple[int, ...] = (0, 1)
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/finetuning.json")
    #: All other options of a run, as in experiments.finetune.
    base: Run = dataclasses.field(default_factory=lambda: BASE)


def tune(config: Any, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Fine-tunes; returns the result, and the answers and loss that an entry keeps beside it."""
    outcome = finetune(config, show=show)
    if outcome.after is None:  # stopped before its last step, which the result tells the caller
        return outcome.result, {}
    assert outcome.loss
    return outcome.result, {
        "before": outcome.before,
        "after": outcome.after.summary(),
        "loss": outcome.loss._asdict(),
    }


def point(config: Config, optimizer: str, rate: float, seed: int) -> Run:
    """Returns the configuration of one run.

    All runs begin with the same weights, so only the first run of the search asks for answers
    before training. GaLore has GUM's projector: an SVD differs only in the minutes it takes.
    """
    own = {"projector": "subspace_iteration"} if optimizer in ("galore", "galore_muon") else {}
    run = change(
        config.base, optimizer=optimizer, learning_rate=rate, seed=seed,
        baseline=(optimizer, rate, seed) == (config.optimizers[0], _first_rates(config)[0],
                                             config.seeds[0]),
        **own,
    )  # fmt: skip
    return sweeps.in_own_directory(run)


def grid(config: Config, complete: Complete) -> list[sweeps.Entry]:
    """Searches with the first seed; returns the entries of all runs of the search."""
    # 1. Begin with the two rates in the middle of the grid, for all optimizers.
    points = {(o, r) for o in config.optimizers for r in _first_rates(config)}
    while True:
        wanted = [
            point(config, optimizer, rate, config.seeds[0])
            for rate in config.learning_rates
            for optimizer in config.optimizers
            if (optimizer, rate) in points
        ]
        entries = complete(wanted)
        # 2. Ask for both neighbours of each optimizer's best rate so far.
        further = {
            (optimizer, rate)
            for optimizer, best in best_rates(entries).items()
            for rate in _neighbours(config.learning_rates, best)
        }
        # 3. Stop once all of them have been run. At an end of the grid there is only one neighbour.
        if further <= points:
            return entries
        points |= further


def _first_rates(config: Config) -> Sequence[float]:
    """Returns the two rates in the middle of the grid."""
    return config.learning_rates[(len(config.learning_rates) - 1) // 2 :][:2]


def _neighbours(rates: Sequence[float], rate: float) -> Sequence[float]:
    place = rates.index(rate)
    return rates[max(place - 1, 0) : place + 2]


def finals(config: Config, best: dict[str, float]) -> list[Run]:
    """Returns the runs of all optimizers at their best learning rates, with all seeds."""
    return [
        point(config, optimizer, rate_of(optimizer, best), seed)
        for seed in config.seeds
        for optimizer in config.optimizers
    ]


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    complete = sweeps.runner(config, config.out, tune)
    tuned = grid(config, complete)
    best = finals(config, best_rates(tuned))
    found = complete(best)
    asked = before([*tuned, *found])
    show(config, tuned, found, asked)
    print(f"\nresults: {config.out}; figure: {draw(config, found, asked)}")
    return 0


def finals_of(entries: Sequence[sweeps.Entry]) -> list[sweeps.Entry]:
    """Selects from stored entries the runs at each optimizer's best rate of the search.

    Entries whose other options differ from the first entry's belong to another study and are left
    out.
    """
    first = entries[0]["config"]
    varied = {"optimizer", "learning_rate", "seed", "projector"}
    alike = [e for e in entries if all(e["config"][k] == first[k] for k in first.keys() - varied)]
    best = best_rates(e for e in alike if e["config"]["seed"] == first["seed"])
    return [e for e in alike if e["config"]["learning_rate"] == best.get(e["config"]["optimizer"])]


def compare(entries: Sequence[sweeps.Entry]) -> list[dict[str, Any]]:
    """Returns one row per optimizer: means over seeds, and 95 % intervals for held-out items."""
    names = dict.fromkeys(entry["config"]["optimizer"] for entry in entries)
    return [_row(n, [e for e in entries if e["config"]["optimizer"] == n]) for n in names]


def before(entries: Sequence[sweeps.Entry]) -> float:
    """Returns the share of right answers before training; NaN if no run asked for them."""
    return next((e["before"]["share"] for e in entries if e["before"]), float("nan"))


def _row(optimizer: str, entries: Sequence[sweeps.Entry]) -> dict[str, Any]:
    # All seeds answer the same items, so the sample of the Wilson interval is `items` and does not
    # grow with the number of seeds.
    items = entries[0]["after"]["of"]
    shares = [e["after"]["share"] for e in entries]
    share = float(np.mean(shares))
    losses = [e["validation_loss"] for e in entries]
    last = entries[-1]["loss"]
    return {
        "optimizer": optimizer,
        "learning_rate": entries[0]["config"]["learning_rate"],
        "shares": shares,
        "share": share,
        "interval": wilson(round(share * items), items),
        "losses": losses,
        "loss": float(np.mean(losses)),
        "loss_interval": (last["low"], last["high"]),  # of the last seed
        "state_bytes": entries[0]["state_bytes"],
        # The minimum over seeds: other work on the machine can only slow a run down.
        "seconds_per_step": min(e["seconds_per_step"] for e in entries),
    }


def show(
    config: Config, tuned: Sequence[sweeps.Entry], found: Sequence[sweeps.Entry], asked: float
) -> None:
    """Prints the search along the grid, then the comparison at the best rates."""
    by_point = {(e["config"]["optimizer"], e["config"]["learning_rate"]): e for e in tuned}

    def cell(optimizer: str, rate: float) -> str | None:
        entry = by_point.get((optimizer, rate))
        return (
            None
            if entry is None
            else f"{entry['validation_loss']:.4f} ({entry['after']['share']:.0%})"
        )

    reporting.table(
        f"Loss of held-out answers (share of right answers) by learning rate, {config.base.task}",
        ("optimizer", *(f"{rate:g}" for rate in config.learning_rates)),
        ((o, *(cell(o, rate) for rate in config.learning_rates)) for o in config.optimizers),
    )
    rows = compare(found)
    reporting.table(
        f"{config.base.model} on {config.base.task}: {config.base.steps} steps, "
        f"{len(config.seeds)} seeds, right before: {asked:.1%}",
        ("optimizer", "rate", "right", "95 % interval", "loss", "95 % interval", "state MiB",
         "s/step"),
        (
            (STYLES[row["optimizer"]].name, row["learning_rate"], f"{row['share']:.1%}",
             "{:.1%} to {:.1%}".format(*row["interval"]), row["loss"],
             "{:.3f} to {:.3f}".format(*row["loss_interval"]),
             row["state_bytes"] / 2**20, row["seconds_per_step"])
            for row in rows
        ),
    )  # fmt: skip


def draw(config: Config, found: Sequence[sweeps.Entry], asked: float) -> Path:
    """Draws the loss of held-out answers against steps, and right answers against state bytes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    for optimizer in config.optimizers:
        style = STYLES[optimizer]
        mine = [e for e in found if e["config"]["optimizer"] == optimizer]
        steps = [step for step, _ in mine[0]["curve"]]
        curves = np.array([[loss for _, loss in e["curve"]] for e in mine])
        left.plot(
            steps, curves.mean(0), marker=style.marker, color=style.colour, markersize=3,
            linewidth=1, label=style.name,
        )  # fmt: skip
        _share(right, style, _row(optimizer, mine))
    right.axhline(
        asked, color=COLOURS[-1], linewidth=1, linestyle=":",
        label="before training",
    )  # fmt: skip
    left.set_xticks([step for step, _ in found[0]["curve"]])
    left.set(xlabel="step", ylabel="loss of held-out answers (nats per token)", ylim=(0, None))
    left.set_title("mean over seeds", fontsize="medium")
    left.legend(frameon=False, fontsize="small")
    right.legend(frameon=False, fontsize="small")
    right.set(xlabel="optimizer state (MiB)", ylabel="right answers", ylim=(0, 1))
    right.set_title("mean over seeds, 95 % interval", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save(figure, config.out)


def _share(axes: Axes, style: Style, row: dict[str, Any]) -> None:
    low, high = row["interval"]
    axes.errorbar(
        row["state_bytes"] / 2**20, row["share"],
        yerr=[[row["share"] - low], [high - row["share"]]],
        fmt=style.marker, color=style.colour, capsize=3,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
