"""Bad input raises at once, with an error that names the parameter, the value and the reason."""

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
from gum_optax import LowRank, carries, projectors, residuals, samplers, storages
from tests.helpers import described, first_coordinates, jit_once

NAN, INF = float("nan"), float("inf")
MuonDims = optax.contrib.MuonDimensionNumbers

_IDENTITY = optax.identity()
Compression = functools.partial(LowRank, rank=2, period=3)
gum = functools.partial(gum_optax.gum, 0.1)
muon = functools.partial(gum_optax.muon, 0.1)
swan = functools.partial(gum_optax.swan, 0.1)
adamw = functools.partial(gum_optax.adamw, 0.1)
for_matrices = functools.partial(gum_optax.for_matrices, _IDENTITY, 0.1)
golore = functools.partial(gum_optax.golore, switch_step=5)
scale_by_gum = gum_optax.scale_by_gum
OPTIMIZERS = [gum, muon, swan, adamw, for_matrices]
COMPRESSIONS = [LowRank, gum_optax.galore, golore]


def _ones(shape, dtype=np.float32):
    return np.ones(shape, dtype)


def low_rank(**options):
    return gum_optax.low_rank(_IDENTITY, Compression(**options))


# parameter -> factories that take it, and values that cannot work.
# Arrays of JAX's are put on its device, which compiles nothing.
NOT_POSITIVE = [0, -1, 1.5, True, "8", None, NAN, 2.0, jax.device_put(np.float32(3))]
NOT_COUNT = [-1, 1.5, True, "2", None]
NOT_NUMBER = [-1, -1e-9, NAN, INF, "0.1", [0.1, 0.2]]
NOT_DECAY = [*NOT_NUMBER, 1, 1.0, 1.5, None]
NOT_FUNCTION = ["svd", 3, 1.0]
NOT_TRANSFORMATION = [0.1, "adam", optax.adam, (optax.adam(0.1).init,)]
NOT_KEY_DATA = [
    jax.device_put(value)
    for value in (
        np.zeros(3, np.uint32),
        np.zeros(2, np.int32),
        np.zeros((1, 2), np.uint32),
        np.float32(1),
        np.True_,
    )
]
NOT_COMPRESSION = [64, None, "galore", {"rank": 64}, LowRank, gum_optax.galore, optax.identity()]
BAD_VALUES = {
    # Options of a compression.
    "rank": (COMPRESSIONS, NOT_POSITIVE),
    "period": (COMPRESSIONS, NOT_POSITIVE),
    "residual": (COMPRESSIONS, [2, None, "drop", residuals.drop, samplers.none, optax.trace(0.9)]),
    "projector": ([LowRank, gum_optax.galore], [*NOT_FUNCTION, None]),
    "carry": (COMPRESSIONS, [*NOT_FUNCTION, None, True, False, "rotate"]),
    "storage": (
        [*COMPRESSIONS, functools.partial(gum_optax.quantized, _IDENTITY)],
        [None, jnp.bfloat16, "bfloat16", storages.plain, residuals.drop()],
    ),
    "group_by": (COMPRESSIONS, [*NOT_FUNCTION, None]),
    "key": (
        COMPRESSIONS,
        [1.5, None, "0", True, 1j, np.float32(1), np.True_, [0, 1], b"0", *NOT_KEY_DATA],
    ),
    "switch_step": ([golore], NOT_COUNT),
    # Options of residual rules and storages.
    "gamma": ([residuals.sampled, samplers.fixed_size], NOT_COUNT),
    "form": ([lambda form: residuals.sampled(form=form)], ["both", "Additive", None, 1]),
    "undrawn": ([lambda undrawn: residuals.sampled(undrawn=undrawn)], NOT_TRANSFORMATION),
    "transformation": ([residuals.through], [*NOT_TRANSFORMATION, 3, None]),
    "decay": ([residuals.feedback], NOT_DECAY),
    "dtype": ([storages.cast], ["int32", jnp.int32, bool, jnp.complex64, "bogus", 3.0]),
    "block": (
        [storages.int8, storages.float8, storages.int6, storages.int4],
        [each for each in NOT_POSITIVE if each is not None],
    ),
    "non_negative": (
        [storages.int8, storages.float8, storages.int6, storages.int4],
        [*NOT_FUNCTION, None, True],
    ),
    "choose": ([storages.by_path], [*NOT_FUNCTION, None, storages.plain()]),
    "smallest": ([functools.partial(gum_optax.quantized, _IDENTITY)], NOT_COUNT),
    # Options of optimizers.
    "compression": (
        [gum, adamw, scale_by_gum, lambda compression: gum_optax.low_rank(_IDENTITY, compression)],
        NOT_COMPRESSION,
    ),
    "inner": (
        [gum_optax.low_rank, gum_optax.quantized],
        [None, 0.1, "adam", optax.adam, LowRank()],
    ),
    "direction": (
        [lambda direction: gum_optax.for_matrices(direction, 0.1)],
        [*NOT_TRANSFORMATION, None, LowRank()],
    ),
    "orthogonalizer": ([gum, scale_by_gum, muon, swan], [*NOT_TRANSFORMATION, None]),
    "learning_rate": (
        [
            gum_optax.gum,
            gum_optax.muon,
            gum_optax.swan,
            gum_optax.adamw,
            functools.partial(gum_optax.for_matrices, _IDENTITY),
        ],
        [*NOT_NUMBER, None],
    ),
    "fallback_learning_rate": (OPTIMIZERS, NOT_NUMBER),
    "weight_decay": (OPTIMIZERS, [*NOT_NUMBER, None]),
    "beta": ([scale_by_gum, gum, muon], NOT_DECAY),
    "eps": ([adamw, gum_optax.scale_by_polar], [*NOT_NUMBER, None]),
    "b1": ([adamw], NOT_DECAY),
    "b2": ([adamw], NOT_DECAY),
    "consistent_rms": ([gum, muon, swan], NOT_NUMBER),
    "fallback": (OPTIMIZERS, NOT_TRANSFORMATION),
}


