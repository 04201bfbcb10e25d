"""Bad input fails at once, and the message names the parameter, the value and the reason."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import projectors, restarts, samplers

NAN, INF = float("nan"), float("inf")
MuonDims = optax.contrib.MuonDimensionNumbers

low_rank = functools.partial(gum_optax.low_rank, optax.identity(), rank=2, period=3)
gum = functools.partial(gum_optax.gum, 0.1)
galore = functools.partial(gum_optax.galore, 0.1)
golore = functools.partial(gum_optax.golore, 0.1, switch_step=5)
unbiased_adamw = functools.partial(gum_optax.unbiased_adamw, 0.1)
scale_by_gum = gum_optax.scale_by_gum
ALIASES = [gum, galore, golore, unbiased_adamw]
ALL = [low_rank, scale_by_gum, *ALIASES]

# parameter -> factories that take it, and values that cannot work.
NOT_POSITIVE = [0, -1, 1.5, True, "8", None, NAN, 2.0, jnp.float32(3)]
NOT_COUNT = [-1, 1.5, True, "2", None]
NOT_NUMBER = [-1, -1e-9, NAN, INF, "0.1", [0.1, 0.2]]
NOT_DECAY = [*NOT_NUMBER, 1, 1.0, 1.5, None]
NOT_FUNCTION = ["svd", 3, 1.0]
BAD_VALUES = {
    "rank": (ALL, NOT_POSITIVE),
    "period": (ALL, NOT_POSITIVE),
    "full_rank_layers": ([scale_by_gum, gum, unbiased_adamw], NOT_COUNT),
    "learning_rate": (
        [gum_optax.gum, gum_optax.galore, gum_optax.unbiased_adamw,
         functools.partial(gum_optax.golore, switch_step=5)],
        [*NOT_NUMBER, None],
    ),
    "weight_decay": (ALIASES, [*NOT_NUMBER, None]),
    "beta": ([scale_by_gum, gum], NOT_DECAY),
    "eps": ([scale_by_gum, gum, unbiased_adamw], [*NOT_NUMBER, None]),
    "b1": ([unbiased_adamw], NOT_DECAY),
    "b2": ([unbiased_adamw], NOT_DECAY),
    "consistent_rms": ([gum], NOT_NUMBER),
    "scale": ([galore, golore], [*NOT_NUMBER, None]),
    "switch_step": ([golore], NOT_COUNT),
    "projector": ([low_rank, scale_by_gum, gum, galore, unbiased_adamw], [*NOT_FUNCTION, None]),
    "sampler": ([scale_by_gum, gum, unbiased_adamw], NOT_FUNCTION),
    "stack_by": (ALL, [*NOT_FUNCTION, None]),
    "fallback": (ALIASES, [0.1, "adam", optax.adam, (optax.adam(0.1).init,)]),
    "momentum_dtype": (ALL, ["int32", jnp.int32, bool, jnp.complex64, "bogus", 3.0]),
    "key": (ALL, [1.5, None, "0", True, jnp.zeros(3, jnp.uint32), jnp.zeros(2, jnp.int32)]),
}  # fmt: skip


def _value_id(value):
    # Without addresses: parallel workers must collect equal names.
    return getattr(value, "__name__", repr(value).split(" at 0x")[0])[:30]


@pytest.mark.parametrize(
    ("name", "factory", "value"),
    [
        pytest.param(name, factory, value, id=f"{name}-{i}-{_value_id(value)}")
        for name, (factories, values) in BAD_VALUES.items()
        for i, factory in enumerate(factories)
        for value in values
    ],
)
def test_bad_value(name, factory, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must") as error:
        factory(**{name: value})
    if isinstance(value, int | float | str) or value is None:
        assert str(value) in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("inner", [None, 0.1, "adam", optax.adam], ids=_value_id)
def test_inner_must_be_a_transformation(inner):
    with pytest.raises(TypeError, match=r"`inner` must be an optax.GradientTransformation"):
        gum_optax.low_rank(inner, rank=2, period=3)
    if inner is not None:
        with pytest.raises(TypeError, match="`inner` must"):
            gum_optax.galore(0.1, inner=inner)


@pytest.mark.parametrize("value", NOT_FUNCTION + [None], ids=_value_id)  # noqa: RUF005
def test_projectors_of_a_switch_are_checked(value):
    good = projectors.svd
    for before, after in [(value, good), (good, value)]:
        with pytest.raises(TypeError, match="must be a function"):
            low_rank(projector=projectors.switch(before, after, 3))
        with pytest.raises(TypeError, match="must be a function"):
            golore(before=before, after=after)
    for step in NOT_COUNT:
        with pytest.raises((TypeError, ValueError), match="`step` must"):
            low_rank(projector=projectors.switch(good, good, step))


def test_rbg_keys_are_refused_with_the_reason():
    for key in (jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0, impl="rbg")):
        with pytest.raises(ValueError, match=r"`key` must be .*threefry"):
            low_rank(key=key)


def test_structural_arguments_refuse_traced_values():
    def under_jit(rank):
        return low_rank(rank=rank).init([jnp.ones((4, 6))] * 2)

    with pytest.raises(TypeError, match=r"`rank` must be a Python int.*traced"):
        jax.jit(lambda rank: gum_optax.scale_by_gum(rank=rank).init([jnp.ones((4, 6))]))(2)
    with pytest.raises(TypeError):
        jax.jit(under_jit)(2)


# Leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
@pytest.mark.parametrize("factory", [low_rank, scale_by_gum])
def test_a_leaf_with_too_few_axes(factory, shape):
    params = {"layer": {"w": jnp.ones((4, 6)), "bias": jnp.ones(shape)}}
    match = rf"`layer/bias` has shape {re.escape(str(shape))}.*at least two axes"
    with pytest.raises(ValueError, match=match):
        factory().init(params)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_, jnp.uint8])
@pytest.mark.parametrize("factory", [low_rank, scale_by_gum])
def test_a_leaf_that_is_not_real_floating_point(factory, dtype):
    with pytest.raises(TypeError, match=f"`w` has dtype {jnp.dtype(dtype)}"):
        factory().init({"w": jnp.ones((4, 6), dtype)})


@pytest.mark.parametrize("factory", ALIASES)
def test_a_complex_matrix_in_an_alias(factory):
    with pytest.raises(TypeError, match="`w` has dtype complex64"):
        factory().init({"w": jnp.ones((4, 6), jnp.complex64)})


DIMENSION_NUMBERS = {
    "overlap": ((4, 6), MuonDims(0, 0), "used more than once"),
    "overlap of negative": ((4, 6), MuonDims(0, -2), "used more than once"),
    "repeat": ((4, 6, 8), MuonDims((0, 0), 1), "used more than once"),
    "too large": ((4, 6), MuonDims(0, 2), "axis 2 is out of range for 2 axes"),
    "too small": ((4, 6), MuonDims(-3, 1), "axis -3 is out of range for 2 axes"),
    "no reduction": ((4, 6), MuonDims((), 1), "both sides need an axis"),
    "no output": ((4, 6), MuonDims(0, ()), "both sides need an axis"),
    "one axis": ((6,), MuonDims(0, 0), "at least two axes"),
    "no axes": ((), MuonDims(0, 0), "at least two axes"),
    "not an int": ((4, 6), MuonDims(0, 1.5), ""),
    "text": ((4, 6), MuonDims("0", 1), ""),
    "a tuple": ((4, 6), (0, 1), ""),
    "a number": ((4, 6), 1, "must be optax.contrib.MuonDimensionNumbers or None, got 1"),
    "a name": ((4, 6), "last_two", "got 'last_two'"),
}


@pytest.mark.parametrize(
    ("shape", "numbers", "reason"), DIMENSION_NUMBERS.values(), ids=DIMENSION_NUMBERS
)
@pytest.mark.parametrize("factory", ALIASES[:2])
def test_bad_dimension_numbers(factory, shape, numbers, reason):
    optimizer = factory(weight_dimension_numbers={"a": {"w": numbers}})
    with pytest.raises((TypeError, ValueError), match="`weight_dimension_numbers`") as error:
        optimizer.init({"a": {"w": jnp.ones(shape)}})
    assert reason in str(error.value)
    if reason:
        assert "`a/w`" in str(error.value)


@pytest.mark.parametrize(
    "tree",
    [{"b": MuonDims()}, {"a": MuonDims(), "b": MuonDims()}, [MuonDims()], {}],
    ids=["other key", "extra key", "other container", "empty"],
)
def test_dimension_numbers_that_are_no_prefix(tree):
    with pytest.raises(ValueError, match="`weight_dimension_numbers` must be a tree"):
        gum(weight_dimension_numbers=tree).init({"a": jnp.ones((4, 6))})


# Updates that do not fit the state ---------------------------------------------------------------

PARAMS = {"h": [{"w": jnp.ones((4, 6))} for _ in range(4)], "single": jnp.ones((4, 8))}


def _with(**changes):
    return {**PARAMS, **changes}


MISFITS = {
    "missing layer": _with(h=PARAMS["h"][:3]),
    "extra layer": _with(h=[*PARAMS["h"], {"w": jnp.ones((4, 6))}]),
    "missing stack": {"single": PARAMS["single"]},
    "missing dense leaf": {"h": PARAMS["h"]},
    "extra leaf": _with(other=jnp.ones((4, 6))),
    "other shape": _with(h=[{"w": jnp.ones((4, 7))} for _ in range(4)]),
    "transposed": _with(h=[{"w": jnp.ones((6, 4))} for _ in range(4)]),
    "other shape of one": _with(h=[*PARAMS["h"][:3], {"w": jnp.ones((4, 7))}]),
    "other name": {"g": PARAMS["h"], "single": PARAMS["single"]},
    "other shape of the dense leaf": _with(single=jnp.ones((4, 9))),
    "empty": {},
}


# What the state of a base without state, or one shape of state, cannot tell apart.
INVISIBLE = {"transposed"}


@pytest.mark.parametrize("kind", [kind for kind in MISFITS if kind not in INVISIBLE])
@pytest.mark.parametrize("base", [optax.trace(0.9), optax.scale_by_adam()], ids=["trace", "adam"])
def test_gradients_that_do_not_fit_the_state(kind, base):
    optimizer = gum_optax.low_rank(base, rank=2, period=3)
    with pytest.raises(ValueError, match="do not fit the optimizer state") as error:
        optimizer.update(MISFITS[kind], optimizer.init(PARAMS))
    assert "`state" in str(error.value)


def test_gradients_without_the_dense_leaf_of_a_base_without_state():
    optimizer = low_rank()
    with pytest.raises(ValueError, match="do not fit the optimizer state"):
        optimizer.update(MISFITS["missing dense leaf"], optimizer.init(PARAMS))


@pytest.mark.parametrize("gradients", MISFITS.values(), ids=MISFITS)
def test_gradients_that_do_not_fit_the_state_of_gum(gradients):
    optimizer = gum(rank=2)
    with pytest.raises(ValueError):
        optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "other",
    [{"rank": 3}, {"sampler": samplers.none}, {"sampler": samplers.fixed_size(1)}],
    ids=["rank", "no slots", "fewer slots"],
)
def test_a_state_of_another_configuration(other):
    state = low_rank(**other).init(PARAMS)
    with pytest.raises(ValueError, match="do not fit the optimizer state"):
        low_rank().update(PARAMS, state)


@pytest.mark.parametrize("name", [n for n in MISFITS if n != "other name"])
def test_params_that_do_not_fit_the_gradients(name):
    optimizer = low_rank()
    with pytest.raises(ValueError, match="`params` must have the structure and shapes"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), MISFITS[name])


# Parts of a user ---------------------------------------------------------------------------------


def _draw(slots):
    return lambda key: jnp.zeros(slots, jnp.int32)


JUNK_SAMPLINGS = {
    "None": None,
    "a number": 2,
    "a tuple": (1, 0.5, _draw(1)),
    "too many slots": samplers.Sampling(5, 0.5, _draw(5)),
    "negative slots": samplers.Sampling(-1, 0.5, _draw(1)),
    "probability above one": samplers.Sampling(1, 1.5, _draw(1)),
    "negative probability": samplers.Sampling(1, -0.5, _draw(1)),
    "nan": samplers.Sampling(1, NAN, _draw(1)),
    "slots never drawn": samplers.Sampling(1, 0.0, _draw(1)),
    "drawn without slots": samplers.Sampling(0, 0.5, _draw(0)),
    "slots no int": samplers.Sampling(1.5, 0.5, _draw(1)),  # type: ignore[arg-type]
    "probability no number": samplers.Sampling(1, "half", _draw(1)),  # type: ignore[arg-type]
    "draw no function": samplers.Sampling(1, 0.5, None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("sampling", JUNK_SAMPLINGS.values(), ids=JUNK_SAMPLINGS)
def test_a_sampler_that_returns_junk(sampling):
    with pytest.raises((TypeError, ValueError), match="`sampler`"):
        low_rank(sampler=lambda count: sampling).init(PARAMS["h"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: jnp.zeros(3, jnp.int32),
        lambda key: jnp.zeros((), jnp.int32),
        lambda key: jnp.zeros((2, 1), jnp.int32),
        lambda key: jnp.zeros(2, jnp.float32),
    ],
    ids=["too many", "a scalar", "two axes", "floats"],
)
def test_a_sampler_that_draws_junk(draw):
    optimizer = low_rank(sampler=lambda count: samplers.Sampling(2, 0.5, draw))
    with pytest.raises((TypeError, ValueError), match="`sampler`"):
        optimizer.update(PARAMS["h"], optimizer.init(PARAMS["h"]))


def test_a_key_function_that_returns_junk():
    with pytest.raises((TypeError, ValueError), match="`stack_by`"):
        low_rank(stack_by=lambda path, leaf: None).init(PARAMS)


def test_a_projector_that_returns_junk():
    optimizer = low_rank(projector=lambda *args: None)
    with pytest.raises((TypeError, ValueError), match="`projector` returned"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


# What is no error --------------------------------------------------------------------------------

HARMLESS = {
    "zero gradients": jax.tree.map(jnp.zeros_like, PARAMS),
    "rank above both sides": {"h": [jnp.ones((1, 2)), jnp.ones((1, 2))]},
    "one layer": {"w": jnp.ones((4, 6))},
    "one matrix of rank above": {"w": jnp.ones((1, 1))},
    "empty": {},
    "only None": [None],
    "None leaves": {"w": [jnp.ones((4, 6)), None, jnp.ones((4, 6))]},
    "bfloat16": jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS),
    "float16": jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS),
    "empty leaf": {"w": [jnp.ones((4, 6))] * 2, "none": jnp.ones((0, 4))},
}


@pytest.mark.parametrize("params", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize(
    "factory",
    [
        lambda: gum(2, 2, 1, weight_decay=0.1),
        lambda: gum_optax.low_rank(optax.scale_by_adam(), rank=2, period=2),
    ],
    ids=["gum", "low_rank"],
)
def test_harmless(factory, params):
    optimizer = factory()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates, state = update(params, state, params)
    for _ in range(2):
        updates, state = update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for result, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (result.shape, result.dtype) == (leaf.shape, leaf.dtype)
        assert np.isfinite(np.asarray(result, np.float32)).all()


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3), jnp.int32(3), 3])
def test_integers_of_other_libraries_are_ints(value):
    state = gum_optax.low_rank(optax.identity(), rank=value, period=value).init(PARAMS)
    assert state.basis["h/*/w"].shape == (4, 4, 3)
    assert samplers.fixed_size(value)(8).slots == 3


@pytest.mark.parametrize("value", [0.1, np.float32(0.1), jnp.float32(0.1), np.float64(0.1), 0])
def test_numbers_of_other_libraries_are_numbers(value):
    gum_optax.gum(value, weight_decay=value, beta=value, eps=value, consistent_rms=value)


@pytest.mark.parametrize(
    "key",
    [7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), np.array([0, 7], np.uint32)],
    ids=["int", "numpy int", "typed", "raw", "numpy raw"],
)
def test_equal_keys_in_any_form(key):
    np.testing.assert_array_equal(low_rank(key=key).init(PARAMS).key, [0, 7])


@pytest.mark.parametrize("factory", [low_rank, scale_by_gum, gum, unbiased_adamw])
@pytest.mark.parametrize("value", [None, 1, "rotate"])
def test_restart(factory, value):
    with pytest.raises(TypeError, match=r"`restart` must be True, False or a function"):
        factory(restart=value)


def test_second_moments_are_not_rotated():
    tx = gum_optax.unbiased_adamw(1e-3, rank=2, restart=restarts.rotate)
    params = {"layers": [{"w": jnp.ones((4, 6))}] * 4}
    with pytest.raises(ValueError, match=r"cannot carry the second moment `.*nu"):
        tx.update(params, tx.init(params), params)
