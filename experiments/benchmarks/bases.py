"""The energy of gradients that GUM's bases capture during a real run.

Each refresh starts from the previous basis, so a projector can only be judged along a run. At each
refresh, the energy ``||P'G||^2`` under the new basis is divided by the energy under the best
subspace of the same rank.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments import reporting
from experiments.benchmarks.settings import Config
from experiments.studies import gradients
from experiments.studies.gradients import Moment
from experiments.trainer.config import Config as Run
from experiments.trainer.methods import Gum

Captured = dict[str, np.ndarray]  # kind -> the share of each matrix, [N]


def run(config: Config) -> None:
    """Trains, writes `projectors.json` and prints a table."""
    found = dict(refreshes(config))
    # Two summaries of every refresh: of each kind of matrix, and of all matrices together.
    rows = [
        {"step": step, "matrix": kind} | _summary(values)
        for step, kinds in found.items()
        for kind, values in kinds.items()
    ]
    together = [
        {"step": step} | _summary(np.concatenate(list(kinds.values())))
        for step, kinds in found.items()
    ]
    reporting.write(config.out / "projectors.json", config, by_step=together, by_matrix=rows)
    reporting.table(
        "Captured energy over that of the best subspace",
        ("step", "min", "median", "matrices"),
        ((row["step"], row["min"], row["median"], row["matrices"]) for row in together),
    )


def refreshes(config: Config) -> Iterator[tuple[int, Captured]]:
    """Trains, and yields at every refresh the step and each matrix's share by kind."""
    settings = run_of(config)
    steps = range(0, settings.steps + 1, gradients.period(settings))
    for moment in gradients.along(settings, steps):
        yield moment.step, captured(moment)


def run_of(config: Config) -> Run:
    """Returns the configuration of the run of GUM."""
    preset: Any = config.projector_preset
    return Run(
        preset=preset, steps=config.projector_steps, seed=config.seed,
        optimizer=Gum(
            period=config.projector_period, rank=config.projector_rank,
            full_rank_layers=config.full_rank_layers,
        ), corpus=config.corpus, cache_dir=config.cache_dir,
    )  # fmt: skip


def captured(moment: Moment) -> Captured:
    """Returns by kind ``||P'G||^2`` of each matrix over the best subspace's of the same rank."""
    return {
        kind: np.array([share(G, P) for G, P in zip(moment.gradients[kind], basis, strict=True)])
        for kind, basis in moment.bases.items()
    }


def share(gradient: Any, basis: Any) -> float:
    """Returns ``||P'G||^2`` over the sum of the r largest eigenvalues of ``G G'``, in float64."""
    G, P = gradients.wide(gradient), np.asarray(basis, np.float64)  # [m, n] and [m, r]
    # `eigvalsh` sorts in ascending order: the last r.
    best = np.linalg.eigvalsh(G @ G.T)[-P.shape[1] :].sum()
    return float(np.sum((P.T @ G) ** 2) / best)


def _summary(values: np.ndarray) -> dict[str, Any]:
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "matrices": len(values),
    }
