"""Estimators against loops in float64, their laws by enumeration, and their memory."""

# Directions are trees of any structure to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, estimators, projectors, residuals
from tests import helpers

DIRECTIONS = {
    "gaussian": estimators.gaussian(),
    "sphere": estimators.sphere(),
    "low_rank": estimators.low_rank(2, 3),
    "orthonormal": estimators.orthonormal(2, 3),
}
every_direction = pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
# Compiling takes all of the time: one kind in `make test`, all in `make slow`.
each_direction = pytest.mark.parametrize(
    "directions",
    [
        pytest.param(each, id=name, marks=() if name == "low_rank" else pytest.mark.slow)
        for name, each in DIRECTIONS.items()
    ],
)

# A wide matrix, a batch of tall ones and a vector.
SHAPES = {"wide": (3, 5), "tall": (2, 5, 3), "vector": (4,)}


def _tree(seed=0, dtype=np.float32):
    noise = np.random.default_rng(seed)
    return {name: noise.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def _flat(tree):
    return np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    )


def _linear(gradient):
    def loss(params, scale=1.0):
        parts = jax.tree.map(lambda g, w: jnp.sum(g * w), gradient, params)
        return scale * sum(jax.tree.leaves(parts))

    return loss


def _occasion(key=0, step=0, sample=0):
    data = jax.random.key_data(jax.random.key(key))
    return estimators.Occasion(data, *(jnp.asarray(x, jnp.int32) for x in (step, sample)))


def _listed(*directions):
    """Directions that are listed, one for each sample."""

    def draw(occasion, params):
        return jax.tree.map(
            lambda *each: estimators.Dense(jnp.stack(each)[occasion.sample]), *directions
        )

    return estimators.Directions(draw)


# Against loops ------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles for seconds each
@every_direction
def test_equals_the_float64_loop(directions):
    """Of a cubic loss, whose slopes depend on eps; two samples, directions given from outside."""
    eps, samples = 0.25, 2

    def loss(params, x):
        return sum(jnp.sum(x * w**3) for w in jax.tree.leaves(params))

    with jax.enable_x64(True):
        params = _tree(dtype=np.float64)
        draw = jax.jit(directions.draw, compiler_options=helpers.QUICK)
        estimate = estimators.zeroth_order(loss, directions, eps, samples)
        update = jax.jit(lambda p: estimate(p, 2.0, key=5, step=4), compiler_options=helpers.QUICK)
        value, gradient = update(params)
        expected = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        losses = []
        for sample in range(samples):
            drawn = draw(_occasion(5, 4, sample), params)
            for sign in (1, -1):
                moved = {
                    name: np.asarray(w) + sign * eps * np.asarray(drawn[name].dense())
                    for name, w in params.items()
                }
                losses.append(sum((2.0 * w**3).sum() for w in moved.values()))
            slope = (losses[-2] - losses[-1]) / (2 * eps)
            for name in SHAPES:
                z, w = np.asarray(drawn[name].dense()), float(drawn[name].weight)
                expected[name] += slope * w * z / samples
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-12)
    for name in SHAPES:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-11, atol=1e-11)


def test_a_quadratic_has_its_exact_slope_at_any_eps():
    """The hand vector: A = diag(1, 2, 3), x = 1, z = (1, -1, 2) give c = z'Ax = 5."""
    z = np.array([1.0, -1.0, 2.0], np.float32)
    for eps in (0.5, 2.0):
        estimate = estimators.zeroth_order(
            lambda x: 0.5 * jnp.sum(jnp.arange(1.0, 4.0) * x**2), _listed(z), eps
        )
        value, gradient = estimate(np.ones(3, np.float32), key=0)
        np.testing.assert_allclose(gradient, 5 * z, rtol=1e-6)
        # The value is the mean of the two losses: L + eps^2 z'Az / 2.
        np.testing.assert_allclose(value, 3 + eps**2 * 15 / 2, rtol=1e-6)


# Unbiased, by enumeration -------------------------------------------------------------------------


