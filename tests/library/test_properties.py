"""Random trees, types and settings: failures are clear errors, nothing drifts, the laws hold."""

import pytest
from hypothesis import given, settings

from experiments.reliability import fuzz, strategies
from gum_optax import by_role, projectors, residuals, samplers


# `python -m experiments.reliability.fuzz` runs many more, on larger trees and on empty ones, and op
# by op. A compiled update is one program; op by op it is a hundred, of which each new shape has its
# own.
@settings(max_examples=3)
@given(example=strategies.examples(parts_of_tree=2).filter(lambda example: example.tree))
def test_a_random_example(example):
    fuzz.check(example, compiled=True)


LAYERS = {"layers": [strategies.Leaf((3, 5), "float32")] * 4}
PARTS = {
    "method": "LowRank", "rank": 2, "period": 2, "key": 0, "group_by": by_role,
    "projector": projectors.svd, "residual": ("sampled", "1", "exclusive", "nothing"),
    "storage": "plain",
}  # fmt: skip


def an_example(*, flaw=None, **changes):
    return strategies.Example(
        optimizer="low_rank",
        options={"inner": "identity"},
        parts=PARTS | changes,
        tree=LAYERS,
        size="ordinary",
        other_dtype=False,
        flaw=flaw,
    )


@pytest.mark.slow
def test_the_check_notices_what_is_wrong(monkeypatch):
    counts = fuzz.check(an_example())
    assert counts["checks of the law, by leaf"] == 4
    assert counts["checks that no residual is lost, by leaf"] == 4
    with pytest.raises(AssertionError, match="rank passed unnoticed"):
        fuzz.check(an_example(flaw="rank"))
    with pytest.raises(AssertionError, match="not a clear error for None"):
        fuzz.check(an_example(rank=0))
    assert fuzz.check(an_example(rank=0, flaw="rank")) == {"refused with ValueError": 1}

    def misstated(run, runs, included):
        sampling = honest(run, runs, included)(4)._replace(probability=0.55)
        return lambda count: samplers.Sampling(*sampling)

    honest = fuzz._scripted_sampler
    with monkeypatch.context() as patch:
        patch.setattr(fuzz, "_scripted_sampler", misstated)
        with pytest.raises(AssertionError, match="the law"):
            fuzz.check(an_example())
    for rule, other in (("through", residuals.drop()), ("feedback", residuals.feedback(0.5))):
        with monkeypatch.context() as patch:
            patch.setattr(residuals, rule, lambda *_, other=other: other)
            with pytest.raises(AssertionError, match=rule):
                fuzz.check(an_example())


def test_the_check_notices_a_plan_and_a_warning_that_are_wrong():
    assert fuzz.check(an_example(rank=3))["accepted"] == 1  # uncompressed, so `init` warns
    tx = fuzz._estimator(an_example(), residuals.drop())
    params = strategies.arrays(LAYERS, "ordinary", seed=0)
    state, plan = tx.init(params), fuzz.gum_optax.memory_plan(tx, params)
    fuzz._check_plan(plan, state, warned=False)
    with pytest.raises(AssertionError, match="init warned: True"):
        fuzz._check_plan(plan, state, warned=True)
    with pytest.raises(AssertionError, match="bytes, the state has"):
        fuzz._check_plan(plan, (state, params), warned=False)
