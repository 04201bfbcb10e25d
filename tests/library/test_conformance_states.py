"""Compiled transformations in loops and under donation, and their states as trees.

Compiled once for all tests here, every transformation runs under scans, maps and donation, and
learns; states are found by name, mapped, serialized, saved and restored.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools
import warnings

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gum_optax
from gum_optax import dimension_numbers
from tests.tables import (
    ALIASES,
    COMPILED,
    LOW_RANK,
    OPTIMIZERS,
    PERIOD,
    PROJECTED,
    SIMPLE,
    assert_close,
    assert_equal,
    compiled,
    each_kind,
    every_compiled,
    first_state,
    parameters,
    run,
    transformation,
    values,
)

# Runs --------------------------------------------------------------------------------------------


@every_compiled
def test_no_second_compilation(name):
    """`compiled` refuses a second trace, in every test that runs it."""
    _, update = compiled(name)
    run(update, first_state(name), name)
    assert update._cache_size() == 1


# Those without a fallback are scanned in the next test.
@pytest.mark.parametrize("name", ["gum", "adamw_galore"])
def test_scan_equals_loop(name):
    optimizer, update = compiled(name)
    params = parameters(name)
    expected, final = run(update, first_state(name), name)
    gradients = [parameters(name, seed + 1) for seed in range(len(expected))]

    @jax.jit
    def scanned(state, gradients):
        def step(state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, state, gradients)

    state, got = scanned(first_state(name), _stack(gradients))
    assert_close(state, final)
    assert_close(got, _stack(expected))


def _stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


@pytest.mark.parametrize("name", ["scale_by_gum", "low_rank_adam"])
def test_many_runs_at_once(name):
    """Over seeds of the optimizer and of its gradients."""
    optimizer, update = compiled(name)
    params, seeds = parameters(name), np.arange(2)
    gradients = [parameters(name, seed) for seed in (5, 6)]

    def two_steps(arguments):
        seed, gradient = arguments
        state = optimizer.init(params)
        state = state._replace(key=jax.random.key_data(jax.random.key(seed)))

        def step(state, _):
            updates, state = optimizer.update(gradient, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, state, length=2)
        return jax.tree.map(lambda u: u[-1], updates), state

    got, states = jax.jit(jax.vmap(two_steps))((seeds, _stack(gradients)))
    got, states = jax.tree.map(np.asarray, (got, states))
    for i, gradient in enumerate(gradients):
        state = first_state(name)._replace(key=jax.random.key_data(jax.random.key(i)))
        _, state = update(gradient, state, params)
        expected, state = update(gradient, state, params)
        assert_close(jax.tree.map(lambda x, i=i: x[i], (got, states)), (expected, state))


@each_kind
def test_donated_states_and_parameters(name):
    """In bfloat16 with float32 gradients.

    Were a type of the state to drift, a buffer would not fit, of which JAX warns.
    """
    optimizer, _ = compiled(name)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(parameters(name, dtype=jnp.bfloat16), may_alias=False)
    gradients = jax.device_put(parameters(name, 1))
    state = optimizer.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PERIOD + 1):
            old = jax.tree.leaves((params, state))
            params, state = step(params, state, gradients)
            assert all(x.is_deleted() for x in old)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(gradients))
    optimizer.init(params)  # the factory holds nothing that was donated


# Arguments ---------------------------------------------------------------------------------------


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = parameters("low_rank_identity")
    optimizer = gum_optax.low_rank(inner, SIMPLE)
    # The first update of `trace` is its gradient.
    _, update_plain = compiled("low_rank_trace")
    got, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, value=3.0)
    expected, _ = update_plain(params, first_state("low_rank_trace"), params)
    assert_close(got, _scaled(3.0, expected))
    # Through `for_matrices`, a mask and a chain: the update follows from the value alone.
    whole = gum_optax.for_matrices(gum_optax.low_rank(inner, PROJECTED), 1.0)
    update_whole, state = jax.jit(whole.update), whole.init(params)
    got, _ = update_whole(params, state, params, value=2.0)
    once, _ = update_whole(params, state, params, value=1.0)
    assert_close(got, _scaled(2.0, once))


@pytest.mark.parametrize("name", ["scale_by_gum", "adamw_galore"])
def test_params_are_optional_where_nothing_decays(name):
    optimizer, update = compiled(name)
    params = parameters(name)
    expected, _ = update(params, first_state(name), params)
    if name == "adamw_galore":
        optimizer = gum_optax.adamw(0.1, PROJECTED, weight_decay=0.0, fallback=optax.sgd(0.1))
    without, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    for matrices in ("layers", "single"):
        assert_close(without[matrices], expected[matrices])


# Without a matrix no compression has a say: one alias of each factory.
@pytest.mark.parametrize("name", ["gum", "adamw_galore"])
def test_a_model_without_matrices(name):
    optimizer, _ = compiled(name)
    params = {"b": np.ones(3, np.float32), "embed": np.ones((4, 6), np.float32)}
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert all(np.asarray(u).any() for u in jax.tree.leaves(updates))


# Learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gum", "adamw_galore"])
def test_learning_rate_schedules_count_steps(name):
    """A schedule goes on over refreshes: at the second period it is not back at its start."""
    schedule = optax.piecewise_constant_schedule(0.1, {PERIOD: 0.5, 2 * PERIOD: 0.0})
    params = jax.tree.map(np.zeros_like, parameters(name))
    scheduled, (_, update) = transformation(name, schedule), compiled(name)
    got, _ = run(jax.jit(scheduled.update), scheduled.init(params), name, params=params)
    expected, _ = run(update, first_state(name), name, params=params)
    for step, (updates, reference) in enumerate(zip(got, expected, strict=True)):
        factor = [1.0, 0.5, 0.0][step // PERIOD]
        assert_close(updates, _scaled(factor, reference))


@every_compiled
def test_a_quadratic_shrinks(name):
    """``|w - w*|^2 / 2`` over all leaves."""
    _, update = compiled(name)
    rate = np.float32(1.0 if name in OPTIMIZERS else -0.05)
    target = values(parameters(name), seed=9)
    params, state = jax.tree.map(np.zeros_like, target), first_state(name)
    for _ in range(100):
        updates, state = update(jax.tree.map(np.subtract, params, target), state, params)
        params = jax.tree.map(lambda p, u: p + rate * np.asarray(u), params, updates)
    assert _squares(jax.tree.map(np.subtract, params, target)) < 0.3 * _squares(target)


def _scaled(factor, tree):
    return jax.tree.map(lambda leaf: np.float32(factor) * np.asarray(leaf), tree)


def _squares(tree):
    return sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(tree))


# States ------------------------------------------------------------------------------------------


@functools.cache
def _after_three_steps(name):
    _, update = compiled(name)
    return run(update, first_state(name), name, steps=3)[1]


@every_compiled
def test_map_params_without_effect(name):
    state = _after_three_steps(name)
    assert_equal(optax.tree.map_params(compiled(name)[0], lambda x: x, state), state)


def test_map_params_reaches_what_is_shaped_like_parameters():
    """The fallback's moments and those of others in the chain; nothing of low rank."""
    optimizer = optax.chain(optax.scale_by_adam(), compiled("gum")[0])
    state = jax.jit(optimizer.init)(parameters("gum"))
    marked = optax.tree.map_params(optimizer, lambda x: np.asarray(x) + 1, state)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(marked), strict=True
        )
        if np.any(np.asarray(old) != new)
    }
    leaves = ("bias", "embed", "layers/0/w", "layers/1/w", "single")
    fallback = "1/inner_states/fallback/inner_state/0"
    assert changed == {
        *(f"0/{moment}/{leaf}" for moment in ("mu", "nu") for leaf in leaves),
        *(f"{fallback}/{moment}/{leaf}" for moment in ("mu", "nu") for leaf in ("bias", "embed")),
    }