def _value_id(value):
    # Without addresses: parallel workers must collect equal names.
    return getattr(value, "__name__", repr(value).split(" at 0x")[0])[:30]


@pytest.mark.parametrize(
    ("name", "factory", "value"),
    [
        pytest.param(name, factory, value, id=f"{name}-{i}-{j}-{_value_id(value)}")
        for name, (factories, values) in BAD_VALUES.items()
        for i, factory in enumerate(factories)
        for j, value in enumerate(values)
    ],
)
def test_bad_value(name, factory, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must") as error:
        _call(factory, name, value)
    if isinstance(value, int | float | str) or value is None:
        assert str(value) in str(error.value)
    assert str(error.value).endswith(".")


def _call(factory, name, value):
    """By name, or for factories of one argument that is called otherwise, by position."""
    if name == "gamma" or factory is storages.cast:
        return factory(value)
    return factory(**{name: value})


def test_an_old_positional_rank_says_what_to_write():
    for factory in (gum, adamw, scale_by_gum):
        with pytest.raises(
            TypeError, match=r"`compression` must be a LowRank.*`LowRank\(rank=64\)`"
        ):
            factory(64)


def test_the_class_in_place_of_an_instance_is_named():
    with pytest.raises(
        TypeError, match=r"`compression` must be a LowRank .*got <class '.*LowRank'>"
    ):
        gum(LowRank)


@pytest.mark.parametrize("factory", OPTIMIZERS)
@pytest.mark.parametrize("rate", [0.1, 0.0, lambda step: 0.1], ids=["rate", "zero", "schedule"])
def test_a_fallback_brings_its_own_learning_rate(factory, rate):
    with pytest.raises(ValueError, match=r"`fallback_learning_rate` must be left out .*`fallback`"):
        factory(fallback=optax.sgd(0.1), fallback_learning_rate=rate)


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=_value_id)
def test_a_rank_function_that_returns_junk(value):
    """Only then is the rank known, so the message names the group, too."""
    optimizer = low_rank(rank=lambda group: value)
    with pytest.raises(
        (TypeError, ValueError), match=r"`rank` of the group `h\.\*\.w` must"
    ) as error:
        optimizer.init(PARAMS)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [*NOT_FUNCTION, None], ids=_value_id)
def test_projectors_of_a_switch_are_checked(value):
    good = projectors.svd
    for before, after in [(value, good), (good, value)]:
        with pytest.raises(TypeError, match="must be a function"):
            Compression(projector=projectors.switch(before, after, 3))
        with pytest.raises(TypeError, match="must be a function"):
            golore(before=before, after=after)
    for step in NOT_COUNT:
        with pytest.raises((TypeError, ValueError), match="`step` must"):
            Compression(projector=projectors.switch(good, good, step))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_rbg_keys_are_refused_with_the_reason(implementation):
    for make in (jax.random.key, jax.random.PRNGKey):
        with pytest.raises(ValueError, match=r"`key` must be .*threefry") as error:
            Compression(key=make(0, impl=implementation))
        assert "pass an int seed" in str(error.value)


