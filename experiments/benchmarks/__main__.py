"""Runs the benchmarks: `python -m experiments.benchmarks`."""

import sys
from collections.abc import Callable, Sequence

from experiments.benchmarks import (
    bases,
    compiled,
    figure,
    orthogonality,
    step,
    sweep,
    training,
    variants,
)
from experiments.benchmarks.settings import Config, check
from experiments.trainer import cli
from experiments.trainer.options import make_directory

PROGRAM = "experiments.benchmarks"

# Training comes first: its processes need an accelerator that this one has not taken yet.
STUDIES: dict[str, Callable[[Config], None]] = {
    "training": training.run,
    "step": step.run,
    "compiled": compiled.run,
    "sweep": sweep.run,
    "projectors": bases.run,
    "orthogonality": orthogonality.run,
    "variants": variants.run,
}


def main(arguments: Sequence[str]) -> int:
    """Runs the studies, each of which writes and prints its results; redraws the figure."""
    config = cli.parse(Config, PROGRAM, arguments)
    check(config)
    make_directory("out", config.out)
    for name, study in STUDIES.items():
        if name in config.studies:
            study(config)
    picture = figure.draw(config.out, config.out.with_suffix(".png"))
    print(f"\nresults: {config.out}; figure: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
