"""Pretrain a language model: `python -m experiments.pretrain --help`."""

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
    # These import the network, data and checkpoints, which takes seconds; `--help` needs none.
    from experiments.trainer import checkpoints, processes
    from experiments.trainer.pretraining import train

    processes.join(command.launch)
    with checkpoints.storage_faults(command.config):
        result = train(command.config)
        if processes.is_first():
            _conclude(command.config, result, arguments)
    return 128 + result.stopped_by if result.stopped_by else 0


def parse(arguments: Sequence[str]) -> Command:
    """The options of a run; what is not given has the defaults of the recipe, if there is one."""
    command = cli.parse(Command, PROGRAM, arguments)
    if not (recipe := command.config.recipe):
        return command
    default = Command(RECIPES[recipe], Launch())
    with defaults_like(default.config.optimizer):
        return cli.parse(Command, PROGRAM, arguments, default)


def _conclude(config: Config, result: "Result", arguments: Sequence[str]) -> None:
    """Draws the loss curve and says how the run ended."""
    # Matplotlib takes a second to import, and other processes than the first do not draw.
    from experiments import reporting

    label = f"{config.optimizer.name}, {config.learning_rate:g}"
    title = f"{config.preset} on {reporting.title(*config.corpus)}"
    path = Path(config.run_dir) / "loss.png"
    picture = reporting.loss_curves({label: result.metrics}, path, title)
    if result.stopped_by:
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
