"""``optax.inject_hyperparams``: numbers are injected, a compression passes through unchanged."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import LowRank, dimension_numbers, residuals, samplers, storages
from tests.helpers import described, first_coordinates, jit_once
from tests.tables import PERIOD, PROJECTED, SIMPLE, assert_close, parameters, run

_MATRIX = dimension_numbers.MuonDimensionNumbers(-2, -1)
_GUM_NUMBERS = {"learning_rate", "beta", "weight_decay"}
_ADAMW_NUMBERS = {"learning_rate", "b1", "b2", "eps", "weight_decay"}


def _decays(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


# Options of every kind: numbers, functions, trees and prefixes of trees, other transformations;
# arguments that `inject_hyperparams` must be told of, as it takes any function for a schedule; and
# the numbers that it finds.
INJECTED = {
    "gum": (
        gum_optax.gum,
        LowRank(
            rank=lambda group: 2,
            period=PERIOD,
            residual=residuals.sampled(samplers.fixed_size(1)),
            projector=SIMPLE.projector,
            group_by=gum_optax.by_shape,
            key=3,
        ),
        {
            "beta": 0.9,
            "weight_decay": 0.1,
            "weight_decay_mask": _decays,
            "weight_dimension_numbers": lambda params: dimension_numbers.default(params),
            "consistent_rms": 0.2,
            "fallback_learning_rate": 0.05,
        },
        ("weight_decay_mask", "weight_dimension_numbers"),
        {*_GUM_NUMBERS, "consistent_rms", "fallback_learning_rate"},
    ),
    "adamw, galore": (
        gum_optax.adamw,
        PROJECTED,
        {
            "b1": 0.8,
            "fallback_learning_rate": optax.linear_schedule(0.2, 0.1, 3),
            "weight_dimension_numbers": {
                "layers": _MATRIX,
                "single": _MATRIX,
                "bias": None,
                "embed": _MATRIX,
            },
        },
        (),
        {*_ADAMW_NUMBERS, "fallback_learning_rate"},
    ),
    "adamw, golore": (
        gum_optax.adamw,
        gum_optax.golore(
            2, PERIOD, switch_step=2, before=first_coordinates, after=SIMPLE.projector
        ),
        {},
        (),
        _ADAMW_NUMBERS,
    ),
    "adamw": (
        gum_optax.adamw,
        dataclasses.replace(SIMPLE, storage=storages.cast(jnp.float32)),
        {
            "b1": 0.8,
            "b2": 0.9,
            "weight_decay": 0.1,
            "weight_decay_mask": {"layers": True, "single": False, "bias": False, "embed": True},
            "fallback": optax.sgd(0.1),
        },
        (),
        _ADAMW_NUMBERS,
    ),
}


def _injected(case):
    """The optimizer of a case with its numbers injected, and without."""
    factory, compression, options, static_args, _ = INJECTED[case]
    learning_rate = 0.1 if case == "adamw, galore" else optax.linear_schedule(0.1, 0.0, 10)
    inject = optax.inject_hyperparams(factory, static_args=static_args)
    return inject(learning_rate, compression, **options), factory(
        learning_rate, compression, **options
    )


@pytest.mark.parametrize("case", INJECTED)
def test_numbers_and_they_alone_are_injected(case):
    params, (injected, _) = parameters("gum"), _injected(case)
    state = jax.eval_shape(injected.init, params)
    _, after = jax.eval_shape(injected.update, params, state, params)
    assert set(state.hyperparams) == INJECTED[case][-1]
    assert described(after) == described(state)


# GoLore's options are those of the others, and its compression passes through as theirs do.
@pytest.mark.parametrize("case", [case for case in INJECTED if case != "adamw, golore"])
def test_inject_hyperparams(case):
    params, (injected, plain) = parameters("gum"), _injected(case)
    got, state = run(jit_once(injected.update), jax.jit(injected.init)(params), "gum")
    expected, final = run(jit_once(plain.update), jax.jit(plain.init)(params), "gum")
    # A rate and a beta of float32 arrays in place of Python floats.
    assert_close(got, expected)
    assert_close(*(optax.tree.get(s, "LowRankState") for s in (state.inner_state, final)))


def test_injected_hyperparameters_can_be_set_between_steps():
    params = parameters("gum")
    # A direction that compiles at once: `gum` and `adamw` hand their rates to `for_matrices`.
    make = optax.inject_hyperparams(gum_optax.for_matrices)
    injected = make(optax.scale_by_sign(), 0.1, weight_decay=0.0)
    update, state = jit_once(injected.update), injected.init(params)
    full, _ = update(params, state, params)
    rate = state.hyperparams["learning_rate"]
    state.hyperparams["learning_rate"] = jnp.full_like(rate, 0.05)
    half, _ = update(params, state, params)
    assert_close(jax.tree.map(lambda u: np.float32(0.5) * np.asarray(u), full), half)


@pytest.mark.parametrize("kind", ["a number", "a schedule"])
def test_an_injected_rate_of_the_fallback_moves_the_fallback_alone(kind):
    """A schedule is read at its own step, and a number can be set between two steps."""
    params = parameters("gum")
    rate = 0.1 if kind == "a number" else optax.piecewise_constant_schedule(0.1, {1: 0.0})
    make = optax.inject_hyperparams(gum_optax.for_matrices)
    injected = make(optax.scale_by_sign(), 0.1, fallback_learning_rate=rate)
    update, state = jit_once(injected.update), jax.jit(injected.init)(params)
    first, state = update(params, state, params)
    if kind == "a number":
        old = state.hyperparams["fallback_learning_rate"]
        state.hyperparams["fallback_learning_rate"] = jnp.zeros_like(old)
    second, _ = update(params, state, params)
    for name in ("bias", "embed"):
        assert np.asarray(first[name]).any() and not np.asarray(second[name]).any()
    others = jax.tree.leaves((second["layers"], second["single"]))
    assert all(np.asarray(u).any() for u in others)


WITHOUT_RATE = {
    "low_rank": (gum_optax.low_rank, {"inner": optax.scale_by_adam(), "compression": SIMPLE}, ()),
    "scale_by_gum": (
        gum_optax.scale_by_gum,
        {"beta": optax.linear_schedule(0.5, 0.9, 4), "compression": SIMPLE},
        {"beta"},
    ),
    "for_matrices": (
        gum_optax.for_matrices,
        {"direction": optax.scale_by_sign(), "learning_rate": 0.1},
        {"learning_rate", "weight_decay"},
    ),
}


@pytest.mark.parametrize("case", WITHOUT_RATE)
def test_inject_hyperparams_on_transformations_that_are_no_optimizers(case):
    factory, options, numbers = WITHOUT_RATE[case]
    params = parameters("gum" if case == "for_matrices" else case)
    injected = optax.inject_hyperparams(factory)(**options)
    name = "gum" if case == "for_matrices" else case
    updates, state = run(jit_once(injected.update), injected.init(params), name)
    assert set(state.hyperparams) == set(numbers)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (gum_optax.gum, {"beta": 0.9, "consistent_rms": 0.2, "fallback_learning_rate": 0.05}),
        (gum_optax.adamw, {"b1": 0.8, "b2": 0.9, "fallback_learning_rate": 0.05}),
    ],
    ids=["gum", "adamw"],
)
def test_inject_hyperparams_on_explicit_meshes(factory, options):
    """There a traced beta travels as an extra argument; nothing may mix types of two modes."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    placed = NamedSharding(mesh, P("fsdp", "tensor"))
    rate = optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(factory)(rate, SIMPLE, weight_decay=0.1, **options)
    shapes = {"layers": [{"w": (4, 8)}, {"w": (4, 8)}], "embed": (6, 4)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    # Types decide, so tracing is enough; numbers: test_state_shardings.py.
    with jax.set_mesh(mesh):
        state = jax.eval_shape(injected.init, params)
        updates, after = jax.eval_shape(injected.update, params, state, params)
    assert set(state.hyperparams) == {"learning_rate", "weight_decay", *options} | (
        {"eps"} if factory is gum_optax.adamw else set()
    )
    assert described(after) == described(state)
    for update in jax.tree.leaves(updates):
        assert update.sharding.spec == placed.spec
