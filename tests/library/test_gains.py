"""Gains of low-rank optimizers: Fira and APOLLO against the float64 reference, and by hand."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false

import jax
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, low_rank, projectors, residuals, scale_by_gain
from tests import cases, helpers, reference
from tests.cases import EXPERTS, SEPARATE, SQUARE, STACKED, label

# On the basis e1: R = (3, 0, 1), and E is the second row.
G = np.asarray([[3.0, 0, 1], [4, 2, 1]], np.float32)
SIGN = optax.scale_by_sign()


def first_update(residual, inner=SIGN):
    return one_update(low_rank(inner, LowRank(1, 9, residual, helpers.first_coordinates)), G)


def one_update(tx, gradient):
    """Compiled: op by op, it is fifty programs."""
    [(update, _)] = helpers.run(tx, [gradient])
    return np.asarray(update)


# The oracle of Fira itself is in test_residuals.py, among the other rules.
@pytest.mark.parametrize(
    ("case", "inner", "per", "limit"),
    [
        (SEPARATE, "adam", "column", 1.01),
        (STACKED, "adam", "matrix", 1.01),
        (EXPERTS, "momentum", "column", None),
        (SQUARE, "adam", "matrix", 1.2),
    ],
    ids=label,
)
def test_guided_gradients_equal_the_reference(case, inner, per, limit):
    tx, oracle = {
        "adam": (optax.scale_by_adam(), reference.adam()),
        "momentum": (optax.trace(0.9), reference.momentum(0.9)),
    }[inner]
    gradients = cases.gradients_of(case)
    rule = residuals.guided(scale_by_gain(per, growth_limit=limit))
    compression = case.compression(residual=rule, projector=projectors.svd, carry=carries.keep)
    run = cases.run(low_rank(tx, compression), case, gradients)
    sizes = {"rank": case.rank, "K": case.K, "bases": run.bases, "carry": "keep"}
    expected = reference.guided(oracle, reference.fira(limit, per=per), gradients, **sizes)
    cases.assert_close(run.updates, expected)


@pytest.mark.parametrize("limit", [None, 1.01])
def test_fira_by_hand(limit):
    """D = sign R = (1, 0, 1), so the columns of the residual are scaled by 1/3, 0 and 1."""
    got = first_update(residuals.through(scale_by_gain(growth_limit=limit)))
    np.testing.assert_allclose(got, [[1, 0, 1], [4 / 3, 0, 1]], rtol=1e-6, atol=1e-7)


def test_apollo_by_hand():
    """The same gains on the whole gradient; of the matrix, |D| / |R| = sqrt(2) / sqrt(10)."""
    got = first_update(residuals.guided(scale_by_gain()))
    np.testing.assert_allclose(got, [[1, 0, 1], [4 / 3, 0, 1]], rtol=1e-6, atol=1e-7)
    got = first_update(residuals.guided(scale_by_gain("matrix")))
    np.testing.assert_allclose(got, G * np.sqrt(0.2), rtol=1e-6)


def test_apollo_of_a_gaussian_projection_by_hand():
    """Published vectors: P = (1, 1), R = (7, 2, 2); here P is (1, 1) / sqrt(2)."""

    def diagonal(key, gradient, rank, previous_basis):
        return np.full((2, 1), 0.5**0.5, np.float32)

    def update(per):
        rule = residuals.guided(scale_by_gain(per))
        return one_update(low_rank(SIGN, LowRank(1, 9, rule, diagonal)), G)

    columns = [[3 / 7, 0, 0.5], [4 / 7, 1, 0.5]]
    np.testing.assert_allclose(update("column"), np.sqrt(2) * np.asarray(columns), rtol=1e-6)
    np.testing.assert_allclose(update("matrix"), np.sqrt(2) * 0.2294157339 * G, rtol=1e-6)


def test_the_norm_grows_by_its_limit_and_is_not_frozen_by_zero():
    """A gradient of ten times the size, after a first; no limit after a residual of zero."""
    inner = optax.scale_by_schedule(lambda count: 10.0**count)
    rule = residuals.through(scale_by_gain())
    tx = low_rank(inner, LowRank(1, 9, rule, helpers.first_coordinates))
    frozen = G * np.asarray([[1], [0]], np.float32)
    tx = tx._replace(update=jax.jit(tx.update))  # One trace for both runs.
    norms = [float(state.residual["param"][0]) for _, state in helpers.run(tx, [G] * 3)]
    np.testing.assert_allclose(np.divide(norms[1:], norms[:-1]), 1.01, rtol=1e-5)
    norms = [float(state.residual["param"][0]) for _, state in helpers.run(tx, [frozen, G])]
    np.testing.assert_allclose(norms, [0.0, 10 * np.linalg.norm([4, 1])], rtol=1e-5)


def test_an_adam_step_of_apollo_has_columns_of_rms_one():
    """At t = 1, D = sign R: |D_j| = sqrt(r), and |R_j| is |G_j| at full rank."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((3, 6, 8)).astype(np.float32)

    def whole(key, gradient, rank, previous_basis):
        return np.linalg.qr(rng.standard_normal((6, 5)))[0].astype(np.float32)

    tx = low_rank(optax.scale_by_adam(), gum_optax.apollo(5, projector=whole))
    found = one_update(tx, gradient)
    # Of 6 directions 5 are seen, so a column is at least as large as with all.
    gain = np.linalg.norm(found, axis=1) / np.sqrt(5)
    assert (gain >= 1 - 1e-5).all() and np.median(gain) < 1.3
    cosine = np.sum(found * gradient, axis=1) / (
        np.linalg.norm(found, axis=1) * np.linalg.norm(gradient, axis=1)
    )
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)