def test_structural_arguments_refuse_traced_values():
    def init(**options):
        return low_rank(**options).init([jnp.ones((4, 6))] * 2)

    for name in ("rank", "period"):
        with pytest.raises(TypeError, match=f"`{name}` must be a Python int.*traced"):
            jax.jit(lambda value, name=name: init(**{name: value}))(2)
    with pytest.raises(TypeError, match=r"`rank` .* must be a Python int.*traced"):
        jax.jit(lambda rank: init(rank=lambda group: rank))(2)


# Leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
@pytest.mark.parametrize("factory", [low_rank, scale_by_gum])
def test_a_leaf_with_too_few_axes(factory, shape):
    params = {"layer": {"w": _ones((4, 6)), "bias": _ones(shape)}}
    match = rf"`layer/bias` has shape {re.escape(str(shape))}.*at least two axes"
    with pytest.raises(ValueError, match=match):
        factory().init(params)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_, jnp.uint8])
@pytest.mark.parametrize("factory", [low_rank, scale_by_gum])
def test_a_leaf_that_is_not_real_floating_point(factory, dtype):
    with pytest.raises(TypeError, match=f"`w` has dtype {jnp.dtype(dtype)}"):
        factory().init({"w": _ones((4, 6), dtype)})


@pytest.mark.parametrize("factory", [gum, adamw])
def test_a_complex_matrix_of_a_whole_model(factory):
    with pytest.raises(TypeError, match="`w` has dtype complex64"):
        factory().init({"w": _ones((4, 6), jnp.complex64)})


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
@pytest.mark.parametrize("factory", OPTIMIZERS)
def test_bad_dimension_numbers(factory, shape, numbers, reason):
    optimizer = factory(weight_dimension_numbers={"a": {"w": numbers}})
    with pytest.raises((TypeError, ValueError), match="`weight_dimension_numbers`") as error:
        optimizer.init({"a": {"w": _ones(shape)}})
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
        gum(weight_dimension_numbers=tree).init({"a": _ones((4, 6))})


# Updates that do not fit the state ---------------------------------------------------------------

PARAMS = {"h": [{"w": _ones((4, 6))} for _ in range(4)], "single": _ones((4, 8))}


def _step(optimizer, params, gradients, params_at_update=None):
    """The types after an init and an update, where wrong ones raise."""
    state = jax.eval_shape(optimizer.init, params)
    return jax.eval_shape(optimizer.update, gradients, state, params_at_update)


def _with(**changes):
    return {**PARAMS, **changes}


MISFITS = {
    "missing layer": _with(h=PARAMS["h"][:3]),
    "extra layer": _with(h=[*PARAMS["h"], {"w": _ones((4, 6))}]),
    "missing group": {"single": PARAMS["single"]},
    "missing uncompressed leaf": {"h": PARAMS["h"]},
    "extra leaf": _with(other=_ones((4, 6))),
    "other shape": _with(h=[{"w": _ones((4, 7))} for _ in range(4)]),
    "transposed": _with(h=[{"w": _ones((6, 4))} for _ in range(4)]),
    "other shape of one": _with(h=[*PARAMS["h"][:3], {"w": _ones((4, 7))}]),
    "other name": {"g": PARAMS["h"], "single": PARAMS["single"]},
    "other shape of the uncompressed leaf": _with(single=_ones((4, 9))),
    "empty": {},
}


# A state of one shape cannot tell these apart.
INVISIBLE = {"transposed"}


@pytest.mark.parametrize("kind", [kind for kind in MISFITS if kind not in INVISIBLE])
@pytest.mark.parametrize("inner", [optax.trace(0.9), optax.scale_by_adam()], ids=["trace", "adam"])
def test_gradients_that_do_not_fit_the_state(kind, inner):
    optimizer = gum_optax.low_rank(inner, Compression())
    with pytest.raises(ValueError, match="do not fit the optimizer state") as error:
        _step(optimizer, PARAMS, MISFITS[kind])
    assert "`state" in str(error.value)


def test_gradients_without_an_uncompressed_leaf_where_nothing_has_state():
    optimizer = low_rank()
    with pytest.raises(ValueError, match="do not fit the optimizer state"):
        _step(optimizer, PARAMS, MISFITS["missing uncompressed leaf"])


