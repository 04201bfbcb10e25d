"""Every transformation keeps every promise that optax's own transformations keep."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gum_optax
from gum_optax import projectors, samplers

PERIOD = 2
STRUCTURE = {"rank": 2, "period": PERIOD}


def _first(count):
    """A sampler without random numbers, which take longest to compile."""
    if count == 1:
        return samplers.fixed_size(1)(1)
    return samplers.Sampling(1, 1 / count, lambda key: jnp.zeros(1, jnp.int32))


def _coordinates(key, gradient, rank, previous_basis):
    return jnp.eye(gradient.shape[0], rank)


SIMPLE = {**STRUCTURE, "sampler": _first, "projector": _coordinates}

# name -> transformation, from the learning rate where it takes one.
TRANSFORMATIONS = {
    "gum": lambda lr=0.1, **_: gum_optax.gum(lr, 2, PERIOD, 1, weight_decay=0.01),
    "scale_by_gum": lambda **_: gum_optax.scale_by_gum(2, PERIOD, 1),
    "low_rank_adam": lambda parts=SIMPLE: gum_optax.low_rank(optax.scale_by_adam(), **parts),
    "low_rank_identity": lambda parts=SIMPLE: gum_optax.low_rank(optax.identity(), **parts),
    "low_rank_adamw": lambda parts=SIMPLE: gum_optax.low_rank(
        optax.adamw(0.1, weight_decay=0.1), restart=False, **parts
    ),
    "galore": lambda lr=0.1, **_: gum_optax.galore(lr, 2, PERIOD),
    "golore": lambda lr=0.1, **_: gum_optax.golore(lr, 2, PERIOD, switch_step=2),
    "unbiased_adamw": lambda lr=0.1, parts=SIMPLE: gum_optax.unbiased_adamw(lr, **parts),
}
ALIASES = ["gum", "galore", "golore", "unbiased_adamw"]
every = pytest.mark.parametrize("name", TRANSFORMATIONS)
# Where each case is a compilation of its own: every kind of base, slots or none, alias or engine.
each_kind = pytest.mark.parametrize("name", ["gum", "low_rank_adamw", "golore"])


def _tree(name, seed=0, dtype=jnp.float32):
    """Sampled matrices and a dense one; for aliases a vector and a table too."""
    shapes = {"layers": [{"w": (5, 8)}, {"w": (5, 8)}], "single": (8, 5)}
    if name in ALIASES:
        shapes |= {"bias": (8,), "embed": (7, 5)}
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def _compiled(name):
    """The transformation and its compiled update, shared by the tests that change neither."""
    optimizer = TRANSFORMATIONS[name]()
    return optimizer, jax.jit(optimizer.update)


def _run(update, state, name, steps=2 * PERIOD + 1, params=None):
    """Updates over several periods on fixed gradients; returns all updates and the state."""
    params = _tree(name) if params is None else params
    results = []
    for step in range(steps):
        updates, state = update(_tree(name, seed=step + 1), state, params)
        results.append(updates)
    return results, state


def _assert_equal(left, right):
    """The same tree, bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def _assert_close(left, right, atol=5e-6):
    """The same tree, up to the order of float32 operations in another program.

    Measured over the tests here: 5e-7; 8e-6 where averages of gradients are orthogonalized.
    """
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def _specs(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)


def _float32(x):
    return np.asarray(x, np.float32)


# Compilation -------------------------------------------------------------------------------------


@every
def test_compiles_once(name):
    optimizer, update = _compiled(name)
    _, state = _run(update, optimizer.init(_tree(name)), name, steps=1)
    programs = update._cache_size()
    _run(update, state, name, steps=2 * PERIOD + 1)
    assert update._cache_size() == programs


