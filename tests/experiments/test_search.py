"""Bayesian search on a known function, and its coordinates."""

import math

import pytest

from experiments.trainer import search
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


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match="`trials`: a search needs Optuna; pip install"):
        next(search.search(RANGES, _bowl, 1))


def test_a_search_finds_the_bowl_and_repeats_itself():
    pytest.importorskip("optuna")
    first = list(search.search(RANGES, _bowl, 40))
    again = list(search.search(RANGES, _bowl, 40))
    assert [trial.point for trial in again] == [trial.point for trial in first]
    assert all(0.1 <= trial.point["ratio"] <= 10 for trial in first)
    finite = [trial.loss for trial in first if not math.isnan(trial.loss)]
    assert min(finite) < 0.1
    # Later trials are better than those at random.
    assert sum(finite[-10:]) < sum(finite[:10])
