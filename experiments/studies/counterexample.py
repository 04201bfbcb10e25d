"""The counterexample on which GaLore stands still and GUM converges (the paper's Figure 1).

Minimize ``f(X) = 1/2 ||A X||_F^2 + <B, X>`` over n x n matrices, with ``A = [I_{n-r} 0]`` and
``B = blockdiag(D, 0)``, from gradients with noise ``xi sigma C``, where ``C = blockdiag(0, I_r)``
and ``xi`` is +1 or -1 with equal probability. The noise is larger than the signal and has rank r,
so the rank-r projector spans the noise and nothing else. The signal lies entirely in the
complement, which GaLore drops.

`python -m experiments.studies.counterexample` draws the figure, with q = 0.5, K = 20 and projectors
of the rank of the noise. It then sweeps q and K for GUM, and the rank for GUM and GaLore-Muon. All
runs follow one rule for the learning rate: four times the smallest rate that reaches the optimum
even if only a fraction q of the steps move towards it. The rate therefore grows as q shrinks.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes

import gum_optax
from experiments import reporting
from experiments.reporting import COLOURS, MARKERS, STYLES, save
from experiments.trainer import cli
from gum_optax import projectors, residuals, samplers

PROGRAM = "experiments.studies.counterexample"
_FLOOR = 1e-12  # the sweep's figure draws smaller gaps, and zero, at this height


@dataclasses.dataclass(frozen=True)
class Config:
    """GUM and its relatives on the paper's counterexample; the defaults are the paper's sizes."""

    #: figure: compare all methods, as in the paper; sweep: vary q, K and the projectors' rank.
    parts: tuple[Literal["figure", "sweep"], ...] = ("figure", "sweep")
    #: Side of the matrix.
    n: int = 20
    #: Rank of the noise.
    r: int = 12
    #: Rank of the projectors. None: the rank of the noise.
    rank: int | None = None
    #: Scale of the noise; the entries of the signal are of order one.
    sigma: float = 100.0
    #: Optimizer steps.
    steps: int = 4000
    #: K: steps between refreshes.
    period: int = 20
    #: q: GUM's probability that a period is full-rank.
    probability: float = 0.5
    #: Number of seeds 0, 1, ..., each of which fixes the problem, the noise and the draws.
    seeds: int = 10
    #: sweep: probabilities q of a full-rank period.
    probabilities: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    #: sweep: periods K, each with every q.
    periods: tuple[int, ...] = (5, 20, 100, 500)
    #: sweep: ranks of the projectors, at the q and K of `probability` and `period`.
    ranks: tuple[int, ...] = (4, 8, 12, 16)
    #: Directory of the figure and its JSON file; the sweep's go into its folder `studies`.
    out: Path = Path("experiments/results")

    @property
    def projector_rank(self) -> int:
        """The number of columns of every basis."""
        return self.r if self.rank is None else self.rank

    @property
    def learning_rate(self) -> float:
        """The peak rate of all methods: four times the smallest rate that reaches the optimum.

        An orthogonalized update moves each singular direction by about the learning rate, so under
        linear decay a direction travels ``learning_rate * steps / 2``. The optimum is ``-D``, whose
        spectral norm is about ``2 sqrt(n - r)`` at most, and GUM moves towards it in a fraction q
        of the steps.
        """
        # 4 x distance / (fraction of steps x distance travelled at rate 1)
        return 4 * 2 * (self.n - self.r) ** 0.5 / (self.probability * self.steps / 2)


def methods(config: Config) -> dict[str, Callable[[jax.Array], optax.GradientTransformation]]:
    """Returns the methods compared: by name, a function from a random key to a transformation.

    The transformations have no learning rate; `relative_gap` applies the same one to all.
    """

    def low_rank_muon(
        residual: residuals.Residual, projector: Any = projectors.svd
    ) -> Callable[[jax.Array], optax.GradientTransformationExtraArgs]:
        return lambda key: gum_optax.scale_by_gum(
            gum_optax.LowRank(
                config.projector_rank,
                config.period,
                residual=residual,
                projector=projector,
                key=key,
            )
        )

    # GoLore projects on random subspaces after half of the run, when the gradient is mostly noise.
    golore = projectors.switch(projectors.svd, projectors.random_orthonormal, config.steps // 2)
    return {
        "Muon": lambda key: optax.contrib.scale_by_muon(nesterov=False),
        "GaLore-Muon": low_rank_muon(residuals.drop()),
        "GoLore-Muon": low_rank_muon(residuals.drop(), golore),
        "GUM": low_rank_muon(residuals.sampled(samplers.bernoulli(config.probability))),
    }


def relative_gap(
    direction: Callable[[jax.Array], optax.GradientTransformation], config: Config, seed: jax.Array
) -> jax.Array:
    """Runs one method on one seed.

    Returns:
      ``[steps + 1]``: ``(f(X_t) - f*) / (f(X_0) - f*)``, with X_0 = 0 and f* = -1/2 ||D||^2.
    """
    # 1. The problem of this seed. D fills the signal's rows and columns, C the remaining diagonal.
    signal = config.n - config.r
    problem_key, noise_key, draw_key = jax.random.split(jax.random.key(seed), 3)
    d = jax.random.normal(problem_key, (signal, signal))
    b = jnp.zeros((config.n, config.n)).at[:signal, :signal].set(d)
    c = jnp.diag(jnp.arange(config.n) >= signal).astype(jnp.float32)

    def f(x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(x[:signal] ** 2) + jnp.sum(b * x)

    def gap(x: Any) -> jax.Array:
        # f(X) - f* = 1/2 ||A X + [D 0]||^2 by completing the square. In float32 the difference of
        # f(X) and f* has an error of about 1e-7 of the start, and showed negative gaps.
        return 0.5 * jnp.sum((x + b)[:signal] ** 2)

    # 2. The optimizer, with a linear decay to zero over the run.
    tx = optax.chain(
        direction(draw_key),
        optax.scale_by_learning_rate(
            optax.linear_schedule(config.learning_rate, 0.0, config.steps)
        ),
    )

    # 3. The run: one scan over the signs of the noise, `[steps]`.
    def step(carry: Any, noise: jax.Array) -> tuple[Any, jax.Array]:
        x, state = carry
        updates, state = tx.update(jax.grad(f)(x) + noise * config.sigma * c, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), gap(x)

    x = jnp.zeros((config.n, config.n))
    signs = jax.random.rademacher(noise_key, (config.steps,), jnp.float32)
    _, values = jax.lax.scan(step, (x, tx.init(x)), signs)
    return jnp.concatenate([gap(x)[None], values]) / gap(x)


def run(config: Config) -> dict[str, np.ndarray]:
    """Runs all methods on all seeds; returns by method the relative gaps ``[seeds, steps + 1]``."""
    return {name: relative_gaps(direction, config) for name, direction in methods(config).items()}


def relative_gaps(
    direction: Callable[[jax.Array], optax.GradientTransformation], config: Config
) -> np.ndarray:
    """Runs one method on all seeds; returns relative gaps ``[seeds, steps + 1]``."""
    # lax.map instead of vmap, which turns the optimizer's conditionals into selections that compute
    # both branches: bases would be refreshed at every step.
    every = jax.jit(partial(jax.lax.map, partial(relative_gap, direction, config)))
    return np.asarray(every(jnp.arange(config.seeds)))


def plot(gaps: dict[str, np.ndarray], config: Config, path: Path) -> None:
    """Draws the median over seeds and the band from minimum to maximum."""
    # The line styles tell the methods apart in black and white.
    lines = {"Muon": ":", "GaLore-Muon": "--", "GoLore-Muon": "-.", "GUM": "-"}
    colours = {style.name: style.colour for style in STYLES.values()}
    figure, axes = plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)
    steps = np.arange(config.steps + 1)
    for name, values in gaps.items():
        colour, line = colours[name], lines[name]
        values = np.maximum(values, 1e-30)  # A gap of exactly zero has no logarithm.
        axes.plot(steps, np.median(values, 0), line, color=colour, label=name, linewidth=2)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="gap to the optimum / gap at the start",
        xlim=(0, config.steps),
        ylim=(1e-9, 3),
    )
    axes.set_title(
        "GaLore-Muon stays where it started, GUM converges\n"
        f"median and range over {config.seeds} seeds",
        fontsize=11,
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Runs the parts in `parts`, each of which writes its results and figure; returns 0."""
    config = cli.parse(Config, PROGRAM, arguments)
    for part in config.parts:
        PARTS[part](config)
    return 0


