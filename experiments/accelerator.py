"""Measures GUM on a GPU or TPU within a given time: `python -m experiments.accelerator`.

Parts, in order of value, until the time is up:

1. correctness: do updates on this device agree with those on the CPU?
2. update: seconds and bytes of GUM's update beside AdamW's, Muon's and GaLore's, on large models;
3. training: tokens per second and peak memory of whole training steps;
4. pretraining: a short comparison on text.

Each part has a result file, which is rewritten after every measurement: results are kept when the
time is up or the machine is taken away. Every measurement is a *job*, a process of its own: its
peak memory is not another's, and one that fails or hangs ends alone.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import reporting
from experiments.trainer import cli
from experiments.trainer.options import Checked, at_least, option, positive

PROGRAM = "experiments.accelerator"
ROOT = Path(__file__).parents[1]
# Newton-Schulz amplifies rounding errors of products: float32 on two CPUs differs by 1e-4, and a
# GPU's products of fewer digits (TF32) by a per cent.
AGREES = 0.03
UNFINISHED = 75  # exit code, EX_TEMPFAIL of sysexits.h: some parts were not finished
_LEAST = 20.0  # seconds that must be left to begin a measurement

Part = Literal["correctness", "update", "training", "pretraining"]
# The runs of the comparison on text, at learning rates that suit a model of 60 million parameters.
RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "learning_rate": 1e-3},
    "Muon": {"optimizer": "muon", "learning_rate": 1.5e-3},
    "Muon, 8 bits": {"optimizer": "muon", "learning_rate": 1.5e-3, "momentum": "int8"},
    "GUM": {"optimizer": "gum", "learning_rate": 3e-3},
    "low-rank Muon + columns": {
        "optimizer": "gum",
        "learning_rate": 1.5e-3,
        "residual": "columns",
        "full_rank_layers": 0,
        "restart": "rotate",
    },
}


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Check, time and train on the present device for a given time."""

    #: Minutes after which no measurement begins, and the running one is ended.
    minutes: float = option(25.0, positive)
    #: Parts to run, in this order.
    parts: tuple[Part, ...] = ("correctness", "update", "training", "pretraining")
    #: Directory of the result files, one for each part.
    out: Path = Path("experiments/results/accelerator")

    #: correctness: optimizers, by their names in experiments.pretrain.
    optimizers: tuple[str, ...] = ("gum", "muon", "adamw", "galore", "joint_muon", "apollo")

    #: update: presets of experiments.models.presets whose parameters are updated.
    update_presets: tuple[str, ...] = ("350m", "1b")
    #: update: contenders of experiments.benchmarks, GaLore's SVD last.
    contenders: tuple[str, ...] = (
        "gum", "adamw", "optax muon", "Muon, 8 bits", "columns of the residual", "galore"
    )  # fmt: skip
    #: update, training, pretraining: rank of the projection.
    rank: int = option(256, at_least(1))
    #: update: gamma, number of full-rank layers of each role in a period.
    full_rank_layers: int = option(2, at_least(0))
    #: update: period, over which the cost of a refresh is averaged.
    period: int = option(200, at_least(1))
    #: update: number of timings of an ordinary step and of a refresh, at most.
    repeats: int = option(20, at_least(1))

    #: training: presets of experiments.models.presets to train.
    training_presets: tuple[str, ...] = ("60m", "130m")
    #: training: optimizers, by their names in experiments.pretrain.
    training_optimizers: tuple[str, ...] = ("gum", "adamw", "muon")
    #: training, pretraining: windows of 256 tokens in one step.
    batch_size: int = option(32, at_least(1))
    #: training: steps; every fourth is a refresh, and the first two are not counted.
    training_steps: int = option(20, at_least(5))

    #: pretraining: preset of the model.
    preset: str = "60m"
    #: pretraining: runs to compare, by their names in this module.
    runs: tuple[str, ...] = tuple(RUNS)
    #: pretraining: steps of each run. None: as many as the time allows, estimated from the first 20
    #: steps, and 2000 at most.
    steps: int | None = option(None, at_least(1))
    #: pretraining: data type of the forward and backward pass.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    #: pretraining: text to train on, as in experiments.pretrain.
    corpus: tuple[str, ...] = ("stdlib",)
    #: pretraining: directory of token files, as in experiments.pretrain.
    cache_dir: str | None = None


class Job(NamedTuple):
    """One measurement.

    Attributes:
      kind: its name in `experiments.benchmarks.device`.
      of: the fields that identify it in a row of results.
      options: its options.
    """

    kind: str
    of: dict[str, Any]
    options: dict[str, Any]


class OutOfTime(Exception):
    """The time of the program is up."""


