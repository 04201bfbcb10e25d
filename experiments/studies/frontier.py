"""Loss against bytes of state, over many periods: `python -m experiments.studies.frontier`.

Which residual rule reaches the loss of full-rank Muon with low-rank memory? Each contender has its
own learning rate for the hidden matrices. A search along a grid, on the first corpus and one seed,
finds the rate whose two neighbours are both worse. Each contender then trains at full length with
that rate, on all seeds and corpora. Embedding, head and norms have the same AdamW at one rate.

The study takes hours and can be interrupted: finished runs are read from the result file, others
resume from their last checkpoint.

    python -m experiments.studies.frontier --budget-minutes 60
"""

import dataclasses
import functools
import json
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
from experiments.studies import singular_values
from experiments.studies.pretraining import steps_to
from experiments.trainer import cli, loop, optimizers, rest, sweeps, together
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change, from_record
from experiments.trainer.methods import Gum
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
    """One method of the comparison.

    Attributes:
      name: its label in tables and figures.
      options: the options of a run that select it.
      rate: the learning rate at which the search begins.
      tuned: the option that the search varies.
      searched: False: there is no search, and the learning rate is `rate`.
    """

    name: str
    options: dict[str, Any]
    rate: float
    tuned: str = "learning_rate"
    searched: bool = True


def _muon(residual: str, full_rank: int = 0, **more: Any) -> dict[str, Any]:
    """Options of low-rank Muon with a residual rule and `full_rank` slots."""
    return {"optimizer": "gum", "residual": residual, "full_rank_layers": full_rank, **more}


def _turned(**more: Any) -> dict[str, Any]:
    """Options with the column-normalized residual; a refresh rotates momentum to the new basis."""
    return _muon("columns", restart="rotate", **more)


def _polar(scale: float, **more: Any) -> dict[str, Any]:
    """Options with `scale` times the polar factor of the residual; a refresh rotates momentum."""
    return _muon("polar", restart="rotate", residual_scale=scale, **more)


def _adam(optimizer: str, **more: Any) -> dict[str, Any]:
    # Power iteration replaces the SVD of these methods' papers: bases by SVD train no better and
    # take an accelerator minutes.
    return {"optimizer": optimizer, "projector": "subspace_iteration", **more}


def _with_fallback(name: str, fallback: str, rate: float) -> Contender:
    """Muon at its best rate, with a fallback other than AdamW whose own rate is searched."""
    options = {"optimizer": "muon", "learning_rate": 3e-3, "fallback": fallback}
    return Contender(f"Muon, {name}", options, rate, "fallback_learning_rate")


def _lean(name: str, options: dict[str, Any], rest: str = "factored") -> Contender:
    """A contender at its best rate, beside the factored fallback at its own unless told otherwise.

    The rate of the matrices is their best one beside AdamW.
    """
    options = {"fallback": "factored", "fallback_learning_rate": 2e-2} | options
    return Contender(f"{name}, {rest} for the rest", options, 3e-3, searched=False)


