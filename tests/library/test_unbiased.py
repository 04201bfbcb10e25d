"""The law of unbiasedness by enumeration, and the samplers on which it depends."""

import functools
import itertools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from gum_optax import (
    LowRank,
    _refresh,
    low_rank,
    projectors,
    residuals,
    samplers,
    scale_by_gum,
    storages,
)
from tests import helpers, tables
from tests.helpers import first_coordinates

N = 4

PROJECTORS = tables.PROJECTORS | {
    "switch": projectors.switch(first_coordinates, projectors.random_orthonormal, 1),
    "user": first_coordinates,
}
every_form = pytest.mark.parametrize("form", ["exclusive", "additive"])


# One of separate leaves and one of a stack, one of wide matrices and one of tall ones: enough where
# the layout is not the subject.
TWO = ("wide", "experts")


def gradients(steps: int = 3, count: int = N) -> dict:
    """Every shape as separate leaves, and once as stacked leaves; ``[steps, ...]`` each."""
    tree = {}
    for seed, (shape, sides) in enumerate(helpers.SHAPES.items()):
        noise = helpers.gradients(seed, steps, count, *sides).astype(np.float32)
        tree[shape] = [noise[:, i] for i in range(count)]
    tree["stacked"] = np.stack(tree["wide"], 1)
    tree["experts"] = np.stack(tree["tall"], 1).reshape(steps, -1, 2, *helpers.SHAPES["tall"])
    return tree


def estimates(
    draws, probability, G, projector=first_coordinates, form: Any = "exclusive", **options: Any
):
    """The estimate of G for each draw: ``[draw, step, ...]``, two of the steps in one period."""

    def estimate(slots):
        def sampler(count):
            return samplers.Sampling(len(slots), probability, lambda key: slots)

        rule = residuals.sampled(sampler, form=form)
        tx = low_rank(optax.identity(), LowRank(3, 2, rule, projector, **options))

        def step(state, G_t):
            update, state = tx.update(G_t, state)
            return state, update

        return jax.lax.scan(step, tx.init(jax.tree.map(lambda leaf: leaf[0], G)), G)[1]

    every = jax.jit(lambda draws: jax.lax.map(estimate, draws), compiler_options=helpers.QUICK)
    return jax.device_get(every(np.asarray(draws, np.int32)))


def assert_unbiased(estimates, weights, G):
    def check(estimate, exact):
        mean = np.tensordot(weights, estimate.astype(np.float64), 1)
        # Measured: 5e-8, and no single estimate comes nearer to any matrix than 0.13.
        np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-6)
        assert np.abs(estimate - exact).max(axis=(-2, -1)).min() > 0.1

    assert math.isclose(sum(weights), 1.0)
    jax.tree.map(check, estimates, G)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_mean_over_all_draws_is_the_gradient(projector):
    G = gradients()
    if projector != "user":
        # Every layout gives a projector wide matrices, one after the other.
        G = {name: G[name] for name in TWO}
    draws = list(itertools.combinations(range(N), 1))
    draws = draws if projector == "svd" else list(itertools.permutations(range(N), 2))
    weights = np.full(len(draws), 1 / len(draws))
    q = len(draws[0]) / N
    assert_unbiased(estimates(draws, q, G, PROJECTORS[projector]), weights, G)


@pytest.mark.parametrize("projector", ["user", "svd"])
def test_mean_over_all_draws_of_the_additive_form_is_the_gradient(projector):
    G = gradients()
    if projector != "user":
        G = {name: G[name] for name in TWO}
    draws = list(itertools.permutations(range(N), 2))
    weights = np.full(len(draws), 1 / len(draws))
    found = estimates(draws, 2 / N, G, PROJECTORS[projector], "additive")
    assert_unbiased(found, weights, G)


@pytest.mark.parametrize("form", ["exclusive", "additive"])
def test_mean_over_all_draws_is_the_gradient_with_bases_in_few_bits(form):
    """Bases with errors of some per cent: E = G - P P'G makes up for any P."""
    G = {name: leaf for name, leaf in gradients().items() if name in TWO}
    draws = list(itertools.permutations(range(N), 2))
    weights = np.full(len(draws), 1 / len(draws))
    few = {"basis_storage": storages.int4(4)}
    found = estimates(draws, 2 / N, G, PROJECTORS["svd"], form, **few)
    assert_unbiased(found, weights, G)


def bernoulli_draws(q, count):
    """Every set of matrices as slots, and its probability."""
    assert samplers.bernoulli(q)(count).slots == count
    sets = list(itertools.product([False, True], repeat=count))
    return np.where(sets, np.arange(count), count), np.where(sets, q, 1 - q).prod(axis=1)


@every_form
def test_mean_over_all_bernoulli_draws_is_the_gradient(form):
    q, count = 0.3, 2
    G = {name: gradients(count=count)[name] for name in TWO}
    draws, weights = bernoulli_draws(q, count)
    assert_unbiased(estimates(draws, q, G, form=form), weights, G)


