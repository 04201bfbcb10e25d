"""Cases of N matrices in every layout, and runs of `low_rank` that record its draws and bases.

Test files compare such runs with ``tests/reference.py``, over several periods.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import gum_optax
from gum_optax import residuals
from tests import helpers

PERIODS = 3
# Chosen so that in every case some matrix is drawn in one period and undrawn in another.
KEY = 0

# Largest errors measured, relative to the largest entry: 4e-12 in float64, 1e-3 in float32, where
# Newton-Schulz multiplies the rounding of vanishing singular values by 3.4445^5 = 485.
FLOAT64, FLOAT32 = 1e-9, 5e-3


class Case(NamedTuple):
    """N matrices, at most gamma of them drawn, refreshed every K steps."""

    layout: str
    shape: str
    N: int
    gamma: int
    K: int
    rank: int

    @property
    def q(self) -> float:
        return min(self.gamma, self.N // 2) / self.N

    def compression(self, **parts: Any) -> gum_optax.LowRank:
        """The case as a `LowRank`, sampled unless another residual rule is given."""
        parts = {"residual": residuals.sampled(self.gamma), "key": KEY} | parts
        return gum_optax.LowRank(self.rank, self.K, **parts)


CASES = [
    Case("separate", "wide", 2, 1, 3, 2),
    Case("separate", "tall", 3, 1, 5, 3),
    Case("separate", "square", 4, 2, 1, 1),
    Case("separate", "tall", 6, 2, 3, 5),
    Case("stacked", "wide", 5, 2, 3, 2),
    Case("stacked", "square", 2, 1, 5, 4),
    Case("experts", "wide", 4, 1, 5, 3),
    Case("experts", "tall", 6, 2, 3, 2),
    Case("experts", "square", 4, 0, 1, 5),
]
SEPARATE, STACKED, EXPERTS = CASES[1], CASES[4], CASES[7]
SQUARE = CASES[5]


def label(value: Any) -> str:
    if isinstance(value, Case):
        return "-".join(map(str, value))
    return getattr(value, "__name__", str(value))


def each(*cases: Case) -> Any:
    return pytest.mark.parametrize("case", cases, ids=label)


class Run(NamedTuple):
    updates: np.ndarray  # [t, i, m, n]
    draws: list[set[int]]
    bases: list[np.ndarray]

    def sizes(self, case: Case) -> dict[str, Any]:
        """The options of the reference that make it draw and project as this run did."""
        drawn = {"q": case.q, "draws": self.draws}
        return {"rank": case.rank, "K": case.K, "bases": self.bases} | drawn


def gradients_of(case: Case, seed: int = 0) -> np.ndarray:
    return helpers.gradients(seed, PERIODS * case.K, case.N, *helpers.SHAPES[case.shape])


def run(
    tx: Any, case: Case, gradients: np.ndarray, dtype: Any = np.float64, params: Any = None
) -> Run:
    """Runs a transformation; per period, keeps the draw and the bases that it used."""
    double = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    name = helpers.group_name(case.layout)
    updates, draws, bases = [], [], []
    with double:
        trees = [helpers.pack(case.layout, np.asarray(G_t, dtype)) for G_t in gradients]
        params = None if params is None else helpers.pack(case.layout, np.asarray(params, dtype))
        for t, (update, state) in enumerate(helpers.run(tx, trees, params)):
            assert jax.tree.map(np.shape, update) == jax.tree.map(np.shape, trees[0])
            updates.append(helpers.unpack(update))
            draw = helpers.drawn(state.slots.get(name, []), case.N)
            basis = np.asarray(state.basis[name])
            basis = basis.reshape(-1, *basis.shape[-2:])  # Experts have an axis of their own.
            assert updates[-1].dtype == basis.dtype == dtype
            if t % case.K == 0:
                draws.append(draw)
                bases.append(basis)
            assert draw == draws[-1], "a draw holds for its period"
            np.testing.assert_array_equal(basis, bases[-1], "a basis holds for its period")
    return Run(np.stack(updates), draws, bases)


def assert_close(actual: np.ndarray, expected: Any, tolerance: float = FLOAT64) -> None:
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{error:.1e}"
