"""Column normalization against loops in float64, alone and on residuals of projections."""

# optax types updates as any tree of arrays, whose leaves are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gum_optax import normalize_columns, standardize_columns
from tests import helpers

SHAPES = [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1), (3, 6, 10), (2, 3, 10, 6)]

# (batch, m, n, r): wide, square, one direction left, none left, batch axes.
RESIDUALS = [((), 6, 10, 2), ((), 8, 8, 3), ((), 6, 10, 5), ((), 4, 9, 4), ((2, 3), 6, 10, 2)]

# Float32 against float64 over all cases here, relative: measured 3e-7.
TOLERANCE = 2e-6


def _gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _float32(x):
    return np.asarray(x, np.float32)


def _oracle(x, eps=1e-8):
    """Column after column, in float64."""
    result = np.zeros(x.shape)
    for *where, j in np.ndindex(*x.shape[:-2], x.shape[-1]):
        column = np.asarray(x, np.float64)[(*where, slice(None), j)]
        rms = np.sqrt(np.mean(column**2))
        if rms > 0:
            result[(*where, slice(None), j)] = column / max(rms, eps)
    return result


def _oracle_residual(residual, projected):
    """Column after column, in float64."""
    result, (m, n), r = np.zeros(residual.shape), residual.shape[-2:], projected.shape[-2]
    for *where, j in np.ndindex(*residual.shape[:-2], n):
        index = (*where, slice(None), j)
        e, p = np.asarray(residual, np.float64)[index], np.asarray(projected, np.float64)[index]
        if e.any():
            size = max(np.linalg.norm(e), 2.0**-8 * np.linalg.norm(p))
            result[index] = np.sqrt((m - r) / n) * e / size
    return result


@functools.cache
def _normalize(eps):
    update = normalize_columns(eps).update
    return jax.jit(lambda x: update(x, optax.EmptyState())[0], compiler_options=helpers.QUICK)


@functools.partial(jax.jit, compiler_options=helpers.QUICK)
def _normalize_residual(residual, projected):
    return normalize_columns().update(residual, optax.EmptyState(), projected=projected)[0]


def _plain(x, eps=1e-8):
    return jax.tree.map(np.asarray, _normalize(eps)(x))


def _residual(residual, projected):
    return jax.tree.map(np.asarray, _normalize_residual(residual, projected))


def _projection(batch, m, n, r, seed=0):
    """A gradient's residual and its projection, in float64."""
    gradient = _gaussian(*batch, m, n, seed=seed)
    basis = np.linalg.qr(_gaussian(*batch, m, r, seed=seed + 1))[0]
    projected = np.swapaxes(basis, -2, -1) @ gradient
    return gradient - basis @ projected, projected


# By itself ----------------------------------------------------------------------------------------


def test_the_hand_vector():
    got = _plain(_float32([[3.0, 1.0], [4.0, -1.0]]))
    expected = [[0.8485281374, 1.0], [1.1313708499, -1.0]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_loop(shape):
    x = _float32(_gaussian(*shape))
    got = _plain({"a": [x]})["a"][0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, _oracle(x), rtol=TOLERANCE)
    np.testing.assert_allclose(np.mean(got**2, axis=-2), 1.0, rtol=TOLERANCE)


def test_equals_the_float64_loop_in_float64():
    with jax.enable_x64(True):
        got = _plain(_gaussian(6, 10))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, _oracle(_gaussian(6, 10)), rtol=1e-14)


def test_is_invariant_to_the_scale_of_columns():
    x = _float32(_gaussian(6, 10))
    np.testing.assert_allclose(_plain(x * _float32(2.0 ** np.arange(-5, 5))), _plain(x), rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_columns_stay_zero(eps):
    x = _float32(_gaussian(6, 10))
    x[:, 3] = 0
    got = _plain(x, eps)
    np.testing.assert_array_equal(got[:, 3], 0.0)
    np.testing.assert_allclose(got, _oracle(x, eps), rtol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e-9, 1e30, 1e37])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
