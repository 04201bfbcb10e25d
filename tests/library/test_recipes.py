"""Recipes: the meaning of each name, shared arguments, and the warning of `init`."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses
import inspect
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, projectors, residuals, samplers, storages
from tests import reference
from tests.helpers import first_coordinates, jit_once, low_rank_state
from tests.tables import (
    PERIOD,
    PROJECTED,
    RANK,
    SIMPLE,
    assert_close,
    assert_equal,
    parameters,
    program,
    values,
)

PUBLIC = [
    gum_optax.gum,
    gum_optax.scale_by_gum,
    gum_optax.muon,
    gum_optax.swan,
    gum_optax.adamw,
    gum_optax.for_matrices,
    gum_optax.low_rank,
    gum_optax.quantized,
    gum_optax.galore,
    gum_optax.golore,
    gum_optax.fira,
    gum_optax.frugal,
    gum_optax.apollo,
    gum_optax.apollo_mini,
    gum_optax.scale_by_gain,
    gum_optax.memory_plan,
    gum_optax.state_shardings,
    LowRank,
]


@pytest.mark.parametrize("factory", PUBLIC, ids=lambda f: f.__name__)
def test_nothing_has_more_than_twelve_arguments(factory):
    """More say that a part is missing which should be passed in instead."""
    arguments = inspect.signature(factory).parameters
    assert 1 <= len(arguments) <= 12
    described = factory.__doc__
    assert all(f"{name}:" in described for name in arguments), list(arguments)


@pytest.mark.parametrize(
    "factory",
    [gum_optax.gum, gum_optax.muon, gum_optax.swan, gum_optax.adamw, gum_optax.for_matrices],
)
def test_optimizers_are_called_alike(factory):
    """In optax's order: the learning rate comes first, and what is optional has a name."""
    kinds = [p.kind for p in inspect.signature(factory).parameters.values()]
    assert kinds == [kinds[0]] * 2 + [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 2)
    shared = ["weight_decay", "weight_decay_mask", "weight_dimension_numbers"]
    shared += ["fallback", "fallback_learning_rate"]
    assert list(inspect.signature(factory).parameters)[-5:] == shared


# Compressions ------------------------------------------------------------------------------------


def test_low_rank_has_the_defaults_of_the_paper():
    default = LowRank()
    assert (default.rank, default.period, default.key) == (128, 200, 0)
    assert default.projector is projectors.subspace_iteration
    assert default.carry is carries.restart
    assert default.group_by is gum_optax.by_role
    [group] = default.groups([jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 8)
    assert default.residual.slots(group) == 2


def test_galore_is_a_compression():
    galore = gum_optax.galore(rank=4, period=7)
    assert isinstance(galore, LowRank)
    assert (galore.rank, galore.period) == (4, 7)
    assert galore.projector is projectors.svd
    assert galore.carry is carries.keep
    [group] = galore.groups([jax.ShapeDtypeStruct((8, 16), jnp.float32)])
    assert not group.uncompressed and galore.residual.slots(group) == 0
    default = gum_optax.galore()
    assert (default.rank, default.period) == (LowRank().rank, LowRank().period)


def test_the_compact_compression_is_made_of_its_parts():
    """A scale other than the default, over a refresh: three steps of period two."""
    params = {"w": jnp.zeros((12, 20))}
    parts = {
        "residual": residuals.orthogonalized(2.0), "carry": carries.rotate,
        "storage": storages.int8(), "basis_storage": storages.int8(),
    }  # fmt: skip
    found = []
    for compression in (gum_optax.compact(4, 2, scale=2.0), LowRank(4, 2, **parts)):
        tx = gum_optax.gum(0.1, compression)
        state, steps = tx.init(params), []
        for seed in range(3):
            grads = {"w": jax.random.normal(jax.random.key(seed), (12, 20))}
            updates, state = tx.update(grads, state, params)
            steps.append(updates["w"])
        found.append(np.stack(steps))
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0]).max() > 0
    own = gum_optax.compact(carry=carries.keep, storage=(plain := storages.plain()))
    assert own.carry is carries.keep and own.storage is plain
    default = gum_optax.compact()
    assert (default.rank, default.period) == (LowRank().rank, LowRank().period)