def figure(config: Config) -> None:
    """Reproduces Figure 1 with all methods and seeds; writes and prints the final gaps."""
    start = time.perf_counter()
    gaps = run(config)
    config.out.mkdir(parents=True, exist_ok=True)
    plot(gaps, config, config.out / "counterexample.png")
    reporting.write(
        config.out / "counterexample.json",
        config,
        learning_rate=config.learning_rate,
        final_relative_gap={name: values[:, -1].tolist() for name, values in gaps.items()},
    )
    print(f"{'method':<12}  final gap / gap at the start: median (min to max)")
    for name, values in gaps.items():
        last = values[:, -1]
        print(f"{name:<12}  {np.median(last):.2e} ({last.min():.2e} to {last.max():.2e})")
    print(
        f"{config.seeds} seeds in {time.perf_counter() - start:.0f} s; "
        f"figure: {config.out / 'counterexample.png'}"
    )


def sweep(config: Config) -> None:
    """Sweeps q and K for GUM, and the rank of the projectors for GUM and GaLore-Muon."""
    path = config.out / "studies" / "counterexample.json"
    # q and K vary at one rank of the projectors; the rank varies at one q and K.
    draws, ranks = by_draw(config), by_rank(config)
    reporting.write(path, config, draws=draws, ranks=ranks)
    head = ("method", "q", "K", "rank", "median", "least", "largest")
    for title, rows in (("q and K", draws), ("the rank of projectors", ranks)):
        reporting.table(
            f"Final gap / gap at the start by {title}, {config.seeds} seeds",
            head,
            ([row[name] for name in head] for row in rows),
        )
    print(f"\nresults: {path}; figure: {draw(config, draws, ranks, path)}")