def test_extreme_scales_follow_the_definition(scale, eps):
    """At 1e30 squares overflow float32, at 1e-30 they vanish; and eps must still be in force."""
    x = _float32(scale * _gaussian(6, 10))
    # Results far below the range of float32 may be flushed to zero.
    np.testing.assert_allclose(_plain(x, eps), _oracle(x, eps), rtol=TOLERANCE, atol=1e-37)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = _gaussian(400, 10).astype(dtype)
    got = _plain(x)
    assert got.dtype == dtype
    # Rounded once, at the end.
    np.testing.assert_array_equal(got, _plain(_float32(x)).astype(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)], ids=str)
def test_empty_leaves_pass_through(shape):
    zero, no_rows = (np.zeros(s, np.float32) for s in (shape, (*shape[:-2], 0, shape[-1])))
    assert _plain(zero).shape == shape
    assert _residual(zero, no_rows).shape == shape


def test_eps_can_be_injected():
    tx = optax.inject_hyperparams(normalize_columns)(eps=2.0)
    x = np.ones((2, 3), np.float32)
    with jax.numpy_dtype_promotion("strict"):
        got, _ = jax.jit(tx.update)(x, tx.init(x))
    np.testing.assert_allclose(got, 0.5)


# Residuals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RESIDUALS, ids=str)
def test_residuals_equal_the_float64_loop(case):
    residual, projected = map(_float32, _projection(*case))
    got = _residual([residual], [projected])[0]
    np.testing.assert_allclose(
        got, _oracle_residual(residual, projected), rtol=TOLERANCE, atol=1e-37
    )


@pytest.mark.parametrize("case", RESIDUALS, ids=str)
def test_residuals_get_the_norm_of_the_directions_that_are_left(case):
    batch, m, _, r = case
    got = _residual(*map(_float32, _projection(*case)))
    np.testing.assert_allclose(np.sum(got**2, axis=(-2, -1)), np.full(batch, m - r), rtol=TOLERANCE)


def test_residuals_are_invariant_to_the_scale_of_columns():
    scale = _float32(2.0 ** np.arange(-5, 5))
    residual, projected = map(_float32, _projection((), 6, 10, 2))
    np.testing.assert_allclose(
        _residual(residual * scale, projected * scale), _residual(residual, projected), rtol=1e-6
    )


@functools.partial(jax.jit, compiler_options=helpers.QUICK, static_argnames="eps")
def _standardize(x, eps=1e-8):
    return standardize_columns(eps).update(x, optax.EmptyState())[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardized_columns_equal_the_float64_loop(shape):
    x = _gaussian(*shape) + 3
    expected = _oracle(x - x.mean(-2, keepdims=True))
    np.testing.assert_allclose(_standardize(_float32(x)), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-33, 1e30, 1e37])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_standardized_columns_of_extreme_scales_follow_the_definition(scale, eps):
    x = _gaussian(6, 10)
    expected = _oracle(scale * (x - x.mean(0)), eps)
    got = _standardize(_float32(scale * x), eps=eps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_columns_of_equal_entries_become_zero():
    x = np.float32(_gaussian(6, 3))
    x[:, 1] = 0.3
    got = _standardize(x)
    np.testing.assert_array_equal(got[:, 1], 0)
    np.testing.assert_allclose(np.std(got[:, ::2], axis=0), 1, rtol=1e-5)


def test_standardized_half_precision_and_empty_leaves():
    x = jnp.asarray(_gaussian(6, 10), jnp.bfloat16)
    assert _standardize(x).dtype == jnp.bfloat16
    exact = _standardize(x.astype(jnp.float32))
    np.testing.assert_array_equal(_standardize(x), exact.astype(jnp.bfloat16))
    assert _standardize(jnp.zeros((0, 4))).shape == (0, 4)


# Measured: 5.6e-5 and 0.47 of a full column.
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.75)])
def test_columns_that_are_rounding_stay_small(dtype, bound):
    """Half of the gradient's columns lie in the basis's span, so their residual is noise."""
    basis = _float32(np.linalg.qr(_gaussian(64, 16))[0])
    gradient = _float32(_gaussian(64, 100, seed=1))
    gradient[:, ::2] = basis @ _float32(_gaussian(16, 50, seed=2))
    gradient = _float32(gradient.astype(dtype))
    projected = basis.T @ gradient
    residual = gradient - basis @ projected
    norms = np.linalg.norm(_residual(residual, projected), axis=0)
    assert (np.linalg.norm(residual, axis=0)[::2] > 0).all()
    share = (48 / 100) ** 0.5
    assert norms[::2].max() < bound * share
    np.testing.assert_allclose(norms[1::2], share, rtol=TOLERANCE)