def test_signs_are_unbiased():
    """Of all eight sign vectors: the mean is g, the second moment d |g|^2."""
    gradient = np.array([3.0, -1.0, 2.0], np.float32)
    signs = [np.array(s, np.float32) for s in itertools.product([-1.0, 1.0], repeat=3)]
    estimate = estimators.zeroth_order(_linear(gradient), _listed(*signs), 0.5, len(signs))
    np.testing.assert_allclose(estimate(np.zeros(3), key=0)[1], gradient, rtol=1e-6)


def _low_rank_mean(factors, gradient):
    """The mean over listed factors of the estimate of a linear loss."""
    lefts, rights, weight = zip(*factors, strict=True)

    def draw(occasion, params):
        pick = occasion.sample
        return estimators.Factors(jnp.stack(lefts)[pick], jnp.stack(rights)[pick], weight[0])

    directions = estimators.Directions(draw)
    estimate = estimators.zeroth_order(_linear(gradient), directions, 0.5, len(factors))
    update = jax.jit(lambda w: estimate(w, key=0)[1], compiler_options=helpers.QUICK)
    return update(np.zeros(gradient.shape, np.float32))


def test_products_of_signs_are_unbiased():
    """LOZO's mean of <G, UV'> UV' / r over all sign factors, r = 1, 2 x 3."""
    gradient = _tree()["wide"][:2, :3]
    factors = [
        (np.array(u, np.float32)[:, None], np.array(v, np.float32)[:, None], 1.0)
        for u in itertools.product([-1.0, 1.0], repeat=2)
        for v in itertools.product([-1.0, 1.0], repeat=3)
    ]
    np.testing.assert_allclose(_low_rank_mean(factors, gradient), gradient, atol=1e-5)


@pytest.mark.slow  # compiles a QR
def test_a_fixed_subspace_gives_the_projection():
    """SubZero's mean over all sign matrices Z, U and V fixed: U U' G V V'."""
    gradient = _tree()["wide"]
    drawn = estimators.orthonormal(2, 9, align_norms=False).draw(_occasion(), jnp.asarray(gradient))
    v = np.asarray(drawn.right)
    u = np.linalg.qr(np.asarray(drawn.left))[0].astype(np.float32)
    factors = [
        (u @ np.array(z, np.float32).reshape(2, 2), v, 1.0)
        for z in itertools.product([-1.0, 1.0], repeat=4)
    ]
    expected = u @ u.T @ gradient @ v @ v.T
    np.testing.assert_allclose(_low_rank_mean(factors, gradient), expected, atol=1e-5)


SECOND_MOMENTS = {
    # name: (directions, E |ghat|^2 / |g|^2) of a 3 x 4 matrix at rank 2.
    "gaussian": (estimators.gaussian(), 12 + 2),
    "sphere": (estimators.sphere(), 12),
    "low_rank": (estimators.low_rank(2, 1), 12 + 2 + 2 * (3 + 4 + 1) / 2),
    "orthonormal": (estimators.orthonormal(2, 1), 12 + 2 * 12 / 4),
}


@pytest.mark.slow  # 20,000 draws each
@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_mean_and_second_moment_of_a_linear_loss(name):
    directions, expected = SECOND_MOMENTS[name]
    gradient = _tree()["wide"][:, :4]
    estimate = estimators.zeroth_order(_linear(gradient), directions, 1.0)
    draws = jax.vmap(lambda step: estimate(jnp.zeros((3, 4)), key=1, step=step)[1])
    draws = np.asarray(jax.jit(draws)(jnp.arange(20_000)), np.float64)
    square = (gradient**2).sum()
    # Five standard errors of the mean; 6 % of the mean of squares, which have heavy tails.
    error = np.sqrt(expected * square / 20_000)
    np.testing.assert_allclose(draws.mean(0), gradient, atol=5 * error)
    np.testing.assert_allclose((draws**2).sum((1, 2)).mean() / square, expected, rtol=0.06)


# What directions depend on ------------------------------------------------------------------------


@each_direction
def test_directions_are_functions_of_key_step_sample_and_path(directions):
    params = jax.tree.map(jnp.asarray, _tree())
    draw = jax.jit(directions.draw, compiler_options=helpers.QUICK)

    def dense(tree):
        is_leaf = lambda x: hasattr(x, "dense")  # noqa: E731
        return _flat(jax.tree.map(lambda z: z.dense(), tree, is_leaf=is_leaf))

    first = dense(draw(_occasion(), params))
    np.testing.assert_array_equal(first, dense(draw(_occasion(), params)))
    for other in (_occasion(key=1), _occasion(step=1), _occasion(sample=1)):
        assert np.all(first != dense(draw(other, params)))


