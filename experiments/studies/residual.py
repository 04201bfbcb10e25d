"""The residual of later gradients (Figure 4): `python -m experiments.studies.residual`.

Measures the relative residual ``||G - P P'G||_F / ||G||_F`` against the steps since the refresh
that made P. It has three causes, which are measured apart: P has few columns (the residual under
the best basis of each step's own gradient), P fits the noise of one batch (the residual of other
batches at the weights of the refresh), and P ages (the growth over the period). The bias of GaLore
is the residual of the full gradient, the mean over all batches, which is estimated as well.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import reporting
from experiments.reporting import COLOURS, MARKERS, save
from experiments.studies import gradients
from experiments.studies.gradients import KINDS, ByKind, Moment
from experiments.trainer import cli
from experiments.trainer.config import Config as Run
from experiments.trainer.options import ConfigError

PROGRAM = "experiments.studies.residual"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the part of later gradients that bases leave out, along a run of GUM."""

    #: Steps after each refresh at which its bases are compared with the gradient.
    offsets: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 150, 199)
    #: Further batches at the same weights, to tell the noise of a batch from the full gradient.
    others: int = 16
    #: Result file; the figure is beside it.
    out: Path = Path("experiments/results/studies/residual.json")
    #: The run, as in experiments.pretrain.
    base: Run = dataclasses.field(default_factory=lambda: gradients.RUN)


# Curve -> kind -> [refreshes, offsets, layers]
Values = dict[str, ByKind]
# Curve -> kind -> "mean" and "deviation" over layers -> [refreshes][offsets], as in the result file
Summary = dict[str, dict[str, dict[str, list[list[float]]]]]

# Curve -> label, colour, line and marker. "other batches" and "noise" are in the result file and
# not drawn as curves.
_STYLES = {
    "svd": ("SVD", COLOURS[1], "s--"),
    "default": ("default projector", COLOURS[0], "o-"),
    "full gradient": ("default, full gradient", COLOURS[2], "^-"),
    "fresh": ("SVD of the step itself", COLOURS[3], "v-"),
    "random": ("random subspace", COLOURS[6], ":"),
}


def main(arguments: Sequence[str]) -> int:
    """Trains and measures, prints tables, writes results and figure; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    values = measured(config)
    starts = range(0, config.base.steps, gradients.period(config.base))
    curves = summary(values)
    reporting.write(config.out, config, refreshes=list(starts), curves=curves)
    for i, start in enumerate(starts):
        reporting.table(
            f"Residual, mean over all matrices, steps after the refresh at {start}",
            ("curve", *map(str, config.offsets)),
            ((curve, *overall(by_kind)[0][i].tolist()) for curve, by_kind in curves.items()),
        )
    print(f"\nresults: {config.out}; figure: {draw(config, curves)}")
    return 0


def measured(config: Config) -> Values:
    """Trains, and returns the residuals of all matrices at all refreshes and offsets.

    Raises:
      ConfigError: the steps do not fit into the run, or there are too few batches.
    """
    if config.others < 2:
        raise ConfigError(
            f"`others` is {config.others}; it must be at least 2, since the noise of batches is "
            "estimated from their differences"
        )
    steps = gradients.since_refresh(config.base, config.offsets)
    svd: ByKind = {}
    found: list[Values] = []
    for moment in gradients.along(config.base, steps, config.others):
        # The SVD's bases of the refresh stay until the next one, like the projector's.
        if moment.step % gradients.period(config.base) == 0:
            svd = own_bases(moment)
        found.append(residuals(moment, svd))
    return {
        curve: {kind: _periods(config, found, curve, kind) for kind in KINDS} for curve in found[0]
    }


def _periods(config: Config, found: list[Values], curve: str, kind: str) -> np.ndarray:
    """Returns one curve of one kind, ``[refreshes, offsets, layers]``, from its values by step."""
    rows = np.array([each[curve][kind] for each in found])  # [refreshes x offsets, layers]
    return rows.reshape(-1, len(config.offsets), rows.shape[-1])


def own_bases(moment: Moment) -> ByKind:
    """Returns the SVD's bases ``[N, m, r]`` of a step's own gradients, of the run's rank."""
    return {
        kind: gradients.best_bases(moment.gradients[kind], bases.shape[-1])
        for kind, bases in moment.bases.items()
    }


def residuals(moment: Moment, svd: ByKind) -> Values:
    """Returns one number per layer for each curve and kind, at one step.

    Args:
      moment: the step, with gradients of further batches.
      svd: the SVD's bases from the last refresh, ``[N, m, r]`` by kind.
    """
    fresh = own_bases(moment)
    found = {}
    for kind in KINDS:
        own, bases = moment.gradients[kind], moment.bases[kind]
        others = np.stack([each[kind] for each in moment.others])  # [batches, N, m, n]
        layers, m, rank = bases.shape
        found[kind] = {
            "svd": relative(own, svd[kind]),
            "default": relative(own, bases),
            "other batches": relative(others, bases).mean(0),
            "full gradient": np.full(layers, full_gradient(others, bases)),
            "fresh": relative(own, fresh[kind]),
            # A random subspace leaves a share 1 - r/m of the squared norm in expectation.
            "random": np.full(layers, (1 - rank / m) ** 0.5),
            "noise": noise(others),
        }
    return {curve: {kind: found[kind][curve] for kind in KINDS} for curve in found[KINDS[0]]}


