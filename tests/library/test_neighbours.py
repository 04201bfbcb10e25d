"""Dion2, Adam-mini and AdaLomo against loops in float64, their laws and hand vectors."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from tests import helpers, reference


def _gradients(*shape, steps=4):
    return np.random.default_rng(0).normal(size=(steps, *shape))


# Dion2 --------------------------------------------------------------------------------------------


def _dion2(gradients, fraction, decay):
    momentum, updates = np.zeros(gradients[0].shape), []
    for G in gradients:
        momentum = momentum + G
        wide = momentum if G.shape[0] <= G.shape[1] else momentum.T
        count = int(np.ceil(fraction * len(wide)))
        rows = np.argsort(-np.abs(wide).sum(1))[:count]
        update = np.zeros(wide.shape)
        update[rows] = reference.newton_schulz(wide[rows])
        wide[rows] *= decay
        updates.append(update if G.shape[0] <= G.shape[1] else update.T)
    return updates


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)], ids=str)
def test_dion2_equals_the_float64_loop(shape):
    gradients = _gradients(*shape)
    with jax.enable_x64(True):
        got = [u["a"] for u, _ in helpers.run(gum_optax.scale_by_dion2(0.4, 0.9),
                                              [{"a": G} for G in gradients])]  # fmt: skip
    np.testing.assert_allclose(got, _dion2(gradients, 0.4, 0.9), atol=1e-9)


def test_dion2_by_hand():
    """diag(1, .1): the first row is used and decays, the second waits. Batches choose by matrix."""
    # Of a single row, the polar factor is its direction.
    unit = lambda x: x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
    exact = optax.stateless(lambda u, p: jax.tree.map(unit, u))
    tx = gum_optax.scale_by_dion2(0.5, 0.5, orthogonalizer=exact)
    diagonal = np.diag([1.0, 0.1]).astype(np.float32)
    both = np.stack([diagonal, diagonal[::-1]])
    [(update, state)] = helpers.run(tx, [both])
    np.testing.assert_allclose(update, [[[1, 0], [0, 0]], [[0, 0], [1, 0]]], atol=1e-6)
    np.testing.assert_allclose(state[0], [[0.5, 0], [0, 0.1]], atol=1e-6)


def test_dion2_rejects():
    with pytest.raises(ValueError, match=r"`fraction` must lie in \(0, 1\], got 0"):
        gum_optax.scale_by_dion2(0)


# Adam-mini ----------------------------------------------------------------------------------------


def test_adam_mini_without_blocks_is_adam():
    trees = [{"w": G.astype(np.float32)} for G in _gradients(3, 4)]
    mini = helpers.run(gum_optax.scale_by_adam_mini(blocks=lambda path, leaf: ()), trees)
    for (got, _), (expected, _) in zip(
        mini, helpers.run(optax.scale_by_adam(), trees), strict=True
    ):
        np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)


def test_adam_mini_equals_the_float64_loop():
    """Columns of a kernel, rows of an embedding, a whole norm, entries of a bias."""
    shapes = {"kernel": (3, 4), "embedding": (4, 3), "norm": (4,), "bias": (4,)}
    axes = {"kernel": 0, "embedding": 1, "norm": 0, "bias": None}
    b1, b2, eps = 0.9, 0.99, 1e-8
    trees = [
        {name: G[: int(np.prod(shape))].reshape(shape) for name, shape in shapes.items()}
        for G in _gradients(12)
    ]
    with jax.enable_x64(True):
        run = list(helpers.run(gum_optax.scale_by_adam_mini(b1, b2, eps), trees))
    for name, axis in axes.items():
        m = v = 0.0
        for t, (tree, (update, _)) in enumerate(zip(trees, run, strict=True), 1):
            square = tree[name] ** 2
            m = b1 * m + (1 - b1) * tree[name]
            v = b2 * v + (1 - b2) * (square if axis is None else square.mean(axis, keepdims=True))
            expected = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            np.testing.assert_allclose(update[name], expected, rtol=1e-10)
    numbers = {name: part.size for name, part in run[-1][1].nu.items()}
    assert numbers == {"kernel": 4, "embedding": 4, "norm": 1, "bias": 4}


def test_adam_mini_by_hand():
    """Rows as blocks: each one's update has a root mean square of one at the first step."""
    tx = gum_optax.scale_by_adam_mini(eps=0.0, blocks=lambda path, leaf: (-1,))
    [(update, _)] = helpers.run(tx, [np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)])
    np.testing.assert_allclose(update, [[0.8485281374, 1.1313708499], [0, 1.4142135624]], rtol=1e-5)


@pytest.mark.slow  # compiles an engine
def test_adam_mini_runs_inside_of_low_rank():
    tx = gum_optax.low_rank(
        gum_optax.scale_by_adam_mini(),
        gum_optax.LowRank(2, 2, gum_optax.residuals.sampled(1), helpers.first_coordinates),
    )
    gradients = list(_gradients(4, 6).astype(np.float32))
    *_, (update, state) = helpers.run(tx, [gradients] * 3)
    assert state.inner.nu["*"].low.shape == (4, 1, 6)
    assert all(np.all(np.isfinite(u)) for u in update)


# AdaLomo ------------------------------------------------------------------------------------------


def test_adalomo_equals_the_float64_loop():
    """Equations of the paper, with decay, over a matrix and a vector."""
    shapes, rate, decay = {"w": (3, 5), "b": (4,)}, 0.1, 0.01
    noise = np.random.default_rng(1)
    weights = {name: noise.normal(size=shape) for name, shape in shapes.items()}
    trees = [{name: noise.normal(size=shape) for name, shape in shapes.items()} for _ in range(4)]
    with jax.enable_x64(True):
        run = helpers.train(gum_optax.adalomo(rate, weight_decay=decay), trees, weights)
    for name in shapes:
        W, rows, columns = weights[name], 0.0, 0.0
        for t, (tree, after) in enumerate(zip(trees, run, strict=True), 1):
            G, b = tree[name], 1 - t**-0.8
            square = G**2 + 1e-30
            if G.ndim == 2:
                rows = b * rows + (1 - b) * square.mean(1)
                columns = b * columns + (1 - b) * square.mean(0)
                second = np.outer(rows, columns) / np.mean(rows)
            else:
                second = rows = b * rows + (1 - b) * square
            u = G / np.sqrt(second)
            u = u / max(1, np.sqrt(np.mean(u**2)))
            size = max(1e-3, np.sqrt(np.mean(W**2)))
            W = W - rate * size * (u + decay * W)
            np.testing.assert_allclose(after[name], W, rtol=1e-6)


def test_adalomo_by_hand():
    """W = 2 everywhere at rate 1: the step is -2 u, u of root mean square one."""
    tx = gum_optax.adalomo(1.0)
    gradient = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    weights = np.full((2, 2), 2.0, np.float32)
    [(update, _)] = helpers.run(tx, [gradient], weights)
    u = np.array([[1.414213562, 0.883452209], [0, 1.104315261]])
    np.testing.assert_allclose(update, -2 * u, rtol=1e-5)
