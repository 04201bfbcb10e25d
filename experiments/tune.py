"""Grids of optimizer, learning rate and seed on one model: `python -m experiments.tune --help`.

The result file is rewritten after each run, and runs that it already holds are not repeated: a
grid may be stopped at any time and continued by the same command.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.config import FREE_ON_RESUME, Config, Optimizer
from experiments.train import Result, train

PROGRAM = "experiments.tune"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Train with every combination of optimizers, learning rates and seeds."""

    optimizers: tuple[Optimizer, ...] = ("gum", "adamw")
    """Optimizers to compare."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Peak learning rates."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, data order and draws."""
    out: str = "experiments/results/demo_grid.json"
    """The JSON file to write or add to."""
    base: Config = dataclasses.field(
        default_factory=lambda: Config(run_dir="runs/tune", checkpoint_every=1_000_000)
    )
    """All other options of a run, as in experiments.pretrain."""


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing from the grid and prints a table; returns the exit code."""
    grid = cli.parse(Grid, PROGRAM, arguments)
    out = Path(grid.out)
    entries = json.loads(out.read_text()) if out.exists() else []
    for config in configurations(grid):
        if any(entry["config"] == _identity(config) for entry in entries):
            continue
        rate, seed = config.learning_rate, config.seed
        print(f"\n== {config.optimizer}, learning rate {rate:g}, seed {seed}")
        shutil.rmtree(config.run_dir, ignore_errors=True)
        result = train(config)
        if result.stopped_by:
            return 128 + result.stopped_by
        entries.append(entry_of(config, result))
        _write(out, entries)
    print("\n" + table(entries))
    return 0


def configurations(grid: Grid) -> list[Config]:
    """One configuration for each point of the grid."""
    return [
        dataclasses.replace(
            grid.base,
            optimizer=optimizer,
            learning_rate=rate,
            seed=seed,
            run_dir=f"{grid.base.run_dir}/{optimizer}-{rate:g}-{seed}",
        )
        for seed in grid.seeds
        for optimizer in grid.optimizers
        for rate in grid.learning_rates
    ]


def entry_of(config: Config, result: Result) -> dict:
    """What the result file keeps of a run."""
    described = json.loads((Path(config.run_dir) / "config.json").read_text())
    held_out = [record for record in result.metrics if "validation_loss" in record]
    return described | {
        "config": _identity(config),
        "validation_loss": result.validation_loss,
        "curve": [[record["step"], record["validation_loss"]] for record in held_out],
        "seconds_per_step": result.seconds_per_step,
        "state_bytes": result.state_bytes,
        "parameters": result.parameters,
    }


def table(entries: list[dict]) -> str:
    """The runs, each optimizer's best first."""
    best = sorted(entries, key=lambda e: (e["config"]["optimizer"], e["validation_loss"]))
    rows = [
        f"{e['config']['optimizer']:<15}{e['config']['learning_rate']:>14g}{e['config']['seed']:>6}"
        f"{e['validation_loss']:>17.4f}{e['state_bytes']:>13,}{e['seconds_per_step']:>12.3f}"
        for e in best
    ]
    heads = "optimizer", "learning rate", "seed", "validation loss", "state bytes", "s per step"
    return "\n".join(["{:<15}{:>14}{:>6}{:>17}{:>13}{:>12}".format(*heads), *rows])


def _identity(config: Config) -> dict:
    """The options that decide a run's numbers, as JSON would give them back."""
    fields = dataclasses.asdict(config).items()
    free = FREE_ON_RESUME - {"validation_batches"}
    return json.loads(json.dumps({name: value for name, value in fields if name not in free}))


def _write(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".scratch")
    scratch.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(scratch, path)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
