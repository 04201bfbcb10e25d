"""Random models: gradients compressed in the backward pass equal projections of full gradients."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings

from experiments.reliability import programs
from gum_optax import _taps
from tests.helpers import QUICK


def _check(model):
    with warnings.catch_warnings():
        # Of weights that are used elementwise, a full gradient exists for a moment.
        warnings.filterwarnings("ignore", ".*have uses other than dense products", UserWarning)
        programs.check(model, compiler_options=QUICK)


@settings(max_examples=1)
@given(model=programs.models(uses=2))
def test_a_random_model(model):
    _check(model)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(model=programs.models())
def test_many_random_models(model):
    _check(model)


@pytest.mark.slow
def test_the_check_notices_what_is_wrong(monkeypatch):
    use = programs.Use(kind="square", weight=1, wrap="plain", cast=False)
    model = programs.Model(uses=(use,), weights=2, rule="drop", seed=0)
    _check(model)
    as_tokens = _taps._as_tokens
    monkeypatch.setattr(_taps, "_as_tokens", lambda *args: as_tokens(*args)[::-1])
    with pytest.raises(AssertionError, match="differs by"):
        _check(model)
