"""``optax.inject_hyperparams`` without ``static_args``: what is structural stays what it is."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import dimension_numbers, projectors, samplers
from tests.conformance import PERIOD, SIMPLE, STRUCTURE, assert_close, parameters, run

_MATRIX = dimension_numbers.MuonDimensionNumbers(-2, -1)
# Each of the structural arguments is in one of these: numbers, functions, trees, prefixes of trees.
INJECTED = {
    "gum": (gum_optax.gum, {
        "rank": 2, "period": PERIOD, "full_rank_layers": 1, "beta": 0.9, "weight_decay": 0.1,
        "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        "weight_dimension_numbers": lambda p: dimension_numbers.default(p),
        "projector": projectors.random_orthonormal, "sampler": samplers.fixed_size(1),
        "stack_by": gum_optax.by_shape, "consistent_rms": 0.2, "key": 3,
    }),
    "galore": (gum_optax.galore, {
        "rank": 2, "period": PERIOD, "scale": 0.25, "projector": projectors.svd,
        "inner": optax.scale_by_adam(b1=0.8),
        "weight_dimension_numbers": {
            "layers": _MATRIX, "single": _MATRIX, "bias": None, "embed": _MATRIX,
        },
    }),
    "golore": (gum_optax.golore, {"rank": 2, "period": PERIOD, "switch_step": 2}),
    "unbiased_adamw": (gum_optax.unbiased_adamw, {
        "rank": 2, "period": PERIOD, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1,
        "weight_decay_mask": {"layers": True, "single": False, "bias": False, "embed": True},
        "fallback": optax.sgd(0.1), "momentum_dtype": jnp.float32,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", INJECTED)
def test_inject_hyperparams_without_static_args(case):
    factory, options = INJECTED[case]
    params = parameters("gum")
    learning_rate = 0.1 if case == "galore" else optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(factory)(learning_rate, **options)
    plain = factory(learning_rate, **options)
    update = jax.jit(injected.update)
    got, state = run(update, injected.init(params), "gum")
    expected, final = run(jax.jit(plain.update), plain.init(params), "gum")
    # A rate and a beta of float32 arrays in place of Python floats.
    assert_close(got, expected)
    assert_close(*(optax.tree.get(s, "LowRankState") for s in (state.inner_state, final)))
    assert "learning_rate" in state.hyperparams
    assert not set(state.hyperparams) & {"rank", "period", "key", "full_rank_layers", "switch_step"}
    assert update._cache_size() == 1


def test_injected_hyperparameters_can_be_set_between_steps():
    params = parameters("gum")
    injected = optax.inject_hyperparams(gum_optax.gum)(0.1, rank=2, weight_decay=0.0)
    update = jax.jit(injected.update)
    state = injected.init(params)
    full, _ = update(params, state, params)
    rate = state.hyperparams["learning_rate"]
    state.hyperparams["learning_rate"] = jnp.full_like(rate, 0.05)
    half, _ = update(params, state, params)
    assert update._cache_size() == 1
    assert_close(jax.tree.map(lambda u: 0.5 * u, full), half)


@pytest.mark.parametrize("case", ["low_rank", "scale_by_gum"])
def test_inject_hyperparams_on_transformations_without_rate(case):
    factory, options = {
        "low_rank": (gum_optax.low_rank, {"inner": optax.scale_by_adam(), **SIMPLE}),
        "scale_by_gum": (gum_optax.scale_by_gum, {"beta": optax.linear_schedule(0.5, 0.9, 4),
                                                  **STRUCTURE}),
    }[case]  # fmt: skip
    params = parameters(case)
    injected = optax.inject_hyperparams(factory)(**options)
    updates, state = run(jax.jit(injected.update), injected.init(params), case)
    assert set(state.hyperparams) == ({"beta", "eps"} if case == "scale_by_gum" else set())
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