# The order of the runs: a study cut short has compared the decisive contenders. Question 1: which
# residual rule? Muon in few bits is the rival that saves bytes by precision instead of rank.
CONTENDERS = {
    key: Contender(name, options, rate)
    for key, name, rate, options in (
        ("columns", "low-rank Muon + columns", 3e-3, _muon("columns")),
        ("muon", "Muon", 3e-3, {"optimizer": "muon"}),
        ("columns_rotate", "low-rank Muon + columns, rotated", 3e-3, _turned()),
        ("columns_16", "low-rank Muon + columns, rank 16", 3e-3, _turned(rank=16)),
        ("columns_8", "low-rank Muon + columns, rank 8", 3e-3, _turned(rank=8)),
        ("scale", "SCALE", 1e-3, {"optimizer": "scale"}),
        ("rmnp", "RMNP", 3e-3, {"optimizer": "rmnp"}),
        ("rmnp_rows8", "RMNP, 8 bits, a scale per row", 3e-3,
         {"optimizer": "rmnp", "momentum": "rows8"}),
        ("rmnp_int4", "RMNP, 4 bits", 3e-3, {"optimizer": "rmnp", "momentum": "int4"}),
        ("normuon", "NorMuon", 3e-3, {"optimizer": "normuon"}),
        ("mud", "MUD", 3e-3, {"optimizer": "mud"}),
        ("mud_int6", "MUD, 6 bits", 3e-3, {"optimizer": "mud", "momentum": "int6"}),
        ("normuon_int8", "NorMuon, 8 bits", 3e-3, {"optimizer": "normuon", "momentum": "int8"}),
        ("adamw", "AdamW", 1e-3, {"optimizer": "adamw"}),
        ("galore_muon", "GaLore-Muon", 3e-3, _muon("drop")),
        ("gum", "GUM", 3e-3, _muon("sampled", 2)),
        ("muon_rows8", "Muon, 8 bits, a scale per row", 3e-3,
         {"optimizer": "muon", "momentum": "rows8"}),
        ("muon_rows4", "Muon, 4 bits, a scale per row", 3e-3,
         {"optimizer": "muon", "momentum": "rows4"}),
        ("muon_int8", "Muon, 8 bits", 3e-3, {"optimizer": "muon", "momentum": "int8"}),
        ("muon_int6", "Muon, 6 bits", 3e-3, {"optimizer": "muon", "momentum": "int6"}),
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
        ("ldadam", "LDAdam", 1e-3, {"optimizer": "ldadam", "period": 1}),
        ("subtrack", "SubTrack++", 1e-3, {"optimizer": "subtrack"}),
        ("mofasgd", "MoFaSGD", 3e-3, {"optimizer": "mofasgd"}),
        ("swan", "SWAN", 2.4e-2, {"optimizer": "swan"}),
        ("swan_momentum", "SWAN with momentum", 3e-3, {"optimizer": "swan", "decay": 0.95}),
        ("swan_normalized", "SWAN without centering", 2.4e-2,
         {"optimizer": "swan", "columns": "normalized"}),
        ("swan_polar", "Muon without momentum", 2.4e-2, {"optimizer": "swan", "columns": "as_is"}),
        ("swan_mud", "SWAN by MUD", 2.4e-2,
         {"optimizer": "swan", "orthogonalizer": "decorrelation"}),
        ("racs", "RACS", 3e-3, {"optimizer": "racs"}),
        ("adam_mini", "Adam-mini", 1e-3, {"optimizer": "adam_mini"}),
        ("adalomo", "AdaLomo", 1e-2, {"optimizer": "adalomo"}),
        ("energy", "low-rank Muon + columns by energy", 3e-3,
         _muon("energy", restart="rotate")),
        ("polar", "low-rank Muon + the residual's polar factor", 3e-3, _polar(1.0)),
        ("polar_8", "low-rank Muon + 8 times the residual's polar factor", 3e-3, _polar(8.0)),
        ("polar_4", "low-rank Muon + 4 times the residual's polar factor", 3e-3, _polar(4.0)),
        ("polar_2", "low-rank Muon + twice the residual's polar factor", 3e-3, _polar(2.0)),
        ("polar_4_int8", "low-rank Muon + 4 times the residual's polar factor, 8 bits", 3e-3,
         _polar(4.0, momentum="int8", bases="int8")),
        ("polar_4_64_int8",
         "low-rank Muon + 4 times the residual's polar factor, 8 bits, rank 64", 3e-3,
         _polar(4.0, rank=64, momentum="int8", bases="int8")),
        ("polar_4_16", "low-rank Muon + 4 times the residual's polar factor, rank 16", 3e-3,
         _polar(4.0, rank=16)),
        ("sign", "low-rank Muon + sign", 3e-3, _muon("sign")),
        ("rows", "low-rank Muon + rows", 3e-3, _muon("rows")),
        ("plain", "low-rank Muon + residual", 3e-3, _muon("plain")),
        ("galore", "GaLore", 1e-3, _adam("galore")),
        # Question 2: how many layers to draw?
        ("gum_1", "GUM, 1 layer drawn", 3e-3, _muon("sampled", 1)),
        ("gum_4", "GUM, half of the layers drawn", 3e-3, _muon("sampled", 4)),
        ("gum_ramp", "GUM with a ramp after restarts", 3e-3, {"optimizer": "ramped_gum"}),
        ("columns_slots_1", "GUM additive + columns, 1 layer drawn", 3e-3, _muon("columns", 1)),
        ("columns_slots_4", "GUM additive + columns, half drawn", 3e-3, _muon("columns", 4)),
        # Question 3: does an old basis cost loss?
        ("galore_20", "GaLore-Muon, K = 20", 3e-3, _muon("drop", period=20)),
        ("galore_1000", "GaLore-Muon, K = 1000", 3e-3, _muon("drop", period=1000)),
        ("gum_20", "GUM, K = 20", 3e-3, _muon("sampled", 2, period=20)),
        ("gum_1000", "GUM, K = 1000", 3e-3, _muon("sampled", 2, period=1000)),
    )
} | {
    # Question 4: which fallback with less state than AdamW keeps the loss?
    f"fallback_{fallback}": _with_fallback(name, fallback, rate)
    for fallback, name, rate in (
        ("adamw", "AdamW for the rest", 1e-2),
        ("adamw_float8", "8-bit AdamW for the rest", 1e-2),
        ("adamw8", "AdamW with linear codes for the rest", 1e-2),
        ("adamw8_rows", "AdamW with linear codes of rows for the rest", 1e-2),
        ("factored", "factored second moment for the rest", 5e-3),
        ("factored_momentum", "the same, and 8-bit momentum", 1e-2),
        ("columns", "SCALE's rule for the rest", 2.5e-3),
    )
} | {
    # Question 5: with hardly any state for the rest, is the order of methods the same, and do 8
    # bits still cost nothing?
    f"lean_{key}": _lean(name, options)
    for key, name, options in (
        ("muon", "Muon", {"optimizer": "muon"}),
        ("muon8", "Muon, 8 bits", {"optimizer": "muon", "momentum": "int8"}),
        ("muon6", "Muon, 6 bits", {"optimizer": "muon", "momentum": "int6"}),
        ("muon4", "Muon, 4 bits", {"optimizer": "muon", "momentum": "int4"}),
        ("muon4_at_random", "Muon, 4 bits, rounded at random",
         {"optimizer": "muon", "momentum": "int4_at_random"}),
        ("columns", "low-rank Muon + columns, rotated", _turned()),
        ("columns8", "low-rank Muon in 8 bits + columns, rotated",
         _turned(momentum="int8", bases="int8")),
        ("gum", "GUM", _muon("sampled", 2)),
        ("gum8", "GUM, 8 bits", _muon("sampled", 2, momentum="int8", bases="int8")),
        ("polar8", "low-rank Muon in 8 bits + 4 times the residual's polar factor",
         _polar(4.0, momentum="int8", bases="int8")),
        ("galore_muon", "GaLore-Muon", _muon("drop")),
    )
} | {
    # Why is the factored fallback ahead of AdamW: no momentum, or the longer memory of its second
    # moment?
    "lean_momentum": _lean(
        "Muon", {"optimizer": "muon", "fallback": "factored_momentum"}, "factored with momentum"
    ),
    "lean_momentum_float8": _lean(
        "Muon", {"optimizer": "muon", "fallback": "factored_momentum_float8"},
        "factored with momentum in float8",
    ),
} | {
    # Weights in fewer bits, rounded at random. Momentum is in float32.
    f"lean_{weights}_weights": _lean("Muon", {"optimizer": "muon", "weights": weights}, rest)
    for weights, rest in (
        ("bfloat16", "weights in bfloat16, factored"), ("int8", "weights in 8 bits, factored")
    )
} | {
    # The longer a second moment remembers, the less of it changes in a step: can 8 bits follow it?
    key: _lean("Muon", {"optimizer": "muon", "fallback": fallback, "fallback_learning_rate": 1e-2,
                        "b2": 0.999}, f"{name} with b2 = 0.999")
    for key, fallback, name in (
        ("lean_memory", "adamw", "AdamW"),
        ("lean_memory_float8", "adamw_float8", "8-bit AdamW"),
        ("lean_memory_at_random", "adamw_float8_at_random", "8-bit AdamW, rounded at random,"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Tune every contender on the same grid, then compare them over many periods."""

    #: Contenders to compare, by their keys in this module.
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    #: Ratio of neighbouring learning rates in the grid.
    factor: float = 2.0
    #: Grid point at which the search begins, counted from each contender's own rate: -1 is half of
    #: that rate at the default `factor`. Larger models need smaller rates. Without a search, the
    #: grid point of all runs.
    first: int = 0
    #: Steps of each run of the search.
    tuning_steps: int = TUNING_STEPS
    #: Runs that judge a rate: first: the first seed on the first corpus; all: the mean over all
    #: seeds and corpora; none: there is no search.
    tuning_runs: Literal["first", "all", "none"] = "first"
    #: Seeds of weights, data order and draws.
    seeds: tuple[int, ...] = (0, 1, 2)
    #: Corpora, each of which is trained on separately.
    corpora: tuple[str, ...] = ("stdlib", "runs/sotu")
    #: Train all runs of a contender in one program, for an accelerator; `jobs` has no effect.
    together: bool = False
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/frontier.json")
    #: All other options of a run, as in experiments.pretrain.
    base: Run = dataclasses.field(default_factory=lambda: BASE)


# Runs what is missing and returns the entries of all runs, in their order.
Complete = Callable[[Sequence[Run]], list[sweeps.Entry]]


def point(config: Config, key: str, rate: float, seed: int, corpus: str, steps: int) -> Run:
    """Returns the configuration of one run of a contender."""
    chosen = CONTENDERS[choose("contenders", key, CONTENDERS)]
    options = chosen.options | {chosen.tuned: rate}
    run = change(config.base, seed=seed, corpus=(corpus,), steps=steps, **options)
    return sweeps.in_own_directory(run)


def trials(config: Config, key: str, rate: float) -> list[Run]:
    """Returns the runs whose mean loss judges a rate of a contender."""
    some = slice(1 if config.tuning_runs == "first" else None)
    return [
        point(config, key, rate, seed, corpus, config.tuning_steps)
        for corpus in config.corpora[some]
        for seed in config.seeds[some]
    ]


def rate_at(config: Config, key: str, index: int) -> float:
    """Returns point `index` of a contender's grid, ``rate * factor**index``, to four digits."""
    return float(f"{CONTENDERS[key].rate * config.factor**index:.4g}")


def search(config: Config, complete: Complete) -> dict[str, float]:
    """Finds each contender's best rate of the grid, whose neighbours are both worse.

    All contenders search in the same rounds, so that their runs share the cores. Those that are
    not `searched` keep the rate of grid point `first`.

    Raises:
      ConfigError: no learning rate of a contender ended with a finite loss.
    """
    # Contender -> grid point -> mean validation loss
    searching = config.tuning_runs != "none"
    searched = [key for key in config.contenders if searching and CONTENDERS[key].searched]
    found: dict[str, dict[int, float]] = {key: {} for key in searched}
    while missing := [
        (key, i) for key, losses in found.items() for i in _next(losses, config.first)
    ]:
        # 1. Run all rates that this round lacks as one set.
        asked = [trials(config, key, rate_at(config, key, i)) for key, i in missing]
        entries = iter(complete([run for some in asked for run in some]))
        # 2. Entries come in the order of the runs. A rate that diverged counts as infinitely bad.
        for (key, i), some in zip(missing, asked, strict=True):
            loss = statistics.mean(next(entries)["validation_loss"] for _ in some)
            found[key][i] = loss if math.isfinite(loss) else math.inf
    best = {key: min(losses, key=losses.__getitem__) for key, losses in found.items()}
    return {key: rate_at(config, key, best.get(key, config.first)) for key in config.contenders}


_HOPELESS = 8  # the search gives up after more grid points than this, all of which diverged


def _next(losses: dict[int, float], first: int) -> list[int]:
    """Returns the grid points to try next; none once both neighbours of the best are known."""
    if not losses:
        return [first - 1, first, first + 1]
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf and len(losses) > _HOPELESS:
        raise ConfigError(
            f"`contenders`: one has no finite loss at any of {len(losses)} learning rates; "
            "a lower `first` begins the search at smaller ones"
        )
    return [i for i in (best - 1, best + 1) if i not in losses]


def finals(config: Config, best: dict[str, float], corpus: str) -> list[Run]:
    """Returns the runs of all contenders at their best rates and full length, seed by seed."""
    return [
        point(config, key, best[key], seed, corpus, config.base.steps)
        for seed in config.seeds
        for key in config.contenders
    ]


def finished(config: Config) -> tuple[dict[str, float], dict[str, dict[str, list[sweeps.Entry]]]]:
    """Looks up a study whose runs are all in its result file; trains nothing.

    Returns:
      Contender -> its best learning rate, and corpus -> contender -> the entries of its seeds.

    Raises:
      ConfigError: a run is missing.
    """
    entries = json.loads(config.out.read_text())

    def stored(runs: Sequence[Run]) -> list[sweeps.Entry]:
        return sweeps.select(entries, runs)

    best = search(config, stored)
    return best, {
        corpus: _by_contender(config, stored(finals(config, best, corpus)))
        for corpus in config.corpora
    }


def hidden_bytes(run: Run) -> int:
    """Returns the bytes of optimizer state of the hidden matrices, without the fallback's."""
    arch = architecture(run)
    params = _shapes(arch)
    kinds: Any = rest.matrix_or_rest(params)
    # Count the whole state under AdamW as the fallback, whose share is known: two moments for each
    # weight outside the hidden matrices.
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
    """Returns the parameters of a model as shapes; all contenders share them."""
    return jax.eval_shape(lambda: llama.create(arch)[1])


def compare(config: Config, entries: Sequence[sweeps.Entry]) -> list[dict[str, Any]]:
    """Returns one row for each contender, summarized over its seeds, in order of the mean loss."""
    of = _by_contender(config, entries)
    goals = {name: _losses(of[name]) for name in ("adamw", "muon") if name in of}
    return sorted((_row(key, found, goals) for key, found in of.items()), key=lambda r: r["loss"])


def _by_contender(config: Config, entries: Sequence[sweeps.Entry]) -> dict[str, list[sweeps.Entry]]:
    """Sorts entries by contender; they are in the order of `finals`."""
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
    # Runs that were trained in one program have only the program's seconds in common.
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
        # Paired by seed: most of the variation between seeds is the same under every method.
        apart = [loss - other for loss, other in zip(losses, reference, strict=True)]
        row |= {f"above_{goal}": statistics.mean(apart), f"apart_{goal}": _deviation(apart)}
        # A contender reaches the goal if every one of its seeds does.
        reached = [steps_to(entry["curve"], statistics.mean(reference)) for entry in entries]
        whole = [steps for steps in reached if steps is not None]
        row[f"steps_to_{goal}"] = statistics.mean(whole) if len(whole) == len(reached) else None
    return row


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    complete: Complete = sweeps.runner(config, config.out, singular_values.pretrain_for_ranks)
    if config.together:
        complete = partial(
            together.complete, out=config.out,
            deadline=sweeps.deadline_in(config.budget_minutes),
            measure=singular_values.stable_ranks,
        )  # fmt: skip
    # 1. Tune each contender.  2. Compare them at full length.  3. Report.
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
    """Draws a panel per corpus: final loss (mean, min to max) against bytes of hidden matrices."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.8 * len(found), 4.8), layout="constrained", squeeze=False
    )
    # AdamW's bytes are the unit of the axis; rate, seed and steps do not matter for them.
    whole = hidden_bytes(point(config, "adamw", 1.0, 0, config.corpora[0], 1))
    for each, (corpus, entries) in zip(axes[0], found.items(), strict=True):
        of = _by_contender(config, entries)
        for row in compare(config, entries):
            losses = _losses(of[row["contender"]])
            style = _style(config, row["contender"])
            each.errorbar(
                # Zero bytes (SCALE) have no logarithm; they are drawn at the left edge.
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
    # One panel is as wide as one of these names.
    columns = 3 if len(found) > 1 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return save(figure, config.out)


_LEFT = 0.8  # per cent: the position of zero bytes, left of the smallest share (100 / 64)


def _style(config: Config, key: str) -> Style:
    """Returns the optimizer's style, or for other contenders one that no optimizer has."""
    if key in STYLES:
        return STYLES[key]._replace(name=CONTENDERS[key].name)
    taken = {(style.colour, style.marker) for style in STYLES.values()}
    filled = "PDH8*Xd"
    free = [
        (colour, filled[(i + shift) % len(filled)])
        for shift in range(len(filled))
        for i, colour in enumerate(COLOURS)
    ]
    # Go through the palette before a marker repeats: neighbours differ in colour and in marker.
    free = [each for each in free if each not in taken]
    place = [each for each in config.contenders if each not in STYLES].index(key)
    return Style(CONTENDERS[key].name, *free[place % len(free)])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
