"""Power iteration against Householder's QR, and the accuracy of its Cholesky factors."""

# `*args` hides how many arguments there are.
# pyright: reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gum_optax import _bases
from gum_optax._bases import orthonormal_rows, power_iteration_basis, well_conditioned_rows
from tests import helpers


def _gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _float32(x):
    return np.asarray(x, np.float32)


# Measured over all cases here: 4e-7.
ORTHONORMAL = 2e-6

ROWS = jax.jit(orthonormal_rows, static_argnums=1, compiler_options=helpers.QUICK)
WELL_CONDITIONED_ROWS = jax.jit(well_conditioned_rows, compiler_options=helpers.QUICK)
BASIS = jax.jit(power_iteration_basis, static_argnums=2, compiler_options=helpers.QUICK)
# One program for any number of iterations.
BASIS_OF_ANY = jax.jit(power_iteration_basis, compiler_options=helpers.QUICK)


def _departure(basis):
    basis = np.asarray(basis, np.float64)
    return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


def _householder(gradient, start, iterations):
    """Power iteration in float64, orthonormalized by NumPy's QR."""
    basis = start
    for _ in range(iterations):
        basis = np.linalg.qr(gradient @ np.linalg.qr(gradient.T @ basis)[0])[0]
    return basis


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("shape", [(12, 30, 4), (8, 8, 3), (6, 9, 6), (1, 5, 1)], ids=str)
def test_the_basis_equals_the_float64_iteration(shape, iterations):
    m, n, r = shape
    gradient, start = _gaussian((m, n)), _gaussian((m, r), seed=1)
    expected = _householder(gradient, start, iterations)
    with jax.enable_x64(True):
        basis = np.asarray(BASIS_OF_ANY(gradient, start, iterations))
    # Subspaces, not vectors: the columns may be rotated. Measured: 7e-16.
    np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-12)


@pytest.mark.parametrize("decades", [3, 5, 8])
def test_steep_spectra_keep_every_direction(decades):
    """Once, the weakest of 64 directions were lost in rounding, and the basis was not finite."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(128, 128)))[0] for _ in range(2))
    gradient = _float32(left * np.logspace(0, -decades, 128) @ right)
    start = np.linalg.qr(rng.normal(size=(128, 64)))[0]
    basis = BASIS(gradient, _float32(start), 3)
    assert _departure(basis) < ORTHONORMAL
    G = np.asarray(gradient, np.float64)
    oracle = _householder(G, start, 2)
    missed = [1 - np.sum((P.T @ G) ** 2) / np.sum(G**2) for P in (np.asarray(basis), oracle)]
    assert missed[0] < 1.05 * missed[1] + 1e-9


@pytest.mark.parametrize(("kind", "cholesky"), [("gaussian", True), ("zero", False)])
def test_householder_is_for_where_cholesky_fails(monkeypatch, kind, cholesky):
    """Cholesky does what it can, several times as fast: spoil the other and see who notices."""
    monkeypatch.setattr(jnp.linalg, "qr", lambda x: (jnp.full_like(x, jnp.nan), None))
    gradient = _float32((kind == "gaussian") * _gaussian((40, 60)))
    start = _float32(_gaussian((40, 6), seed=1))
    spoiled = jax.jit(lambda *args: power_iteration_basis(*args, 3), compiler_options=helpers.QUICK)
    assert bool(np.isfinite(spoiled(gradient, start)).all()) == cholesky


def test_where_cholesky_fails_householder_takes_over(monkeypatch):
    """XLA's CPU backend passes over NaNs in a maximum: the check must not rest on one."""

    def failed(x, shift):
        return jnp.full_like(x, jnp.nan), jnp.array(jnp.nan)

    monkeypatch.setattr(_bases, "orthonormal_rows", failed)
    gradient, start = (_float32(_gaussian((16, n))) for n in (24, 4))
    spoiled = jax.jit(lambda *args: power_iteration_basis(*args, 3), compiler_options=helpers.QUICK)
    assert _departure(spoiled(gradient, start)) < ORTHONORMAL


def test_two_factorizations_polish_what_one_leaves(monkeypatch):
    """The last rows may be as far from orthonormal as their first factor leaves them.

    One factor without a shift leaves an error of the squared condition number, here 900 roundings.
    Gradients that were tried left less before it, of ranks below r too: one would do for them.
    """

    def rows_of_condition(x):
        left, _, right = jnp.linalg.svd(x, full_matrices=False)
        return left * jnp.geomspace(1, 1 / 30, len(left), dtype=x.dtype) @ right

    # Householder would repair it, and take several times as long.
    monkeypatch.setattr(jnp.linalg, "qr", lambda x: (jnp.full_like(x, jnp.nan), None))
    monkeypatch.setattr(_bases, "well_conditioned_rows", rows_of_condition)
    gradient, start = _float32(_gaussian((40, 60))), _float32(_gaussian((40, 12), seed=1))
    polished = jax.jit(lambda *args: power_iteration_basis(*args, 1))
    assert _departure(polished(gradient, start)) < ORTHONORMAL


@pytest.mark.parametrize(("decades", "shift"), [(0, 1e-6), (3, 1e-6), (8, 1e-6), (8, 1e-3)])
def test_what_a_shift_takes_from_the_rows_is_known(decades, shift):
    """It decides whether they are taken again, and bounds what every direction lost."""
    with jax.enable_x64(True):
        x = np.logspace(0, -decades, 8)[:, None] * _gaussian((8, 20))
        rows, lost = map(np.asarray, ROWS(x, shift))
    missing = np.linalg.eigvalsh(np.eye(8) - rows @ rows.T)
    np.testing.assert_allclose(lost, missing.sum(), atol=1e-9)
    assert missing.max() < lost + 1e-9


@pytest.mark.parametrize(("decades", "again"), [(0, False), (2, False), (4, True)])
def test_rows_are_taken_again_only_where_much_was_lost(decades, again):
    with jax.enable_x64(True):
        x = np.logspace(0, -decades, 8)[:, None] * np.linalg.qr(_gaussian((20, 8)))[0].T
        rows = np.asarray(WELL_CONDITIONED_ROWS(x))
        once = np.asarray(ROWS(x, 1e-6)[0])
    assert np.linalg.svd(rows, compute_uv=False).min() > 0.9
    assert (np.linalg.svd(once, compute_uv=False).min() < 0.2) == again
    assert (rows != once).any() == again


def test_vectorized_over_runs_the_slow_way_is_taken_only_where_some_run_needs_it():
    """And then by that run alone. Under a plain `cond`, all would compute both ways."""
    gradients = _float32(_gaussian((3, 12, 20)))
    gradients[1] = 0  # has no Cholesky factor; the others must not notice
    start = jnp.asarray(_float32(_gaussian((12, 4), seed=1)))
    basis = functools.partial(power_iteration_basis, start=start, iterations=2)
    every = jax.vmap(basis)
    names = [str(equation.primitive) for equation in jax.make_jaxpr(every)(gradients).eqns]
    assert "cond" in names and not {"geqrf", "qr", "householder_product"} & set(names)
    found = jax.jit(every, compiler_options=helpers.QUICK)(gradients)
    for one, gradient in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, BASIS(gradient, start, 2), atol=2e-6)
    # What chooses the way has no derivative; what was chosen keeps its own.
    jax.make_jaxpr(jax.grad(lambda gradient: jnp.sum(basis(gradient))))(gradients[0])
