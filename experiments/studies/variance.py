"""The variance that layer sampling adds to gradients: `python -m experiments.studies.variance`.

With low-rank part ``S_i = P_i P_i' G_i`` and residual ``R_i = G_i - S_i``, the estimate of a matrix
is ``S_i / (1 - q_i)`` or, with probability ``q_i``, ``R_i / q_i``. The parts are orthogonal, so

    E ||estimate_i - G_i||^2 = ||S_i||^2 / (1 - q_i) + ||R_i||^2 / q_i - ||G_i||^2,

and the sum over a group of N matrices does not depend on how their draws are correlated. The
library draws all matrices with ``q = gamma / N``. Importance sampling gives each matrix its own
``q_i``, with the same sum and hence the same expected memory. It must choose them once per period,
from norms that age; with the norms of each step itself, its gain is an upper bound.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import reporting
from experiments.reporting import COLOURS, MARKERS, save
from experiments.studies import gradients
from experiments.studies.gradients import KINDS, Moment
from experiments.trainer import cli
from experiments.trainer.config import Config as Run
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import architecture

PROGRAM = "experiments.studies.variance"
# Bounds of a probability. They keep the weights 1/q and 1/(1-q) of norms that change after the
# choice at most 20.
LEAST, MOST = 0.05, 0.95
# Norms that a rule may use, as slices of the offsets: of the refresh, from the batch that also made
# the bases; of the next recorded step, from another batch; or of each later step itself, which no
# rule could know in advance.
KNOWN = {"refresh": slice(0, 1), "next": slice(1, 2), "step": slice(2, None)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compute the variance of GUM's estimate of gradients along a run."""

    #: Expected numbers of full-rank layers of each role.
    gammas: tuple[int, ...] = (1, 2, 4)
    #: The gamma at which the figure compares sampling rules.
    shown: int = 2
    #: Steps after each refresh whose norms are recorded; rules are compared from the third on.
    offsets: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 150, 199)
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/variance.json")
    #: The run, as in experiments.pretrain.
    base: Run = dataclasses.field(default_factory=lambda: gradients.RUN)


class Norms(NamedTuple):
    """``||S_i||^2`` and ``||R_i||^2``, float64 ``[refreshes, offsets, kinds, layers]`` each."""

    low: np.ndarray
    residual: np.ndarray

    @property
    def gradient(self) -> np.ndarray:
        """``||G_i||^2``, the sum of both, since the two parts are orthogonal."""
        return self.low + self.residual


# (||S_i||^2, ||R_i||^2, sum of probabilities) -> the probability of each matrix, on the last axis
Rule = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def main(arguments: Sequence[str]) -> int:
    """Trains and computes, prints tables, writes results and figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    check(config)
    # 1. Train and record squared norms.
    steps = gradients.since_refresh(config.base, config.offsets)
    norms = together(config, map(squares, gradients.along(config.base, steps)))
    # 2. Compare rules; from here on everything is arithmetic on the recorded norms.
    overviews = {gamma: overview(norms, gamma) for gamma in config.gammas}
    rules = {gamma: comparison(norms, gamma) for gamma in config.gammas}
    residual = dict[str, list](
        zip(KINDS, np.moveaxis(missed(norms), -1, 0).round(4).tolist(), strict=True)
    )
    reporting.write(config.out, config, residual=residual, equal=overviews, rules=rules)
    show(overviews, rules)
    print(f"\nresults: {config.out}; figure: {draw(config, residual, rules[config.shown])}")
    return 0


def check(config: Config) -> None:
    """Checks `gammas`, `shown` and `offsets`.

    Raises:
      ConfigError: naming the first of them whose value cannot work.
    """
    layers = architecture(config.base).layers
    for gamma in config.gammas:
        if not 1 <= gamma < layers:
            raise ConfigError(
                f"`gammas`: {gamma} is not between 1 and {layers - 1}, below {layers} layers"
            )
    if config.shown not in config.gammas:
        raise ConfigError(f"`shown` is {config.shown}; it must be one of `gammas`")
    if len(config.offsets) < 3:
        raise ConfigError(
            f"`offsets` has {len(config.offsets)} values; it needs three or more, since rules are "
            "compared from the third on"
        )


def squares(moment: Moment) -> Norms:
    """Returns the squared norms of one step, ``[kinds, layers]``."""
    found = []
    for kind in KINDS:
        G = moment.gradients[kind]  # [N, m, n]
        R = gradients.residual(G, moment.bases[kind])  # G - P P'G
        found.append((gradients.squares(G - R), gradients.squares(R)))
    return Norms(*map(np.array, zip(*found, strict=True)))


def together(config: Config, steps: Iterable[Norms]) -> Norms:
    """Stacks the norms of all recorded steps: ``[refreshes, offsets, kinds, layers]``."""
    shape = (-1, len(config.offsets))
    parts = map(np.array, zip(*steps, strict=True))
    return Norms(*(part.reshape(*shape, *part.shape[1:]) for part in parts))


def variance(low: np.ndarray, residual: np.ndarray, q: np.ndarray | float) -> np.ndarray:
    """Returns ``E ||estimate - G||^2`` of matrices drawn with probability `q`.

    Args:
      low: ``||S||^2``.
      residual: ``||R||^2``, of the same shape.
      q: probabilities, broadcast against both.
    """
    return low / (1 - q) + residual / q - (low + residual)


def equal(low: np.ndarray, residual: np.ndarray, total: float) -> np.ndarray:
    """The library's rule: the same probability ``total / N`` for all matrices."""
    del residual
    return np.full(low.shape, total / low.shape[-1])


