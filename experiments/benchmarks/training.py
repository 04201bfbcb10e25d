"""Seconds and memory of the whole training step, each optimizer in processes of its own.

The processes take turns. `python -m experiments.benchmarks.training` is one of them: it trains on
random tokens and prints one line of JSON. It reports three peaks of memory:

- `program_bytes`: XLA's own count for a step, arguments and temporaries.
- `peak_bytes`, on CPUs: the resident peak during the steps, minus what the process held before them
  beside model and state. Compiling takes hundreds of MiB, more for one optimizer than for another,
  and happens once in a run of any length, so it is left out.
- `process_peak_bytes`: the resident peak of the whole process.
"""

import ctypes
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import reporting
from experiments.benchmarks import parameters, timing
from experiments.benchmarks.settings import Config
from experiments.models.presets import PRESETS
from experiments.trainer import cli, loop, optimizers, pretraining
from experiments.trainer.config import Config as Run
from experiments.trainer.config import Preset
from experiments.trainer.methods import Gum
from experiments.trainer.optimizers import Name

PROGRAM = "experiments.benchmarks.training"
# Contender -> options of its worker.
CONTENDERS: dict[str, dict[str, Any]] = {
    "gum": {"optimizer": "gum"},
    "gum, compressed gradients": {"optimizer": "gum", "gradients": "compressed"},
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
}

_ROOT = Path(__file__).parents[2]
_SKIPPED = 2  # first steps, which are not counted: they set up what later steps reuse


@dataclasses.dataclass(frozen=True)
class Worker:
    """Take a few training steps on random tokens and print their seconds and bytes."""

    #: Optimizer, as in experiments.pretrain.
    optimizer: Name = "gum"
    #: Form in which gradients leave GUM's backward pass, as in experiments.pretrain.
    gradients: Literal["full", "compressed"] = "full"
    #: Size of the model.
    preset: Preset = "60m"
    #: Windows in one step.
    batch_size: int = 8
    #: Tokens in one window.
    seq_len: int = 256
    #: Training steps, of which the first two are not counted.
    steps: int = 12
    #: Rank of GUM.
    rank: int = 128
    #: Gamma: full-rank layers of each role in a period.
    full_rank_layers: int = 2
    #: Steps between two refreshes: few, so that a short run has both kinds of step.
    every: int = 4
    #: Seed of weights and tokens.
    seed: int = 0


def main(arguments: Sequence[str]) -> int:
    """Measures one optimizer in this process and prints one line of JSON; returns the exit code."""
    print(json.dumps(measure(cli.parse(Worker, PROGRAM, arguments))))
    return 0


def run(config: Config, work: Callable[[Worker], dict[str, Any]] | None = None) -> None:
    """Runs the processes by turns, writes a file for this batch and prints a table.

    Args:
      config: the options.
      work: measures one run; by default in a new process.
    """
    # 1. Each round runs every contender once, so that a slower machine affects all alike.
    work = work or _in_process
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for turn in range(config.rounds):
        for name in CONTENDERS:
            runs[name].append(work(_worker(config, name)))
            print(f"trained with {name}, round {turn + 1} of {config.rounds}", flush=True)
    # 2. Compare medians, and write and print them.
    results = compare(runs, config.period)
    name = f"{config.training_preset}-{config.batch_size}x{config.seq_len}.json"
    reporting.write(config.out / "training" / name, config, runs=runs, **results)
    reporting.table(
        f"Steps of {config.training_preset}, {config.batch_size} x {config.seq_len} random tokens",
        ("optimizer", "tokens/s", "amortized", "refresh s", "program MiB", "peak MiB", "state MiB"),
        (
            (name, *(median[key] for key in ("tokens_per_second", "amortized_tokens_per_second",
             "refresh_seconds")), *(median[key] / 2**20 for key in
             ("program_bytes", "peak_bytes", "state_bytes")))
            for name, median in results["medians"].items()
        ),
    )  # fmt: skip
    print(f"tokens/s of gum over adamw: {results['gum_over_adamw']}")
    for kind in ("program", "peak"):
        print(f"saved {kind} over saved state: {results[f'saved_{kind}_over_saved_state']:.2f}")


def stored(out: Path) -> list[dict[str, Any]]:
    """Reads all results, the smallest model and batch first."""
    found = [json.loads(file.read_text()) for file in (out / "training").glob("*.json")]
    sizes = list(PRESETS)

    def place(result: dict[str, Any]) -> tuple[int, int]:
        config = result["config"]
        return sizes.index(config["training_preset"]), config["batch_size"]

    return sorted(found, key=place)


def speeds(result: dict[str, Any]) -> dict[str, float]:
    """Returns by optimizer the amortized tokens per second over AdamW's, of a stored result."""
    rates = {name: m["amortized_tokens_per_second"] for name, m in result["medians"].items()}
    return {name: rate / rates["adamw"] for name, rate in rates.items()}


