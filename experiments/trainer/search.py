"""Bayesian search over positive numbers, in coordinates without known invariances.

A *coordinate* is positive and searched by its logarithm, as training depends on ratios of learning
rates rather than on their differences. Two options of which one can undo the other share a single
coordinate: an update along a scale-free direction (a polar factor, a sign) has the length learning
rate times scale, so this product, the *size* of the update, is searched at a fixed scale. Where
coordinates can be exchanged without any effect, the model knows it by a symmetrized kernel.

A Gaussian process (tinygp) predicts losses, and the next run is at the point of the largest
expected improvement: `pip install gum-optax[tuning]`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import stats

from experiments.trainer.config import Training, change
from experiments.trainer.options import ConfigError

Point = dict[str, float]
_Run = TypeVar("_Run", bound=Training)


class Trial(NamedTuple):
    """A point and its loss."""

    point: Point
    loss: float


def search(
    ranges: Mapping[str, tuple[float, float]],
    loss: Callable[[Point], float],
    trials: int,
    seed: int = 0,
    exchangeable: Sequence[Sequence[str]] = (),
) -> Iterator[Trial]:
    """Yields trials, each chosen from the results of those before it.

    Equal losses and seeds give equal points.

    Args:
      ranges: the least and the largest value of each coordinate, both positive.
      loss: the function to minimize; NaN or infinity for a run that diverged.
      trials: number of trials.
      seed: seed of the first points and of the candidates.
      exchangeable: groups of coordinates whose values can be exchanged without an effect on the
        loss, such as the learning rates of layers that play the same part. They need equal ranges.

    Raises:
      ConfigError: tinygp is not installed, or the ranges of exchangeable coordinates differ.
    """
    try:
        from experiments.trainer import surrogate
    except ImportError as error:
        raise ConfigError(
            "`trials`: a search needs tinygp; pip install gum-optax[tuning], or run the grid"
        ) from error
    for group in exchangeable:
        if len({ranges[name] for name in group}) > 1:
            raise ConfigError(f"`exchangeable`: the ranges of {', '.join(group)} differ")
    names = list(ranges)
    low, high = np.log(np.array([ranges[name] for name in names])).T
    permutations = _permutations(names, exchangeable)
    x, losses = np.zeros((trials, len(names))), []  # points as shares of the ranges
    # 1. A third of the trials, and at least four, spread over the ranges: below that there is
    #    nothing to model.
    first = max(4, trials // 3)
    x[:first] = stats.qmc.LatinHypercube(len(names), rng=seed).random(first)[:trials]
    for done in range(trials):
        # 2. The others by the model.
        if done >= first:
            x[done] = surrogate.next_point(x, _tamed(losses), permutations, seed)
        # Rounded to three digits: a repeated search then finds its runs in the result file.
        values = np.exp(low + x[done] * (high - low))
        point = {name: float(f"{value:.3g}") for name, value in zip(names, values, strict=True)}
        losses.append(loss(point))
        yield Trial(point, losses[-1])


def scale(base: Training) -> float:
    """Returns the ratio of the size of updates to the learning rate, 1 without `consistent_rms`."""
    return getattr(base.optimizer, "consistent_rms", None) or 1.0


def at_size(base: _Run, size: float) -> _Run:
    """Returns the run whose updates have a size: learning rate = size / scale."""
    return change(base, learning_rate=float(f"{size / scale(base):.3g}"))


def _permutations(names: list[str], exchangeable: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the group of permutations of all coordinates, ``[group, coordinates]``."""
    found = []
    for orders in itertools.product(*(itertools.permutations(group) for group in exchangeable)):
        order = np.arange(len(names))
        for group, values in zip(exchangeable, orders, strict=True):
            order[[names.index(n) for n in group]] = [names.index(n) for n in values]
        found.append(order)
    return np.array(found)


def _tamed(losses: list[float]) -> np.ndarray:
    """Returns losses of mean 0 and standard deviation 1, in which bad runs are not too bad.

    A run far above the others, or one that diverged, would set the scale of the model. It only
    needs to know that such a run is bad.
    """
    all_losses = np.array(losses, float)
    finite = all_losses[np.isfinite(all_losses)]
    if not finite.size:
        return np.zeros(len(losses))
    best, middle = finite.min(), np.median(finite)
    limit = middle + 2 * (middle - best)
    tamed = np.where(np.isfinite(all_losses), np.minimum(all_losses, limit), limit)
    return (tamed - tamed.mean()) / (tamed.std() or 1.0)
