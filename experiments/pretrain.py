"""Pretrain a language model: `python -m experiments.pretrain --help`."""

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.config import Config
from experiments.plots import loss_curves
from experiments.train import train

PROGRAM = "experiments.pretrain"


def main(arguments: Sequence[str]) -> int:
    """Runs or resumes a training run; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    result = train(config)
    label = f"{config.optimizer}, {config.learning_rate:g}"
    title = f"{config.preset} on {' '.join(config.corpus)}"
    picture = loss_curves({label: result.metrics}, Path(config.run_dir) / "loss.png", title)
    if result.stopped_by:
        again = [*arguments, *([] if config.resume else ["--resume"])]
        name = signal.Signals(result.stopped_by).name
        print(
            f"stopped by {name} after step {result.step}, which is saved; continue with:\n"
            f"  python -m {PROGRAM} {shlex.join(again)}"
        )
        return 128 + result.stopped_by
    print(
        f"validation loss {result.validation_loss:.4f} after {result.step} steps, "
        f"{result.seconds_per_step:.3f} s each\nloss curve: {picture}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
