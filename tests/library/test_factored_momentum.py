"""Momentum of rank r against its equations in float64, its laws and its hand vector."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gum_optax
from gum_optax._factored_momentum import Factored, FactoredMomentumState
from tests import helpers

BETA = 0.8


def _gradients(*shape, steps=4):
    return np.random.default_rng(0).normal(size=(steps, *shape))


def _top(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def _oracle(gradients, rank, beta):
    """Full matrices: beta M + T(G), then the best approximation of rank r."""
    u, _, v = _top(gradients[0], rank)
    momentum, updates, sizes = np.zeros(gradients[0].shape), [], []
    for G in gradients:
        tangent = u @ u.T @ G + G @ v @ v.T - u @ u.T @ G @ v @ v.T
        u, s, v = _top(beta * momentum + tangent, rank)
        momentum = (u * s) @ v.T
        updates.append(u @ v.T)
        sizes.append(s)
    return updates, sizes, momentum


# Rank far below, 2 r > m, and full; wide and tall.
@pytest.mark.parametrize(
    ("shape", "rank"), [((5, 8), 2), ((8, 5), 3), ((4, 6), 4), ((4, 6), 9)], ids=str
)
def test_equals_the_full_matrices(shape, rank):
    gradients = _gradients(*shape)
    tx = gum_optax.scale_by_factored_momentum(rank, BETA)
    with jax.enable_x64(True):
        trees = [{"a": G} for G in gradients]
        run = list(helpers.run(tx, trees))
    updates, sizes, momentum = _oracle(gradients, min(rank, *shape), BETA)
    for (got, state), update, size in zip(run, updates, sizes, strict=True):
        np.testing.assert_allclose(got["a"], update, atol=1e-10)
        np.testing.assert_allclose(state.momentum["a"].values, size, rtol=1e-10)
    kept = jax.tree.map(np.asarray, run[-1][1].momentum["a"])
    assert sum(part.size for part in kept) == min(rank, *shape) * (sum(shape) + 1)
    np.testing.assert_allclose((kept.left * kept.values) @ kept.right.T, momentum, atol=1e-10)
    if rank >= min(shape):
        # At full rank: M <- beta M + G exactly, and U V' its polar factor.
        whole = sum(BETA ** (len(gradients) - 1 - t) * G for t, G in enumerate(gradients))
        np.testing.assert_allclose(momentum, whole, atol=1e-10)


def test_the_hand_vector():
    """U = V = e1, s = 1, beta = 1/2: the target [[1.5, 2], [3, 0]] and its leading direction."""
    e1 = np.array([[1.0], [0.0]], np.float32)
    state = FactoredMomentumState(jnp.int32(1), Factored(e1, np.ones(1, np.float32), e1))
    tx = gum_optax.scale_by_factored_momentum(1, 0.5)
    gradient = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    update, state = jax.jit(tx.update, compiler_options=helpers.QUICK)(gradient, state)
    np.testing.assert_allclose(state.momentum.values, [3.5114644461], rtol=1e-6)
    expected = [[0.5596990900, 0.2015630445], [0.7562632407, 0.2723512044]]
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_degenerate_gradients_are_finite_and_do_not_freeze():
    """A batch: zero first, of rank one, and one huge entry; then ordinary ones."""
    first = np.zeros((3, 4, 6), np.float32)
    first[1] = np.outer(np.arange(4), np.arange(6))
    first[2, 1, 2] = 1e15
    ordinary = _gradients(3, 4, 6)[1].astype(np.float32)
    tx = gum_optax.scale_by_factored_momentum(2, 0.5)
    (start, _), (then, _) = helpers.run(tx, [first, ordinary])
    np.testing.assert_array_equal(start[0], 0)
    # Directions without a singular value are left out: one of two here.
    assert np.linalg.matrix_rank(start[1]) == 1
    for update in (start, then):
        assert np.all(np.isfinite(update))
    assert np.linalg.norm(then[0]) > 0.9


def test_needs_matrices():
    with pytest.raises(ValueError, match=r"at least 2 axes, \[..., m, n\], got shape \(3,\)"):
        gum_optax.scale_by_factored_momentum(2).init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        gum_optax.scale_by_factored_momentum(0)