@pytest.mark.parametrize("gradients", MISFITS.values(), ids=MISFITS)
def test_gradients_that_do_not_fit_the_state_of_gum(gradients):
    optimizer = gum(LowRank(rank=2))
    with pytest.raises(ValueError):
        _step(optimizer, PARAMS, gradients, PARAMS)


OTHERS = {
    "rank": {"rank": 3},
    "no slots": {"residual": residuals.drop()},
    "fewer slots": {"residual": residuals.sampled(1)},
    "an error buffer": {"residual": residuals.feedback()},
    "state of the residual": {"residual": residuals.sampled(undrawn=optax.trace(0.9))},
    "other groups": {"group_by": lambda path, leaf: path},
    "uncompressed": {"rank": 4},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore:None of .* is compressed:UserWarning")
def test_a_state_of_another_configuration(other):
    state = jax.eval_shape(low_rank(**OTHERS[other]).init, PARAMS)
    with pytest.raises(ValueError, match="do not fit the optimizer state") as error:
        jax.eval_shape(low_rank().update, PARAMS, state)
    assert "`state" in str(error.value)


STRANGE_STATES = {
    "of another optimizer": lambda state: optax.scale_by_adam().init(PARAMS),
    "None": lambda state: None,
    "a tuple": tuple,
    "a dict": lambda state: state._asdict(),
    "without its last fields": lambda state: state[:5],
}


@pytest.mark.parametrize("strange", STRANGE_STATES.values(), ids=STRANGE_STATES)
def test_a_state_of_another_type(strange):
    """A checkpoint of another version comes back as one of these."""
    optimizer = low_rank()
    version = gum_optax.STATE_VERSION
    match = rf"`state` must be the LowRankState \(version {version}\).*cannot be restored"
    with pytest.raises(TypeError, match=match):
        optimizer.update(PARAMS, strange(optimizer.init(PARAMS)))


def test_a_state_whose_entries_are_of_an_older_version():
    """Version 2 had slots in `Compressed.full`, and neither `residual` nor `uncompressed`."""
    optimizer = low_rank()
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match="do not fit the optimizer state"):
        optimizer.update(PARAMS, state._replace(residual=state.slots))


def _renamed(node, old, new):
    """A state with other names of groups: the keys of all its dicts."""
    if isinstance(node, dict):
        return {k.replace(old, new): _renamed(v, old, new) for k, v in node.items()}
    if isinstance(node, tuple):
        parts = [_renamed(part, old, new) for part in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return node


def test_a_state_of_version_4_is_told_what_to_rename():
    """It has slashes for points, and nothing else: renamed, it goes on."""
    optimizer = low_rank()
    state = jax.eval_shape(optimizer.init, PARAMS)
    older = _renamed(state, ".", "/")
    with pytest.raises(ValueError, match=r"version 4 .* `h/\*/w` .* calls it `h\.\*\.w`: replace"):
        jax.eval_shape(optimizer.update, PARAMS, older)
    assert jax.tree.structure(_renamed(older, "/", ".")) == jax.tree.structure(state)


@pytest.mark.parametrize("name", [n for n in MISFITS if n != "other name"])
def test_params_that_do_not_fit_the_gradients(name):
    optimizer = low_rank()
    with pytest.raises(ValueError, match="`params` must have the structure and shapes"):
        _step(optimizer, PARAMS, PARAMS, MISFITS[name])


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
        low_rank(residual=residuals.sampled(lambda count: sampling)).init(PARAMS["h"])


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
    sampler = lambda count: samplers.Sampling(2, 0.5, draw)  # noqa: E731
    optimizer = low_rank(residual=residuals.sampled(sampler))
    with pytest.raises((TypeError, ValueError), match="`sampler`"):
        _step(optimizer, PARAMS["h"], PARAMS["h"])


def test_a_key_function_that_returns_junk():
    with pytest.raises((TypeError, ValueError), match="`group_by`"):
        low_rank(group_by=lambda path, leaf: None).init(PARAMS)


def test_a_projector_that_returns_junk():
    optimizer = low_rank(projector=lambda *args: None)
    with pytest.raises((TypeError, ValueError), match="`projector` returned"):
        _step(optimizer, PARAMS, PARAMS)


# What is no error --------------------------------------------------------------------------------

HARMLESS = {
    "zero gradients": jax.tree.map(np.zeros_like, PARAMS),
    "rank above both sides": {"h": [_ones((1, 2)), _ones((1, 2))]},
    "one layer": {"w": _ones((4, 6))},
    "one matrix of rank above": {"w": _ones((1, 1))},
    "empty": {},
    "only None": [None],
    "None leaves": {"w": [_ones((4, 6)), None, _ones((4, 6))]},
    "bfloat16": jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS),
    "float16": jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS),
    "empty leaf": {"w": [_ones((4, 6))] * 2, "none": _ones((0, 4))},
}