class Clock:
    """The time left to the program, from its start on."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Returns the seconds until the time is up; negative after it."""
        return self._end - time.monotonic()

    def demand(self) -> None:
        """Raises `OutOfTime` unless there is time for another measurement."""
        if self.left() < _LEAST:
            raise OutOfTime


def main(arguments: Sequence[str]) -> int:
    """Runs the parts; returns 0, or 1 if a measurement failed, or else 75 if time was too short."""
    config = cli.parse(Config, PROGRAM, arguments)
    clock, failed, unfinished = Clock(config.minutes), False, []
    for part in config.parts:
        found: list[dict[str, Any]] = []
        # A part that runs out of time keeps its rows.
        try:
            for row in PARTS[part](config, clock):
                found.append(row)
                _write(config, part, found)
                print(f"[{part}] {_line(row)}", flush=True)
        except OutOfTime:
            unfinished.append(part)
        failed |= any("error" in row or row.get("agrees") is False for row in found)
    print(f"\nresults: {config.out}")
    if unfinished:
        print(f"out of time in: {', '.join(unfinished)}")
    return 1 if failed else UNFINISHED if unfinished else 0


def correctness(config: Config, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the difference between an update on the device and on the CPU, by optimizer."""
    for optimizer in config.optimizers:
        row = measure(Job("correctness", {"optimizer": optimizer}, {"optimizer": optimizer}), clock)
        if "error" not in row:
            row["agrees"] = row["relative_difference"] <= AGREES
        yield row


def update(config: Config, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the seconds and bytes of an update, by model and contender."""
    shared = ("rank", "full_rank_layers", "period", "repeats")
    options = {name: getattr(config, name) for name in shared}
    for preset in config.update_presets:
        for contender in config.contenders:
            of = {"preset": preset, "contender": contender}
            yield measure(Job("update", of, of | options), clock)


def training(config: Config, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the tokens per second and bytes of training steps, by model and optimizer."""
    for preset in config.training_presets:
        for optimizer in config.training_optimizers:
            of = {"preset": preset, "optimizer": optimizer}
            options = {
                "batch_size": config.batch_size,
                "rank": config.rank,
                "steps": config.training_steps,
            }
            yield measure(Job("step", of, of | options), clock)


def pretraining(config: Config, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the losses of the runs after equally many steps on the same text."""

    def job(name: str, steps: int) -> Job:
        shared = ("preset", "batch_size", "rank", "dtype", "corpus", "cache_dir")
        options = {name: getattr(config, name) for name in shared}
        of = {"run": name, "steps": steps}
        return Job("pretrain", of, {"options": RUNS[name], "steps": steps} | options)

    # 1. The number of steps: time left for a run, without its start, divided by the time of a step.
    steps = config.steps
    if steps is None:
        # The first try also prepares the text, so the overhead of a run is taken from a second
        # one. Both are of GUM, whose steps are among the slowest.
        first = measure(job("GUM", 20), clock)
        if "error" in first:
            yield first
            return
        begun = time.monotonic()
        tried = measure(job("GUM", 20), clock)
        each = 0.8 * clock.left() / len(config.runs)  # a fifth is reserve: times vary
        overhead = time.monotonic() - begun
        steps = int(max(each - overhead, 0) / tried.get("seconds_per_step", float("inf")))
        if steps < 50:
            raise OutOfTime  # too few steps to tell methods apart
        steps = min(steps, 2000)
    # 2. The runs.
    for name in config.runs:
        yield measure(job(name, steps), clock)


PARTS: dict[str, Callable[[Config, Clock], Iterator[dict[str, Any]]]] = {
    "correctness": correctness,
    "update": update,
    "training": training,
    "pretraining": pretraining,
}


def measure(job: Job, clock: Clock) -> dict[str, Any]:
    """Runs a job in a process of its own; returns a row with its results, or with its error.

    Raises:
      OutOfTime: the time is up, before the job or during it.
    """
    clock.demand()
    command = [sys.executable, "-m", "experiments.benchmarks.device"]
    command += [job.kind, json.dumps(job.options)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=clock.left()
        )
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return job.of | {"error": lines[-1][:500]}
    # Other lines may come from libraries; the last one is the answer.
    answer = json.loads(done.stdout.splitlines()[-1])
    return job.of | answer["found"] | {"device": answer["device"]}


def _write(config: Config, part: str, found: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of a part, with the device that they were measured on."""
    device = next((row["device"] for row in found if "device" in row), {"platform": "unknown"})
    rows = [{name: value for name, value in row.items() if name != "device"} for row in found]
    reporting.write(config.out / f"{part}.json", config, device=device, rows=rows)


def _line(row: dict[str, Any]) -> str:
    """Formats a measurement on one line, without its curve."""
    hidden = {"device", "curve"}
    cells = (f"{name} {reporting.cell(v)}" for name, v in row.items() if name not in hidden)
    return ", ".join(cells)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
