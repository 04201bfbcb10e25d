"""Random trees, types and settings: nothing crashes unclearly, nothing drifts, the law holds."""

import pytest
from hypothesis import given, settings

from experiments import examples, fuzz
from gum_optax import by_role, projectors, samplers


# `python -m experiments.fuzz` runs many more.
@settings(max_examples=8)
@given(example=examples.examples())
def test_a_random_example(example):
    fuzz.check(example)


LAYERS = {"layers": [examples.Leaf((3, 5), "float32")] * 4}
OPTIONS = {"base": "identity", "rank": 2, "period": 2, "key": 0}


def an_example(**changes):
    options = {"stack_by": by_role, "projector": projectors.svd}
    parts = {"optimizer": "low_rank", "options": OPTIONS | options, "tree": LAYERS}
    return examples.Example(**(parts | {"size": "ordinary", "other_dtype": False} | changes))


@pytest.mark.slow
def test_the_check_notices_what_is_wrong(monkeypatch):
    assert fuzz.check(an_example(flaw=None))["checks of the law, by leaf"] == 4
    with pytest.raises(AssertionError, match="rank passed unnoticed"):
        fuzz.check(an_example(flaw="rank"))
    flawed = {"options": an_example(flaw=None).options | {"rank": 0}}
    with pytest.raises(AssertionError, match="not a clear error for None"):
        fuzz.check(an_example(flaw=None, **flawed))
    assert fuzz.check(an_example(flaw="rank", **flawed)) == {"refused with ValueError": 1}

    def misstated(run, runs, included):
        sampling = honest(run, runs, included)(4)._replace(probability=0.55)
        return lambda count: samplers.Sampling(*sampling)

    honest = fuzz._scripted_sampler
    monkeypatch.setattr(fuzz, "_scripted_sampler", misstated)
    with pytest.raises(AssertionError, match="the law"):
        fuzz.check(an_example(flaw=None))