def test_compressions_named_after_papers_are_made_of_these_parts():
    G = np.random.default_rng(1).standard_normal((2, 6, 8)).astype(np.float32)

    def update(compression):
        return one_update(low_rank(optax.scale_by_adam(), compression), G)

    gain = scale_by_gain(growth_limit=1.5)
    svd = {"projector": projectors.svd, "carry": carries.keep}
    pairs = [
        (gum_optax.fira(2, 5, growth_limit=1.5), LowRank(2, 5, residuals.through(gain), **svd)),
        (gum_optax.fira(2, carry=carries.restart).carry, carries.restart),
        (gum_optax.apollo(2, 5).projector, projectors.random_orthonormal),
        (gum_optax.apollo_mini(7).rank, 1),
        (gum_optax.apollo_mini(7).period, 7),
        (gum_optax.frugal(2).carry, carries.restart),
    ]
    np.testing.assert_array_equal(*map(update, pairs[0]))
    assert all(left == right for left, right in pairs[1:])
    # FRUGAL at t = 1: P sign(R) and the signs of the residual, at a tenth of their size.
    basis = np.linalg.svd(G)[0][..., :2]
    R = basis.mT @ G
    expected = basis @ np.sign(R) + 0.1 * np.sign(G - basis @ R)
    np.testing.assert_allclose(update(gum_optax.frugal(2, scale=0.1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: scale_by_gain("row"), "per"),
        (lambda: scale_by_gain(growth_limit=-1.0), "growth_limit"),
        (lambda: scale_by_gain(eps="0"), "eps"),
        (lambda: gum_optax.frugal(scale=-1.0), "scale"),
        (lambda: gum_optax.fira(growth_limit=-1.0), "growth_limit"),
        (lambda: residuals.guided(optax.identity), "transformation"),
    ],
)
def test_malformed_arguments_are_named(make, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        make()


def test_a_gain_needs_to_be_told_of_the_projection():
    tx = scale_by_gain()
    with pytest.raises(ValueError, match=r"residuals\.through"):
        tx.update(G, tx.init(G))


def test_a_tree_without_leaves_has_no_gains():
    nothing = {"none": []}
    tx = scale_by_gain()
    told = {"projected": nothing, "projected_update": nothing}
    assert tx.update(nothing, tx.init(nothing), **told) == (nothing, nothing)


@pytest.mark.parametrize("scale", [1e25, 1e-3])
def test_gains_do_not_depend_on_the_size_of_gradients(scale):
    """Squares of 1e25 leave the range of float32; D = sign R, so updates are the same."""
    for rule in (residuals.through(scale_by_gain()), residuals.guided(scale_by_gain("matrix"))):
        tx = low_rank(SIGN, LowRank(1, 9, rule, helpers.first_coordinates))
        sized, plain = (one_update(tx, factor * G) for factor in (np.float32(scale), 1))
        np.testing.assert_allclose(sized, plain, rtol=2e-5, atol=1e-6)


def test_the_last_norm_is_kept_in_float32():
    """In bfloat16 a growth of 1 % is rounded to 0.8 or 1.6 %."""
    tx = low_rank(
        SIGN, LowRank(1, 9, residuals.through(scale_by_gain()), helpers.first_coordinates)
    )
    state = tx.init(np.zeros((2, 3), jax.numpy.bfloat16))
    assert [leaf.dtype for leaf in jax.tree.leaves(state.residual)] == [np.float32]
