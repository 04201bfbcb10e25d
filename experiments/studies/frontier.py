"""Loss against bytes of state, over many periods: `python -m experiments.studies.frontier`.

Which rule for the residual brings low-rank memory to the loss of full-rank Muon? Every contender
has its own learning rate for the hidden matrices: it is searched along one grid on the first corpus
and one seed, until both neighbours of the best are worse. Then each is run at full length with that
rate on several seeds and all corpora. Embedding, head and norms have the same AdamW at one rate.

It takes hours, and goes on where it was stopped: finished runs are in the result file, others
continue from their last checkpoint.

    python -m experiments.studies.frontier --budget-minutes 60
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt

from experiments import cli, model, optimizers, runs, tables
from experiments.config import Config as Run
from experiments.config import ConfigError, choose
from experiments.plots import COLOURS, MARKERS, save
from experiments.studies.pretraining import steps_to

PROGRAM = "experiments.studies.frontier"
STEPS, TUNING_STEPS = 4000, 1000
BASE = Run(
    run_dir="runs/frontier", steps=STEPS, period=200, fallback_learning_rate=1e-2,
    validate_every=200, validation_batches=16, checkpoint_every=500, keep_checkpoints=1,
    log_every=50,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contender:
    """One method: how it is called, its options, and where the search for its rate begins."""

    name: str
    options: dict[str, Any]
    rate: float


def _low_rank(residual: str, full_rank: int = 0, **more: Any) -> dict[str, Any]:
    return {"residual": residual, "full_rank_layers": full_rank, **more}


# In the order in which they are run, the decisive ones first.
CONTENDERS = {
    key: Contender(name, options, rate)
    for key, name, rate, options in (
        ("columns", "low-rank Muon + columns", 3e-3, {"optimizer": "gum", **_low_rank("columns")}),
        ("columns_16", "low-rank Muon + columns, rank 16", 3e-3,
         {"optimizer": "gum", **_low_rank("columns", rank=16)}),
        ("muon", "Muon", 3e-3, {"optimizer": "muon"}),
        ("scale", "SCALE", 1e-3, {"optimizer": "scale"}),
        ("gum", "GUM", 3e-3, {"optimizer": "gum", **_low_rank("sampled", 2)}),
        ("adamw", "AdamW", 1e-3, {"optimizer": "adamw"}),
        ("galore_muon", "GaLore-Muon", 3e-3, {"optimizer": "gum", **_low_rank("drop")}),
        ("columns_rotate", "low-rank Muon + columns, rotated", 3e-3,
         {"optimizer": "gum", **_low_rank("columns", restart="rotate")}),
        ("columns_half", "low-rank Muon + half of columns, rotated", 3e-3,
         {"optimizer": "gum", **_low_rank("columns", restart="rotate", residual_scale=0.5)}),
        ("columns_20", "low-rank Muon + columns, rotated, K = 20", 3e-3,
         {"optimizer": "gum", **_low_rank("columns", restart="rotate", period=20)}),
        ("adam_columns", "low-rank Adam + columns", 1e-3,
         {"optimizer": "unbiased_adamw", **_low_rank("columns", restart="slots")}),
        ("columns_slots", "GUM additive + columns", 3e-3,
         {"optimizer": "gum", **_low_rank("columns", 2)}),
        ("additive", "GUM additive", 3e-3, {"optimizer": "gum", **_low_rank("additive", 2)}),
        ("fira", "Fira", 1e-3, {"optimizer": "fira"}),
        ("apollo", "APOLLO", 1e-3, {"optimizer": "apollo"}),
        ("apollo_mini", "APOLLO-Mini", 1e-3, {"optimizer": "apollo_mini"}),
        ("frugal", "FRUGAL", 1e-3, {"optimizer": "frugal"}),
        ("sign", "low-rank Muon + sign", 3e-3, {"optimizer": "gum", **_low_rank("sign")}),
        ("rows", "low-rank Muon + rows", 3e-3, {"optimizer": "gum", **_low_rank("rows")}),
        ("plain", "low-rank Muon + residual", 3e-3, {"optimizer": "gum", **_low_rank("plain")}),
        ("galore", "GaLore", 1e-3, {"optimizer": "galore"}),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Tune every contender on the same grid, then compare them over many periods."""

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to compare, by their names in this module."""
    factor: float = 2.0
    """Ratio of neighbouring learning rates of the grid."""
    tuning_steps: int = TUNING_STEPS
    """Steps of a run of the search."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, data order and draws; the search uses the first."""
    corpora: tuple[str, ...] = ("stdlib", "runs/sotu")
    """What to read, each on its own; the search uses the first."""
    out: Path = Path("experiments/results/studies/frontier.json")
    """Result file; the figure is beside it."""
    jobs: int = 2
    """Runs that train at a time, each on its share of the cores."""
    budget_minutes: float | None = None
    """When to stop: runs are saved, the exit code is 75, and the same command goes on. None: at the
    end."""
    base: Run = dataclasses.field(default_factory=lambda: BASE)
    """All other options of a run, as in experiments.pretrain."""