def proportional(low: np.ndarray, residual: np.ndarray, total: float) -> np.ndarray:
    """Probabilities proportional to the norms of residuals, within bounds."""
    del low
    norm = np.sqrt(residual)
    # Search the factor for which the clipped probabilities sum to `total`. Their sum grows with the
    # factor; at `largest` all of them are at the upper bound.
    largest = MOST / norm.min(-1, keepdims=True)

    def drawn(factor: np.ndarray) -> np.ndarray:
        return np.clip(factor * norm, LEAST, MOST)

    return drawn(_root(lambda factor: total - _sum(drawn(factor)), 0 * largest, largest))


def optimal(low: np.ndarray, residual: np.ndarray, total: float) -> np.ndarray:
    """Probabilities of least total variance, within bounds.

    At the minimum of the total variance under ``sum q_i = total``, the derivatives with respect to
    all ``q_i`` that are not at a bound are equal (the Lagrange multiplier is a price of
    probability): ``||R_i||^2 / q_i^2 - ||S_i||^2 / (1 - q_i)^2 = price``. The left-hand side falls
    in ``q_i``, so the price determines all probabilities, and their sum falls in the price.
    """

    # Two nested bisections: the inner one finds the probability of each matrix at a price, the
    # outer one the price at which the probabilities sum to `total`.
    def saved(q: np.ndarray) -> np.ndarray:
        return residual / q**2 - low / (1 - q) ** 2

    def drawn(price: np.ndarray) -> np.ndarray:
        least, most = np.full(low.shape, LEAST), np.full(low.shape, MOST)
        return _root(lambda q: saved(q) - price, least, most)

    dearest = saved(np.full(low.shape, LEAST)).max(-1, keepdims=True)
    cheapest = saved(np.full(low.shape, MOST)).min(-1, keepdims=True)
    return drawn(_root(lambda price: _sum(drawn(price)) - total, cheapest, dearest))


RULES: dict[str, Rule] = {"proportional": proportional, "optimal": optimal}


