"""Pretrains a language model: `python -m experiments.pretrain --help`.

The exit code is 0 after the last step, 2 for an option that cannot work, and 128 plus the number of
the signal that stopped the run.
"""

import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.trainer import cli
from experiments.trainer.config import Config, Launch
from experiments.trainer.optimizers import defaults_like
from experiments.trainer.recipes import RECIPES

if TYPE_CHECKING:
    from experiments.trainer.loop import Result

PROGRAM = "experiments.pretrain"


@dataclasses.dataclass(frozen=True)
class Command:
    """Pretrain a LLaMA with GUM or another optimizer, on one device or on many."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> int:
    """Runs or resumes a training run; returns the exit code."""
    command = parse(arguments)
    # Imported here because the model, data and checkpoints take seconds; `--help` needs none.
    from experiments.trainer import checkpoints, processes
    from experiments.trainer.pretraining import train

    # Before anything touches a device.
    processes.join(command.launch)
    with checkpoints.storage_faults(command.config):
        result = train(command.config)
        if processes.is_first():
            _conclude(command.config, result, arguments)
    return 128 + result.stopped_by if result.stopped_by else 0


def parse(arguments: Sequence[str]) -> Command:
    """Parses the options of a run; a recipe, if there is one, gives the defaults of all others."""
    # Parsed twice: the first time for the name of the recipe, the second with its defaults.
    command = cli.parse(Command, PROGRAM, arguments)
    if not (recipe := command.config.recipe):
        return command
    default = Command(RECIPES[recipe], Launch())
    with defaults_like(default.config.optimizer):
        return cli.parse(Command, PROGRAM, arguments, default)


def _conclude(config: Config, result: "Result", arguments: Sequence[str]) -> None:
    """Draws the loss curve and prints how the run ended."""
    # Matplotlib takes a second to import, and only the first process draws.
    from experiments import reporting

    label = f"{config.optimizer.name}, {config.learning_rate:g}"
    title = f"{config.preset} on {reporting.title(*config.corpus)}"
    path = Path(config.run_dir) / "loss.png"
    picture = reporting.loss_curves({label: result.metrics}, path, title)
    if result.stopped_by:
        # The command that resumes this run: its own arguments, with `--resume`.
        again = [*arguments, *([] if config.resume else ["--resume"])]
        name = signal.Signals(result.stopped_by).name
        print(
            f"stopped by {name} after step {result.step}, which is saved; continue with:\n"
            f"  python -m {PROGRAM} {shlex.join(again)}"
        )
        return
    print(
        f"validation loss {result.validation_loss:.4f} after {result.step} steps, "
        f"{result.seconds_per_step:.3f} s each\nloss curve: {picture}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
