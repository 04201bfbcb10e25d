"""Each optimizer at its best learning rate: `python -m experiments.studies.pretraining`.

All optimizers have the same grid of learning rates for the hidden matrices, on the first corpus and
one seed; embedding, head and norms have AdamW at one rate under all of them. Each optimizer then
runs at its best rate with several seeds, on all corpora. Runs that are in the result file are not
repeated. On a machine with the memory for the sizes of GaLore's paper:

    python -m experiments.studies.pretraining --base.recipe 60m --jobs 1 \\
        --out experiments/results/studies/pretraining-60m.json
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import reporting
from experiments.reporting import CORPORA, STYLES, save
from experiments.studies import singular_values
from experiments.trainer import cli, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.methods import Gum
from experiments.trainer.optimizers import Name, defaults_like
from experiments.trainer.options import ConfigError
from experiments.trainer.recipes import RECIPES

PROGRAM = "experiments.studies.pretraining"
OPTIMIZERS: tuple[Name, ...] = (
    "gum", "adamw", "muon", "galore", "galore_muon", "golore_muon", "unbiased_adamw"
)  # fmt: skip
# A run has eight periods, and no checkpoints on its way: one that is stopped begins again.
SMALL = Run(
    run_dir="runs/studies", steps=400, optimizer=Gum(period=50), fallback_learning_rate=1e-2,
    validate_every=40, validation_batches=16, checkpoint_every=1_000_000, log_every=100,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(sweeps.Sitting):
    """Tune every optimizer on the same grid, then compare them on several seeds and corpora."""

    #: Optimizers to compare.
    optimizers: tuple[Name, ...] = OPTIMIZERS
    #: The grid, for hidden matrices.
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    #: Seeds of weights, data order and draws; the grid uses the first.
    seeds: tuple[int, ...] = (0, 1, 2)
    #: Corpora, each of which is trained on separately; the grid uses the first.
    corpora: tuple[str, ...] = ("stdlib", "runs/sotu")
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/pretraining.json")
    #: All other options of a run, as in experiments.pretrain.
    base: Run = dataclasses.field(default_factory=lambda: SMALL)


def grid(config: Config) -> list[Run]:
    """Returns the runs of all optimizers at all learning rates, rate by rate."""
    return [
        point(config, optimizer, rate)
        for rate in config.learning_rates
        for optimizer in config.optimizers
    ]


def finals(config: Config, best: dict[str, float], corpus: str) -> list[Run]:
    """Returns the runs of all optimizers at their best learning rates, seed by seed."""
    return [
        point(config, optimizer, rate_of(optimizer, best), seed, corpus)
        for seed in config.seeds
        for optimizer in config.optimizers
    ]


def point(
    config: Config,
    optimizer: str,
    rate: float,
    seed: int | None = None,
    corpus: str | None = None,
) -> Run:
    """Returns the configuration of one run, by default of the first seed on the first corpus."""
    run = change(
        config.base,
        optimizer=optimizer,
        learning_rate=rate,
        seed=config.seeds[0] if seed is None else seed,
        corpus=(corpus or config.corpora[0],),
    )
    return sweeps.in_own_directory(run)


def best_rates(entries: Iterable[sweeps.Entry]) -> dict[str, float]:
    """Returns by optimizer the learning rate of the least validation loss.

    Runs that diverged are left out, and so is an optimizer without any other.
    """
    finite = [e for e in entries if np.isfinite(e["validation_loss"])]
    # The largest loss first: the dictionary keeps the last rate of each optimizer, its best.
    ordered = sorted(finite, key=lambda entry: -entry["validation_loss"])
    return {e["config"]["optimizer"]: e["config"]["learning_rate"] for e in ordered}


def rate_of(optimizer: str, best: dict[str, float]) -> float:
    """Returns an optimizer's rate of `best_rates`.

    Raises:
      ConfigError: all runs of the optimizer diverged.
    """
    if optimizer not in best:
        raise ConfigError(
            f"`learning_rates`: no run of {optimizer} ended with a finite loss; add smaller rates"
        )
    return best[optimizer]


def stored(path: Path, option: str) -> tuple[dict[str, float], dict[str, list[sweeps.Entry]]]:
    """Reads the result file: the best rate of each optimizer, and by corpus the runs at it.

    Args:
      path: the result file of this study.
      option: the caller's option that holds the path, for the error.

    Raises:
      ConfigError: there is no such file.
    """
    if not path.exists():
        raise ConfigError(f"`{option}`: there is no {path}; run `python -m {PROGRAM}` first")
    entries: list[sweeps.Entry] = json.loads(path.read_text())
    # Rates are judged as in `main`, on the corpus and seed of the grid, whose runs come first.
    first = entries[0]["config"]
    alike = ("corpus", "seed")
    best = best_rates(e for e in entries if all(e["config"][k] == first[k] for k in alike))
    finals: dict[str, list[sweeps.Entry]] = {}
    for entry in entries:
        config = entry["config"]
        if config["learning_rate"] == best.get(config["optimizer"]):
            finals.setdefault(" ".join(config["corpus"]), []).append(entry)
    return best, finals


def steps_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Returns the step at which a validation curve first reaches `loss`; None if it never does.

    Args:
      curve: pairs (step, validation loss), interpolated linearly between steps.
      loss: the goal.
    """
    # The loss before the first validation counts as infinite: a goal that the first validation
    # meets is reached at its step.
    for (step, value), (later, next_value) in zip([[0, np.inf], *curve], curve, strict=False):
        if next_value <= loss:
            # The fraction of the interval at which the line through both points meets `loss`.
            share = (value - loss) / (value - next_value) if np.isfinite(value) else 1.0
            return step + share * (later - step)
    return None