def test_paths_decide_and_not_the_order_or_the_dtype():
    a, b = jnp.ones((3, 4)), jnp.ones((3, 4))
    draw = estimators.gaussian().draw
    both = draw(_occasion(), {"a": a, "b": b})
    assert np.all(np.asarray(both["a"].value) != np.asarray(both["b"].value))
    alone = draw(_occasion(), {"b": b.astype(jnp.bfloat16)})
    np.testing.assert_array_equal(alone["b"].value, both["b"].value)
    assert alone["b"].value.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["low_rank", pytest.param("orthonormal", marks=pytest.mark.slow)])
def test_a_period_keeps_its_subspace(kind):
    directions = DIRECTIONS[kind]
    params = jax.tree.map(jnp.asarray, _tree())
    draw = jax.jit(directions.draw, compiler_options=helpers.QUICK)
    at = [draw(_occasion(step=step, sample=step), params) for step in range(4)]
    # V is on the short side: right of tall matrices, left of wide ones; SubZero's is right.
    kept = "left" if kind == "low_rank" else "right"
    wide = [np.asarray(getattr(each["wide"], kept)) for each in at]
    tall = [np.asarray(each["tall"].right) for each in at]
    for factors in (wide, tall):
        np.testing.assert_array_equal(factors[0], factors[2])
        assert np.all(factors[0] != factors[3])
    if kind == "orthonormal":
        np.testing.assert_allclose(tall[0][0].T @ tall[0][0], np.eye(2), atol=1e-6)
        mu = np.sqrt(15 / 4)
        u = np.asarray(at[0]["tall"].left)[0] / mu
        # U Z and U' of the same period span the same columns.
        other = np.asarray(at[1]["tall"].left)[0] / mu
        basis = np.linalg.qr(u)[0]
        np.testing.assert_allclose(basis @ basis.T @ other, other, atol=1e-5)


# Precision ----------------------------------------------------------------------------------------


def test_bfloat16_weights_are_perturbed_in_float32():
    """Around 3, bfloat16 has steps of 1/64: a perturbation of 1e-3 would vanish."""
    weights = np.full((4, 4), 3.0, jnp.bfloat16)
    seen = []

    def loss(w):
        seen.append(w.dtype)
        return jnp.sum(w)

    value, gradient = estimators.zeroth_order(loss, estimators.gaussian())(weights, key=0)
    assert seen[0] == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert value.dtype == jnp.float32
    assert np.all(np.asarray(gradient, np.float32) != 0)


# Low-rank directions ------------------------------------------------------------------------------


def test_factors_are_applied_without_their_product():
    """A model that takes factors gets the same estimate, and no matrix of the weight's size."""
    x = jax.random.normal(jax.random.key(0), (2, 64))
    params = {"w": jax.random.normal(jax.random.key(1), (64, 48))}

    def loss(params):
        return jnp.sum(jnp.tanh(x @ params["w"]))

    slopes = {}
    for perturb in (estimators.add, estimators.as_factors):
        estimate = estimators.zeroth_order(loss, DIRECTIONS["low_rank"], 0.1, perturb=perturb)
        slopes[perturb] = jax.jit(estimate, compiler_options=helpers.QUICK)(params, key=0)[1]["w"]
        jaxpr = jax.make_jaxpr(lambda p, e=estimate: e(p, key=0)[0])(params)
        products = [
            equation.outvars[0].aval.shape
            for equation, _ in helpers.equations(jaxpr)
            if equation.primitive.name == "dot_general"
        ]
        # The gradient's own product is there in both, and is dropped where only the value is used.
        assert products.count((64, 48)) == (2 if perturb is estimators.add else 1)
    np.testing.assert_allclose(slopes[estimators.add], slopes[estimators.as_factors], rtol=2e-3)