Complete = Callable[[Sequence[Run]], list[runs.Entry]]


def point(config: Config, key: str, rate: float, **changes: Any) -> Run:
    """One run of a contender, by default of the search."""
    options = {"steps": config.tuning_steps, "seed": config.seeds[0]}
    options |= {"corpus": (config.corpora[0],)} | changes
    chosen = CONTENDERS[choose("contenders", key, CONTENDERS)].options
    run = dataclasses.replace(config.base, learning_rate=rate, **chosen, **options)
    return dataclasses.replace(run, run_dir=runs.directory(config.base.run_dir, run))


def rate_at(config: Config, key: str, index: int) -> float:
    """The learning rate of a contender's grid, by its distance from the start, in four digits."""
    return float(f"{CONTENDERS[key].rate * config.factor**index:.4g}")


def search(config: Config, complete: Complete) -> dict[str, float]:
    """By contender, the best rate of the grid, whose neighbours are both worse.

    In every round each contender asks for what it still lacks, so that their runs share the cores.
    """
    found: dict[str, dict[int, float]] = {key: {} for key in config.contenders}
    while missing := [(key, i) for key, losses in found.items() for i in _next(losses)]:
        entries = complete([point(config, key, rate_at(config, key, i)) for key, i in missing])
        for (key, i), entry in zip(missing, entries, strict=True):
            loss = entry["validation_loss"]
            found[key][i] = loss if math.isfinite(loss) else math.inf
    best = {key: min(losses, key=losses.__getitem__) for key, losses in found.items()}
    return {key: rate_at(config, key, index) for key, index in best.items()}


_HOPELESS = 8  # points of the grid, all without a finite loss, after which the search gives up


def _next(losses: dict[int, float]) -> list[int]:
    """The points of the grid to try next; none if both neighbours of the best are there."""
    if not losses:
        return [-1, 0, 1]
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf and len(losses) > _HOPELESS:
        raise ConfigError(f"--contenders: no run of {len(losses)} learning rates ended finite")
    return [i for i in (best - 1, best + 1) if i not in losses]


def finals(config: Config, best: dict[str, float], corpus: str) -> list[Run]:
    """Every contender at its best rate, at full length, seed by seed."""
    return [
        point(config, key, best[key], steps=config.base.steps, seed=seed, corpus=(corpus,))
        for seed in config.seeds
        for key in config.contenders
    ]


