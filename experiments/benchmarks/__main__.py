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

# In the order in which they run. Training comes first, since it starts processes that need the
# accelerator: once this process has computed anything, it holds the device's memory itself.
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
    """Runs the studies, each of which writes and prints its results, and redraws the figure."""
    config = cli.parse(Config, PROGRAM, arguments)
    check(config)
    make_directory("out", config.out)
    for name, study in STUDIES.items():
        if name in config.studies:
            study(config)
    # The figure has a panel for every result file, also those of studies that were not run now.
    picture = figure.draw(config.out, config.out.with_suffix(".png"))
    print(f"\nresults: {config.out}; figure: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