def compare(entries: Sequence[sweeps.Entry]) -> list[dict[str, Any]]:
    """Returns one row per optimizer, over its seeds, with the steps to AdamW's mean final loss."""
    names = dict.fromkeys(entry["config"]["optimizer"] for entry in entries)
    of = {n: [e for e in entries if e["config"]["optimizer"] == n] for n in names}
    goal = statistics.mean(e["validation_loss"] for e in of["adamw"]) if "adamw" in of else -np.inf
    return [_row(name, found, goal) for name, found in of.items()]


def _row(optimizer: str, entries: Sequence[sweeps.Entry], goal: float) -> dict[str, Any]:
    losses = [entry["validation_loss"] for entry in entries]
    config = entries[0]["config"]
    reached = [steps_to(entry["curve"], goal) for entry in entries]
    seconds = statistics.median(entry["seconds_per_step"] for entry in entries)
    # An optimizer reaches AdamW's loss if every one of its seeds does.
    everyone = [steps for steps in reached if steps is not None]
    steps = statistics.mean(everyone) if len(everyone) == len(reached) else None
    return {
        "optimizer": optimizer,
        "learning_rate": config["learning_rate"],
        "loss": statistics.mean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "state_bytes": entries[0]["state_bytes"],
        "seconds_per_step": seconds,
        "steps_to_adamw": steps,
        "seconds_to_adamw": None if steps is None else steps * seconds,
    }


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, prints tables, draws the figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    # A recipe changes the defaults, so the command line is parsed again on top of it.
    if recipe := config.base.recipe:
        base = RECIPES[recipe]
        default = Config(corpora=base.corpus, base=base)
        with defaults_like(base.optimizer):
            config = cli.parse(Config, PROGRAM, arguments, default)
    # 1. The grid.  2. The best rates with all seeds and corpora.  3. The report. Entries keep the
    # spectra of the trained weights too, for `experiments.studies.spectra`.
    complete = sweeps.runner(config, config.out, singular_values.pretrain)
    tuned = complete(grid(config))
    best = best_rates(tuned)
    found = {corpus: complete(finals(config, best, corpus)) for corpus in config.corpora}
    show(config, tuned, found)
    print(f"\nresults: {config.out}; figure: {draw(config, found)}")
    return 0


def show(
    config: Config, tuned: Sequence[sweeps.Entry], found: dict[str, list[sweeps.Entry]]
) -> None:
    """Prints the losses of the grid, then the comparison on each corpus."""
    losses = {
        (e["config"]["optimizer"], e["config"]["learning_rate"]): e["validation_loss"]
        for e in tuned
    }
    reporting.table(
        f"Validation loss by learning rate of the hidden matrices, {config.corpora[0]}",
        ("optimizer", *(f"{rate:g}" for rate in config.learning_rates)),
        ((o, *(losses[o, rate] for rate in config.learning_rates)) for o in config.optimizers),
    )
    for corpus, entries in found.items():
        reporting.table(
            f"{corpus}: {config.base.steps} steps, {len(config.seeds)} seeds",
            ("optimizer", "rate", "loss", "deviation", "state MiB", "s/step", "steps to AdamW's"),
            (
                (row["optimizer"], row["learning_rate"], row["loss"], row["deviation"],
                 row["state_bytes"] / 2**20, row["seconds_per_step"], row["steps_to_adamw"])
                for row in compare(entries)
            ),
        )  # fmt: skip


def draw(config: Config, found: dict[str, list[sweeps.Entry]]) -> Path:
    """Draws a panel per corpus: final loss (mean, min to max over seeds) against state bytes."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.6 * len(found), 4.0), layout="constrained", squeeze=False
    )
    for each, (corpus, entries) in zip(axes[0], found.items(), strict=True):
        for optimizer in config.optimizers:
            style = STYLES[optimizer]
            mine = [e for e in entries if e["config"]["optimizer"] == optimizer]
            losses = [e["validation_loss"] for e in mine]
            mean = statistics.mean(losses)
            each.errorbar(
                mine[0]["state_bytes"] / 2**20, mean,
                yerr=[[mean - min(losses)], [max(losses) - mean]],
                fmt=style.marker, color=style.colour, capsize=3, label=style.name,
            )  # fmt: skip
        each.set(xlabel="optimizer state (MiB)", ylabel="validation loss (nats per token)")
        name = Path(corpus).name
        title = f"{CORPORA.get(name, name)}: mean and range of {len(config.seeds)} seeds"
        each.set_title(title, fontsize="medium")
        each.grid(alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize="small")
    return save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
