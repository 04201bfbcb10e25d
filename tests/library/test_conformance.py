"""Every transformation has the properties that optax's own transformations have.

These are the properties that tracing shows: types, trees, arguments. Tests that run transformations
are in test_conformance_states.py.
"""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses
import functools

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
    COMPILED,
    KINDS,
    STRUCTURE,
    TRANSFORMATIONS,
    TREES,
    any_number_of_steps,
    assert_equal,
    each_kind,
    every,
    every_tree,
    first_state,
    parameters,
    program,
    traced,
    transformation,
)

# States ------------------------------------------------------------------------------------------


@every
def test_compiles_once(name):
    """From the fresh state on: its types, weak ones too, are those of every later state."""
    fresh = first_state(name)
    _, state = traced(name).update.eval_shape(parameters(name), fresh, parameters(name))
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(fresh)]
    assert [leaf.weak_type for leaf in types] == [False] * len(types)
    assert [(s.shape, s.dtype, s.weak_type) for s in jax.tree.leaves(state)] == [
        (s.shape, s.dtype, s.weak_type) for s in types
    ]


@every
def test_init_needs_shapes_alone(name):
    """And gives the same state from them."""
    optimizer, state = traced(name), first_state(name)
    abstract = jax.eval_shape(lambda: parameters(name))
    assert_equal(optimizer.init(abstract), state)
    shapes = jax.eval_shape(optimizer.init, abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert described(shapes) == described(state)


def test_a_seed_may_be_traced():
    def make(key):
        compression = dataclasses.replace(STRUCTURE, key=key)
        return gum_optax.scale_by_gum(compression).init(parameters("scale_by_gum"))

    keys = jax.vmap(jax.random.key)(np.arange(3))
    states = jax.jit(jax.vmap(make))(keys)
    np.testing.assert_array_equal(states.key, jax.random.key_data(keys))


@every
def test_no_buffer_of_a_state_is_shared(name):
    """So that every buffer can be donated; each takes a new value, as no type drifts."""
    state = traced(name).init(parameters(name))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


# Types -------------------------------------------------------------------------------------------

DTYPES = [
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
]
_HALVES = [(name, DTYPES[i]) for i in range(len(DTYPES)) for name in COMPILED]
# Where float16 meets bfloat16, both become float32; elsewhere one is as the other.
_HALVES += [(name, (jnp.float16, jnp.float16)) for name in (*KINDS, "bfloat16 storage")]


@pytest.mark.parametrize(
    ("name", "dtypes"),
    _HALVES,
    ids=lambda x: x if isinstance(x, str) else "-".join(jnp.dtype(d).name for d in x),
)
def test_dtypes_do_not_drift(name, dtypes):
    """The state keeps its types; updates have those of the gradients."""
    params, gradients = (parameters(name, seed, dtype) for seed, dtype in enumerate(dtypes))
    state, after, updates = any_number_of_steps(traced(name), params, gradients)
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
        params = parameters("scale_by_gum", dtype=dtype)
        state = jax.eval_shape(gum_optax.scale_by_gum(STRUCTURE).init, params)
        momentum = jax.tree.leaves((state.inner, state.uncompressed))
        assert {m.dtype for m in momentum} == {jnp.dtype(dtype)}


# Extra arguments ---------------------------------------------------------------------------------


def _update_program(name, params):
    return program(traced(name).update, params, traced(name).init(params), params)


@functools.cache
def _plain_program(name):
    return _update_program(name, parameters(name))


@every
def test_unknown_extra_arguments_are_ignored(name):
    params, state = parameters(name), first_state(name)
    extra = functools.partial(transformation(name).update, value=1.0, loss_fn=None)
    assert program(extra, params, state, params) == _plain_program(name)


# Trees -------------------------------------------------------------------------------------------


@every_tree
def test_every_tree(name, tree):
    params = TREES[tree]
    optimizer = traced(name)
    state, after, updates = any_number_of_steps(optimizer, params)
    mapped = optax.tree.map_params(optimizer, lambda x: x, state)
    for other in (after, mapped):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert described(other) == described(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert described(updates) == described(params)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


WRAPPED = {
    "frozen": (flax.core.freeze, lambda tree: {**tree, "layers": dict(enumerate(tree["layers"]))}),
    "None among layers": (lambda tree: {**tree, "layers": [None, *tree["layers"], None]}, None),
    "masked among layers": (
        lambda tree: {**tree, "layers": [tree["layers"][0], optax.MaskedNode(), tree["layers"][1]]},
        None,
    ),
    "tuple": (lambda tree: {**tree, "layers": tuple(tree["layers"])}, None),
}


@each_kind
@pytest.mark.parametrize("container", WRAPPED)
def test_containers_change_nothing(name, container):
    """The same leaves by the same names give the same program, draws included."""
    wrap, prepare = WRAPPED[container]
    plain = parameters(name)
    plain = plain if prepare is None else prepare(plain)
    wrapped = wrap(plain)
    assert program(traced(name).init, wrapped) == program(traced(name).init, plain)
    expected = _plain_program(name) if prepare is None else _update_program(name, plain)
    assert _update_program(name, wrapped) == expected


# One of each factory: the other aliases find the same matrices and treat them in other ways.
@pytest.mark.parametrize("name", ["gum", "adamw_galore"])
def test_prefixes_of_dimension_numbers(name):
    """A tree, a prefix of it and a function say the same."""
    factory = gum_optax.gum if name == "gum" else gum_optax.adamw
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