# Of matrices that are drawn with probability q, and of whose |G|^2 the residual has the share s.
VARIANCES = {
    "exclusive": lambda q, s: (1 - s) * q / (1 - q) + s * (1 - q) / q,
    "additive": lambda q, s: s * (1 - q) / q,
}


@pytest.mark.parametrize("sampler", ["fixed_size", "bernoulli"])
@every_form
def test_variance_over_all_draws_is_the_formula(form, sampler):
    """Of each matrix, as a share of its squared norm, by enumeration in float64."""
    if sampler == "fixed_size":
        count, q = 5, 2 / 5
        draws = list(itertools.combinations(range(count), 2))
        weights = np.full(len(draws), 1 / len(draws))
    else:
        count, q = 3, 0.3
        draws, weights = bernoulli_draws(q, count)
    matrices = helpers.gradients(0, count, 1, *helpers.SHAPES["wide"])  # [i, t, m, n]
    tall = helpers.gradients(1, count, *helpers.SHAPES["tall"])
    with jax.enable_x64(True):
        G = {"separate": list(matrices), "stacked": tall[None]}
        found = estimates(draws, q, G, form=form)
        found = {
            "separate": np.stack([leaf[:, 0] for leaf in found["separate"]], 1),
            "stacked": found["stacked"][:, 0],
        }  # [draw, i, m, n]
    assert found["separate"].dtype == np.float64
    for name, exact in {"separate": matrices[:, 0], "stacked": tall}.items():
        size = np.sum(exact**2, axis=(-2, -1))
        kept = exact[..., :3, :] if name == "separate" else exact[..., :3]  # The first coordinates.
        share = 1 - np.sum(kept**2, axis=(-2, -1)) / size
        errors = np.sum((found[name] - exact) ** 2, axis=(-2, -1)) / size  # [draw, i]
        # Measured: 4e-16.
        np.testing.assert_allclose(weights @ errors, VARIANCES[form](q, share), rtol=1e-13)


KEYS = 20_000
# Five standard deviations of a binomial, as a fraction of KEYS, for the worst probability.
FREQUENCY = 5 * math.sqrt(0.25 / KEYS)


def draw_many(sampling, count=KEYS):
    return np.asarray(jax.jit(jax.vmap(sampling.draw))(jax.random.split(jax.random.key(0), count)))


@pytest.mark.parametrize(("count", "gamma"), [(2, 1), (3, 1), (5, 2), (8, 3), (9, 4), (4, 7)])
def test_fixed_size_draws_exactly_gamma_and_each_matrix_equally_often(count, gamma):
    sampling = samplers.fixed_size(gamma)(count)
    slots = min(gamma, count // 2)
    assert (sampling.slots, sampling.probability) == (slots, slots / count)
    draws = np.sort(draw_many(sampling), axis=1)
    assert draws.dtype == np.int32
    assert draws.shape == (KEYS, slots)
    assert draws.min() >= 0
    assert draws.max() < count
    assert (np.diff(draws, axis=1) > 0).all(), "a matrix was drawn twice"
    frequency = np.bincount(draws.ravel(), minlength=count) / KEYS
    np.testing.assert_allclose(frequency, slots / count, atol=FREQUENCY)


@pytest.mark.parametrize(("count", "q"), [(1, 0.5), (3, 0.1), (4, 0.8)])
def test_bernoulli_draws_each_matrix_with_its_probability_and_independently(count, q):
    sampling = samplers.bernoulli(q)(count)
    assert (sampling.slots, sampling.probability) == (count, q)
    draws = draw_many(sampling)
    inside = draws < count
    np.testing.assert_array_equal(draws, np.where(inside, np.arange(count), count))
    np.testing.assert_allclose(inside.mean(0), q, atol=FREQUENCY)
    together = inside.T.astype(float) @ inside / KEYS
    off_diagonal = ~np.eye(count, dtype=bool)
    np.testing.assert_allclose(together[off_diagonal], q * q, atol=FREQUENCY)


@pytest.mark.parametrize(
    "sampling",
    [samplers.fixed_size(2)(6), samplers.bernoulli(0.5)(6)],
    ids=["fixed_size", "bernoulli"],
)
def test_draws_do_not_depend_on_the_x64_flag(sampling):
    single = draw_many(sampling, 20)
    with jax.enable_x64(True):
        double = draw_many(sampling, 20)
    np.testing.assert_array_equal(single, double)


def test_none_draws_nothing_and_what_is_always_drawn_needs_no_draw():
    assert samplers.none(5)[:2] == (0, 0.0)
    assert samplers.fixed_size(0)(5)[:2] == (0, 0.0)
    assert samplers.fixed_size(2)(1)[:2] == (1, 1.0)


SMALL = {name: [np.ones((2, 3), np.float32)] * N for name in ("a", "b")}
SAMPLES = 2000


@functools.cache
def small(key: int = 0) -> Any:
    compression = LowRank(1, 2, residuals.sampled(1), first_coordinates, key=key)
    return low_rank(optax.identity(), compression)


@functools.cache
def refresh_draws(vary: str) -> dict[str, np.ndarray]:
    """The draws of refreshes, each from a fresh state: at many counts, or with many keys."""
    state = small().init(SMALL)
    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(7), SAMPLES))
    counts = 2 * np.arange(SAMPLES, dtype=np.int32)
    if vary == "count":
        keys = np.tile(state.key, (SAMPLES, 1))
    else:
        counts = 0 * counts
    return jax.device_get(_refreshes()(state, counts, keys))