@pytest.mark.parametrize(("size", "share"), [(0.5, 0.5), (1, 1.0), (2, 1.0), (0.01, 0.01)])
def test_the_floor_is_the_precision_of_bfloat16(size, share):
    residual, projected = np.zeros((4, 5), np.float32), np.ones((1, 5), np.float32)
    residual[3] = size * 2.0**-8
    expected = np.zeros((4, 5))
    expected[3] = share * (3 / 5) ** 0.5
    np.testing.assert_allclose(_residual(residual, projected), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e30, 1e37])
def test_extreme_residuals_follow_the_definition(scale):
    residual, projected = (_float32(scale * x) for x in _projection((), 6, 10, 2))
    np.testing.assert_allclose(
        _residual(residual, projected), _oracle_residual(residual, projected), rtol=TOLERANCE
    )


def test_zero_columns_and_zero_projections():
    residual, projected = map(_float32, _projection((), 6, 10, 2))
    residual[:, [1, 2]] = 0
    projected[:, [2, 3]] = 0
    got = _residual(residual, projected)
    np.testing.assert_array_equal(got[:, 1:3], 0.0)
    np.testing.assert_allclose(
        got, _oracle_residual(residual, projected), rtol=TOLERANCE, atol=1e-37
    )


def test_a_tiny_residual_of_a_huge_projection_vanishes():
    """The quotient of the two overflows float32."""
    got = _residual(np.full((4, 5), 1e-30, np.float32), np.full((1, 5), 1e30, np.float32))
    np.testing.assert_array_equal(got, 0.0)


def test_residuals_keep_their_dtype():
    residual, projected = _projection((), 6, 10, 2)
    got = _residual(residual.astype(jnp.bfloat16), _float32(projected))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.sum(_float32(got) ** 2), 4.0, rtol=1e-2)


# In a tree, on a mesh, with mistakes --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("on_residual", [False, True])
def test_shardings_are_kept(kind, on_residual):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    residual, projected = map(_float32, _projection((), 6, 10, 2))
    x = jax.device_put(residual, sharding)
    if on_residual:
        got = _normalize_residual(x, jax.device_put(projected, sharding))
    else:
        got = _normalize(1e-8)(x)
    expected = _oracle_residual(residual, projected) if on_residual else _oracle(residual)
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def test_chains_pass_the_projection_on():
    residual, projected = map(_float32, _projection((), 6, 10, 2))
    tx = optax.chain(normalize_columns(), optax.scale(2.0))
    got, _ = jax.jit(lambda e, p: tx.update(e, tx.init(e), projected=p, other="unused"))(
        residual, projected
    )
    np.testing.assert_allclose(got, 2 * _residual(residual, projected), rtol=1e-6)


def test_masked_leaves_are_left_out():
    x = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    tx = optax.masked(normalize_columns(), {"w": True, "b": False})
    got, _ = jax.jit(tx.update)(x, tx.init(x))
    np.testing.assert_array_equal(got["b"], x["b"])


@pytest.mark.parametrize("leaf", [np.ones(3), np.ones(())], ids=["vector", "scalar"])
def test_leaves_that_are_not_matrices_are_named(leaf):
    tree = {"norm": {"scale": leaf}}
    for make in (normalize_columns, standardize_columns):
        tx = make()
        for call in (tx.init, lambda tree, tx=tx: tx.update(tree, optax.EmptyState())):
            told = rf"`{make.__name__}`.* 2 axes.*\['norm'\]\['scale'\].*partition"
            with pytest.raises(ValueError, match=told):
                call(tree)


@pytest.mark.parametrize("shape", [(7, 10), (2, 9), (10,), (1, 2, 10)], ids=str)
def test_projections_of_the_wrong_shape_are_named(shape):
    with pytest.raises(ValueError, match="`projected` must"):
        _residual(np.ones((6, 10), np.float32), np.ones(shape, np.float32))


@pytest.mark.parametrize("eps", [-1e-8, float("nan"), float("inf"), "1e-8", None])
def test_a_bad_eps_fails_at_once(eps):
    for make in (normalize_columns, standardize_columns):
        with pytest.raises((TypeError, ValueError), match="`eps` must"):
            make(eps)
