"""Bayesian search on a known function, and its coordinates."""

import math
import statistics
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tinygp
from tinygp.kernels.distance import L2Distance

from experiments import trainer
from experiments.trainer import search, surrogate
from experiments.trainer.config import Config, change
from experiments.trainer.options import ConfigError

RANGES = {"size": (1e-4, 1.0), "ratio": (0.1, 10.0)}


def _bowl(point):
    """Least at 1e-2 and 3, in logarithms; above a size of 0.3 a run diverges."""
    if point["size"] > 0.3:
        return math.nan
    return math.log10(point["size"] / 1e-2) ** 2 + math.log10(point["ratio"] / 3) ** 2


def test_rate_times_scale_is_one_coordinate():
    """Runs of one size take steps of one length, whatever their scale."""
    base = change(Config(), optimizer="muon")
    for rms in (0.1, 0.2):
        scaled = change(base, consistent_rms=rms)
        run = search.at_size(scaled, 2e-3)
        assert run.learning_rate * rms == pytest.approx(2e-3)
    assert search.at_size(change(base, optimizer="adamw"), 2e-3).learning_rate == 2e-3


def test_without_tinygp_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinygp", None)
    monkeypatch.delitem(sys.modules, "experiments.trainer.surrogate", raising=False)
    monkeypatch.delattr(trainer, "surrogate", raising=False)
    with pytest.raises(ConfigError, match="`trials`: a search needs tinygp; pip install"):
        next(search.search(RANGES, _bowl, 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_search_finds_the_bowl_and_repeats_itself(seed):
    """In 12 runs: 0.023 at the worst measured, where a 3 x 3 grid of its range ends at 0.23."""
    first, again = (list(search.search(RANGES, _bowl, 12, seed)) for _ in range(2))
    assert [trial.point for trial in again] == [trial.point for trial in first]
    assert all(0.1 <= trial.point["ratio"] <= 10 for trial in first)
    assert min(trial.loss for trial in first if not math.isnan(trial.loss)) < 0.05


def test_points_far_above_the_others_count_as_bad_and_no_more():
    tamed = search._tamed([1.0, 2.0, 3.0, 1e9, math.nan, math.inf])
    assert tamed[3] == tamed[4] == tamed[5] == max(tamed)
    # The median of the finite losses is 2.5, so that the limit is 2.5 + 2 * 1.5.
    assert (tamed[3] - tamed[0]) / (tamed[1] - tamed[0]) == pytest.approx(4.5)
    assert list(search._tamed([math.nan] * 2)) == [0, 0]


def _symmetrized(coordinates, exchangeable, length=0.3):
    matern = tinygp.kernels.Matern52(length, distance=L2Distance())
    return surrogate.Symmetrized(matern, search._permutations(coordinates, exchangeable))


def test_a_symmetrized_kernel_knows_what_can_be_exchanged():
    """Coordinates a and c can, b cannot."""
    kernel = _symmetrized(["a", "b", "c"], [["a", "c"]])
    np.testing.assert_array_equal(kernel.permutations, [[0, 1, 2], [2, 1, 0]])
    x, y = np.random.default_rng(0).random((2, 3))
    for k in (kernel.mean, kernel.evaluate):
        assert k(x, y[[2, 1, 0]]) == pytest.approx(k(x, y))
        assert k(x, y) == pytest.approx(k(y, x))
        assert abs(k(x, y[[1, 0, 2]]) - k(x, y)) > 1e-3
    with jax.enable_x64(True):
        points: Any = np.random.default_rng(1).random((12, 3))
        assert np.linalg.eigvalsh(kernel(points, points)).min() > 0
    groups = search._permutations(list("abcd"), [["a", "b"], ["c", "d"]])
    assert sorted(map(tuple, groups)) == [(0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (1, 0, 3, 2)]


def test_a_symmetrized_kernel_by_hand():
    """Two coordinates that can be exchanged: k_G((0, 1), (0, 1)) = (1 + k(sqrt(2))) / 2."""
    kernel = _symmetrized(["a", "b"], [["a", "b"]])
    corner, other, middle = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    with jax.enable_x64(True):
        assert kernel.mean(corner, corner) == pytest.approx(0.5006420125, abs=1e-10)
        assert kernel.mean(corner, other) == pytest.approx(0.5006420125, abs=1e-10)
        assert kernel.mean(middle, middle) == 1
        assert kernel.evaluate(corner, corner) == kernel.evaluate(corner, other) == 1


def test_what_can_be_exchanged_is_found_sooner():
    """Three coordinates in any order, with as many trials."""
    ranges = dict.fromkeys("abc", (0.01, 10.0))

    def loss(point):
        found = sorted(math.log10(point[name]) for name in "abc")
        return sum((x - best) ** 2 for x, best in zip(found, (-1.5, -0.6, 0.7), strict=True))

    def best(**options):
        runs = [search.search(ranges, loss, 30, seed, **options) for seed in range(3)]
        return [min(trial.loss for trial in trials) for trials in runs]

    assert statistics.mean(best(exchangeable=[tuple("abc")])) < statistics.mean(best()) / 3


def test_only_equal_ranges_can_be_exchanged():
    with pytest.raises(ConfigError, match="`exchangeable`: the ranges of size, ratio differ"):
        next(search.search(RANGES, _bowl, 1, exchangeable=[("size", "ratio")]))