@functools.cache
def _refreshes() -> Any:
    def draw(state, count, key):
        return small().update(SMALL, state._replace(count=count, key=key))[1].slots

    return jax.jit(jax.vmap(draw, (None, 0, 0)), compiler_options=helpers.QUICK)


def assert_independent(first, second):
    """Chi-square over the joint table, uniform if both draws are uniform and independent."""
    table = np.bincount(N * first.ravel() + second.ravel(), minlength=N * N)
    expected = first.size / N**2
    chi_square = ((table - expected) ** 2 / expected).sum()
    degrees = N * N - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees), chi_square


def test_bases_have_other_keys_than_the_draw():
    """Draws are independent of bases, on which unbiasedness rests, so no key serves both."""
    given = {}

    def draw(group, key):
        given[group.name] = key
        return np.zeros(1, np.int32)

    rule = residuals.sampled(1)._replace(draw=draw)
    groups = LowRank(1, 2, rule).groups(SMALL)
    period = jax.numpy.int32(3)
    _, keys = _refresh.draw(groups, jax.random.key_data(jax.random.key(0)), period, rule)
    for name, own in given.items():
        of_bases = np.asarray(jax.random.key_data(keys[name]))
        of_draw = np.asarray(jax.random.key_data(own))
        # Nor is any of them split from it: a sampler that draws a permutation does that.
        split = np.asarray(jax.random.key_data(jax.random.split(own, len(of_bases))))
        for key in of_bases:
            assert not (key == np.concatenate([split, of_draw[None]])).all(axis=1).any()


def test_groups_and_periods_and_seeds_draw_independently():
    for draws in map(refresh_draws, ("count", "key")):
        assert_independent(draws["a.*"], draws["b.*"])
        assert_independent(draws["a.*"][:-1], draws["a.*"][1:])


PERIODS = 6


def small_draws(tx, tree, state=None):
    """The draws of both groups, ``[period, group]``, of a run."""
    states = [state for _, state in helpers.run(tx, [tree] * (2 * PERIODS), state=state)]
    return [[int(state.slots[name][0]) for name in ("a.*", "b.*")] for state in states[::2]]


def test_draws_are_a_function_of_seed_and_step_alone():
    tx = small()
    expected = small_draws(tx, SMALL)
    assert len({a for a, _ in expected}) > 1, "periods differ"
    assert len({b for _, b in expected}) > 1, "periods differ"
    # The key is part of the state; in all else the two optimizers are the same program.
    assert small_draws(tx, SMALL, small(key=1).init(SMALL)) != expected

    # Another inner transformation, form and projector, other gradients, and one parameter more,
    # ahead of the others.
    additive = residuals.sampled(1, form="additive")
    other = low_rank(optax.trace(0.9), LowRank(1, 2, additive, helpers.all_arguments))
    more = {"0": [np.ones((4, 4), np.float32)] * 3, **jax.tree.map(np.negative, SMALL)}
    assert small_draws(other, more) == expected

    # Each period by itself, from a fresh state with the count set.
    alone = np.concatenate([refresh_draws("count")[name] for name in ("a.*", "b.*")], axis=1)
    assert alone[:PERIODS].tolist() == expected


def test_eager_runs_on_numpy_arrays_and_jitted_runs_draw_and_compute_the_same():
    compression = LowRank(2, 1, residuals.sampled(1), first_coordinates)
    tx: Any = low_rank(optax.trace(0.9), compression)
    gradients = helpers.gradients(0, 2, 2, 4, 6).astype(np.float32)
    trees = [helpers.pack("separate", G_t) for G_t in gradients]
    state = jax.device_get(tx.init(trees[0]))
    for tree, (jitted, jitted_state) in zip(trees, helpers.run(tx, trees, trees[0]), strict=True):
        update, state = tx.update(tree, state, tree)
        # Equal when measured.
        helpers.assert_trees_close(update, jitted, 1e-6)
        np.testing.assert_array_equal(state.slots["layers.*.w"], jitted_state.slots["layers.*.w"])


def test_a_state_restored_from_numpy_goes_on_the_same():
    tx = scale_by_gum(LowRank(2, 2, residuals.sampled(1), helpers.all_arguments))
    trees = [
        helpers.pack("separate", G_t) for G_t in helpers.gradients(0, 7, 3, 4, 6).astype(np.float32)
    ]
    whole = list(helpers.run(tx, trees))
    for cut in (3, 4):  # Inside a period, and before a refresh.
        saved = jax.tree.map(lambda leaf: np.array(leaf), whole[cut - 1][1])
        resumed = helpers.run(tx, trees[cut:], state=saved)
        for got, expected in zip(resumed, whole[cut:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, got, expected)
