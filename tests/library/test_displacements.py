"""Displaced gradients against loops in float64, their hand vectors and degenerate cases."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import displaced, displacements, estimators
from tests import helpers, tables


def _cubic(params, scale=1.0):
    return scale * sum(jnp.sum(w**3) for w in jax.tree.leaves(params)) / 3


GRADIENT = jax.value_and_grad(_cubic)


def _params(dtype=np.float64):
    noise = np.random.default_rng(0)
    return {"a": noise.normal(size=(3, 4)).astype(dtype), "b": noise.normal(size=5).astype(dtype)}


def test_sam_and_extrapolation_equal_the_float64_loop():
    """The gradient of sum(w^3) / 3 is w^2, at w + rho g / |g| and at w - rate g."""
    with jax.enable_x64(True):
        params = _params()
        g = {name: 2.0 * w**2 for name, w in params.items()}
        norm = np.sqrt(sum((part**2).sum() for part in g.values()))
        cases = {
            0.3 / norm: displacements.ascent(GRADIENT, 0.3),
            -0.2: displacements.extrapolation(GRADIENT, 0.2),
        }
        for factor, displacement in cases.items():
            value, got = displaced(GRADIENT, displacement)(params, 2.0)
            moved = {name: w + factor * g[name] for name, w in params.items()}
            np.testing.assert_allclose(value, 2 * sum((w**3).sum() for w in moved.values()) / 3)
            for name, w in moved.items():
                np.testing.assert_allclose(got[name], 2 * w**2, rtol=1e-12)


@pytest.mark.parametrize(("rho", "rate"), [(0.1, None), (None, 0.05)])
def test_a_parabola_by_hand(rho, rate):
    """Of lam x^2 / 2: x - eta lam (x + rho sign x), and (1 - eta lam (1 - rate lam)) x."""
    lam, eta, x = 2.0, 0.1, np.float32(1.0)
    gradient = jax.value_and_grad(lambda x: lam * x**2 / 2)
    if rate is None:
        moved, expected = displacements.ascent(gradient, rho), x - eta * lam * (x + rho)
    else:
        moved, expected = displacements.extrapolation(gradient, rate), 0.82
    got = x - eta * displaced(gradient, moved)(x)[1]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [displacements.ascent, displacements.extrapolation])
def test_a_distance_of_zero_is_the_gradient_bit_for_bit(make):
    params = _params(np.float32)
    _, got = displaced(GRADIENT, make(GRADIENT, 0.0))(params)
    for name, part in GRADIENT(params)[1].items():
        np.testing.assert_array_equal(got[name], part)


def test_a_zero_gradient_displaces_nothing():
    """At a stationary point SAM takes the gradient there, and not NaN."""
    flat = jax.value_and_grad(lambda w: jnp.sum(w**2))
    _, got = displaced(flat, displacements.ascent(flat, 0.1))(jnp.zeros(3))
    np.testing.assert_array_equal(got, 0.0)


def test_past_gradients_on_a_linear_loss_are_the_base():
    linear = jax.value_and_grad(lambda w: jnp.sum(jnp.arange(3.0) * w))
    ahead = displaced(linear, displacements.along_previous(0.5))
    _, got = ahead(jnp.ones(3), previous=jnp.full(3, 7.0))
    np.testing.assert_array_equal(got, np.arange(3.0))
    # And on a parabola its gradient is that of the displaced point.
    parabola = jax.value_and_grad(lambda w: jnp.sum(w**2) / 2)
    ahead = displaced(parabola, displacements.along_previous(0.5))
    np.testing.assert_allclose(ahead(jnp.ones(3), previous=jnp.full(3, 4.0))[1], -1.0)


@pytest.mark.parametrize("samples", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_estimated_ascent_never_points_downhill_of_a_linear_loss(samples):
    """<A, d> is a sum of squares: f(W + rho d / |d|) >= f(W) for every draw."""
    slope = jnp.asarray(_params(np.float32)["a"])

    def loss(w):
        return jnp.sum(slope * w)

    probe = estimators.zeroth_order(loss, estimators.low_rank(2, 3), 0.1, samples)
    move = displacements.ascent(probe, 0.1)
    draws = jax.jit(
        jax.vmap(lambda step: move(jnp.zeros((3, 4)), key=0, step=step)),
        compiler_options=helpers.QUICK,
    )(jnp.arange(8))
    np.testing.assert_allclose(np.linalg.norm(draws, axis=(1, 2)), 0.1, rtol=1e-5)
    assert np.all((np.asarray(draws) * slope).sum((1, 2)) > 0)


@pytest.mark.slow  # compiles three training steps
def test_lorenza_without_a_distance_is_galore_bit_for_bit():
    params = {"layers": [{"w": w} for w in np.random.default_rng(1).normal(size=(2, 6, 8))]}
    params = jax.tree.map(lambda w: w.astype(np.float32), params)
    probe = estimators.zeroth_order(_cubic, estimators.low_rank(2, 3))
    tx = gum_optax.adamw(1e-2, gum_optax.galore(2, 3, projector=helpers.first_coordinates))

    def trained(gradient):
        @jax.jit
        def step(params, state, t):
            updates, state = tx.update(gradient(params, t), state, params)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        for t in range(2):
            now, state = step(now, state, t)
        return jax.tree.leaves(now)

    plain = trained(lambda params, t: GRADIENT(params)[1])
    for rho, equal in ((0.0, True), (0.5, False)):
        lorenza = displaced(GRADIENT, displacements.ascent(probe, rho))
        got = trained(lambda params, t, f=lorenza: f(params, key=0, step=t)[1])
        assert all(map(np.array_equal, got, plain)) == equal


def test_bfloat16_weights_are_displaced_in_float32():
    weights = np.full(3, 3.0, jnp.bfloat16)
    gradient = jax.value_and_grad(lambda w: jnp.sum((w - 3.0) * 1e4))
    value, got = displaced(gradient, displacements.ascent(gradient, 1e-3))(weights)
    np.testing.assert_allclose(value, 1e-3 * 1e4 * np.sqrt(3), rtol=1e-2)
    assert got.dtype == jnp.bfloat16


def test_a_displacement_may_be_a_tree_that_can_be_called():
    """The displacement of an Equinox model is such a tree, and no function of the parameters."""
    params, moved = (tables.CallableTree(np.full(3, x, np.float32)) for x in (1.0, 0.5))
    value, got = displaced(GRADIENT, moved)(params)
    np.testing.assert_allclose(value, 1.5**3)
    np.testing.assert_allclose(got.layers, np.full(3, 1.5**2))


def test_bad_arguments():
    with pytest.raises(TypeError, match="`value_and_grad` must be a function"):
        displaced(3, jnp.ones(3))
    with pytest.raises(ValueError, match="`rho` must not be negative, got -1"):
        displacements.ascent(GRADIENT, -1)
    with pytest.raises(ValueError, match="`rate` must not be negative, got -1"):
        displacements.along_previous(-1)
    with pytest.raises(TypeError, match="`displacement` is a tree and takes no arguments, got key"):
        displaced(GRADIENT, jnp.ones(3))(jnp.ones(3), key=0)
