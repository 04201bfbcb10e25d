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
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib.pyplot as plt

from experiments import reporting
from experiments.models import llama, presets
from experiments.reporting import COLOURS, CORPORA, STYLES, Style, save
from experiments.studies.pretraining import steps_to
from experiments.trainer import cli, loop, optimizers, rest, sweeps, together
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change, from_record
from experiments.trainer.optimizers import Gum
from experiments.trainer.options import ConfigError, choose
from experiments.trainer.pretraining import architecture

PROGRAM = "experiments.studies.frontier"
STEPS, TUNING_STEPS = 4000, 1000
BASE = Run(
    run_dir="runs/frontier", steps=STEPS, optimizer=Gum(period=200), fallback_learning_rate=1e-2,
    validate_every=200, validation_batches=16, checkpoint_every=500, keep_checkpoints=1,
    log_every=50,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contender:
    """One method: how it is called, its options, where the search begins, and of which rate."""

    name: str
    options: dict[str, Any]
    rate: float
    tuned: str = "learning_rate"


def _muon(residual: str, full_rank: int = 0, **more: Any) -> dict[str, Any]:
    """Low-rank Muon with a rule for the residual."""
    return {"optimizer": "gum", "residual": residual, "full_rank_layers": full_rank, **more}


def _turned(**more: Any) -> dict[str, Any]:
    """With the columns of the residual; a refresh turns momentum into the new basis."""
    return _muon("columns", restart="rotate", **more)


def _adam(optimizer: str, **more: Any) -> dict[str, Any]:
    # Bases of an SVD train no better, and take an accelerator minutes.
    return {"optimizer": optimizer, "projector": "subspace_iteration", **more}


def _with_fallback(name: str, fallback: str, rate: float) -> Contender:
    """Muon at its best rate, whose embedding, head and norms have something else than AdamW."""
    options = {"optimizer": "muon", "learning_rate": 3e-3, "fallback": fallback}
    return Contender(f"Muon, {name}", options, rate, "fallback_learning_rate")


# In the order in which they are run, the decisive ones first.
CONTENDERS = {
    key: Contender(name, options, rate)
    for key, name, rate, options in (
        ("columns", "low-rank Muon + columns", 3e-3, _muon("columns")),
        ("muon", "Muon", 3e-3, {"optimizer": "muon"}),
        ("columns_rotate", "low-rank Muon + columns, rotated", 3e-3, _turned()),
        ("columns_16", "low-rank Muon + columns, rank 16", 3e-3, _turned(rank=16)),
        ("columns_8", "low-rank Muon + columns, rank 8", 3e-3, _turned(rank=8)),
        ("scale", "SCALE", 1e-3, {"optimizer": "scale"}),
        ("adamw", "AdamW", 1e-3, {"optimizer": "adamw"}),
        ("galore_muon", "GaLore-Muon", 3e-3, _muon("drop")),
        ("gum", "GUM", 3e-3, _muon("sampled", 2)),
        ("muon_rows8", "Muon, 8 bits, a scale per row", 3e-3,
         {"optimizer": "muon", "momentum": "rows8"}),
        ("muon_rows4", "Muon, 4 bits, a scale per row", 3e-3,
         {"optimizer": "muon", "momentum": "rows4"}),
        ("muon_int8", "Muon, 8 bits", 3e-3, {"optimizer": "muon", "momentum": "int8"}),
        ("muon_int4", "Muon, 4 bits", 3e-3, {"optimizer": "muon", "momentum": "int4"}),
        ("columns_decay", "low-rank Muon + columns that fade", 3e-3, _turned(residual_decay=1.0)),
        ("columns_half", "low-rank Muon + half of columns", 3e-3, _turned(residual_scale=0.5)),
        ("columns_20", "low-rank Muon + columns, K = 20", 3e-3, _turned(period=20)),
        ("columns_1000", "low-rank Muon + columns, K = 1000", 3e-3, _turned(period=1000)),
        ("joint", "low-rank momentum, jointly orthogonalized", 3e-3,
         {"optimizer": "joint_muon", "restart": "rotate"}),
        ("joint_3", "the same, 3 times the residual", 3e-3,
         {"optimizer": "joint_muon", "restart": "rotate", "residual_scale": 3.0}),
        ("adam_columns", "low-rank Adam + columns", 1e-3,
         {"optimizer": "unbiased_adamw", "residual": "columns", "full_rank_layers": 0,
          "restart": "slots"}),
        ("columns_slots", "GUM additive + columns", 3e-3, _muon("columns", 2)),
        ("additive", "GUM additive", 3e-3, _muon("additive", 2)),
        ("fira", "Fira", 1e-3, _adam("fira")),
        ("apollo", "APOLLO", 1e-3, {"optimizer": "apollo"}),
        ("apollo_mini", "APOLLO-Mini", 1e-3, {"optimizer": "apollo_mini"}),
        ("frugal", "FRUGAL", 1e-3, _adam("frugal")),
        ("sign", "low-rank Muon + sign", 3e-3, _muon("sign")),
        ("rows", "low-rank Muon + rows", 3e-3, _muon("rows")),
        ("plain", "low-rank Muon + residual", 3e-3, _muon("plain")),
        ("galore", "GaLore", 1e-3, _adam("galore")),
        # Question 2: is it the draw?
        ("gum_1", "GUM, 1 layer drawn", 3e-3, _muon("sampled", 1)),
        ("gum_4", "GUM, half of the layers drawn", 3e-3, _muon("sampled", 4)),
        ("columns_slots_1", "GUM additive + columns, 1 layer drawn", 3e-3, _muon("columns", 1)),
        ("columns_slots_4", "GUM additive + columns, half drawn", 3e-3, _muon("columns", 4)),
        # Question 3: staleness.
        ("galore_20", "GaLore-Muon, K = 20", 3e-3, _muon("drop", period=20)),
        ("galore_1000", "GaLore-Muon, K = 1000", 3e-3, _muon("drop", period=1000)),
        ("gum_20", "GUM, K = 20", 3e-3, _muon("sampled", 2, period=20)),
        ("gum_1000", "GUM, K = 1000", 3e-3, _muon("sampled", 2, period=1000)),
    )
} | {
    # What may train embedding, head and norms with less state than AdamW's.
    f"fallback_{fallback}": _with_fallback(name, fallback, rate)
    for fallback, name, rate in (
        ("adamw8", "8-bit AdamW for the rest", 1e-2),
        ("factored", "factored second moment for the rest", 5e-3),
        ("factored_momentum", "the same, and 8-bit momentum", 1e-2),
        ("columns", "SCALE's rule for the rest", 2.5e-3),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Tune every contender on the same grid, then compare them over many periods."""

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to compare, by their names in this module."""
    factor: float = 2.0
    """Ratio of neighbouring learning rates of the grid."""
    first: int = 0
    """Where in the grid a search begins, counted from each contender's own rate: -1 is half of it.
    Larger models want smaller rates."""
    tuning_steps: int = TUNING_STEPS
    """Steps of a run of the search."""
    tuning_runs: Literal["first", "all"] = "first"
    """Runs by which the search judges a rate: that of the first seed on the first corpus, or the
    mean over all seeds and corpora."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, data order and draws."""
    corpora: tuple[str, ...] = ("stdlib", "runs/sotu")
    """What to read, each on its own."""
    together: bool = False
    """Train the runs of a contender in one program, for an accelerator: jobs have no effect."""
    out: Path = Path("experiments/results/studies/frontier.json")
    """Result file; the figure is beside it."""
    base: Run = dataclasses.field(default_factory=lambda: BASE)
    """All other options of a run, as in experiments.pretrain."""


Complete = Callable[[Sequence[Run]], list[sweeps.Entry]]


def point(config: Config, key: str, rate: float, seed: int, corpus: str, steps: int) -> Run:
    """One run of a contender."""
    chosen = CONTENDERS[choose("contenders", key, CONTENDERS)]
    options = chosen.options | {chosen.tuned: rate}
    run = change(config.base, seed=seed, corpus=(corpus,), steps=steps, **options)
    return dataclasses.replace(run, run_dir=sweeps.directory(config.base.run_dir, run))


def trials(config: Config, key: str, rate: float) -> list[Run]:
    """The runs by which the search judges a rate of a contender."""
    some = slice(1 if config.tuning_runs == "first" else None)
    return [
        point(config, key, rate, seed, corpus, config.tuning_steps)
        for corpus in config.corpora[some]
        for seed in config.seeds[some]
    ]


def rate_at(config: Config, key: str, index: int) -> float:
    """The learning rate of a contender's grid, by its distance from the start, in four digits."""
    return float(f"{CONTENDERS[key].rate * config.factor**index:.4g}")


def search(config: Config, complete: Complete) -> dict[str, float]:
    """By contender, the best rate of the grid, whose neighbours are both worse.

    In every round each contender asks for what it still lacks, so that their runs share the cores.
    """
    found: dict[str, dict[int, float]] = {key: {} for key in config.contenders}
    while missing := [
        (key, i) for key, losses in found.items() for i in _next(losses, config.first)
    ]:
        asked = [trials(config, key, rate_at(config, key, i)) for key, i in missing]
        entries = iter(complete([run for some in asked for run in some]))
        for (key, i), some in zip(missing, asked, strict=True):
            loss = statistics.mean(next(entries)["validation_loss"] for _ in some)
            found[key][i] = loss if math.isfinite(loss) else math.inf
    best = {key: min(losses, key=losses.__getitem__) for key, losses in found.items()}
    return {key: rate_at(config, key, index) for key, index in best.items()}


_HOPELESS = 8  # points of the grid, all without a finite loss, after which the search gives up


def _next(losses: dict[int, float], first: int) -> list[int]:
    """The points of the grid to try next; none if both neighbours of the best are there."""
    if not losses:
        return [first - 1, first, first + 1]
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf and len(losses) > _HOPELESS:
        raise ConfigError(f"`contenders`: no run of {len(losses)} learning rates ended finite")
    return [i for i in (best - 1, best + 1) if i not in losses]


def finals(config: Config, best: dict[str, float], corpus: str) -> list[Run]:
    """Every contender at its best rate, at full length, seed by seed."""
    return [
        point(config, key, best[key], seed, corpus, config.base.steps)
        for seed in config.seeds
        for key in config.contenders
    ]


def hidden_bytes(run: Run) -> int:
    """Bytes of optimizer state that belong to the hidden matrices: all but the fallback's."""
    arch = architecture(run)
    params = _shapes(arch)
    kinds: Any = rest.matrix_or_rest(params)
    # With AdamW as the fallback, which keeps two moments of each other weight.
    run = dataclasses.replace(run, fallback="adamw")
    state = jax.eval_shape(optimizers.build(run, arch.layers).init, params)
    others = sum(
        2 * leaf.size * leaf.dtype.itemsize
        for leaf, kind in zip(jax.tree.leaves(params), jax.tree.leaves(kinds), strict=True)
        if kind == "rest"
    )
    return loop.state_bytes(state) - others


@functools.cache
def _shapes(arch: presets.Architecture) -> llama.Params:
    """The parameters of a model as shapes; all contenders have the same."""
    return jax.eval_shape(lambda: llama.create(arch)[1])


def compare(config: Config, entries: Sequence[sweeps.Entry]) -> list[dict[str, Any]]:
    """One row for each contender, over its seeds, the least loss first."""
    of = _by_contender(config, entries)
    goals = {name: _losses(of[name]) for name in ("adamw", "muon") if name in of}
    return sorted((_row(key, found, goals) for key, found in of.items()), key=lambda r: r["loss"])


def _by_contender(config: Config, entries: Sequence[sweeps.Entry]) -> dict[str, list[sweeps.Entry]]:
    """The entries of `finals`, whose order they have."""
    keys = list(config.contenders) * len(config.seeds)
    return {
        key: [entry for name, entry in zip(keys, entries, strict=True) if name == key]
        for key in config.contenders
    }


def _losses(entries: Sequence[sweeps.Entry]) -> list[float]:
    return [entry["validation_loss"] for entry in entries]


def _row(
    key: str, entries: Sequence[sweeps.Entry], goals: dict[str, list[float]]
) -> dict[str, Any]:
    losses = _losses(entries)
    run = from_record(Run, entries[0]["config"])
    # Runs of one program share its seconds, and none has seconds of its own.
    alone = [entry["seconds_per_step"] for entry in entries if "together" not in entry]
    row: dict[str, Any] = {
        "contender": key,
        "learning_rate": getattr(run, CONTENDERS[key].tuned),
        "loss": statistics.mean(losses),
        "deviation": _deviation(losses),
        "hidden_bytes": hidden_bytes(run),
        "state_bytes": entries[0]["state_bytes"],
        "seconds_per_step": statistics.median(alone) if alone else None,
    }
    for goal, reference in goals.items():
        # By pairs: most of what seeds change, they change under every method.
        apart = [loss - other for loss, other in zip(losses, reference, strict=True)]
        row |= {f"above_{goal}": statistics.mean(apart), f"apart_{goal}": _deviation(apart)}
        reached = [steps_to(entry["curve"], statistics.mean(reference)) for entry in entries]
        whole = [steps for steps in reached if steps is not None]
        row[f"steps_to_{goal}"] = statistics.mean(whole) if len(whole) == len(reached) else None
    return row


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    complete: Complete = sweeps.runner(config, config.out)
    if config.together:
        ends = sweeps.deadline_in(config.budget_minutes)
        complete = partial(together.complete, out=config.out, deadline=ends)
    best = search(config, complete)
    found = {corpus: complete(finals(config, best, corpus)) for corpus in config.corpora}
    show(config, found)
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def show(config: Config, found: dict[str, list[sweeps.Entry]]) -> None:
    """Prints the comparison on each corpus."""
    for corpus, entries in found.items():
        reporting.table(
            f"{corpus}: {config.base.steps} steps, {len(config.seeds)} seeds",
            ("contender", "rate", "loss", "deviation", "above Muon", "deviation",
             "steps to AdamW's", "hidden KiB", "state KiB", "s/step"),
            (
                (CONTENDERS[row["contender"]].name, row["learning_rate"], row["loss"],
                 row["deviation"], row.get("above_muon"), row.get("apart_muon"),
                 row.get("steps_to_adamw"), row["hidden_bytes"] / 1024,
                 row["state_bytes"] / 1024, row["seconds_per_step"])
                for row in compare(config, entries)
            ),
        )  # fmt: skip


def draw(config: Config, found: dict[str, list[sweeps.Entry]]) -> Path:
    """Draws, for each corpus, last losses over the hidden matrices' bytes: mean and range."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.8 * len(found), 4.8), layout="constrained", squeeze=False
    )
    whole = hidden_bytes(point(config, "adamw", 1.0, 0, config.corpora[0], 1))
    for each, (corpus, entries) in zip(axes[0], found.items(), strict=True):
        of = _by_contender(config, entries)
        for row in compare(config, entries):
            losses = _losses(of[row["contender"]])
            style = _style(config, row["contender"])
            each.errorbar(
                # No bytes have no logarithm: they are drawn at the left edge.
                max(100 * row["hidden_bytes"] / whole, _LEFT), row["loss"],
                yerr=[[row["loss"] - min(losses)], [max(losses) - row["loss"]]],
                fmt=style.marker, color=style.colour, capsize=3, label=style.name,
            )  # fmt: skip
        each.set(xscale="log", xlabel="state of the hidden matrices, % of AdamW's")
        ticks = [_LEFT, *(100 / 2**i for i in range(6, -1, -1))]
        each.set_xticks(ticks, ["0", *(f"{tick:.3g}" for tick in ticks[1:])])
        each.minorticks_off()
        name = Path(corpus).name
        each.set_title(f"{CORPORA.get(name, name)}, {config.base.steps:,} steps")
        each.grid(alpha=0.3)
    axes[0][0].set(ylabel="validation loss (nats per token)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return save(figure, config.out)


_LEFT = 0.8  # per cent


def _style(config: Config, key: str) -> Style:
    """That of the optimizer of this name, or one that no optimizer has."""
    if key in STYLES:
        return STYLES[key]._replace(name=CONTENDERS[key].name)
    taken = {(style.colour, style.marker) for style in STYLES.values()}
    filled = "PDH8*Xd"
    free = [
        (colour, filled[(i + shift) % len(filled)])
        for shift in range(len(filled))
        for i, colour in enumerate(COLOURS)
    ]
    free = [each for each in free if each not in taken]
    place = [each for each in config.contenders if each not in STYLES].index(key)
    return Style(CONTENDERS[key].name, *free[place % len(free)])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
