"""Bayesian search over positive numbers, in coordinates without known invariances.

A *coordinate* is positive and searched by its logarithm, as training depends on ratios of learning
rates rather than on their differences. Two options of which one can undo the other share a single
coordinate: an update along a scale-free direction (a polar factor, a sign) has the length learning
rate times scale, so this product, the *size* of the update, is searched at a fixed scale.

Optuna's tree-structured Parzen estimator chooses the points: `pip install gum-optax[tuning]`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments.trainer.config import Training, change
from experiments.trainer.options import ConfigError

Point = dict[str, float]


class Trial(NamedTuple):
    """A point and its loss."""

    point: Point
    loss: float


def search(
    ranges: Mapping[str, tuple[float, float]],
    loss: Callable[[Point], float],
    trials: int,
    seed: int = 0,
) -> Iterator[Trial]:
    """Yields trials, each chosen from the results of those before it.

    Equal losses and seeds give equal points.

    Args:
      ranges: the least and the largest value of each coordinate, both positive.
      loss: the function to minimize; NaN or infinity for a run that diverged.
      trials: number of trials.
      seed: seed of Optuna's choices.

    Raises:
      ConfigError: Optuna is not installed.
    """
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "`trials`: a search needs Optuna; pip install gum-optax[tuning], or run the grid"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # 1. A third of the trials at random, and at least four: below that there is nothing to model.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, trials // 3))
    study = optuna.create_study(sampler=sampler)
    # 2. Ask for a point, run it, tell its loss. A trial that diverged is told as failed: the
    #    estimator takes no infinite losses.
    for _ in range(trials):
        trial = study.ask()
        point = {
            # Rounded to three digits: a repeated search then finds its runs in the result file.
            name: float(f"{trial.suggest_float(name, low, high, log=True):.3g}")
            for name, (low, high) in ranges.items()
        }
        found = loss(point)
        diverged = not found < float("inf")
        study.tell(trial, None if diverged else found, state=_state(optuna, diverged))
        yield Trial(point, found)


def _state(optuna: Any, diverged: bool) -> Any:
    states = optuna.trial.TrialState
    return states.FAIL if diverged else states.COMPLETE


def scale(base: Training) -> float:
    """Returns the ratio of the size of updates to the learning rate, 1 without `consistent_rms`."""
    return getattr(base.optimizer, "consistent_rms", None) or 1.0


def at_size(base: Training, size: float, **options: Any) -> Training:
    """Returns the run whose updates have a size: learning rate = size / scale."""
    return change(base, learning_rate=float(f"{size / scale(base):.3g}"), **options)