@every
def test_init_is_abstract(name):
    """``init`` needs shapes alone, and gives the same state from them."""
    optimizer, _ = _compiled(name)
    params = _tree(name)
    state = optimizer.init(params)
    abstract = jax.eval_shape(lambda: params)
    assert _specs(optimizer.init(abstract)) == _specs(state)
    shapes = jax.eval_shape(optimizer.init, abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [
        (s.shape, s.dtype) for s in jax.tree.leaves(state)
    ]


@each_kind
def test_scan_equals_loop(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    expected, final = _run(update, optimizer.init(params), name)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[_tree(name, s + 1) for s in range(5)])

    @jax.jit
    def scanned(state, gradients):
        def step(state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, state, gradients)

    state, got = scanned(optimizer.init(params), stacked)
    _assert_close(state, final)
    _assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@pytest.mark.parametrize("name", ["scale_by_gum", "low_rank_adam"])
def test_vmap_over_seeds_of_the_gradients(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    gradients = [_tree(name, seed) for seed in (5, 6)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    state = optimizer.init(params)
    batched = jax.jit(jax.vmap(optimizer.update, in_axes=(0, 0, None)))
    got, states = batched(stack(gradients), stack([state, state]), params)
    got, _ = batched(stack(gradients), states, params)
    for i, gradient in enumerate(gradients):
        _, alone = update(gradient, state, params)
        expected, _ = update(gradient, alone, params)
        _assert_close(jax.tree.map(lambda x, i=i: x[i], got), expected)


@every
def test_donated_states_and_parameters(name):
    """No buffer of the state is shared, and every one can take the new value.

    In bfloat16 with float32 gradients: were a type of the state to drift, a buffer would not fit.
    """
    optimizer, _ = _compiled(name)
    params = _tree(name, dtype=jnp.bfloat16)
    state = optimizer.init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradients = _tree(name, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PERIOD + 1):
            old = jax.tree.leaves((params, state))
            params, state = step(params, state, gradients)
            assert all(x.is_deleted() for x in old)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.tree.map(_float32, params)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(gradients))
    optimizer.init(params)  # the factory holds nothing that was donated


# Wrappers ----------------------------------------------------------------------------------------


@each_kind
def test_chain_and_named_chain(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    expected, _ = _run(update, optimizer.init(params), name)
    chained = optax.chain(
        optax.scale(1.0), optax.named_chain(("a", optimizer), ("b", optax.scale(-2.0)))
    )
    got, _ = _run(jax.jit(chained.update), chained.init(params), name)
    _assert_close(got, jax.tree.map(lambda u: -2.0 * u, expected))


@each_kind
def test_masked_and_partition(name):
    """Leaves outside pass through; a group of another optimizer, or of none, is no trouble."""
    optimizer, _ = _compiled(name)
    params = {"in": _tree(name), "out": jnp.ones(3)}
    gradients = {"in": _tree(name, 1), "out": jnp.full(3, 7.0)}
    mask = {"in": jax.tree.map(lambda _: True, params["in"]), "out": False}
    wrapper = optax.partition(
        {"a": optax.masked(optimizer, lambda _: mask), "b": optax.identity(), "empty": optimizer},
        {"in": "a", "out": "b"},
    )
    update, state = jax.jit(wrapper.update), wrapper.init(params)
    for _ in range(PERIOD + 1):
        updates, state = update(gradients, state, params)
        np.testing.assert_array_equal(updates["out"], 7.0)
        assert _shape_dtypes(updates) == _shape_dtypes(params)
        assert all(np.isfinite(u).all() and np.any(u) for u in jax.tree.leaves(updates))


@each_kind
def test_a_mask_changes_nothing_inside(name):
    """Masked leaves are absent: what is left gets the updates that it gets alone."""
    optimizer, update = _compiled(name)
    params, gradients = _tree(name), _tree(name, 1)
    expected, _ = update(gradients, optimizer.init(params), params)
    wrapped = {**params, "out": jnp.ones(3)}
    masked = optax.masked(optimizer, {**jax.tree.map(lambda _: True, params), "out": False})
    got, _ = jax.jit(masked.update)(
        {**gradients, "out": jnp.zeros(3)}, masked.init(wrapped), wrapped
    )
    got.pop("out")
    _assert_close(got, expected)


@each_kind
def test_multi_steps_equals_the_run_on_averages(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    multi = optax.MultiSteps(optimizer, every_k_schedule=2)
    update_multi = jax.jit(multi.update)
    state, plain = multi.init(params), optimizer.init(params)
    for step in range(PERIOD + 1):
        first, second = _tree(name, 2 * step), _tree(name, 2 * step + 1)
        skipped, state = update_multi(first, state, params)
        assert not any(np.any(u) for u in jax.tree.leaves(skipped))
        got, state = update_multi(second, state, params)
        average = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, plain = update(average, plain, params)
        _assert_close(got, expected, atol=5e-5)


@each_kind
def test_apply_if_finite_leaves_the_state_alone(name):
    optimizer, _ = _compiled(name)
    params = _tree(name)
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    update = jax.jit(guarded.update)
    _, state = _run(update, guarded.init(params), name, steps=PERIOD)  # the next step refreshes
    broken = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), _tree(name))
    updates, after = update(broken, state, params)
    _assert_equal(after.inner_state, state.inner_state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    updates, _ = update(_tree(name), after, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert any(np.any(u) for u in jax.tree.leaves(updates))


INJECTED = {
    "gum": (gum_optax.gum, {
        "rank": 2, "period": PERIOD, "full_rank_layers": 1, "beta": 0.9, "weight_decay": 0.1,
        "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        "weight_dimension_numbers": lambda p: gum_optax.dimension_numbers.default(p),
        "projector": projectors.random_orthonormal, "sampler": samplers.fixed_size(1),
        "stack_by": gum_optax.by_shape, "consistent_rms": 0.2, "key": 3,
    }),
    "galore": (gum_optax.galore, {
        "rank": 2, "period": PERIOD, "scale": 0.25, "projector": projectors.svd,
        "inner": optax.scale_by_adam(b1=0.8),
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
    params = _tree("gum")
    learning_rate = 0.1 if case == "galore" else optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(factory)(learning_rate, **options)
    plain = factory(learning_rate, **options)
    update = jax.jit(injected.update)
    got, state = _run(update, injected.init(params), "gum")
    expected, final = _run(jax.jit(plain.update), plain.init(params), "gum")
    # A rate and a beta of float32 arrays in place of Python floats.
    _assert_close(got, expected)
    low_rank_states = (optax.tree.get(s, "LowRankState") for s in (state.inner_state, final))
    _assert_close(*low_rank_states)
    assert "learning_rate" in state.hyperparams
    assert not set(state.hyperparams) & {"rank", "period", "key", "full_rank_layers", "switch_step"}


def test_injected_hyperparameters_can_be_set_between_steps():
    params = _tree("gum")
    injected = optax.inject_hyperparams(gum_optax.gum)(0.1, rank=2, weight_decay=0.0)
    update = jax.jit(injected.update)
    state = injected.init(params)
    full, _ = update(params, state, params)
    rate = state.hyperparams["learning_rate"]
    state.hyperparams["learning_rate"] = jnp.full_like(rate, 0.05)
    half, _ = update(params, state, params)
    assert update._cache_size() == 1
    _assert_close(jax.tree.map(lambda u: 0.5 * u, full), half)


@pytest.mark.parametrize("case", ["low_rank", "scale_by_gum"])
def test_inject_hyperparams_on_transformations_without_rate(case):
    factory, options = {
        "low_rank": (gum_optax.low_rank, {"inner": optax.scale_by_adam(), **STRUCTURE}),
        "scale_by_gum": (gum_optax.scale_by_gum, {"beta": optax.linear_schedule(0.5, 0.9, 4),
                                                  **STRUCTURE}),
    }[case]  # fmt: skip
    params = _tree(case)
    injected = optax.inject_hyperparams(factory)(**options)
    updates, state = _run(jax.jit(injected.update), injected.init(params), case)
    assert set(state.hyperparams) == ({"beta", "eps"} if case == "scale_by_gum" else set())
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["gum", "galore", "unbiased_adamw"])
def test_learning_rate_schedules_count_steps(name):
    """A schedule goes on over refreshes: at the second period it is not back at its start."""
    schedule = optax.piecewise_constant_schedule(1.0, {PERIOD: 0.5, 2 * PERIOD: 0.0})
    params = jax.tree.map(jnp.zeros_like, _tree(name))
    scheduled, constant = TRANSFORMATIONS[name](schedule), TRANSFORMATIONS[name](1.0)
    got, _ = _run(jax.jit(scheduled.update), scheduled.init(params), name, params=params)
    expected, _ = _run(jax.jit(constant.update), constant.init(params), name, params=params)
    for step, (updates, reference) in enumerate(zip(got, expected, strict=True)):
        factor = [1.0, 0.5, 0.0][step // PERIOD]
        _assert_close(updates, jax.tree.map(lambda u, f=factor: f * u, reference))


# Types -------------------------------------------------------------------------------------------

DTYPES = [
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
]


@every
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(jnp.dtype(x).name for x in d))
def test_dtypes_do_not_drift(name, dtypes):
    """The state keeps its types; updates have those of the gradients."""
    of_params, of_gradients = dtypes
    optimizer, _ = _compiled(name)
    params, gradients = _tree(name, 0, of_params), _tree(name, 1, of_gradients)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradients, state, params)
    assert _shape_dtypes(after) == _shape_dtypes(state)
    if name not in ALIASES:
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(of_gradients)}


def _shape_dtypes(tree):
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@pytest.mark.parametrize("name", ["gum", "galore", "unbiased_adamw"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(jnp.dtype(x).name for x in d))
def test_updates_of_matrices_have_the_gradients_dtype(name, dtypes):
    optimizer, _ = _compiled(name)
    params, gradients = _tree(name, 0, dtypes[0]), _tree(name, 1, dtypes[1])
    updates, _ = jax.eval_shape(optimizer.update, gradients, optimizer.init(params), params)
    assert updates["layers"][0]["w"].dtype == updates["single"].dtype == dtypes[1]


@pytest.mark.parametrize("momentum_dtype", [jnp.bfloat16, "bfloat16", jnp.float32])
def test_momentum_dtype(momentum_dtype):
    params = _tree("scale_by_gum", dtype=jnp.bfloat16)
    optimizer = gum_optax.scale_by_gum(**STRUCTURE, momentum_dtype=momentum_dtype)
    state = optimizer.init(params)
    _, after = jax.eval_shape(optimizer.update, params, state, params)
    for s in (state, after):
        momentum = jax.tree.leaves((s.inner, s.dense))
        assert {m.dtype for m in momentum} == {jnp.dtype(momentum_dtype)}
        assert {b.dtype for b in s.basis.values()} == {jnp.dtype(jnp.float32)}


def test_momentum_has_the_parameters_dtype_by_default():
    for dtype in (jnp.float32, jnp.bfloat16):
        state = gum_optax.scale_by_gum(**STRUCTURE).init(_tree("scale_by_gum", dtype=dtype))
        assert {m.dtype for m in jax.tree.leaves((state.inner, state.dense))} == {jnp.dtype(dtype)}


# Extra arguments ---------------------------------------------------------------------------------


@each_kind
def test_extra_arguments_are_ignored_by_bases_without_them(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    state = optimizer.init(params)
    expected, _ = update(params, state, params)
    got, _ = jax.jit(optimizer.update)(params, state, params, value=jnp.float32(1.0))
    _assert_equal(got, expected)


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: value * u, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = _tree("low_rank_identity")
    optimizer = gum_optax.low_rank(base, **SIMPLE)
    plain, _ = _compiled("low_rank_identity")
    got, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, value=3.0)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    _assert_close(got, jax.tree.map(lambda u: 3.0 * u, expected))
    through = gum_optax.galore(1.0, **STRUCTURE, inner=base)
    got, _ = jax.jit(through.update)(params, through.init(params), params, value=2.0)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(got))


@pytest.mark.parametrize("name", ["scale_by_gum", "low_rank_adam", "low_rank_identity", "galore"])
def test_params_are_optional_where_nothing_decays(name):
    optimizer, update = _compiled(name)
    if name == "galore":
        optimizer = gum_optax.galore(0.1, 2, PERIOD, fallback=optax.sgd(0.1))
        update = jax.jit(optimizer.update)
    params = _tree(name)
    got, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    expected, _ = update(params, optimizer.init(params), params)
    _assert_close(got, expected)


# Odd trees ---------------------------------------------------------------------------------------

ODD = {
    "empty dict": {},
    "empty list": [],
    "only None": [None],
    "None leaves": {"w": [jnp.ones((4, 6)), None, jnp.ones((4, 6))], "none": None},
    "masked nodes": {"w": [jnp.ones((4, 6)), optax.MaskedNode(), jnp.ones((4, 6))]},
    "single": {"w": jnp.ones((4, 6))},
    "array": jnp.ones((4, 6)),
}


@every
@pytest.mark.parametrize("kind", ODD)
def test_odd_trees(name, kind):
    optimizer, _ = _compiled(name)
    params = ODD[kind]
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert _shape_dtypes(after) == _shape_dtypes(state)


@pytest.mark.parametrize("name", ALIASES)
def test_a_model_without_matrices(name):
    optimizer, _ = _compiled(name)
    params = {"b": jnp.ones(3), "embed": jnp.ones((4, 6))}
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert all(np.any(u) for u in jax.tree.leaves(updates))


# Trees of states ---------------------------------------------------------------------------------


@every
def test_map_params_without_effect(name):
    optimizer, update = _compiled(name)
    _, state = _run(update, optimizer.init(_tree(name)), name, steps=1)
    _assert_equal(optax.tree.map_params(optimizer, lambda x: x, state), state)


@every
def test_the_state_is_found_by_name(name):
    optimizer, update = _compiled(name)
    _, state = _run(update, optimizer.init(_tree(name)), name, steps=3)
    found = optax.tree.get(state, "LowRankState")
    assert isinstance(found, gum_optax.LowRankState)
    assert int(found.count) == 3
    assert optax.tree.get(state, "basis") is found.basis
    assert optax.tree.get(state, "slots") is found.slots
    if name in ("scale_by_gum", "low_rank_identity"):
        assert int(optax.tree.get(state, "count")) == 3


@every
def test_states_hold_plain_arrays_that_are_not_empty(name):
    """Orbax refuses arrays without elements, and NumPy cannot read typed keys."""
    optimizer, _ = _compiled(name)
    for leaf in jax.tree.leaves(optimizer.init(_tree(name))):
        assert isinstance(leaf, jax.Array)
        assert leaf.size > 0
        assert np.asarray(leaf).dtype == leaf.dtype


@every
def test_flax_serialization_round_trip(name):
    optimizer, update = _compiled(name)
    params = _tree(name)
    _, state = _run(update, optimizer.init(params), name, steps=3)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(optimizer.init(params), data)
    _assert_equal(restored, state)
    restored = jax.tree.map(jnp.asarray, restored)
    _assert_equal(_run(update, restored, name, 2)[0], _run(update, state, name, 2)[0])


@pytest.mark.parametrize("name", ["gum", "golore", "low_rank_identity"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
def test_orbax_round_trip(name, tmp_path):
    """Saved in the middle of a period, a run goes on bit for bit, in a state made of shapes."""
    optimizer, update = _compiled(name)
    params = _tree(name)
    _, state = _run(update, optimizer.init(params), name, steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(optimizer.init, params)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    _assert_equal(restored, state)
    _assert_equal(_run(update, restored, name)[0], _run(update, state, name)[0])


# Learning ----------------------------------------------------------------------------------------


@every
def test_a_quadratic_shrinks(name):
    """``|w - w*|^2 / 2`` over all leaves."""
    target = _tree(name, 9)
    params = jax.tree.map(jnp.zeros_like, target)
    optimizer = TRANSFORMATIONS[name](parts=STRUCTURE)
    if name not in ALIASES and name != "low_rank_adamw":
        optimizer = optax.chain(optimizer, optax.scale_by_learning_rate(0.05))

    def loss(params):
        return 0.5 * optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=60)[0][0]

    assert loss(train(params, optimizer.init(params))) < 0.3 * loss(params)