def _oracle_lozo_m(estimates, lazies, period, beta):
    """Momentum beta N + (1 - beta) c U, and its projection to the new V at a refresh."""
    momentum, updates = 0.0, []
    for t, estimate in enumerate(estimates):
        if t % period == 0:
            basis = np.linalg.qr(lazies[t])[0]
            if t:  # of N V_old': its projection onto the span of the new V
                momentum = basis @ basis.T @ momentum
        momentum = beta * momentum + (1 - beta) * estimate
        updates.append(momentum)
    return updates


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_lozo_m_is_lozo_and_the_engine(beta):
    """Low-rank momentum keeps LOZO's estimates without loss, over three periods.

    The paper multiplies by V_old'V_new / n at a refresh, the identity on average; here it is a
    projection. Without momentum, LOZO-M is LOZO.
    """
    rank, period, shape = 2, 4, (3, 5)
    directions = estimators.low_rank(rank, period)
    compression = LowRank(rank, period, residuals.drop(), projectors.svd, carries.rotate)
    tx = gum_optax.low_rank(optax.ema(beta, debias=False), compression)
    target = _tree(1)["wide"]

    @jax.jit
    def step(w, state, t):
        loss = lambda w: jnp.sum((w - target) ** 2)  # noqa: E731
        _, gradient = estimators.zeroth_order(loss, directions, 0.1)(w, key=3, step=t)
        updates, state = tx.update(gradient, state)
        return gradient, updates, state, optax.apply_updates(w, -0.01 * jnp.asarray(updates))

    w = jnp.zeros(shape)
    state, estimates, updates, lazies = tx.init(w), [], [], []
    for t in range(3 * period):
        gradient, update, state, w = step(w, state, t)
        estimates.append(np.asarray(gradient, np.float64))
        updates.append(np.asarray(update))
        lazies.append(np.asarray(directions.draw(_occasion(3, t), w).left, np.float64))
    assert state.inner.ema["param"].low.shape == (1, rank, 5)
    expected = _oracle_lozo_m(estimates, lazies, period, beta)
    # Measured 4e-6: rounding of float32 losses is in the estimates of both.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.stack(updates) / scale, np.stack(expected) / scale, atol=2e-5)


# Coordinates and mixtures -------------------------------------------------------------------------


def test_coordinates_are_unbiased_by_enumeration():
    """Each set I with its probability: the mean is g, the variance sum g^2 (1/p - 1) = 10."""
    gradient = np.array([8.0, 1.0, 1.0, 2.0])
    p = np.array([1.0, 0.25, 0.25, 0.5])
    estimate = estimators.zeroth_order(_linear(jnp.asarray(gradient)), estimators.coordinates(p))
    draws = jax.jit(
        jax.vmap(lambda step: estimate(jnp.zeros(4), key=0, step=step)[1]),
        compiler_options=helpers.QUICK,
    )(jnp.arange(400))
    # 1. Whatever is drawn: g_i / p_i where i is in I, and zero elsewhere.
    draws = np.asarray(draws, np.float64)
    included = draws != 0
    np.testing.assert_allclose(draws, included * gradient / p, rtol=1e-3)
    # 2. All eight sets that have a chance are drawn.
    sets = {tuple(row) for row in included.tolist()}
    assert sets == {s for s in itertools.product([True, False], repeat=4) if s[0]}
    # 3. The mean over sets weighted by their probabilities, and the variance.
    weights = {s: np.prod(np.where(s, p, 1 - p)) for s in sets}
    of_set = {s: np.array(s) * gradient / p for s in sets}
    np.testing.assert_allclose(sum(w * of_set[s] for s, w in weights.items()), gradient)
    variance = sum(w * ((of_set[s] - gradient) ** 2).sum() for s, w in weights.items())
    np.testing.assert_allclose(variance, 10)
    # 4. And they are drawn that often: five standard deviations.
    np.testing.assert_allclose(included.mean(0), p, atol=5 * np.sqrt(0.25 / 400))


