"""Scaled residuals that never exist: against float64, at extreme scales, and in the program."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, normalize_columns, residuals, scale_by_gain
from gum_optax._column_scaling import expanded, factors_of
from tests import helpers

M, N, R = 12, 20, 4


def _arrays(orthonormal=True):
    """A basis P, a gradient G and an update D of its projection, in float64."""
    noise = np.random.default_rng(0)
    basis = np.linalg.qr(noise.normal(size=(M, R)))[0]
    if not orthonormal:
        basis = np.round(20 * basis) / 20  # as codes of few bits leave it
    return basis, noise.normal(size=(M, N)) * np.arange(1, N + 1), noise.normal(size=(R, N))


def _expanded(transformation, basis, gradient, update, dtype=np.float64):
    """Returns P D + E diag(c) and the new state of a transformation after its first step."""
    with jax.enable_x64(dtype == np.float64):
        P, G, D = (jnp.asarray(x, dtype) for x in (basis, gradient, update))
        state = transformation.init(jnp.zeros((M, N), dtype))
        return expanded(factors_of(transformation), P, D, P.mT @ G, G, state)


@pytest.mark.parametrize("orthonormal", [True, False], ids=["orthonormal", "rounded"])
@pytest.mark.parametrize("name", ["columns", "gain", "matrix gain"])
def test_the_update_is_that_of_the_residual(name, orthonormal):
    """P D + E diag(c) by definition: with E, and with its norms."""
    P, G, D = _arrays(orthonormal)
    low = P.T @ G
    E = G - P @ low
    norm = np.linalg.norm
    transformation, c = {
        "columns": (normalize_columns(), ((M - R) / N) ** 0.5 / norm(E, axis=0)),
        "gain": (scale_by_gain(eps=1e-30), norm(D, axis=0) / norm(low, axis=0)),
        "matrix gain": (scale_by_gain("matrix", eps=1e-30), norm(D) / norm(low)),
    }[name]
    got, state = _expanded(transformation, P, G, D)
    np.testing.assert_allclose(got, P @ D + E * c, rtol=1e-9, atol=1e-12)
    if name != "columns":
        np.testing.assert_allclose(state, norm(E * c), rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_squares_stay_in_range(scale):
    P, G, D = _arrays()
    expected, _ = _expanded(normalize_columns(), P, G, D)
    got, _ = _expanded(normalize_columns(), P, scale * G, D, np.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_inside_the_basis_has_hardly_a_residual():
    """E is rounding: its columns stay below 2^8 eps of the size that others have."""
    P, _, D = _arrays()
    got, _ = _expanded(normalize_columns(), P, P @ D, D, np.float32)
    added = np.linalg.norm(got - P @ D, axis=0)
    assert np.all(added < 2**8 * 1e-6 * ((M - R) / N) ** 0.5)


def test_a_zero_gradient_has_the_update_of_its_momentum():
    P, G, D = _arrays()
    got, _ = _expanded(normalize_columns(), P, 0 * G, D, np.float32)
    np.testing.assert_allclose(got, P @ D, rtol=1e-5, atol=1e-6)


def test_a_chain_is_applied_to_the_residual():
    """A transformation that is not known to scale columns gets the residual itself."""
    noise = np.random.default_rng(0).normal(size=(3, M, N)).astype(np.float32)

    def updates(*transformations):
        rule = residuals.through(*transformations)
        compression = LowRank(R, 9, rule, helpers.first_coordinates)
        run = helpers.run(gum_optax.low_rank(optax.scale(0.0), compression), [[G] for G in noise])
        return [update[0] for update, _ in run]

    once = np.asarray(updates(normalize_columns()))
    twice = updates(optax.chain(normalize_columns(), optax.scale(2.0)))
    np.testing.assert_allclose(twice, 2 * once, atol=1e-5)
    other = normalize_columns()._replace(update=lambda E, s, p=None, **extra: (0.0 * E, s))
    np.testing.assert_array_equal(updates(other), 0 * once)


@pytest.mark.parametrize(
    "transformation", [normalize_columns(), scale_by_gain()], ids=["columns", "gain"]
)
def test_an_update_takes_the_large_products_of_one_that_drops_the_residual(transformation):
    """P'G and P (D - R diag(c)); a third would be P R."""

    def large(rule):
        compression = LowRank(R, 9, rule, helpers.first_coordinates)
        tx = gum_optax.low_rank(optax.trace(0.9), compression)
        params = [np.zeros((M, N), np.float32)]
        program = jax.make_jaxpr(tx.update)(params, tx.init(params))
        sizes = [_multiplications(equation) for equation, _ in helpers.equations(program)]
        return sum(size >= M * R * N for size in sizes)

    assert large(residuals.through(transformation)) == large(residuals.drop()) == 2


def _multiplications(equation):
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    sides = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return int(np.prod(equation.outvars[0].aval.shape) * np.prod(sides))