def relative(G: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Returns ``||G - P P'G||_F / ||G||_F`` of each matrix: ``[..., m, n]`` to ``[...]``."""
    return np.sqrt(gradients.squares(gradients.residual(G, P)) / gradients.squares(G))


def full_gradient(samples: np.ndarray, P: np.ndarray) -> float:
    """Estimates the relative residual of the full gradient from samples of it.

    All layers together give one number, each scaled to samples of norm one: in a single layer the
    full gradient may be a hundredth of the noise.

    Args:
      samples: gradients of batches at the same weights, ``[batches, layers, m, n]``.
      P: bases, ``[layers, m, r]``.
    """
    norms = gradients.squares(samples).mean(0)  # [layers]
    missed = np.sum(without_noise(gradients.residual(samples, P)) / norms)
    present = np.sum(without_noise(samples) / norms)
    # Both are unbiased and may fall below zero or in the wrong order by chance.
    return float(np.clip(missed / present, 0, 1)) ** 0.5


def noise(samples: np.ndarray) -> np.ndarray:
    """Returns the share of a sample's squared norm that is noise, ``1 - ||E G||^2 / E ||G||^2``."""
    return 1 - without_noise(samples) / gradients.squares(samples).mean(0)


def without_noise(samples: np.ndarray) -> np.ndarray:
    """Estimates ``||E G||^2`` without bias: the mean of ``<G_a, G_b>`` over pairs of samples."""
    count = len(samples)
    # ||sum G_a||^2 - sum ||G_a||^2 is the sum over all ordered pairs a != b.
    pairs = gradients.squares(samples.sum(0)) - gradients.squares(samples).sum(0)
    return pairs / (count * (count - 1))


def summary(values: Values) -> Summary:
    """Returns the mean and standard deviation over layers, by curve and kind."""
    return {
        curve: {
            kind: {
                "mean": layers.mean(-1).round(4).tolist(),
                "deviation": layers.std(-1).round(4).tolist(),
            }
            for kind, layers in by_kind.items()
        }
        for curve, by_kind in values.items()
    }


def overall(by_kind: dict[str, dict[str, list]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation over all matrices, ``[refreshes, offsets]`` each.

    All kinds have the same number of layers, so both follow from the kinds' own: the mean square
    over all matrices is the mean of the kinds' ``deviation^2 + mean^2``.
    """
    means = np.array([by_kind[kind]["mean"] for kind in KINDS])  # [kinds, refreshes, offsets]
    deviations = np.array([by_kind[kind]["deviation"] for kind in KINDS])
    mean = means.mean(0)
    square = (deviations**2 + means**2).mean(0)
    # Results are rounded to four digits, which may bring the difference below zero.
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def draw(config: Config, curves: Summary) -> Path:
    """Draws a panel per refresh over all matrices, and one per kind at the last refresh."""
    starts = range(0, config.base.steps, gradients.period(config.base))
    rows = len(starts) // 2 + 1
    figure, axes = plt.subplots(
        rows, 2, figsize=(8.6, 3.6 * rows), layout="constrained", sharey=True, squeeze=False
    )
    for i, (each, start) in enumerate(zip(axes.flat, starts, strict=False)):
        _refresh(each, config, curves, i)
        title = f"refresh at step {start}: mean, and band of one deviation"
        each.set_title(title, fontsize="medium")
    _kinds(axes.flat[len(starts)], config, curves["default"])
    axes.flat[len(starts)].set_title(
        f"default projector, refresh at step {starts[-1]}", fontsize="medium"
    )
    for each in axes.flat[: len(starts) + 1]:
        # Linear below one step and logarithmic above, so that the refresh (0) is on the axis.
        each.set_xscale("symlog", linthresh=1, linscale=0.4)
        # The labels of the last two offsets would touch: leave one out.
        labels = [*config.offsets[:-2], "", config.offsets[-1]]
        each.set_xticks(config.offsets, labels, fontsize="x-small")
        each.set(
            xlabel="steps since the refresh",
            xlim=(-0.3, gradients.period(config.base)),
            ylim=(0, 1),
        )
        each.grid(alpha=0.3)
    for empty in axes.flat[len(starts) + 1 :]:
        empty.set_axis_off()
    for row in axes:
        row[0].set_ylabel("residual / gradient")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return save(figure, config.out)


def _refresh(axes: Axes, config: Config, curves: Summary, i: int) -> None:
    for curve, (label, colour, line) in _STYLES.items():
        mean, deviation = (each[i] for each in overall(curves[curve]))
        axes.plot(config.offsets, mean, line, color=colour, label=label, markersize=4)
        if curve == "default":
            axes.fill_between(
                config.offsets, mean - deviation, mean + deviation, color=colour, alpha=0.15,
                linewidth=0,
            )  # fmt: skip
    other = overall(curves["other batches"])[0][i, 0]
    axes.plot(
        0, other, "*", color=COLOURS[4], markersize=14, label="default, other batches, same weights"
    )


def _kinds(axes: Axes, config: Config, by_kind: dict[str, dict[str, list]]) -> None:
    for kind, colour, marker in zip(KINDS, COLOURS, MARKERS, strict=True):
        axes.plot(
            config.offsets, by_kind[kind]["mean"][-1], color=colour, marker=marker, label=kind,
            markersize=4,
        )  # fmt: skip
    axes.legend(frameon=False, fontsize="x-small", ncols=4)


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
