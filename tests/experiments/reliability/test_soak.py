"""Hundreds of steps: nothing grows, is compiled again or becomes non-finite."""

import pytest

from experiments.reliability import soak


@pytest.mark.slow
@pytest.mark.parametrize("name", soak.optimizers(soak.Config()))
def test_a_few_hundred_steps_are_steady(name):
    every = len(soak.optimizers(soak.Config()))
    result = soak.soak(soak.Config(steps=300 * every, period=3, samples=30), name)
    # Memory of a process that other tests share says nothing over so few steps.
    assert soak.is_steady(result | {"kilobytes per 1000 steps": 0.0}), result
    first, last = result["loss, first and last sample"]
    assert last < first


def test_what_is_not_steady_is_noticed():
    steady = {
        "compilations": 1, "state bytes": [9], "live arrays": [3], "steps not finite": 0,
        "kilobytes per 1000 steps": 1.0,
    }  # fmt: skip
    assert soak.is_steady(steady)
    faults = {
        "compilations": 2, "state bytes": [9, 10], "live arrays": [3, 4], "steps not finite": 1,
        "kilobytes per 1000 steps": 100.0,
    }  # fmt: skip
    for name, value in faults.items():
        assert not soak.is_steady(steady | {name: value}), name