@pytest.mark.parametrize("name", LOW_RANK)
def test_the_state_is_found_by_name(name):
    found = optax.tree.get(_after_three_steps(name), "LowRankState")
    assert isinstance(found, gum_optax.LowRankState)
    assert int(found.count) == 3
    assert_equal(optax.tree.get(found, "basis"), found.basis)
    assert_equal(optax.tree.get(found, "slots"), found.slots)


COUNTLESS = [
    "scale_by_gum",
    "low_rank_identity",
    "low_rank_trace",
    "low_rank_nesterov",
    "additive",
    "through momentum",
    "feedback",
    "bfloat16 storage",
]


@pytest.mark.parametrize("name", COUNTLESS)
def test_the_count_is_unambiguous_where_the_inner_transformation_counts_nothing(name):
    assert int(optax.tree.get(_after_three_steps(name), "count")) == 3


@pytest.mark.parametrize("name", [name for name in ALIASES if name in LOW_RANK])
def test_the_count_of_a_whole_optimizer_needs_a_filter(name):
    """Its fallback and its schedules count too, as in ``optax.contrib.muon``."""
    state = _after_three_steps(name)
    with pytest.raises(KeyError, match="Found multiple values for 'count'"):
        optax.tree.get(state, "count")

    def of_low_rank(path, value):
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey) and (
            path[-1].tuple_name == "LowRankState"
        )

    assert int(optax.tree.get(state, "count", filtering=of_low_rank)) == 3