def _root(f: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bisects falling functions for a zero in ``[a, b]``; without one, returns the nearer end."""
    # 40 halvings leave 1e-12 of the interval.
    for _ in range(40):
        middle = (a + b) / 2
        a, b = np.where(f(middle) > 0, middle, a), np.where(f(middle) > 0, b, middle)
    return (a + b) / 2


def _sum(q: np.ndarray) -> np.ndarray:
    return q.sum(-1, keepdims=True)


def missed(norms: Norms) -> np.ndarray:
    """Returns ``||R|| / ||G||`` of whole groups, ``[refreshes, offsets, kinds]``."""
    return np.sqrt(norms.residual.sum(-1) / norms.gradient.sum(-1))


def relative(norms: Norms, q: np.ndarray) -> np.ndarray:
    """Returns ``E ||estimate - G||^2 / ||G||^2`` of groups, ``[refreshes, offsets, kinds]``."""
    return variance(*norms, q).sum(-1) / norms.gradient.sum(-1)


def overview(norms: Norms, gamma: int) -> dict[str, float]:
    """Summarizes the relative variance with equal probabilities, over groups and steps."""
    now = known(norms, "step")
    values = relative(now, equal(*now, gamma))
    return {
        "probability": gamma / now.low.shape[-1],
        "least": float(values.min()),
        "mean": float(values.mean()),
        "largest": float(values.max()),
    }


# Weighing -> rule and whose norms it knows -> kind -> relative variance
Comparison = dict[str, dict[str, dict[str, float]]]


def comparison(norms: Norms, gamma: int) -> Comparison:
    """Returns the relative variance by rule, averaged over all compared steps.

    "as it is" weighs matrices by their squared norms, so that large gradients dominate. "by own
    norm" divides each matrix by its norm first, as suits an inner transformation that ignores the
    scale of gradients, such as Muon's.
    """
    # Every matrix has a gradient of norm one.
    alike = Norms(*(part / norms.gradient for part in norms))
    return {"as it is": _by_rule(norms, gamma), "by own norm": _by_rule(alike, gamma)}


def _by_rule(norms: Norms, gamma: int) -> dict[str, dict[str, float]]:
    # The variance always counts the norms of the step itself. A rule chooses its probabilities from
    # those, or from the older norms that it would have.
    now = known(norms, "step")
    chosen = {"equal": equal(*now, gamma)} | {
        f"{name}, {whose}": rule(*known(norms, whose), gamma)
        for name, rule in RULES.items()
        for whose in KNOWN
    }
    return {
        name: dict(zip(KINDS, relative(now, q).mean((0, 1)).tolist(), strict=True))
        for name, q in chosen.items()
    }


def known(norms: Norms, whose: str) -> Norms:
    """Selects the norms that a rule may use, by a key of `KNOWN`."""
    return Norms(*(part[:, KNOWN[whose]] for part in norms))


def show(overviews: dict[int, dict[str, float]], rules: dict[int, Comparison]) -> None:
    """Prints the variance by gamma with equal probabilities, then under each rule."""
    reporting.table(
        "Variance over ||G||^2, equal probabilities, over kinds and steps",
        ("gamma", "q", "min", "mean", "max"),
        ((str(gamma), *row.values()) for gamma, row in overviews.items()),
    )
    for gamma, weighings in rules.items():
        for weighing, rows in weighings.items():
            reporting.table(
                f"Variance by rule, gamma {gamma}, {weighing}",
                ("rule and its norms", *KINDS, "mean"),
                (
                    (name, *row.values(), statistics.mean(row.values()))
                    for name, row in rows.items()
                ),
            )


def draw(config: Config, residual: dict[str, list], rules: Comparison) -> Path:
    """Draws the variance against the residual, and its ratio under importance sampling."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    _by_residual(left, config, residual)
    _by_kind(right, config, rules)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save(figure, config.out)


def _by_residual(axes: Axes, config: Config, residual: dict[str, list]) -> None:
    grid = np.linspace(0, 1, 101)
    # With equal probabilities the relative variance of a group follows from its residual alone,
    # (1 - s) / (1 - q) + s / q - 1 with s the squared relative residual, so each dot lies on its
    # curve. The compared steps, flattened: [kinds x refreshes x offsets].
    found = np.array([residual[kind] for kind in KINDS])[:, :, KNOWN["step"]].ravel()
    layers = architecture(config.base).layers
    for gamma, colour, marker in zip(config.gammas, COLOURS, MARKERS, strict=False):
        q = gamma / layers
        axes.plot(grid, variance(1 - grid**2, grid**2, q), color=colour, linewidth=1)
        axes.plot(
            found, variance(1 - found**2, found**2, q), marker,
            color=colour, markersize=3, alpha=0.5, label=f"gamma {gamma} (q = {q:g})",
        )  # fmt: skip
    axes.plot(grid, grid**2, ":", color=COLOURS[-1], label="low rank alone: squared bias")
    axes.set(xlabel="residual / gradient", ylabel="squared error / squared gradient", xlim=(0, 1))
    axes.set_title("Variance against the residual (dots: groups and steps)", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


def _by_kind(axes: Axes, config: Config, rules: Comparison) -> None:
    # Label -> (weighing, rule) in `comparison`: from what can be known to what cannot.
    curves = {
        "norms of the refresh": ("as it is", "optimal, refresh"),
        "norms of the next step": ("as it is", "optimal, next"),
        "each step's own norms": ("as it is", "optimal, step"),
        "the same, all gradients of norm one": ("by own norm", "optimal, step"),
    }
    styles = zip(curves.items(), COLOURS, "os^D", strict=False)
    for (label, (weighing, rule)), colour, marker in styles:
        values = rules[weighing]
        y = [values[rule][kind] / values["equal"][kind] for kind in KINDS]
        axes.plot(KINDS, y, marker, color=colour, label=label)
    axes.axhline(1, color=COLOURS[-1], linewidth=1, linestyle=":")
    axes.set(xlabel="kind of matrix", ylabel="variance / with equal probabilities", yscale="log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.6, 10)
    axes.set_title(f"Importance sampling at equal memory, gamma {config.shown}", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="upper left")


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