@pytest.mark.parametrize(
    "options",
    [
        {"projector": projectors.randomized_svd},
        {"carry": carries.restart},
        {"residual": residuals.through(optax.scale_by_sign())},
        {"storage": storages.cast(jnp.bfloat16)},
        {"group_by": gum_optax.by_shape, "key": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("make", [gum_optax.galore, gum_optax.golore], ids=["galore", "golore"])
def test_every_other_part_of_a_compression_may_be_given(make, options):
    required = {"switch_step": 5} if make is gum_optax.golore else {}
    if make is gum_optax.golore and "projector" in options:
        with pytest.raises(TypeError, match="projector"):
            make(**required, **options)
        return
    plain, changed = make(**required), make(**required, **options)
    for field in dataclasses.fields(LowRank):
        expected = options.get(field.name, getattr(plain, field.name))
        if field.name not in ("residual", "projector", "storage") or field.name in options:
            assert getattr(changed, field.name) is expected


def test_golore_switches_its_projector():
    golore = gum_optax.golore(rank=4, switch_step=5, before=projectors.randomized_svd)
    assert isinstance(golore, LowRank)
    assert golore.projector == projectors.switch(
        projectors.randomized_svd, projectors.random_orthonormal, 5
    )
    assert golore.carry is carries.keep
    default = gum_optax.golore(switch_step=5).projector
    assert default == projectors.switch(projectors.svd, projectors.random_orthonormal, 5)


# Optimizers --------------------------------------------------------------------------------------


def _same_program(first, second):
    """On parameters with a fallback: the same state and the same update."""
    params = parameters("gum")
    assert program(first.init, params) == program(second.init, params)
    states = [jax.eval_shape(optimizer.init, params) for optimizer in (first, second)]
    assert program(first.update, params, states[0], params) == program(
        second.update, params, states[1], params
    )


def test_gum_around_galore_is_galore_muon():
    """Muon's momentum and Newton-Schulz in projected coordinates; momentum is kept."""
    muon = optax.chain(optax.trace(0.9), gum_optax.scale_by_polar())
    optimizer = gum_optax.gum(0.1, PROJECTED, beta=0.9)
    params = parameters("gum")
    state = low_rank_state(jax.eval_shape(optimizer.init, params))
    assert state.slots == {}
    assert state.uncompressed is None
    direct = gum_optax.low_rank(muon, PROJECTED)
    _same_program(
        gum_optax.for_matrices(optax.chain(direct, _scale_by_muons_shapes()), 0.1), optimizer
    )


def _scale_by_muons_shapes():
    """``sqrt(max(1, fan_out / fan_in))``, of Jordan et al."""

    def scale(update):
        fan_in, fan_out = update.shape[-2:]
        return (jnp.sqrt(max(1.0, fan_out / fan_in)) * update).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def test_adamw_is_adam_for_matrices():
    """The fallback has the same betas, too."""
    adam = gum_optax.low_rank(optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-6), SIMPLE)
    fallback = optax.adamw(0.1, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.2)
    _same_program(
        gum_optax.for_matrices(adam, 0.1, weight_decay=0.2, fallback=fallback),
        gum_optax.adamw(0.1, SIMPLE, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.2),
    )


def test_momentum_has_the_options_of_gum():
    """``scale_by_gum`` is Muon in `low_rank`, program by program."""
    polar = gum_optax.scale_by_polar(ns_steps=1)
    compression = LowRank(2, 2, residuals.drop(), first_coordinates)
    params = [np.ones((4, 6), np.float32)] * 2
    programs = []
    for beta, nesterov in itertools.product((0.5, 0.9), (False, True)):
        options = {"beta": beta, "nesterov": nesterov, "orthogonalizer": polar}
        muon = optax.chain(optax.trace(beta, nesterov=nesterov), polar)
        one, other = (
            str(jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params)))
            for tx in (
                gum_optax.scale_by_gum(compression, **options),
                gum_optax.low_rank(muon, compression),
            )
        )
        assert one == other
        programs.append(one)
    assert len(set(programs)) == 4


