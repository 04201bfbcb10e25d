"""Unequal probabilities: exact by enumeration of draws, unbiased, and ranks by depth."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import Frame, LowRank, residuals, samplers
from gum_optax._groups import by_role, find_groups
from gum_optax._inclusion import at_point
from tests import helpers

Q = np.array([0.1, 0.7, 0.2, 0.5, 0.5])


def test_systematic_draws_have_exactly_their_probabilities():
    """All orders of five, and every interval of u between two ends of parts."""
    included, draw = np.zeros(len(Q)), jax.jit(at_point, static_argnums=3)
    orders = list(itertools.permutations(range(5)))[::7]  # 18 of 120; each is exact by itself
    for order in orders:
        ends = np.cumsum(Q[list(order)]) % 1
        points = np.unique(np.round(np.concatenate([[0, 1], ends]), 6))
        for low, high in itertools.pairwise(points):
            drawn = np.asarray(draw(jnp.array(order), jnp.asarray(Q), (low + high) / 2, 2))
            assert len(set(drawn.tolist())) == 2, "exactly two, all different"
            included[drawn] += (high - low) / len(orders)
    np.testing.assert_allclose(included, Q, atol=1e-5)


def test_the_sampler_draws_that_often():
    sampling = samplers.unequal(2, lambda count: Q)(5)
    assert sampling.slots == 2
    np.testing.assert_allclose(sampling.probability, Q)
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = np.asarray(jax.jit(jax.vmap(sampling.draw), compiler_options=helpers.QUICK)(keys))
    frequencies = np.bincount(draws.ravel(), minlength=5) / len(draws)
    np.testing.assert_allclose(frequencies, Q, atol=5 * np.sqrt(0.25 / len(draws)))
    # A random order draws neighbours together, too: all pairs but the two rarest, whose parts never
    # lie a whole number apart.
    pairs = {tuple(sorted(draw)) for draw in draws.tolist()}
    assert pairs == set(itertools.combinations(range(5), 2)) - {(0, 2)}


@pytest.mark.parametrize("form", ["exclusive", "additive"])
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_estimates_are_unbiased(form, layout):
    """Each matrix's estimate, drawn or not, weighted by its own probability, is G in the mean."""
    weights = [1.0, 2.0, 2.0, 3.0]
    rule = residuals.sampled(samplers.unequal(2, lambda count: weights), form=form)
    matrices = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    tree = helpers.pack(layout, matrices)
    [group] = find_groups(tree, by_role)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    P = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 1)))[0].astype(np.float32)
    basis = jnp.broadcast_to(jnp.asarray(P), (*group.lead, 3, 1))
    q = np.array(weights) / 4
    means = np.zeros_like(matrices)
    # Two draws that have each matrix once: in one of them it is drawn, in the other not.
    for slots in ([0, 1], [2, 3]):
        frame = Frame(group, basis, jnp.array(slots))
        encoded = rule.encode(frame, leaves)
        decoded, _ = rule.decode(frame, encoded, encoded, leaves, ())
        for i, estimate in enumerate(helpers.unpack(decoded)):
            means[i] += (q[i] if i in slots else 1 - q[i]) * estimate
    np.testing.assert_allclose(means, matrices, atol=1e-5)


@pytest.mark.slow  # compiles an engine
def test_the_engine_runs_on_it():
    """Over two periods of `low_rank`: drawn matrices have their residual over q, others P'G."""
    weights = samplers.by_depth(0.5)
    rule = residuals.sampled(samplers.unequal(1, weights))
    tx = gum_optax.low_rank(optax.identity(), LowRank(1, 1, rule, helpers.first_coordinates))
    gradients = list(np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32))
    q = weights(3) / 3
    for updates, state in helpers.run(tx, [gradients] * 2):
        [drawn] = np.asarray(state.slots["*"])
        for i, (G, U) in enumerate(zip(gradients, updates, strict=True)):
            inside = np.eye(2, 1) @ G[:1]
            expected = (G - inside) / q[i] if i == drawn else inside / (1 - q[i])
            np.testing.assert_allclose(U, expected, rtol=1e-5)


def test_the_best_probabilities_by_hand():
    """a = 3, b = 4: a^2 / (1 - q) + b^2 / q is least at b / (a + b), where it is 49."""
    q = np.linspace(0.01, 0.99, 981)
    moment = 9 / (1 - q) + 16 / q
    assert abs(q[np.argmin(moment)] - 4 / 7) < 1e-3
    np.testing.assert_allclose(9 / (3 / 7) + 16 / (4 / 7), 49)


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ([8, 1, 1, 2], 2, [1, 0.25, 0.25, 0.5]),
        ([1, 1, 1, 1], 2, [0.5] * 4),
        ([0, 0, 0, 0], 2, [0.5] * 4),
        ([5, 0, 0], 2, [1, 0.5, 0.5]),
        ([5, 3, 0], 2, [1, 1, 0]),
        ([1, 2, 3], 0, [0, 0, 0]),
        ([1, 2, 3], 3, [1, 1, 1]),
    ],
)
def test_water_filling(sizes, total, expected):
    fill = jax.jit(samplers.water_filling, compiler_options=helpers.QUICK)
    got = fill(np.array(sizes, np.float32), float(total))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_water_filling_has_the_least_variance():
    """Of w = (8, 1, 1, 2) and two draws: 10, where equal probabilities have 70."""
    w = np.array([8.0, 1, 1, 2])
    variance = lambda p: np.sum(w**2 * (1 / p - 1))  # noqa: E731
    np.testing.assert_allclose(variance(np.array([1, 0.25, 0.25, 0.5])), 10)
    np.testing.assert_allclose(variance(np.full(4, 0.5)), 70)


def test_bad_weights():
    with pytest.raises(ValueError, match="`weights` must return 4 positive numbers"):
        samplers.unequal(1, lambda count: [1.0, 2.0])(4)
    with pytest.raises(ValueError, match="so unequal that some of 4 matrices would be drawn in"):
        samplers.unequal(2, lambda count: [8.0, 1.0, 1.0, 2.0])(4)
    with pytest.raises(ValueError, match=r"`slope` must lie in \(-1, 1\), got 1"):
        samplers.by_depth(1)
    assert samplers.unequal(2, samplers.by_depth(0.5))(1).probability == 1.0
    assert samplers.unequal(0, samplers.by_depth(0.5))(4).slots == 0


@pytest.mark.parametrize("slope", [0.0, 2.0, -4.0])
def test_ranks_by_depth_keep_their_mean(slope):
    params = {"layers": [{"w": jax.ShapeDtypeStruct((64, 96), jnp.float32)} for _ in range(8)]}
    compression = LowRank(rank=gum_optax.rank_by_depth(16, slope), group_by=gum_optax.by_band(8, 4))
    groups = compression.groups(params)
    assert [group.role for group in groups] == [f"layers/*/w@{i}/4" for i in range(4)]
    assert [group.rank for group in groups] == [16 + 1.5 * slope - slope * i for i in range(4)]
    assert sum(group.rank * group.count for group in groups) == 16 * 8


def test_bad_bands():
    with pytest.raises(ValueError, match="`bands` must be at most `layers`, 2, got 3"):
        gum_optax.by_band(2, 3)
    assert gum_optax.by_band(8, 4)("layers/w", None) == "layers/w"