# Where nothing at all is compressed, `init` says so.
UNCOMPRESSED = {"rank above both sides", "one layer", "one matrix of rank above"}


# Only values can harm: zeros, numbers of few bits, and matrices that are too small for their rank.
# For the others types are enough.
TYPES_ALONE = {"None leaves", "bfloat16", "empty leaf"}
COMPUTED = [(case, "gum", first_coordinates) for case in HARMLESS if case not in TYPES_ALONE]
COMPUTED += [
    (case, "low_rank", projectors.subspace_iteration) for case in ("zero gradients", "float16")
]
TRACED = [(case, "low_rank", first_coordinates) for case in HARMLESS]
TRACED += [(case, "gum", first_coordinates) for case in HARMLESS if case in TYPES_ALONE]


def _harmless(case, name, projector):
    """The optimizer of a case, and its first state."""
    compression = LowRank(2, 2, residuals.sampled(1), projector)
    optimizer = (
        gum(compression, weight_decay=0.1)
        if name == "gum"
        else gum_optax.low_rank(optax.scale_by_adam(), compression)
    )
    if case not in UNCOMPRESSED:
        return optimizer, optimizer.init(HARMLESS[case])
    with pytest.warns(UserWarning, match="None of 1 group"):
        return optimizer, optimizer.init(HARMLESS[case])


def _assert_alike(updates, params):
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for result, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (result.shape, result.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(("case", "name", "projector"), COMPUTED, ids=_value_id)
def test_harmless(case, name, projector):
    params, (optimizer, state) = HARMLESS[case], _harmless(case, name, projector)
    update = jit_once(optimizer.update)
    updates, state = update(params, state, params)
    for _ in range(2):
        updates, state = update(params, state, params)
    _assert_alike(updates, params)
    for result in jax.tree.leaves(updates):
        assert np.isfinite(np.asarray(result, np.float32)).all()


@pytest.mark.parametrize(("case", "name", "projector"), TRACED, ids=_value_id)
def test_harmless_in_shape(case, name, projector):
    params, (optimizer, state) = HARMLESS[case], _harmless(case, name, projector)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    _assert_alike(updates, params)
    assert described(after) == described(state)


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3), jnp.int32(3), 3])
def test_integers_of_other_libraries_are_ints(value):
    state = low_rank(rank=value, period=value).init(PARAMS)
    assert state.basis["h.*.w"].shape == (4, 4, 3)
    assert samplers.fixed_size(value)(8).slots == 3


@pytest.mark.parametrize("value", [0.1, np.float32(0.1), jnp.float32(0.1), np.float64(0.1), 0])
def test_numbers_of_other_libraries_are_numbers(value):
    gum_optax.gum(
        value,
        weight_decay=value,
        beta=value,
        consistent_rms=value,
        fallback_learning_rate=value,
        orthogonalizer=gum_optax.scale_by_polar(eps=value),
    )
    gum_optax.adamw(value, b1=value, b2=value, eps=value)
    residuals.feedback(value)


KEYS = {
    "int": lambda: 7,
    "numpy int": lambda: np.int64(7),
    "jax int": lambda: jnp.int32(7),
    "typed": lambda: jax.random.key(7),
    "typed by name": lambda: jax.random.key(7, impl="threefry2x32"),
    "raw": lambda: jax.random.PRNGKey(7),
    "numpy raw": lambda: np.array([0, 7], np.uint32),
}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_equal_keys_in_any_form(make):
    np.testing.assert_array_equal(low_rank(key=make()).init(PARAMS).key, [0, 7])


def test_a_carry_that_is_no_function_of_four():
    with pytest.raises(TypeError):
        low_rank(carry=lambda state: state).init(PARAMS)


def test_second_moments_are_not_rotated():
    tx = adamw(LowRank(rank=2, carry=carries.rotate))
    params = {"layers": [{"w": _ones((4, 6))}] * 4}
    with pytest.raises(ValueError, match=r"cannot carry the second moment `.*nu"):
        tx.init(params)
