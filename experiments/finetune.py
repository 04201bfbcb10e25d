"""Fine-tunes a pretrained language model on a task: `python -m experiments.finetune --help`.

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
from experiments.trainer.config import Launch
from experiments.trainer.finetuning_options import Config

if TYPE_CHECKING:
    from experiments.trainer.finetuning import Outcome

PROGRAM = "experiments.finetune"


@dataclasses.dataclass(frozen=True)
class Command:
    """Fine-tune a pretrained language model with GUM or another optimizer."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> int:
    """Runs or resumes a fine-tuning run; returns the exit code."""
    command = cli.parse(Command, PROGRAM, arguments)
    # Imported here because models, data and checkpoints take seconds; `--help` needs none.
    from experiments.trainer import checkpoints, processes
    from experiments.trainer.finetuning import finetune

    # Before anything touches a device.
    processes.join(command.launch)
    with checkpoints.storage_faults(command.config):
        outcome = finetune(command.config)
        if processes.is_first():
            _conclude(command.config, outcome, arguments)
    stopped_by = outcome.result.stopped_by
    return 128 + stopped_by if stopped_by else 0


def _conclude(config: Config, outcome: "Outcome", arguments: Sequence[str]) -> None:
    """Draws the loss curve and prints how the run ended."""
    # Matplotlib takes a second to import, and only the first process draws.
    from experiments import reporting
    from experiments.trainer import evaluation
    from experiments.trainer.finetuning import accuracy_path, share

    result = outcome.result
    label = f"{config.optimizer.name}, {config.learning_rate:g}"
    title = f"{reporting.title(config.model)} on {reporting.title(config.task)}"
    path = Path(config.run_dir) / "loss.png"
    picture = reporting.loss_curves({label: result.metrics}, path, title)
    if outcome.after is None:
        # The command that resumes this run: its own arguments, with `--resume`.
        again = [*arguments, *([] if config.resume else ["--resume"])]
        print(
            f"stopped by {signal.Signals(result.stopped_by or 0).name} after step {result.step}, "
            f"which is saved; continue with:\n  python -m {PROGRAM} {shlex.join(again)}"
        )
        return
    # Some answers, the share of right ones before and after, and the loss.
    print(
        f"\nanswers of the trained model:\n"
        f"{evaluation.examples(outcome.after.answers[: config.shown])}\n\n"
        f"right before: {share(outcome.before)}\nright after:  {outcome.after}\n"
        f"loss of held-out answers {outcome.loss} after {result.step} steps, "
        f"{result.seconds_per_step:.3f} s each\nloss curve: {picture}\n"
        f"answers: {accuracy_path(config)}" + (f"\nmodel: {config.export}" if config.export else "")
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
