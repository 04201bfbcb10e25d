"""Samplers: number of slots, probabilities, and draws.

The frequencies of draws are tested in ``test_unbiased.py``.
"""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, projectors, residuals, samplers
from tests import helpers

# (gamma, N) -> slots; the probability is slots / N. A single matrix is uncompressed.
FIXED = {
    (1, 2): 1,
    (1, 3): 1,
    (2, 3): 1,
    (2, 4): 2,
    (2, 5): 2,
    (2, 8): 2,
    (4, 8): 4,
    (5, 8): 4,
    (100, 8): 4,
    (100, 9): 4,
}


def _draws(sampling, count):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(sampling.draw), compiler_options=helpers.QUICK)(keys))


@pytest.mark.parametrize(("case", "slots"), FIXED.items(), ids=str)
def test_fixed_size_is_clipped_to_half(case, slots):
    gamma, count = case
    sampling = samplers.fixed_size(gamma)(count)
    assert (sampling.slots, sampling.probability) == (slots, slots / count)


def test_fixed_size_draws_pairs_independently_of_order():
    """Each of the 28 pairs of 8 is equally likely."""
    draws = np.sort(_draws(samplers.fixed_size(2)(8), 5600), axis=1)
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == 28
    np.testing.assert_allclose(counts, 200, atol=5 * np.sqrt(200))


@pytest.mark.parametrize("gamma", [1, 2, 100])
def test_a_single_matrix_is_uncompressed_under_fixed_size(gamma):
    assert samplers.fixed_size(gamma)(1).probability == 1.0
    optimizer = gum_optax.scale_by_gum(LowRank(2, residual=residuals.sampled(gamma)))
    with pytest.warns(UserWarning, match="single matrix"):
        state = optimizer.init({"w": jnp.ones((8, 12))})
    assert state.basis == {}
    assert state.slots == {}
    assert state.uncompressed is not None


def test_fixed_size_zero_is_none():
    for count in (1, 2, 8):
        sampling = samplers.fixed_size(0)(count)
        assert sampling[:2] == samplers.none(count)[:2] == (0, 0.0)
        assert sampling.draw(jax.random.key(0)).shape == (0,)
    optimizer = gum_optax.scale_by_gum(LowRank(2, residual=residuals.sampled(0)))
    state = optimizer.init({"w": jnp.ones((8, 12))})
    assert state.slots == {}
    assert state.uncompressed is None
    assert state.inner[0].trace["w"].residual is None


def test_bernoulli_samples_a_single_matrix():
    """Where it is drawn the residual alone is followed, otherwise the projection alone."""
    rule = residuals.sampled(samplers.bernoulli(0.5))
    optimizer = gum_optax.low_rank(optax.identity(), LowRank(1, 1, rule, helpers.first_coordinates))
    gradient = {"w": np.ones((3, 4), np.float32)}
    update = jax.jit(optimizer.update, compiler_options=helpers.QUICK)
    state = optimizer.init(gradient)
    low, full = np.zeros((3, 4)), np.zeros((3, 4))
    low[:1], full[1:] = 2.0, 2.0
    seen = []
    for _ in range(12):
        updates, state = update(gradient, state)
        seen.append(bool(np.asarray(state.slots["w"])[0] == 0))
        np.testing.assert_allclose(updates["w"], full if seen[-1] else low, rtol=1e-6)
    assert set(seen) == {True, False}


def test_none_never_draws():
    rule = residuals.sampled(samplers.none)
    optimizer = gum_optax.low_rank(optax.identity(), LowRank(2, 1, rule, projectors.svd))
    gradients = list(helpers.gradients(0, 3, 6, 9).astype(np.float32))
    [(updates, state)] = helpers.run(optimizer, [gradients])
    assert state.slots == {}
    bases = np.asarray(state.basis["*"])
    for gradient, update, basis in zip(gradients, updates, bases, strict=True):
        np.testing.assert_allclose(update, basis @ basis.T @ gradient, atol=1e-5)


def test_a_users_sampler_decides_who_is_drawn():
    def last_two(count):
        return samplers.Sampling(
            2, 2 / count, lambda key: jnp.array([count - 1, count - 2], jnp.int32)
        )

    rule = residuals.sampled(last_two)
    optimizer = gum_optax.low_rank(optax.identity(), LowRank(2, 1, rule, projectors.svd))
    gradients = list(helpers.gradients(0, 5, 6, 9).astype(np.float32))
    [(updates, state)] = helpers.run(optimizer, [gradients])
    np.testing.assert_array_equal(state.slots["*"], [4, 3])
    for i, (gradient, update) in enumerate(zip(gradients, updates, strict=True)):
        basis = np.asarray(state.basis["*"])[i]
        inside = basis @ basis.T @ gradient
        expected = (gradient - inside) / 0.4 if i >= 3 else inside / 0.6
        np.testing.assert_allclose(update, expected, atol=1e-5)


def test_a_users_sampler_may_always_draw_some_groups():
    def sampler(count):
        if count > 2:
            return samplers.fixed_size(1)(count)
        return samplers.Sampling(count, 1.0, lambda key: jnp.arange(count))

    params = {"few": jnp.ones((2, 6, 9)), "many": jnp.ones((4, 6, 9))}
    compression = LowRank(2, 1, residuals.sampled(sampler))
    state = gum_optax.low_rank(optax.identity(), compression).init(params)
    assert set(state.basis) == {"many"}
    assert {group.name: group.uncompressed for group in compression.groups(params)} == {
        "few": "always drawn",
        "many": "",
    }


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None], ids=repr)
def test_fixed_size_rejects(value):
    with pytest.raises((TypeError, ValueError), match="`gamma` must") as error:
        samplers.fixed_size(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.5, 1.5, float("nan"), "a", None], ids=repr)
def test_bernoulli_rejects(value):
    with pytest.raises((TypeError, ValueError), match="`probability` must") as error:
        samplers.bernoulli(value)
    assert repr(value) in str(error.value)