def compare(runs: dict[str, list[dict[str, Any]]], period: int) -> dict[str, Any]:
    """Returns the medians of each optimizer's runs, and GUM's speed and savings over AdamW.

    Args:
      runs: results of `measure` by contender, in the order of the rounds.
      period: steps over which the cost of a refresh is spread.
    """
    runs = {name: [_amortize(each, period) for each in found] for name, found in runs.items()}
    medians = {name: _medians(found) for name, found in runs.items()}
    gum, adamw = medians["gum"], medians["adamw"]
    # How much of the saved optimizer state arrives as saved memory: 1 is all of it.
    saved = adamw["state_bytes"] - gum["state_bytes"]
    return {
        "medians": medians,
        "gum_over_adamw": _ratio(runs, "tokens_per_second"),
        "gum_over_adamw_amortized": _ratio(runs, "amortized_tokens_per_second"),
        "saved_peak_over_saved_state": (adamw["peak_bytes"] - gum["peak_bytes"]) / saved,
        "saved_program_over_saved_state": (adamw["program_bytes"] - gum["program_bytes"]) / saved,
    }


def measure(worker: Worker) -> dict[str, Any]:
    """Takes the steps of one run and waits for the results of each.

    Returns:
      Median seconds, tokens per second of plain steps, and bytes.
    """
    # 1. The model, its state and the compiled step.
    settings = Run(
        preset=worker.preset, batch_size=worker.batch_size,
        seq_len=worker.seq_len, steps=worker.steps, seed=worker.seed,
        optimizer=optimizers.named(
            worker.optimizer,
            Gum(
                rank=worker.rank, period=worker.every, gradients=worker.gradients,
                full_rank_layers=worker.full_rank_layers,
            ),
        ),
    )  # fmt: skip
    arch = pretraining.architecture(settings)
    started: Any = pretraining.start(settings, arch)
    _, state, step = started
    generator = np.random.default_rng(worker.seed)
    shape = (worker.batch_size, worker.seq_len + 1)
    step = step.lower(state, np.zeros(shape, np.int32)).compile()
    # 2. The steps. Once the skipped ones are over, the peak of memory is reset.
    seconds, settled, process_peak = [], 0, 0
    for number in range(worker.steps):
        if number == _SKIPPED:
            process_peak = _status("VmHWM")
            settled = _settle() - parameters.size(state)
        batch = generator.integers(arch.vocab_size, size=shape, dtype=np.int32)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    # 3. The numbers. A device that counts its own peak is asked; on CPUs the process is.
    plain, refresh = _by_kind(worker, seconds)
    return {
        "plain_seconds": statistics.median(plain),
        "refresh_seconds": statistics.median(refresh) if refresh else None,
        "tokens_per_second": worker.batch_size * worker.seq_len / statistics.median(plain),
        "peak_bytes": loop.device_peak() or _status("VmHWM") - settled,
        "program_bytes": program_bytes(step),
        "process_peak_bytes": max(process_peak, _status("VmHWM")),
        "state_bytes": loop.state_bytes(state.opt_state),
    }


def program_bytes(step: Any) -> int:
    """Returns XLA's bytes of arguments, results and temporaries; donated arguments count once."""
    sizes = step.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def _settle() -> int:
    """Frees what compiling left behind and resets the peak; returns the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory until it is told to return it
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current size
    return _status("VmRSS")


def _status(name: str) -> int:
    """Returns the resident bytes of this process: current (VmRSS) or peak (VmHWM).

    `getrusage` would not do: on Linux its peak begins with the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def _by_kind(worker: Worker, seconds: list[float]) -> tuple[list[float], list[float]]:
    """Splits the seconds into plain steps and refreshes, without the skipped first steps."""
    later = list(enumerate(seconds))[_SKIPPED:]
    if worker.optimizer != "gum":
        return [s for _, s in later], []
    plain = [s for i, s in later if i % worker.every]
    return plain, [s for i, s in later if not i % worker.every]


def _worker(config: Config, name: str) -> Worker:
    preset: Any = config.training_preset
    return Worker(
        **CONTENDERS[name], preset=preset, batch_size=config.batch_size, seq_len=config.seq_len,
        steps=config.training_steps, rank=config.rank, full_rank_layers=config.full_rank_layers,
        seed=config.seed,
    )  # fmt: skip


def _in_process(worker: Worker) -> dict[str, Any]:
    """Measures a worker in a new process, whose peak of memory is then its own."""
    options = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(worker).items()]
    command = [sys.executable, "-m", PROGRAM, *options]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    # Training may print before it; the results are the last line.
    return json.loads(done.stdout.splitlines()[-1])


def _amortize(run: dict[str, Any], period: int) -> dict[str, Any]:
    plain, refresh = run["plain_seconds"], run["refresh_seconds"]
    seconds = timing.amortized(plain, refresh, period) if refresh else plain
    # Tokens per second of plain steps, slowed down by the share of refreshes.
    return run | {"amortized_tokens_per_second": run["tokens_per_second"] * plain / seconds}


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None if runs[0][name] is None else statistics.median(run[name] for run in runs)
        for name in runs[0]
    }


def _ratio(runs: dict[str, list[dict[str, Any]]], key: str) -> dict[str, float]:
    return timing.ratio([run[key] for run in runs["gum"]], [run[key] for run in runs["adamw"]])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