def test_losses_of_coordinates_that_are_not_drawn_are_not_computed():
    def loss(params):
        return jnp.sum(params["a"])

    estimate = estimators.zeroth_order(loss, estimators.coordinates({"a": 0.5, "b": 0.0}))
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    jaxpr = jax.make_jaxpr(lambda p: estimate(p, key=0))(params)
    assert [e for e, _ in helpers.equations(jaxpr) if e.primitive.name == "cond"]
    value, gradient = estimate(params, key=0)
    np.testing.assert_array_equal(gradient["b"], 0)
    assert np.isnan(value) == (not np.any(gradient["a"]))
    with pytest.raises(ValueError, match="`probabilities` has 2 leaves and the parameters 1"):
        estimate({"a": jnp.ones(3)}, key=0)


@pytest.mark.slow  # compiles three programs with losses inside conditionals
def test_hybrid_draws_large_coordinates_more_often():
    """With all coordinates tried it is the gradient; of two, one is always the largest."""
    gradient = jnp.array([100.0, 1.0, 1.0, 1.0])

    def loss(w):
        return jnp.sum(gradient * w)

    every = estimators.hybrid(loss, tried=4, share=0.0, eps=0.5)
    np.testing.assert_allclose(every(jnp.zeros(4), key=0)[1], gradient, rtol=1e-5)
    some = estimators.hybrid(loss, tried=2, share=0.0, eps=0.5, samples=200)
    steps = jax.jit(
        jax.vmap(lambda step: some(jnp.zeros(4), key=0, step=step)[1]),
        compiler_options=helpers.QUICK,
    )
    draws = np.asarray(steps(jnp.arange(20)))
    np.testing.assert_allclose(draws[:, 0], 100, rtol=1e-4)
    assert np.count_nonzero(draws[:, 1:]) < 20 * 3
    mixed = estimators.hybrid(loss, tried=4, share=1.0, eps=0.5)
    sphere = estimators.zeroth_order(loss, estimators.sphere(), 0.5)
    np.testing.assert_array_equal(mixed(jnp.zeros(4), key=0)[1], sphere(jnp.zeros(4), key=0)[1])


# Memory -------------------------------------------------------------------------------------------


def _step_bytes(gradient_of, params, batch):
    """Temporaries of a step of SGD that overwrites its weights, by the compiler."""

    def step(params, t, x):
        _, grads = gradient_of(params, x, t)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, params, grads)

    lowered = jax.jit(step, donate_argnums=0).lower(params, 0, batch)
    found: Any = lowered.compile().memory_analysis()
    return found.temp_size_in_bytes


@pytest.mark.slow  # compiles four programs
def test_memory_of_a_step_against_backpropagation():
    """Eight layers 256 x 256 on 4,096 rows: backpropagation keeps their activations, this none."""
    width, rows, layers = 256, 4096, 8
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
    batch = jax.ShapeDtypeStruct((rows, width), jnp.float32)

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    backward = jax.value_and_grad(loss)
    first = _step_bytes(lambda p, x, t: backward(p, x), params, batch)
    activation, weights = rows * width * 4, layers * width**2 * 4
    assert first >= layers * activation
    for directions in (estimators.gaussian(), estimators.low_rank(), estimators.orthonormal()):
        estimate = estimators.zeroth_order(loss, directions)
        zeroth = _step_bytes(lambda p, x, t, e=estimate: e(p, x, key=0, step=t), params, batch)
        # Two activations, a perturbed copy of the weights, and directions while they are made.
        assert zeroth <= 2 * activation + 3 * weights, zeroth


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, estimators.gaussian()), "`loss` must be a function"),
        ((jnp.sum, "gaussian"), "`directions` must be a Directions"),
        ((jnp.sum, estimators.gaussian(), 0), "`eps` must be positive, got 0"),
        ((jnp.sum, estimators.gaussian(), -1), "`eps` must not be negative, got -1"),
        ((jnp.sum, estimators.gaussian(), 1e-3, 0), "`samples` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        estimators.zeroth_order(*arguments)


@pytest.mark.parametrize("make", [estimators.low_rank, estimators.orthonormal])
@pytest.mark.parametrize("name", ["rank", "period"])
def test_bad_ranks_and_periods(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        make(**{name: 0})


def test_a_loss_must_be_a_scalar():
    estimate = estimators.zeroth_order(lambda w: w, estimators.gaussian())
    with pytest.raises(ValueError, match=r"`loss` must return a scalar, got shape \(3,\)"):
        estimate(jnp.ones(3), key=0)