def hidden_bytes(run: Run) -> int:
    """Bytes of optimizer state that belong to the hidden matrices: all but the fallback's."""
    arch = model.architecture(run)
    params = jax.eval_shape(lambda: model.create(arch)[1])
    kinds: Any = optimizers.matrix_or_rest(params)
    state = jax.eval_shape(optimizers.build(run, arch.layers).init, params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # AdamW keeps two moments of each other weight, whatever the hidden matrices have.
    rest = sum(
        2 * leaf.size * leaf.dtype.itemsize
        for leaf, kind in zip(jax.tree.leaves(params), jax.tree.leaves(kinds), strict=True)
        if kind == "rest"
    )
    return total - rest


def compare(config: Config, entries: Sequence[runs.Entry]) -> list[dict[str, Any]]:
    """One row for each contender, over its seeds, the least loss first."""
    of = _by_contender(config, entries)
    goals = {
        name: statistics.mean(e["validation_loss"] for e in of[name]) if name in of else -math.inf
        for name in ("adamw", "muon")
    }
    return sorted((_row(key, found, goals) for key, found in of.items()), key=lambda r: r["loss"])


def _by_contender(config: Config, entries: Sequence[runs.Entry]) -> dict[str, list[runs.Entry]]:
    """The entries of `finals`, whose order they have."""
    keys = list(config.contenders) * len(config.seeds)
    return {
        key: [entry for name, entry in zip(keys, entries, strict=True) if name == key]
        for key in config.contenders
    }


def _row(key: str, entries: Sequence[runs.Entry], goals: dict[str, float]) -> dict[str, Any]:
    losses = [entry["validation_loss"] for entry in entries]
    run = dataclasses.replace(Run(), **_known(entries[0]["config"]))
    seconds = statistics.median(entry["seconds_per_step"] for entry in entries)
    row = {
        "contender": key,
        "learning_rate": run.learning_rate,
        "loss": statistics.mean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else math.nan,
        "hidden_bytes": hidden_bytes(run),
        "state_bytes": entries[0]["state_bytes"],
        "seconds_per_step": seconds,
    }
    for goal, loss in goals.items():
        reached = [steps_to(entry["curve"], loss) for entry in entries]
        whole = [steps for steps in reached if steps is not None]
        mean = statistics.mean(whole) if len(whole) == len(reached) else None
        row |= {f"steps_to_{goal}": mean, f"seconds_to_{goal}": mean and mean * seconds}
    return row


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"corpus": tuple(options["corpus"])}


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    complete = partial(
        runs.complete,
        out=config.out,
        jobs=config.jobs,
        deadline=runs.deadline_in(config.budget_minutes),
    )
    best = search(config, complete)
    found = {corpus: complete(finals(config, best, corpus)) for corpus in config.corpora}
    show(config, found)
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def show(config: Config, found: dict[str, list[runs.Entry]]) -> None:
    """Prints the comparison on each corpus."""
    for corpus, entries in found.items():
        tables.show(
            f"{corpus}: {config.base.steps} steps, {len(config.seeds)} seeds",
            ("contender", "rate", "loss", "deviation", "hidden KiB", "state KiB", "s/step",
             "steps to AdamW's", "steps to Muon's"),
            (
                (CONTENDERS[row["contender"]].name, row["learning_rate"], row["loss"],
                 row["deviation"], row["hidden_bytes"] / 1024, row["state_bytes"] / 1024,
                 row["seconds_per_step"], row["steps_to_adamw"], row["steps_to_muon"])
                for row in compare(config, entries)
            ),
        )  # fmt: skip


def draw(config: Config, found: dict[str, list[runs.Entry]]) -> Path:
    """Draws, for each corpus, last losses over the hidden matrices' bytes: mean and range."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(5.4 * len(found), 4.2), layout="constrained", squeeze=False
    )
    for each, (corpus, entries) in zip(axes[0], found.items(), strict=True):
        of = _by_contender(config, entries)
        for i, row in enumerate(compare(config, entries)):
            losses = [entry["validation_loss"] for entry in of[row["contender"]]]
            each.errorbar(
                # Bytes of nothing have no logarithm.
                max(row["hidden_bytes"] / 1024, 1), row["loss"],
                yerr=[[row["loss"] - min(losses)], [max(losses) - row["loss"]]],
                fmt=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], capsize=3,
                label=CONTENDERS[row["contender"]].name,
            )  # fmt: skip
        each.set(xscale="log", xlabel="state of the hidden matrices (KiB; at most 1: none)")
        each.set_title(Path(corpus).name)
        each.grid(alpha=0.3)
        each.legend(frameon=False, fontsize="x-small")
    axes[0][0].set(ylabel="validation loss (nats per token)")
    return save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
