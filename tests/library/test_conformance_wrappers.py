"""A transformation inside optax's wrappers gives the same updates as alone."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import described, jit_once
from tests.tables import (
    PERIOD,
    assert_close,
    assert_equal,
    compiled,
    each_kind,
    first_state,
    parameters,
)


def _scaled(factor, tree):
    return jax.tree.map(lambda leaf: np.float32(factor) * np.asarray(leaf), tree)


def _added(tree, other):
    return jax.tree.map(lambda a, b: a + np.asarray(b), tree, other)


def _is_zero(tree):
    return not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


@each_kind
def test_chains_masked_and_partition(name):
    """Masked leaves pass through; a group of another optimizer, or of none, is no trouble.

    What is inside gets the updates that it gets alone, at its place in a chain.
    """
    optimizer, update = compiled(name)
    params = {**parameters(name), "out": np.ones(3, np.float32)}
    mask = {**jax.tree.map(lambda _: True, parameters(name)), "out": False}
    labels = {**jax.tree.map(lambda _: "a", parameters(name)), "out": "b"}
    chained = optax.chain(
        optax.scale(1.0), optax.named_chain(("a", optimizer), ("b", optax.scale(-2.0)))
    )
    wrapped = optax.multi_transform(
        {"a": optax.masked(chained, lambda _: mask), "b": optax.identity(), "empty": optimizer},
        labels,
    )
    update_wrapped, state = jit_once(wrapped.update), wrapped.init(params)
    alone = first_state(name)
    for step in range(2 * PERIOD + 1):
        gradients = parameters(name, step)
        outside = np.full(3, 7.0, np.float32)
        got, state = update_wrapped({**gradients, "out": outside}, state, params)
        expected, alone = update(gradients, alone, parameters(name))
        np.testing.assert_array_equal(got.pop("out"), 7.0)
        assert_close(got, _scaled(-2.0, expected))


# Slots and a fallback, with parameters that the inner transformation reads and without.
@pytest.mark.parametrize("name", ["gum", "adamw_galore"])
def test_multi_steps_equals_the_run_on_averages(name):
    """Also where a large mini-batch is left out."""
    optimizer, update = compiled(name)
    params = parameters(name)
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=1e6)
    multi = optax.MultiSteps(optimizer, every_k_schedule=2, should_skip_update_fn=skip)
    update_multi = jit_once(multi.update)
    state, plain = jax.jit(multi.init)(params), first_state(name)
    for step in range(PERIOD + 1):
        first, second = parameters(name, 2 * step), parameters(name, 2 * step + 1)
        updates, state = update_multi(first, state, params)
        assert _is_zero(updates)
        updates, state = update_multi(_scaled(1e6, first), state, params)
        assert _is_zero(updates)
        got, state = update_multi(second, state, params)
        average = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, plain = update(average, plain, params)
        assert_close(got, expected, atol=5e-5)


# Without slots, and with them; orthogonalized directions are guarded in test_faults.py.
@pytest.mark.parametrize("name", ["low_rank_adamw", "adamw_galore"])
def test_apply_if_finite_leaves_the_state_alone(name):
    """A NaN where a refresh is due: key, count, bases and draws wait for the next step."""
    optimizer, update = compiled(name)
    params = parameters(name)
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    update_guarded = jit_once(guarded.update)
    state: Any = guarded.init(params)
    for step in range(PERIOD):
        _, state = update_guarded(parameters(name, step + 1), state, params)
    broken = parameters(name)
    for leaf in jax.tree.leaves(broken):
        leaf.flat[0] = np.nan
    updates, after = update_guarded(broken, state, params)
    assert_equal(after.inner_state, state.inner_state)
    assert _is_zero(updates)
    got, _ = update_guarded(parameters(name), after, params)
    expected, _ = update(parameters(name), state.inner_state, params)
    assert_close(got, expected)
    assert not _is_zero(got)


# Neither wrapper looks at what it holds: one holds draws and the other a fallback.
@pytest.mark.parametrize(
    ("wrap", "name"),
    [(optax.conditionally_transform, "scale_by_gum"), (optax.conditionally_mask, "adamw_galore")],
    ids=["conditionally_transform", "conditionally_mask"],
)
def test_conditional_steps(wrap, name):
    """Steps that are left out do not count: period and draws go by the others."""
    optimizer, update = compiled(name)
    params = parameters(name)
    conditional = wrap(optimizer, lambda step: step % 3 != 1)
    update_conditional = jit_once(conditional.update)
    state, plain = conditional.init(params), first_state(name)
    for step in range(5):
        gradients = parameters(name, step)
        got, state = update_conditional(gradients, state, params)
        if step % 3 != 1:
            expected, plain = update(gradients, plain, params)
            assert_close(got, expected)
        else:
            left = wrap is optax.conditionally_transform
            assert_equal(got, gradients if left else _scaled(0, gradients))
    assert_close(state.inner_state, plain)


def test_lookahead():
    name = "scale_by_gum"
    optimizer, update = compiled(name)
    params = parameters(name)
    wrapped = optax.lookahead(optimizer, sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params)
    state, plain, update_wrapped = wrapped.init(both), first_state(name), jit_once(wrapped.update)
    fast = slow = params
    for step in range(4):
        gradients = parameters(name, step)
        updates, state = update_wrapped(gradients, state, both)
        both = _added(both, updates)
        expected, plain = update(gradients, plain, fast)
        fast = _added(fast, expected)
        if step % 2:
            fast = slow = _scaled(0.5, _added(fast, slow))
        assert_close((both.fast, both.slow), (fast, slow))


def test_schedule_free():
    """Its definition: z takes the updates, x is the mean of z, gradients are taken between."""
    name, b1 = "adamw_galore", 0.9
    optimizer, update = compiled(name)
    x = z = y = params = parameters(name)
    wrapped = optax.contrib.schedule_free(optimizer, learning_rate=0.1, b1=b1)
    state, plain, update_wrapped = wrapped.init(y), first_state(name), jit_once(wrapped.update)
    for step in range(2 * PERIOD):
        gradients = parameters(name, step + 1)
        updates, state = update_wrapped(gradients, state, y)
        y = _added(y, updates)
        expected, plain = update(gradients, plain, params)
        z = _added(z, expected)
        x = jax.tree.map(lambda x, z, n=step + 1: x + (z - x) / np.float32(n), x, z)
    assert_close(y, _added(_scaled(b1, x), _scaled(1 - b1, z)))
    assert_close(jax.jit(optax.contrib.schedule_free_eval_params)(state, y), x)


def test_reduce_on_plateau():
    """A constant loss halves the updates after every two steps; the value passes through."""
    name = "gum"
    optimizer, update = compiled(name)
    params, plain = parameters(name), first_state(name)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=1)
    wrapped = optax.chain(optimizer, plateau)
    update_wrapped, state = jit_once(wrapped.update), wrapped.init(params)
    scales = []
    for step in range(6):
        gradients = parameters(name, step)
        got, state = update_wrapped(gradients, state, params, value=jnp.float32(1.0))
        expected, plain = update(gradients, plain, params)
        scales.append(float(state[1].scale))
        assert_close(got, _scaled(scales[-1], expected))
    assert_close(state[0], plain)
    assert len(set(scales)) >= 3


def test_mechanize():
    """The learning rate is learned outside; inside, updates are those of the optimizer alone."""
    name = "gum"
    optimizer, update = compiled(name)
    params, plain = parameters(name), first_state(name)
    wrapped = optax.contrib.mechanize(optimizer)
    update_wrapped, state = jit_once(wrapped.update), wrapped.init(params)
    for step in range(PERIOD + 1):
        gradients = parameters(name, step)
        got, state = update_wrapped(gradients, state, params)
        _, plain = update(gradients, plain, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    assert_close(state.base_optimizer_state, plain)


def test_sam():
    """Every second step takes back the adversarial one and updates by the gradient found there."""
    name = "gum"
    optimizer, update = compiled(name)
    start = params = parameters(name)
    wrapped = optax.contrib.sam(optimizer, optax.sgd(0.05), sync_period=2)
    update_wrapped, state, plain = jit_once(wrapped.update), wrapped.init(params), first_state(name)
    for step in range(4):
        gradients = parameters(name, step)
        updates, state = update_wrapped(gradients, state, params)
        params = _added(params, updates)
        if step % 2:
            expected, plain = update(gradients, plain, start)
            start = _added(start, expected)
            assert_close(params, start)
    assert_close(state.opt_state, plain)


def test_flatten_leaves_no_matrices():
    """One long vector has no rows: an error, or with a fallback a model of vectors alone."""
    params = parameters("scale_by_gum")
    with pytest.raises(ValueError, match=r"shape \(120,\), and a matrix needs at least two axes"):
        jax.eval_shape(optax.flatten(compiled("scale_by_gum")[0]).init, params)
    state = jax.eval_shape(optax.flatten(compiled("gum")[0]).init, params)
    assert optax.tree.get(state, "LowRankState").basis == {}


def test_wrapped_states_have_no_second_type():
    """All wrappers at once: the state of every later step has the types of the first."""
    optimizer = optax.apply_if_finite(
        optax.chain(optax.masked(compiled("gum")[0], lambda p: jax.tree.map(lambda _: True, p))), 2
    )
    optimizer = optax.MultiSteps(optimizer, every_k_schedule=2)
    params = parameters("gum", dtype=jnp.bfloat16)
    state = optimizer.init(params)
    _, after = jax.eval_shape(optimizer.update, parameters("gum"), state, params)
    assert described(after) == described(state)
    assert_equal(optax.tree.map_params(optimizer, lambda x: x, state), state)
