"""RACS against a loop in float64, its laws and hand vectors."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import numpy as np
import pytest

import gum_optax
from tests import helpers


def _gradients(*shape, steps=4):
    return np.random.default_rng(0).normal(size=(steps, *shape))


def _racs(gradients, beta, limit, iterations):
    """The equations, entry by entry. One matrix."""
    m, n = gradients[0].shape
    rows, columns, last, updates = np.zeros(m), np.zeros(n), 0.0, []
    for t, G in enumerate(gradients, 1):
        q, s = np.ones(m), np.zeros(n)
        for _ in range(iterations):
            for j in range(n):
                s[j] = sum(q[i] * G[i, j] ** 2 for i in range(m)) / sum(q**2)
            for i in range(m):
                q[i] = sum(s[j] * G[i, j] ** 2 for j in range(n)) / sum(s**2)
        rows = beta * rows + (1 - beta) * q
        columns = beta * columns + (1 - beta) * s
        moment = np.outer(rows / (1 - beta**t), columns / (1 - beta**t))
        update = G / np.sqrt(moment)
        size = np.linalg.norm(update)
        if last > 0 and size > limit * last:
            update *= limit * last / size
        last = np.linalg.norm(update)
        updates.append(update)
    return updates


def test_racs_equals_the_float64_loop():
    gradients = _gradients(3, 5) * np.array([1.0, 3.0, 0.1, 5.0])[:, None, None]
    tx = gum_optax.scale_by_racs(0.8, growth_limit=1.05, iterations=3)
    with jax.enable_x64(True):
        got = [u["w"] for u, _ in helpers.run(tx, [{"w": G} for G in gradients])]
    np.testing.assert_allclose(got, _racs(gradients, 0.8, 1.05, 3), rtol=1e-10)


def test_squares_of_rank_one_become_signs():
    """If G_ij^2 = q_i s_j, the fit is exact after one round, and |U_ij| = 1."""
    rows, columns = np.array([1.0, 2.0, 10.0]), np.array([0.1, 3.0, 1.0, 7.0])
    signs = np.sign(_gradients(3, 4)[0])
    tx = gum_optax.scale_by_racs(iterations=1)
    [(update, _)] = helpers.run(tx, [(signs * np.outer(rows, columns)).astype(np.float32)])
    np.testing.assert_allclose(update, signs, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e12], ids=str)
def test_the_scale_of_gradients_does_not_matter(scale):
    gradients = _gradients(3, 5).astype(np.float32)
    tx = gum_optax.scale_by_racs()
    plain = [u for u, _ in helpers.run(tx, list(gradients))]
    scaled = [u for u, _ in helpers.run(tx, list(np.float32(scale) * gradients))]
    np.testing.assert_allclose(scaled, plain, rtol=2e-5)


def test_norms_grow_by_no_more_than_the_limit():
    """Gradients that grow faster than their averages follow."""
    gradients = [(4.0**t * G).astype(np.float32) for t, G in enumerate(_gradients(4, 6, steps=6))]
    norms = [
        np.linalg.norm(u)
        for u, _ in helpers.run(gum_optax.scale_by_racs(growth_limit=1.01), gradients)
    ]
    ratios = np.divide(norms[1:], norms[:-1])
    assert np.max(ratios) == pytest.approx(1.01, rel=1e-5)


def test_a_zero_gradient_does_not_freeze_a_matrix():
    G = _gradients(3, 5)[0].astype(np.float32)
    run = helpers.run(gum_optax.scale_by_racs(), [G, 0 * G, G])
    norms = [np.linalg.norm(update) for update, _ in run]
    assert norms[1] == 0
    assert norms[2] > norms[0] / 2


def test_a_row_of_zeros_stays_zero_and_the_rest_is_finite():
    G = _gradients(3, 5)[0].astype(np.float32)
    G[1] = 0
    [(update, _)] = helpers.run(gum_optax.scale_by_racs(), [G])
    update = np.asarray(update)
    assert np.all(np.isfinite(update)) and not np.any(update[1]) and np.all(update[[0, 2]])


def test_matrices_of_a_batch_are_independent():
    gradients = _gradients(2, 3, 5).astype(np.float32)
    tx = gum_optax.scale_by_racs()
    together = [u for u, _ in helpers.run(tx, list(gradients))]
    for k in range(2):
        alone = [u for u, _ in helpers.run(tx, list(gradients[:, k]))]
        np.testing.assert_allclose([u[k] for u in together], alone, rtol=1e-5)


def test_the_state_is_a_row_a_column_and_a_norm():
    state = gum_optax.scale_by_racs().init({"w": np.zeros((2, 3, 5), np.float32)})
    assert state.rows["w"].shape == (2, 3, 1)
    assert state.columns["w"].shape == (2, 1, 5)
    assert state.norms["w"].shape == (2,)


def test_racs_rejects():
    with pytest.raises(ValueError, match=r"`beta` must .*, got 1"):
        gum_optax.scale_by_racs(1)
    with pytest.raises(ValueError, match=r"`iterations` must be at least 1, got 0"):
        gum_optax.scale_by_racs(iterations=0)
    with pytest.raises(ValueError, match=r"`scale_by_racs` needs leaves with at least 2 axes"):
        gum_optax.scale_by_racs().init({"bias": np.zeros(3, np.float32)})
