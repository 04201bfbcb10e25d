"""Random trees, types and settings: nothing crashes, nothing drifts, and the law holds."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import settings as configure

import gum_optax
from gum_optax import projectors, samplers

# Few distinct values, so that compiled programs are met again.
SHAPES = [(3, 5), (5, 3), (4, 4), (2, 3, 5)]
DTYPES = [jnp.float32, jnp.bfloat16]
NAMES = ["layers", "q", "w", "block_1", "block_2"]

arrays = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
leaves = st.one_of(arrays, st.none())
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.sampled_from(NAMES), children, max_size=3),
        # Layers: the same subtree several times, as models have it.
        st.tuples(children, st.integers(2, 4)).map(lambda pair: [pair[0]] * pair[1]),
    ),
    max_leaves=5,
)
some_samplers = st.one_of(
    st.integers(0, 3).map(samplers.fixed_size),
    st.sampled_from([0.3, 0.7]).map(samplers.bernoulli),
    st.just(samplers.none),
)
settings = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 5),
        "period": st.integers(1, 3),
        "sampler": some_samplers,
        "projector": st.sampled_from(
            [projectors.subspace_iteration, projectors.random_orthonormal]
        ),
        "restart": st.booleans(),
        "stack_by": st.sampled_from([gum_optax.by_role, gum_optax.by_shape]),
        "momentum_dtype": st.sampled_from([None, jnp.float32]),
        "key": st.integers(0, 2**31 - 1),
    }
)
bases = st.sampled_from([optax.identity(), optax.trace(0.9), optax.scale_by_adam()])


def _materialize(tree, seed):
    """Gaussian arrays in place of (shape, dtype)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec[0]), spec[1]),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _specs(tree):
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@given(tree=trees, options=settings, base=bases)
def test_updates_fit_and_the_state_keeps_its_shape(tree, options, base):
    """By abstract evaluation, over three steps."""
    optimizer = gum_optax.low_rank(base, **options)
    params = _materialize(tree, 0)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert _specs(updates) == _specs(params)
    assert _specs(after) == _specs(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.size for leaf in jax.tree.leaves(state))


@configure(max_examples=12)  # each compiles
@given(tree=trees, options=settings, zero=st.booleans())
def test_runs_stay_finite(tree, options, zero):
    optimizer = gum_optax.low_rank(optax.scale_by_adam(), **options)
    update = jax.jit(optimizer.update)
    params = _materialize(tree, 0)
    state = optimizer.init(params)
    for step in range(options["period"] + 1):
        gradients = _materialize(tree, step)
        if zero:
            gradients = jax.tree.map(jnp.zeros_like, gradients)
        updates, state = update(gradients, state, params)
        assert all(np.isfinite(np.asarray(u, np.float32)).all() for u in jax.tree.leaves(updates))
    assert int(state.count) == options["period"] + 1


CURSOR = [jnp.int32(0)]  # where the scripted draws start


def _coordinates(key, gradient, rank, previous_basis):
    return jnp.eye(gradient.shape[0], rank)


@configure(max_examples=12)  # each compiles
@given(
    count=st.integers(2, 5),
    shape=st.sampled_from([(3, 5), (5, 3)]),
    slots=st.integers(1, 2),
    stacked=st.booleans(),
)
def test_the_law_for_scripted_draws(count, shape, slots, stacked):
    """Cyclic draws give every matrix a slot equally often: the mean of the updates is the gradient.

    ``(1 - q) P P'G / (1 - q) + q (G - P P'G) / q = G``, summed over one cycle of draws.
    """
    slots = min(slots, count - 1)

    def scripted(number):
        return samplers.Sampling(
            slots,
            slots / number,
            lambda key: (CURSOR[0] + jnp.arange(slots, dtype=jnp.int32)) % number,
        )

    gradients = _materialize([(shape, jnp.float32)] * count, count)
    tree = jnp.stack(gradients) if stacked else gradients
    optimizer = gum_optax.low_rank(
        optax.identity(), rank=2, period=1, sampler=scripted, projector=_coordinates
    )

    @jax.jit
    def estimate(cursor):
        CURSOR[0] = cursor
        return optimizer.update(tree, optimizer.init(tree))[0]

    cycle = [estimate(jnp.int32(start)) for start in range(count)]
    mean = jax.tree.map(lambda *x: sum(x) / count, *cycle)
    for got, expected in zip(mean, gradients, strict=True):
        # Measured 2.4e-7: sums of at most five float32 numbers of size 10.
        np.testing.assert_allclose(got, expected, atol=2e-6)


@given(tree=trees, seed=st.integers(0, 3))
def test_gum_takes_any_tree(tree, seed):
    """Leaves of three axes are declared batch, so nothing is ambiguous."""
    params = {"root": _materialize(tree, seed)}  # None alone would mean: no parameters
    optimizer = gum_optax.gum(
        0.1, 2, 2, weight_dimension_numbers=gum_optax.dimension_numbers.scanned_layers
    )
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert [u.shape for u in jax.tree.leaves(updates)] == [p.shape for p in jax.tree.leaves(params)]
    assert _specs(after) == _specs(state)