def by_draw(config: Config) -> list[dict[str, Any]]:
    """Runs GUM with every pair of q and K."""
    return [
        final("GUM", dataclasses.replace(config, probability=q, period=period))
        for q in config.probabilities
        for period in config.periods
    ]


def by_rank(config: Config) -> list[dict[str, Any]]:
    """Runs GUM and GaLore-Muon with every rank."""
    return [
        final(method, dataclasses.replace(config, rank=rank))
        for method in ("GUM", "GaLore-Muon")
        for rank in config.ranks
    ]


def final(method: str, config: Config) -> dict[str, Any]:
    """Returns the last relative gaps of one method and setting: all seeds, median and range."""
    direction = methods(config)[method]
    gaps = relative_gaps(direction, config)[:, -1]
    return {
        "method": method,
        "q": config.probability,
        "K": config.period,
        "rank": config.projector_rank,
        "learning_rate": config.learning_rate,
        "median": float(np.median(gaps)),
        "least": float(gaps.min()),
        "largest": float(gaps.max()),
        "gaps": gaps.tolist(),
    }


def draw(
    config: Config, draws: list[dict[str, Any]], ranks: list[dict[str, Any]], path: Path
) -> Path:
    """Draws the median and range of the final gap: against K for each q, and against the rank."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.6, 4.0), layout="constrained", sharey=True
    )
    for i, q in enumerate(config.probabilities):
        # Each series is shifted by 4 % on the logarithmic axis, so that error bars do not overlap.
        _series(left, [row for row in draws if row["q"] == q], "K", f"q = {q:g}", i, apart=1.04)
    for i, method in enumerate(("GUM", "GaLore-Muon")):
        _series(right, [row for row in ranks if row["method"] == method], "rank", method, 4 * i)
    left.set(xlabel="period K", ylabel="final gap / gap at the start", xscale="log")
    # Label the periods of the sweep only; a logarithmic axis would add ticks of its own.
    left.set_xticks(config.periods, config.periods, minor=False)
    left.set_xticks([], minor=True)
    left.set(yscale="log", ylim=(_FLOOR / 3, 9))
    left.set_title("GUM: median and range over seeds", fontsize="medium")
    # GaLore-Muon needs a rank above this line: a basis as wide as the noise holds no signal.
    right.axvline(
        config.r, color=COLOURS[-1], linewidth=1, linestyle=":", label="rank of the noise"
    )
    right.set(xlabel="rank of the projectors")
    right.set_xticks(config.ranks)
    right.set_title(
        f"q = {config.probability:g}, K = {config.period} (zero is drawn at {_FLOOR:g})",
        fontsize="medium",
    )
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.3)
    return save(figure, path)


def _series(
    axes: Axes, rows: list[dict[str, Any]], x: str, label: str, i: int, apart: float = 1.0
) -> None:
    """Draws medians with ranges; series i is shifted along x by `apart` to the power i - 2."""
    places = [row[x] * apart ** (i - 2) for row in rows]
    # A gap of zero, which runs do reach, has no logarithm: raise it to the floor of the figure.
    least, middle, largest = (
        np.maximum([row[name] for row in rows], _FLOOR) for name in ("least", "median", "largest")
    )
    axes.errorbar(
        places, middle, yerr=(middle - least, largest - middle), fmt=f"{MARKERS[i]}-",
        color=COLOURS[i], label=label, capsize=2, markersize=4, linewidth=1,
    )  # fmt: skip


PARTS = {"figure": figure, "sweep": sweep}


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
