"""The paper's Figure 1 at a size for tests, and the claims of the committed result."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments.studies import counterexample
from experiments.studies.counterexample import Config

RESULT = Path(__file__).parents[3] / "experiments" / "results" / "counterexample.json"


class Run(NamedTuple):
    gaps: dict[str, np.ndarray]
    out: Path
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The program's own run, and what it found on its way."""
    out, found, printed = tmp_path_factory.mktemp("counterexample"), [], io.StringIO()
    honest = counterexample.run
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(counterexample, "run", lambda c: found.append(honest(c)) or found[0])
        assert (
            counterexample.main(
                ["--steps", "1000", "--seeds", "2", "--parts", "figure", "--out", str(out)]
            )
            == 0
        )
    return Run(found[0], out, printed.getvalue())


@pytest.fixture(scope="module")
def gaps(run) -> dict[str, np.ndarray]:
    return run.gaps


def test_galore_stays_where_it_started(gaps):
    # The projector sees the noise alone, so the signal's block never moves: exactly 1 was measured
    # on ten seeds, up to the rounding of Newton-Schulz.
    np.testing.assert_allclose(gaps["GaLore-Muon"], 1.0, atol=1e-3)


def test_golore_stays_until_it_projects_at_random(gaps):
    np.testing.assert_allclose(gaps["GoLore-Muon"][:, :500], 1.0, atol=1e-3)
    assert (gaps["GoLore-Muon"][:, -1] < 0.9).all()


@pytest.mark.parametrize("method", ["Muon", "GUM"])
def test_unbiased_methods_converge(gaps, method):
    assert (gaps[method][:, -1] < 1e-3).all()


def test_gap_is_the_difference_to_the_optimum():
    """Against f itself, in float64, at the point a plain gradient step reaches."""
    rng = np.random.default_rng(0)
    n, r = 20, 12
    d = rng.standard_normal((n - r, n - r))
    b = np.zeros((n, n))
    b[: n - r, : n - r] = d
    a = np.hstack([np.eye(n - r), np.zeros((n - r, r))])
    x = rng.standard_normal((n, n))
    f = 0.5 * np.sum((a @ x) ** 2) + np.sum(b * x)
    by_square = 0.5 * np.sum((x + b)[: n - r] ** 2)
    np.testing.assert_allclose(f + 0.5 * np.sum(d**2), by_square, rtol=1e-12)


def test_every_method_starts_at_gap_one(gaps):
    for values in gaps.values():
        np.testing.assert_array_equal(values[:, 0], 1.0)
        assert np.isfinite(values).all()


def test_committed_result_says_what_the_readme_says():
    final = json.loads(RESULT.read_text())["final_relative_gap"]
    assert len(final["GUM"]) >= 5
    assert max(final["GUM"]) < 1e-3
    assert min(final["GaLore-Muon"]) > 0.999
    assert max(final["Muon"]) < 1e-3


def test_writes_figure_and_result(run):
    assert (run.out / "counterexample.png").stat().st_size > 10_000
    written = json.loads((run.out / "counterexample.json").read_text())
    assert written["config"]["steps"] == 1000
    assert set(written["final_relative_gap"]) == {"Muon", "GaLore-Muon", "GoLore-Muon", "GUM"}
    assert written["final_relative_gap"]["GUM"] == run.gaps["GUM"][:, -1].tolist()
    assert "GUM" in run.printed


# Projectors of the noise's own rank, 12, are those of the run above.
@pytest.mark.parametrize(("rank", "moves"), [(8, False), (16, True)])
def test_galore_moves_where_the_projector_is_wider_than_the_noise(rank, moves):
    config = Config(steps=300, seeds=1, rank=rank)
    galore = counterexample.methods(config)["GaLore-Muon"]
    gap = counterexample.relative_gaps(galore, config)[0, -1]
    assert gap < 0.5 if moves else gap > 0.999
