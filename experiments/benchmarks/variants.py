"""Seconds of an update of the frontier's methods, by turns: the cost of residuals and of few bits.

The methods keep their own states and share the parameters, as in `experiments.benchmarks.step`.
No step but the first is a refresh.
"""

from experiments import reporting
from experiments.benchmarks import contenders, parameters, step, timing
from experiments.benchmarks.settings import Config

REFERENCE = "GaLore-Muon"  # low-rank Muon without the residual: what others add is their cost


def run(config: Config) -> None:
    """Times every method on every preset, writes a file for each preset and prints a table."""
    for preset in config.presets:
        tree = parameters.separate(preset)
        shared = {
            "params": parameters.random(tree, config.seed),
            "grads": parameters.random(tree, config.seed + 1),
        }
        steps = {
            name: step.stepper(make(config.rank, config.full_rank_layers), shared)
            for name, make in contenders.VARIANTS.items()
        }
        seconds = timing.by_turns(steps, config.repeats)
        ratios = {name: timing.ratio(each, seconds[REFERENCE]) for name, each in seconds.items()}
        reporting.write(config.out / "variants" / f"{preset}.json", config, ratios=ratios)
        reporting.table(
            f"{preset}: seconds of an update over {REFERENCE}'s, by turns",
            ("method", "median", "min", "max"),
            ((name, *ratio.values()) for name, ratio in ratios.items()),
        )
