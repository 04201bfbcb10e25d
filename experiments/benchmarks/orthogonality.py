"""The error of Newton-Schulz, by coefficients, initial scaling and number of steps.

Newton-Schulz steps are most of the cost of an update. A sequence of coefficients that is as
accurate with fewer steps would be cheaper, so all are tried on the momenta of GUM's slots during a
real run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import reporting
from experiments.benchmarks import bases
from experiments.benchmarks.settings import Config
from experiments.studies import gradients

# Amsel et al., The Polar Express, arXiv 2505.16932: their triples (a, b, c) with a safety factor of
# 1.01, which makes them (a / 1.01, b / 1.01**3, c / 1.01**5).
POLAR_EXPRESS = (
    (8.205160, -22.901935, 16.460725),
    (4.066395, -2.861154, 0.518400),
    (3.909595, -2.823352, 0.525037),
    (3.285564, -2.415302, 0.485294),
    (2.277873, -1.619822, 0.398481),
)  # fmt: skip
# Name -> number of steps -> options of optax, whose default coefficients are Muon's.
COEFFICIENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "Muon": lambda steps: {"ns_steps": steps},
    "Polar Express": lambda steps: {"ns_coeffs": POLAR_EXPRESS[:steps]},
}
SCALINGS = ("frobenius", "schatten", "aol")
STEPS = (5, 4)
AGES = (0, 10, 50)  # steps since the refresh, at which momentum restarts


def run(config: Config) -> None:
    """Trains, writes `orthogonality.json` and prints a table."""
    found = momenta(config)
    count = sum(map(len, found))
    rows = [
        {"coefficients": name, "scaling": scaling, "steps": steps}
        | _summary(errors(found, preconditioning=scaling, **options(steps)))
        for name, options in COEFFICIENTS.items()
        for scaling in SCALINGS
        for steps in STEPS
    ]
    reporting.write(config.out / "orthogonality.json", config, matrices=count, rows=rows)
    reporting.table(
        f"Relative distance from the polar factor, of {count} momenta of slots",
        ("coefficients", "scaling", "steps", "median", "max"),
        ((r["coefficients"], r["scaling"], r["steps"], r["median"], r["max"]) for r in rows),
    )


def momenta(config: Config) -> list[np.ndarray]:
    """Returns for each kind of matrix the momenta ``[N, m, n]`` of its slots, at all ages."""
    settings = bases.run_of(config)
    ages = [age for age in AGES if age < gradients.period(settings)]
    moments = gradients.along(settings, gradients.since_refresh(settings, ages))
    by_kind = [moment.slots for moment in moments]
    return [np.concatenate([each[kind] for each in by_kind]) for kind in by_kind[0]]


def errors(groups: Sequence[np.ndarray], **options: Any) -> np.ndarray:
    """Returns ``||Y - U V'|| / ||U V'||`` of matrices ``X = U S V'``, where Y is optax's result.

    Args:
      groups: arrays ``[N, m, n]``.
      **options: of ``optax.contrib.scale_by_muon``.

    Returns:
      One error for each matrix, in the order of the groups.
    """
    # Without momentum, optax's Muon is Newton-Schulz alone, preceded by the scaling.
    axes = [optax.contrib.MuonDimensionNumbers(1, 2)] * len(groups)
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=axes, **options
    )
    leaves = [jnp.asarray(group, jnp.float32) for group in groups]
    found = jax.jit(lambda x: muon.update(x, muon.init(x))[0])(leaves)
    relative = []
    for group, matrices in zip(groups, found, strict=True):
        U, _, Vt = np.linalg.svd(group, full_matrices=False)
        # ||U V'||^2 is the number of columns of U, min(m, n).
        off = gradients.squares(np.asarray(matrices, np.float64) - U @ Vt)
        relative.append(np.sqrt(off / U.shape[-1]))
    return np.concatenate(relative)


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "max": float(values.max())}
