"""Every transformation keeps every promise that optax's own transformations keep."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses
import functools
import warnings

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import dimension_numbers, storages
from tests.helpers import described
from tests.tables import (
    ALIASES,
    OPTIMIZERS,
    PERIOD,
    PROJECTED,
    SIMPLE,
    STRUCTURE,
    TRANSFORMATIONS,
    TREES,
    any_number_of_steps,
    assert_close,
    assert_equal,
    compiled,
    each_kind,
    every,
    every_tree,
    parameters,
    program,
    run,
    transformation,
    values,
)

# Compilation -------------------------------------------------------------------------------------


@every
def test_compiles_once(name):
    """From the fresh state on: its types, weak ones too, are those of every later state."""
    optimizer, _ = compiled(name)
    fresh = optimizer.init(parameters(name))
    _, state = jax.eval_shape(optimizer.update, parameters(name), fresh, parameters(name))
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(fresh)]
    assert [leaf.weak_type for leaf in types] == [False] * len(types)
    assert [(s.shape, s.dtype, s.weak_type) for s in jax.tree.leaves(state)] == [
        (s.shape, s.dtype, s.weak_type) for s in types
    ]


@every
def test_no_second_compilation(name):
    """`compiled` refuses a second trace, in every test that runs it."""
    optimizer, update = compiled(name)
    run(update, optimizer.init(parameters(name)), name)
    assert update._cache_size() == 1


@every
def test_init_needs_shapes_alone(name):
    """And gives the same state from them."""
    optimizer, _ = compiled(name)
    params = parameters(name)
    state = optimizer.init(params)
    abstract = jax.eval_shape(lambda: params)
    assert_equal(optimizer.init(abstract), state)
    shapes = jax.eval_shape(optimizer.init, abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert described(shapes) == described(state)


@each_kind
def test_scan_equals_loop(name):
    optimizer, update = compiled(name)
    params = parameters(name)
    expected, final = run(update, optimizer.init(params), name)
    gradients = [parameters(name, seed + 1) for seed in range(len(expected))]

    @jax.jit
    def scanned(state, gradients):
        def step(state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, state, gradients)

    state, got = scanned(optimizer.init(params), _stack(gradients))
    assert_close(state, final)
    assert_close(got, _stack(expected))


def _stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.parametrize("name", ["scale_by_gum", "low_rank_adam"])
@pytest.mark.parametrize(
    "over", [jax.vmap, lambda f: functools.partial(jax.lax.map, f)], ids=["vmap", "lax.map"]
)
def test_many_runs_at_once(name, over):
    """Over seeds of the optimizer and of its gradients."""
    optimizer, update = compiled(name)
    params, seeds = parameters(name), jnp.arange(2)
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

    got, states = jax.jit(over(two_steps))((seeds, _stack(gradients)))
    for i, gradient in enumerate(gradients):
        state = optimizer.init(params)._replace(key=jax.random.key_data(jax.random.key(i)))
        _, state = update(gradient, state, params)
        expected, state = update(gradient, state, params)
        assert_close(jax.tree.map(lambda x, i=i: x[i], (got, states)), (expected, state))


def test_a_seed_may_be_traced():
    def make(key):
        compression = dataclasses.replace(STRUCTURE, key=key)
        return gum_optax.scale_by_gum(compression).init(parameters("scale_by_gum"))

    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    states = jax.vmap(make)(keys)
    np.testing.assert_array_equal(states.key, jax.random.key_data(keys))


def _donated(name):
    """A step that takes the buffers of parameters and state, and its arguments.

    In bfloat16 with float32 gradients: were a type of the state to drift, a buffer would not fit.
    """
    optimizer, _ = compiled(name)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = parameters(name, dtype=jnp.bfloat16)
    return step, params, optimizer.init(params), parameters(name, 1)


@every
def test_every_donated_buffer_can_take_a_new_value(name):
    """No buffer of the state is shared; lowering gives each a result of its type, or warns."""
    step, params, state, gradients = _donated(name)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)
    lowered = step.lower(params, state, gradients)
    assert lowered.as_text().count("tf.aliasing_output") == len(buffers)


@each_kind
def test_donated_states_and_parameters(name):
    step, params, state, gradients = _donated(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PERIOD + 1):
            old = jax.tree.leaves((params, state))
            params, state = step(params, state, gradients)
            assert all(x.is_deleted() for x in old)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(gradients))
    compiled(name)[0].init(params)  # the factory holds nothing that was donated


# Types -------------------------------------------------------------------------------------------

DTYPES = [
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
]
every_dtype = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda d: "-".join(jnp.dtype(x).name for x in d)
)


@every
@every_dtype
def test_dtypes_do_not_drift(name, dtypes):
    """The state keeps its types; updates have those of the gradients."""
    params, gradients = (parameters(name, seed, dtype) for seed, dtype in enumerate(dtypes))
    state, after, updates = any_number_of_steps(compiled(name)[0], params, gradients)
    assert described(after) == described(state)
    assert described(updates) == described(gradients)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", jnp.float32])
def test_a_storage_decides_the_dtype_of_the_inner_state_alone(dtype):
    params = parameters("scale_by_gum", dtype=jnp.bfloat16)
    compression = dataclasses.replace(STRUCTURE, storage=storages.cast(dtype))
    state, after, _ = any_number_of_steps(gum_optax.scale_by_gum(compression), params)
    for s in (state, after):
        momentum = jax.tree.leaves((s.inner, s.uncompressed))
        assert {m.dtype for m in momentum} == {jnp.dtype(dtype)}
        assert {b.dtype for b in s.basis.values()} == {jnp.dtype(jnp.float32)}


def test_momentum_has_the_parameters_dtype_by_default():
    for dtype in (jnp.float32, jnp.bfloat16):
        state = gum_optax.scale_by_gum(STRUCTURE).init(parameters("scale_by_gum", dtype=dtype))
        momentum = jax.tree.leaves((state.inner, state.uncompressed))
        assert {m.dtype for m in momentum} == {jnp.dtype(dtype)}


# Extra arguments ---------------------------------------------------------------------------------


@every
def test_unknown_extra_arguments_are_ignored(name):
    optimizer, _ = compiled(name)
    params = parameters(name)
    state = optimizer.init(params)
    extra = functools.partial(optimizer.update, value=1.0, loss_fn=None)
    assert program(extra, params, state, params) == program(optimizer.update, params, state, params)


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = parameters("low_rank_identity")
    optimizer = gum_optax.low_rank(inner, SIMPLE)
    # The first update of `trace` is its gradient.
    plain, update_plain = compiled("low_rank_trace")
    got, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, value=3.0)
    expected, _ = update_plain(params, plain.init(params), params)
    assert_close(got, jax.tree.map(lambda u: 3.0 * u, expected))
    # Through `for_matrices`, a mask and a chain: the update follows from the value alone.
    whole = gum_optax.for_matrices(gum_optax.low_rank(inner, PROJECTED), 1.0)
    update_whole, state = jax.jit(whole.update), whole.init(params)
    got, _ = update_whole(params, state, params, value=2.0)
    once, _ = update_whole(params, state, params, value=1.0)
    assert_close(got, jax.tree.map(lambda u: 2.0 * u, once))


@pytest.mark.parametrize("name", ["scale_by_gum", "adamw_galore"])
def test_params_are_optional_where_nothing_decays(name):
    optimizer, update = compiled(name)
    params = parameters(name)
    expected, _ = update(params, optimizer.init(params), params)
    if name == "adamw_galore":
        optimizer = gum_optax.adamw(0.1, PROJECTED, weight_decay=0.0, fallback=optax.sgd(0.1))
    without, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    for matrices in ("layers", "single"):
        assert_close(without[matrices], expected[matrices])


# Trees -------------------------------------------------------------------------------------------


@every_tree
def test_every_tree(name, tree):
    params = TREES[tree]
    optimizer, _ = compiled(name)
    state, after, updates = any_number_of_steps(optimizer, params)
    mapped = optax.tree.map_params(optimizer, lambda x: x, state)
    for other in (after, mapped):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert described(other) == described(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert described(updates) == described(params)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


CONTAINERS = {
    "frozen": (flax.core.freeze, lambda tree: {**tree, "layers": dict(enumerate(tree["layers"]))}),
    "None among layers": (lambda tree: {**tree, "layers": [None, *tree["layers"], None]}, None),
    "masked among layers": (
        lambda tree: {**tree, "layers": [tree["layers"][0], optax.MaskedNode(), tree["layers"][1]]},
        None,
    ),
    "tuple": (lambda tree: {**tree, "layers": tuple(tree["layers"])}, None),
}


@each_kind
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_change_nothing(name, container):
    """The same leaves by the same names give the same program, draws included."""
    wrap, prepare = CONTAINERS[container]
    optimizer, _ = compiled(name)
    plain = parameters(name)
    plain = plain if prepare is None else prepare(plain)
    wrapped = wrap(plain)
    assert program(optimizer.init, wrapped) == program(optimizer.init, plain)
    programs = [
        program(optimizer.update, tree, optimizer.init(tree), tree) for tree in (wrapped, plain)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("name", ALIASES)
def test_prefixes_of_dimension_numbers(name):
    """A tree, a prefix of it and a function say the same."""
    factory = gum_optax.gum if name.startswith("gum") else gum_optax.adamw
    _, compression = TRANSFORMATIONS[name]
    matrix = dimension_numbers.MuonDimensionNumbers(-2, -1)
    params = parameters(name)
    forms = [
        {"layers": [{"w": matrix}, {"w": matrix}], "single": matrix, "bias": None, "embed": None},
        {"layers": matrix, "single": matrix, "bias": None, "embed": None},
        dimension_numbers.default,
        None,
    ]
    optimizers = [factory(0.1, compression, weight_dimension_numbers=form) for form in forms]
    programs = {program(tx.update, params, tx.init(params), params) for tx in optimizers}
    assert len(programs) == 1


@pytest.mark.parametrize("name", ALIASES)
def test_a_model_without_matrices(name):
    optimizer, _ = compiled(name)
    params = {"b": jnp.ones(3), "embed": jnp.ones((4, 6))}
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert all(np.any(u) for u in jax.tree.leaves(updates))


# Learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gum", "adamw_galore", "adamw"])
def test_learning_rate_schedules_count_steps(name):
    """A schedule goes on over refreshes: at the second period it is not back at its start."""
    schedule = optax.piecewise_constant_schedule(0.1, {PERIOD: 0.5, 2 * PERIOD: 0.0})
    params = jax.tree.map(jnp.zeros_like, parameters(name))
    scheduled, (constant, update) = transformation(name, schedule), compiled(name)
    got, _ = run(jax.jit(scheduled.update), scheduled.init(params), name, params=params)
    expected, _ = run(update, constant.init(params), name, params=params)
    for step, (updates, reference) in enumerate(zip(got, expected, strict=True)):
        factor = [1.0, 0.5, 0.0][step // PERIOD]
        assert_close(updates, jax.tree.map(lambda u, f=factor: f * u, reference))


@every
def test_a_quadratic_shrinks(name):
    """``|w - w*|^2 / 2`` over all leaves."""
    optimizer, update = compiled(name)
    rate = 1.0 if name in OPTIMIZERS else -0.05
    target = values(parameters(name), seed=9)
    params = jax.tree.map(jnp.zeros_like, target)
    state = optimizer.init(params)

    @jax.jit
    def gradient(params):
        return optax.tree.sub(params, target)

    @jax.jit
    def apply(params, updates):
        return jax.tree.map(lambda p, u: p + rate * u, params, updates)

    for _ in range(100):
        updates, state = update(gradient(params), state, params)
        params = apply(params, updates)
    assert _squares(gradient(params)) < 0.3 * _squares(target)


def _squares(tree):
    return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))