@every_compiled
def test_states_hold_plain_arrays_that_are_not_empty(name):
    """Orbax refuses arrays without elements, and NumPy cannot read typed keys."""
    for leaf in jax.tree.leaves(first_state(name)):
        assert isinstance(leaf, jax.Array)
        assert leaf.size > 0
        assert np.asarray(leaf).dtype == leaf.dtype


@every_compiled
def test_flax_serialization_round_trip(name):
    _, update = compiled(name)
    state = _after_three_steps(name)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(first_state(name), data)
    assert_equal(restored, state)
    assert_equal(run(update, restored, name, 2)[0], run(update, state, name, 2)[0])


LAYERS = {
    "unscanned": {"layers": [{"attn": {"q": np.ones((8, 12), np.float32)}}] * 4},
    "scanned": {"layers": {"attn": {"q": np.ones((4, 8, 12), np.float32)}}},
    "a bare list": [np.ones((8, 12), np.float32)] * 4,
}


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_states_are_flattened_with_slashes_and_back(layout, storage):
    """As Flax, and whoever saves one file for each array, flattens trees: by joining their keys."""
    params = {"params": LAYERS[layout], "bias": np.ones(3, np.float32)}
    compression = gum_optax.LowRank(rank=2, storage=getattr(gum_optax.storages, storage)())
    optimizer = gum_optax.gum(
        0.1, compression, weight_dimension_numbers=dimension_numbers.scanned_layers
    )
    state = jax.eval_shape(optimizer.init, params)
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested, sep="/", keep_empty_nodes=True)
    assert any(path.count("basis") for path in flat)
    unflattened = flax.traverse_util.unflatten_dict(flat, sep="/")
    assert unflattened == nested
    assert flax.serialization.from_state_dict(state, unflattened) == state


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
def test_orbax_round_trip(tmp_path):
    """Saved in the middle of a period, a run goes on bit for bit, in a state made of shapes.

    The trees have a matrix that is always drawn, and where there is a fallback, leaves of it; two
    further periods include two further draws. All states go into one checkpoint: opening and
    closing one takes far longer than its contents do.
    """
    states = {name: _after_three_steps(name) for name in COMPILED}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(states))
        manager.wait_until_finished()
        shapes = {name: jax.eval_shape(compiled(name)[0].init, parameters(name)) for name in states}
        restored = manager.restore(3, args=ocp.args.StandardRestore(shapes))
    assert_equal(restored, states)
    for name, state in states.items():
        _, update = compiled(name)
        # Orbax puts arrays on a device for good, for which the update would be compiled anew.
        again = jax.tree.map(np.asarray, restored[name])
        assert_equal(run(update, again, name), run(update, state, name))
