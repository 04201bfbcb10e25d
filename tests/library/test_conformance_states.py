"""States as trees: found by name, mapped, serialized, saved and restored."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gum_optax
from tests.tables import (
    ALIASES,
    TRANSFORMATIONS,
    assert_equal,
    compiled,
    every,
    parameters,
    run,
)


@functools.cache
def _after_three_steps(name):
    optimizer, update = compiled(name)
    return run(update, optimizer.init(parameters(name)), name, steps=3)[1]


@every
def test_map_params_without_effect(name):
    state = _after_three_steps(name)
    assert_equal(optax.tree.map_params(compiled(name)[0], lambda x: x, state), state)


def test_map_params_reaches_what_is_shaped_like_parameters():
    """The fallback's moments and those of others in the chain; nothing of low rank."""
    optimizer = optax.chain(optax.scale_by_adam(), compiled("gum")[0])
    state = optimizer.init(parameters("gum"))
    marked = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(marked), strict=True
        )
        if np.any(old != new)
    }
    leaves = ("bias", "embed", "layers/0/w", "layers/1/w", "single")
    fallback = "1/inner_states/fallback/inner_state/0"
    assert changed == {
        *(f"0/{moment}/{leaf}" for moment in ("mu", "nu") for leaf in leaves),
        *(f"{fallback}/{moment}/{leaf}" for moment in ("mu", "nu") for leaf in ("bias", "embed")),
    }


@every
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


@pytest.mark.parametrize("name", ALIASES)
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


@every
def test_states_hold_plain_arrays_that_are_not_empty(name):
    """Orbax refuses arrays without elements, and NumPy cannot read typed keys."""
    optimizer, _ = compiled(name)
    for leaf in jax.tree.leaves(optimizer.init(parameters(name))):
        assert isinstance(leaf, jax.Array)
        assert leaf.size > 0
        assert np.asarray(leaf).dtype == leaf.dtype


@every
def test_flax_serialization_round_trip(name):
    optimizer, update = compiled(name)
    state = _after_three_steps(name)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(optimizer.init(parameters(name)), data)
    assert_equal(restored, state)
    restored = jax.tree.map(jnp.asarray, restored)
    assert_equal(run(update, restored, name, 2)[0], run(update, state, name, 2)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
def test_orbax_round_trip(tmp_path):
    """Saved in the middle of a period, a run goes on bit for bit, in a state made of shapes.

    The trees have a matrix that is always drawn, and where there is a fallback, leaves of it; two
    further periods include two further draws. All states go into one checkpoint: opening and
    closing one takes far longer than its contents do.
    """
    states = {name: _after_three_steps(name) for name in TRANSFORMATIONS}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(states))
        manager.wait_until_finished()
        shapes = {name: jax.eval_shape(compiled(name)[0].init, parameters(name)) for name in states}
        restored = manager.restore(3, args=ocp.args.StandardRestore(shapes))
    assert_equal(restored, states)
    for name, state in states.items():
        _, update = compiled(name)
        assert_equal(run(update, restored[name], name), run(update, state, name))
