"""Bayesian search of positive numbers, in coordinates that leave known invariances out.

A *coordinate* is positive and searched by its logarithm: training answers to the ratio of two
learning rates, not to their difference. What a change of one option undoes in another is no
coordinate: updates of a scale-free direction (a polar factor, a sign) are as long as learning rate
times scale, so that the *size* of an update is searched, and the scale stays as it is.

Optuna's tree-structured Parzen estimator chooses the points, `pip install gum-optax[tuning]`.
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
    """Yields trials, each chosen after those before it. Equal losses give equal points again.

    Args:
      ranges: the least and the largest value of each coordinate, both positive.
      loss: what is to be made small; a run that diverged may give NaN or infinity.
      trials: how many.
      seed: of the choices.

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
    # A third of the trials at random, and at least four: below that there is nothing to model.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, trials // 3))
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask()
        point = {
            # Three digits, so that a result file finds a run again.
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
    """The factor between a learning rate and the size of updates: 1 unless directions have one."""
    return getattr(base.optimizer, "consistent_rms", None) or 1.0


def at_size(base: Training, size: float, **options: Any) -> Training:
    """The run whose updates have a size, whatever their scale: rate = size / scale."""
    return change(base, learning_rate=float(f"{size / scale(base):.3g}"), **options)
