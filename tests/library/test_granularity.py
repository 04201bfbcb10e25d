"""Granularity of projections: the reshape, unbiasedness by enumeration, ProjFactor's equations."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import Frame, residuals
from gum_optax._groups import by_role, find_groups
from tests import helpers


def _gradients(*shape, steps=4):
    return np.random.default_rng(0).normal(size=(steps, *shape))


@pytest.mark.parametrize(("granularity", "pieces"), [(4, (12, 2)), (0.5, (2, 12)), (1, (4, 6))])
def test_rows_are_cut_into_pieces(granularity, pieces):
    """Row-major: with identity inside nothing changes, and inside are the pieces."""
    shape = (3, 8) if granularity == 4 else (4, 6)
    gradient = {"a": _gradients(*shape)[0].astype(np.float32)}
    seen = []

    def note(updates, params=None):
        seen.append(updates["a"])
        return updates

    tx = gum_optax.regrained(optax.stateless(note), granularity)
    got, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_array_equal(got["a"], gradient["a"])
    np.testing.assert_array_equal(seen[-1], gradient["a"].reshape(pieces))


@pytest.mark.parametrize("value", [0, -1, 2.5, 0.4, float("nan")])
def test_bad_granularity(value):
    with pytest.raises(ValueError, match="`granularity` must"):
        gum_optax.regrained(optax.identity(), value)


def test_pieces_must_come_out_even():
    tx = gum_optax.regrained(optax.identity(), 4)
    with pytest.raises(ValueError, match="`granularity` 4 does not divide the matrix 3 x 6 at `a`"):
        tx.init({"a": jnp.ones((3, 6))})


def test_rescaled_projections_are_unbiased_by_enumeration():
    """The mean over all coordinate bases of (m / r) P P'G is G; the second moment m / r |G|^2."""
    m, n, r = 4, 5, 2
    gradient = _gradients(m, n)[0].astype(np.float32)
    [group] = find_groups({"a": gradient}, by_role)
    rule, found = residuals.rescaled(), []
    for rows in itertools.combinations(range(m), r):
        basis = np.eye(m, dtype=np.float32)[:, rows][None]  # [1, m, r]
        low = rule.encode(Frame(group, jnp.asarray(basis), None), [jnp.asarray(gradient)]).low
        found.append(basis[0] @ np.asarray(low)[0])
    np.testing.assert_allclose(np.mean(found, axis=0), gradient, rtol=1e-5)
    squares = [np.sum(each**2) for each in found]
    np.testing.assert_allclose(np.mean(squares), m / r * np.sum(gradient**2), rtol=1e-5)


def _basis(key, gradient, rank, previous_basis):
    """The same oblique basis for every matrix."""
    m = gradient.shape[0]
    matrix = np.random.default_rng(m).normal(size=(m, rank))
    return np.linalg.qr(matrix)[0].astype(gradient.dtype)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_projfactor_equals_the_float64_loop(shape):
    """Momentum's average M of R, and a factored second moment of P R; rows merged in pairs."""
    b1, b2, eps, rank, c = 0.9, 0.99, 1e-6, 1, 0.5
    compression = gum_optax.projfactor(rank, 100, b2=b2, eps=eps, projector=_basis)
    tx = gum_optax.regrained(gum_optax.low_rank(optax.ema(b1), compression), c)
    gradients = _gradients(2, *shape)  # two layers
    with jax.enable_x64(True):
        run = list(helpers.run(tx, [list(pair) for pair in gradients]))
    pieces = round(shape[0] * c), round(shape[1] / c)
    P = _basis(None, np.empty((min(pieces), 1)), rank, None)
    for layer in range(2):
        M = rows = columns = 0.0
        for t, (pair, (update, _)) in enumerate(zip(gradients, run, strict=True), 1):
            G = pair[layer].reshape(pieces)
            G = G.T if pieces[0] > pieces[1] else G
            R = P.T @ G
            M = b1 * M + (1 - b1) * R
            square = (P @ R) ** 2
            rows = b2 * rows + (1 - b2) * square.sum(1)
            columns = b2 * columns + (1 - b2) * square.sum(0)
            V = np.outer(rows, columns) / rows.sum()
            U = np.sqrt(1 - b2**t) / (1 - b1**t) * (P @ M) / (np.sqrt(V) + eps)
            U = U.T if pieces[0] > pieces[1] else U
            np.testing.assert_allclose(update[layer], U.reshape(shape), rtol=1e-5)


def test_projfactor_by_hand():
    """G = [[3, 1], [1, 1]] on (1, 1): P R has rank one, so that the first update is all ones."""

    def ones(key, gradient, rank, previous_basis):
        return jnp.full((2, 1), 0.5**0.5, gradient.dtype)

    compression = gum_optax.projfactor(1, 1, b2=0.0, eps=0.0, projector=ones)
    tx = gum_optax.low_rank(optax.identity(), compression)
    [(update, _), (zero, _)] = helpers.run(
        tx, [np.array([[3.0, 1.0], [1.0, 1.0]], np.float32), np.zeros((2, 2), np.float32)]
    )
    np.testing.assert_allclose(update, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(zero, 0.0)
