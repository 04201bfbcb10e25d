"""Steps and time to a loss: `python -m experiments.studies.time_to_loss`.

The frontier study trained its contenders for a number of steps. A step costs more with one than
with another, so that fewer steps may take more time. This study reads the validation curves of the
frontier's runs at their best rates, and measures the seconds of their training steps on this
machine, by turns. A curve then runs over time:

    time at step t = t * seconds of a step,    seconds = plain + (refresh - plain) / K

in units of AdamW's whole run. Timings need an idle machine.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments import reporting
from experiments.benchmarks import timing
from experiments.results import contenders, overview
from experiments.studies import frontier
from experiments.studies.pretraining import steps_to
from experiments.trainer import cli, pretraining, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.methods import Refreshed

PROGRAM = "experiments.studies.time_to_loss"
# The order is that of the tables.
COMPARED = (
    "muon", "muon_rows8", "muon_rows4", "columns_rotate", "gum", "galore_muon", "adamw", "scale",
)  # fmt: skip
Curves = dict[str, dict[str, list[sweeps.Entry]]]  # corpus -> contender -> one entry for each seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare contenders of the frontier study by the time that they take to a loss."""

    #: Turns, in each of which every contender takes a few steps.
    turns: int = 9
    #: Steps of a contender in one turn; the first is a refresh, if it has any.
    steps: int = 6
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/time_to_loss.json")


def main(arguments: Sequence[str]) -> int:
    """Measures, compares, prints tables, writes results and figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    best, entries = contenders.finished()
    curves = {corpus: {key: of[key] for key in COMPARED} for corpus, of in entries.items()}
    # 1. Seconds of a step, on the first corpus and seed: time depends on neither.
    study = frontier.Config()
    runs = {
        key: frontier.point(study, key, best[key], 0, "stdlib", frontier.STEPS) for key in COMPARED
    }
    seconds = timed(config, runs)
    # 2. Time to the last losses of AdamW and Muon.
    relative = {key: each["over_adamw"]["of_medians"] for key, each in seconds.items()}
    rows = {corpus: compare(of, relative) for corpus, of in curves.items()}
    reporting.write(config.out, config, seconds=seconds, rows=rows)
    for corpus, of in rows.items():
        reporting.table(
            f"{corpus}: steps, and time in units of AdamW's run",
            ("contender", "s/step", "over AdamW's", "steps to AdamW's", "time", "steps to Muon's",
             "time"),
            (
                (overview.SHOWN[key][0].name, seconds[key]["amortized_seconds"], relative[key],
                 *(row[f"{what}_to_{goal}"] for goal in ("adamw", "muon")
                   for what in ("steps", "time")))
                for key, row in of.items()
            ),
        )  # fmt: skip
    print(f"\nresults: {config.out}; figure: {draw(config, curves, relative)}")
    return 0


def timed(config: Config, runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Times training steps of all runs by turns, in this process.

    Returns:
      Contender -> `timing.costs` of its steps, and ``over_adamw``, the ratio of mean seconds turn
      by turn.
    """
    turn_of = {key: _turns(config, run) for key, run in runs.items()}
    for turn in turn_of.values():
        turn()  # Compiles.
    # turns[key][i]: the seconds of each step of turn i.
    turns: dict[str, list[list[float]]] = {key: [] for key in runs}
    for number in range(config.turns):
        for key, turn in turn_of.items():
            turns[key].append(turn())
        print(f"turn {number + 1} of {config.turns}", file=sys.stderr, flush=True)
    found, means = {}, {}
    for key, run in runs.items():
        # The medians of each turn, and refreshes spread over the period of the study.
        plain = [statistics.median(each[1:]) for each in turns[key]]
        refresh = [each[0] for each in turns[key]] if _period(run) else None
        period = _period(run) or 1
        found[key] = timing.costs(plain, refresh, period)
        means[key] = [
            timing.amortized(p, r, period) for p, r in zip(plain, refresh or plain, strict=True)
        ]
    return {
        key: each | {"over_adamw": timing.ratio(means[key], means["adamw"])}
        for key, each in found.items()
    }


def _period(run: Run) -> int | None:
    """Returns the period of a run's optimizer; None if it has no refreshes."""
    return run.optimizer.period if isinstance(run.optimizer, Refreshed) else None


def _turns(config: Config, run: Run) -> Callable[[], list[float]]:
    """Returns a function that takes the steps of a turn and returns the seconds of each."""
    if _period(run):
        run = change(run, period=config.steps)
    arch = pretraining.architecture(run)
    _, state, step = pretraining.start(run, arch)
    generator = np.random.default_rng(0)

    def turn() -> list[float]:
        nonlocal state
        seconds = []
        for _ in range(config.steps):
            # Random tokens: the time of a step does not depend on them.
            shape = (run.batch_size, arch.seq_len + 1)
            batch = generator.integers(arch.vocab_size, size=shape, dtype=np.int32)
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - start)
        return seconds

    return turn


def compare(
    of: dict[str, list[sweeps.Entry]], relative: dict[str, float]
) -> dict[str, dict[str, float | None]]:
    """Returns steps and time of each contender to the last losses of AdamW and of Muon.

    Args:
      of: contender -> the entries of its seeds.
      relative: contender -> seconds of a step over AdamW's.

    Returns:
      Contender -> ``steps_to_adamw``, ``time_to_adamw`` and so on: means over the seeds, each
      compared with the goal's run of the same seed. Times are in units of AdamW's whole run. None
      if a seed does not reach the goal.
    """
    rows = {}
    for key, entries in of.items():
        row: dict[str, float | None] = {}
        for goal in ("adamw", "muon"):
            last = (entry["validation_loss"] for entry in of[goal])
            reached = [steps_to(e["curve"], loss) for e, loss in zip(entries, last, strict=True)]
            whole = [steps for steps in reached if steps is not None]
            mean = statistics.mean(whole) if len(whole) == len(entries) else None
            row[f"steps_to_{goal}"] = mean
            row[f"time_to_{goal}"] = None if mean is None else mean * relative[key] / frontier.STEPS
        rows[key] = row
    return rows


def draw(config: Config, curves: Curves, relative: dict[str, float]) -> Path:
    """Draws validation loss (mean over seeds) against time in units of AdamW's run, by corpus."""
    figure, axes = plt.subplots(1, len(curves), figsize=(9.6, 4.6), layout="constrained")
    for each, (corpus, of) in zip(axes, curves.items(), strict=True):
        for key, entries in of.items():
            style = overview.SHOWN[key][0]
            curve = np.mean([entry["curve"] for entry in entries], axis=0)  # [points, 2]
            times = curve[:, 0] * relative[key] / frontier.STEPS
            each.plot(
                times, curve[:, 1], color=style.colour, marker=style.marker, markersize=4,
                markevery=4, linewidth=1.4, label=style.name,
            )  # fmt: skip
        # The last three quarters of the runs: before, all are far above.
        late = [entry["curve"][len(entry["curve"]) // 4][1] for es in of.values() for entry in es]
        last = [entry["curve"][-1][1] for es in of.values() for entry in es]
        each.set(
            xlabel="time, in units of AdamW's run", title=overview.TITLES[corpus],
            xlim=(0.25, None), ylim=(min(last) - 0.03, statistics.median(late)),
        )  # fmt: skip
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="validation loss (nats per token)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return reporting.save(figure, config.out)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