def test_golores_rank_and_period_reach_the_state():
    optimizer = gum_optax.gum(0.1, gum_optax.golore(RANK, PERIOD, switch_step=4))
    basis = low_rank_state(jax.eval_shape(optimizer.init, parameters("gum"))).basis
    assert {name: leaf.shape for name, leaf in basis.items()} == {
        "layers.*.w": (2, 5, RANK),
        "single": (1, 5, RANK),
    }


# What becomes of the matrices is not looked at here, so it is what is traced the soonest.
FACTORIES = {
    "gum": lambda **options: gum_optax.gum(
        0.1, PROJECTED, orthogonalizer=optax.identity(), **options
    ),
    "adamw": lambda **options: gum_optax.adamw(0.1, PROJECTED, **options),
    "for_matrices": lambda **options: gum_optax.for_matrices(
        gum_optax.low_rank(optax.trace(0.9), PROJECTED), 0.1, **options
    ),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


MASKS = {
    "everything": None,
    # Leaves that decay and leaves that do not, of both kinds.
    "some": {"layers": True, "single": False, "bias": False, "embed": True},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@every_factory
def test_the_default_fallback_is_adamw_with_the_weight_decay_of_the_matrices(factory, mask):
    options = {"weight_decay": 0.5, "weight_decay_mask": mask}
    fallback = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    _same_program(factory(**options), factory(**options, fallback=fallback))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_weight_decay_reaches_matrices_and_the_default_fallback_alike(mask):
    """Of zero gradients, an update is ``-learning rate * weight decay * parameter`` alone."""
    params = parameters("gum")
    optimizer = gum_optax.for_matrices(
        optax.scale_by_sign(), 0.1, weight_decay=0.5, weight_decay_mask=mask
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jit_once(optimizer.update)(zeros, optimizer.init(params), params)
    for name, update in updates.items():
        decay = np.float32(-0.1 * 0.5 * (mask is None or mask[name]))
        assert_close(update, jax.tree.map(lambda p, decay=decay: decay * p, params[name]))


@every_factory
def test_a_fallback_of_ones_own_decays_as_it_says(factory):
    params = parameters("gum")
    plain, decayed = (factory(weight_decay=decay, fallback=optax.sgd(0.1)) for decay in (0.0, 0.5))

    def fallback_updates(optimizer):
        def update(gradients, state, params):
            updates, _ = optimizer.update(gradients, state, params)
            return updates["bias"], updates["embed"]

        return jax.make_jaxpr(update)(params, jax.eval_shape(optimizer.init, params), params)

    # What is not used for the two results is dropped from the programs.
    assert _pruned(fallback_updates(plain)) == _pruned(fallback_updates(decayed))


def _pruned(closed):
    pruned, _ = jax.interpreters.partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=False
    )
    return str(pruned)


RATES = {
    "a number": 0.03,
    "zero": 0.0,
    "a schedule": optax.piecewise_constant_schedule(0.2, {1: 0.5}),
}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@every_factory
def test_the_default_fallback_is_adamw_with_its_own_learning_rate(factory, rate):
    options = {"weight_decay": 0.5}
    fallback = optax.adamw(rate, weight_decay=0.5)
    _same_program(
        factory(**options, fallback_learning_rate=rate), factory(**options, fallback=fallback)
    )


@every_factory
def test_the_learning_rate_of_the_default_fallback_is_that_of_the_matrices(factory):
    _same_program(factory(), factory(fallback_learning_rate=0.1))


def test_a_schedule_of_the_fallback_leaves_matrices_alone():
    params = parameters("gum")
    plain, own = (
        gum_optax.for_matrices(optax.scale_by_sign(), 0.1, fallback_learning_rate=rate)
        for rate in (None, RATES["a schedule"])
    )
    update, update_own = jit_once(plain.update), jit_once(own.update)
    state, state_own = plain.init(params), own.init(params)
    for factor in np.asarray([2.0, 1.0, 1.0], np.float32):
        expected, state = update(params, state, params)
        updates, state_own = update_own(params, state_own, params)
        for name in ("bias", "embed"):
            assert_close(updates[name], factor * np.asarray(expected[name]))
        for name in ("layers", "single"):
            assert_equal(updates[name], expected[name])


# The warning that nothing is compressed ----------------------------------------------------------


def _matrix(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _layers(count, *shape):
    return {"layers": [{"w": _matrix(*shape)} for _ in range(count)]}


LORA = {"layers": [{"lora_a": _matrix(256, 8), "lora_b": _matrix(8, 256)} for _ in range(4)]}
ONE_LAYER = {"attention": _matrix(512, 512), "up": _matrix(512, 2048)}
BY_SHAPE = r"`LowRank\(group_by=gum_optax.by_shape\)`.*`LowRank\(residual=residuals.drop\(\)\)`"
# Parameters, how many groups there are, the first group and the reason, the advice.
NOTHING_COMPRESSED = {
    "width below the default rank": (
        _layers(12, 128, 512),
        r"None of 1 group.*`layers\.\*\.w`, 12 of 128 x 512: rank 128 >= 128",
        r"`LowRank\(rank=32\)`",
    ),
    "one layer": (
        ONE_LAYER,
        r"None of 2 group.*`attention`, 1 of 512 x 512: single matrix",
        BY_SHAPE,
    ),
    "LoRA pairs": (
        LORA,
        r"None of 2 group.*`layers\.\*\.lora_a`, 4 of 256 x 8: rank 128 >= 8",
        r"`LowRank\(rank=2\)`",
    ),
}
every_nothing = pytest.mark.parametrize("case", NOTHING_COMPRESSED)


def _warnings(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(warning.message) for warning in caught]


@every_nothing
@pytest.mark.parametrize("factory", [gum_optax.gum, gum_optax.adamw])
def test_init_warns_once_where_nothing_is_compressed(factory, case):
    """With the first group, the reason, what to write instead, and where to see every group."""
    params, reason, advice = NOTHING_COMPRESSED[case]
    optimizer = factory(0.1)
    state, messages = _warnings(jax.eval_shape, optimizer.init, params)
    [message] = messages
    for text in (reason, advice, "leave compression out", r"`gum_optax.memory_plan\(tx, params\)`"):
        assert re.search(text, message), message
    if factory is gum_optax.adamw:  # In the step of `low_rank`, which both have.
        _, messages = _warnings(jax.eval_shape, optimizer.update, params, state, params)
        assert messages == []
    # The plan shows the same, so it need not warn.
    plan, messages = _warnings(gum_optax.memory_plan, optimizer, params)
    assert messages == []
    assert {row.treatment for row in plan.rows} <= {"uncompressed", "fallback", "shared"}


def test_init_names_the_groups_that_leave_most_of_a_model_uncompressed():
    """The largest first, each with its reason; `memory_plan` has the same note."""
    layers = [{"w": _matrix(256, 512), "narrow": _matrix(96, 512)} for _ in range(4)]
    params = {"layers": layers, "first": _matrix(512, 4096)}
    optimizer = gum_optax.gum(0.1)
    _, [message] = _warnings(jax.eval_shape, optimizer.init, params)
    assert message.startswith(
        "81 % of the parameters of matrices are in groups that run through the inner "
        "transformation uncompressed: `first`, 1 of 512 x 4096: single matrix; "
        "`layers.*.narrow`, 4 of 96 x 512: rank 128 >= 96. "
    )
    assert re.search(BY_SHAPE, message)
    assert gum_optax.memory_plan(optimizer, params).notes == (message,)


FOLLOWED = {
    "width below the default rank": LowRank(rank=32),
    "one layer": LowRank(residual=residuals.drop()),
    "LoRA pairs": LowRank(rank=2),
}


@every_nothing
def test_the_advice_helps(case):
    params, _, _ = NOTHING_COMPRESSED[case]
    _, messages = _warnings(jax.eval_shape, gum_optax.gum(0.1, FOLLOWED[case]).init, params)
    assert messages == []


def test_no_rank_is_advised_for_vectors_that_are_taken_for_matrices():
    params = [_matrix(1, 64), _matrix(64, 1)]
    _, [message] = _warnings(jax.eval_shape, gum_optax.gum(0.1, LowRank(rank=1)).init, params)
    assert "has no lower rank: send it to the fallback by `weight_dimension_numbers`" in message
    assert "LowRank(rank" not in message


def test_by_shape_helps_where_layers_differ_in_name_alone():
    params = {name: _matrix(256, 256) for name in ("query", "key")}
    with pytest.warns(UserWarning, match=BY_SHAPE):
        jax.eval_shape(gum_optax.gum(0.1).init, params)
    by_shape = gum_optax.gum(0.1, LowRank(group_by=gum_optax.by_shape))
    _, messages = _warnings(jax.eval_shape, by_shape.init, params)
    assert messages == []


@pytest.mark.parametrize(
    "params",
    [
        # Two thirds are compressed.
        _layers(12, 128, 512) | {"wide": [_matrix(256, 512)] * 12},
        {"bias": np.ones(3, np.float32)},
        {},
    ],
    ids=["most is compressed", "no matrices", "empty"],
)
def test_init_does_not_warn_where_something_is_compressed_or_nothing_could_be(params):
    _, messages = _warnings(jax.eval_shape, gum_optax.gum(0.1).init, params)
    assert messages == []


def test_always_drawn_matrices_are_no_mistake_of_the_rank():
    """Every matrix is drawn by this sampler: the advice is not a smaller rank."""

    def everything(count):
        return samplers.Sampling(count, 1.0, lambda key: jnp.arange(count, dtype=jnp.int32))

    compression = LowRank(rank=2, residual=residuals.sampled(everything))
    with pytest.warns(UserWarning, match=r"always drawn\. Layers are sampled within a group"):
        gum_optax.scale_by_gum(compression).init(values(_layers(3, 5, 8)))


def test_a_model_of_one_layer_is_trained_as_by_muon():
    """The warning says so: the inner transformation without low rank."""
    params = {"w": np.asarray(np.random.default_rng(0).normal(size=(5, 8)), np.float32)}
    muon = optax.chain(optax.trace(0.95), gum_optax.scale_by_polar())
    direction = gum_optax.scale_by_gum(LowRank(rank=2))
    with pytest.warns(UserWarning, match="is compressed, so this is the inner transformation"):
        state = direction.init(params)
    updates, _ = jax.jit(direction.update)(params, state)
    expected, _ = jax.jit(muon.update)(params, muon.init(params))
    assert_close(updates, expected)


@pytest.mark.parametrize("orthogonalizer", ["polar", "decorrelation"])
def test_swan_orthogonalizes_standardized_gradients_and_keeps_nothing(orthogonalizer):
    rng = np.random.default_rng(0)
    params = {"layers": [{"kernel": np.float32(rng.normal(size=(5, 8)))} for _ in range(2)]}
    part = getattr(gum_optax, f"scale_by_{orthogonalizer}")()
    tx = gum_optax.swan(0.1, part, consistent_rms=0.2)
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 2  # counters
    direction = {
        "polar": reference.newton_schulz,
        "decorrelation": reference.decorrelated,
    }[orthogonalizer]
    for _ in range(2):  # the second step is like the first
        gradients = jax.tree.map(lambda W: np.float32(rng.normal(size=W.shape) + 1), params)
        updates, state = jax.jit(tx.update)(gradients, state, params)
        for update, G in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
            standard = (G - G.mean(0)) / G.std(0)
            expected = -0.1 * 0.2 * 8**0.5 * direction(standard)
            np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)
