"""Decorrelated rows against forward substitution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import _decorrelation, _scheduling, decorrelate
from tests import helpers, reference

SHAPES = [(8, 20), (20, 8), (12, 12), (1, 9), (9, 1), (1, 1), (3, 8, 20), (2, 3, 20, 8)]
TOLERANCE = 1e-5  # float32 against float64 over all cases here: measured 7e-7

_decorrelate = jax.jit(decorrelate, compiler_options=helpers.QUICK)


def _gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _oracle(x):
    if x.ndim > 2:
        return np.stack([_oracle(part) for part in x])
    return reference.decorrelated(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_forward_substitution_in_float64(shape):
    x = _gaussian(shape)
    np.testing.assert_allclose(_decorrelate(np.float32(x)), _oracle(x), atol=TOLERANCE)


def test_by_hand():
    """The second row loses its half along the first; the third one all but its last entry."""
    x = np.array([[2.0, 0, 0], [1, 3**0.5, 0], [1, 0, 1]], np.float32)
    np.testing.assert_allclose(_decorrelate(x)[:2], np.eye(3)[:2], atol=1e-6)
    # q_3 = (1, 0, 1) / sqrt 2 has correlations of 1 / sqrt 2 and 1 / sqrt 8 with the rows before.
    third = np.array([1, 0, 1]) / 2**0.5
    second = np.array([0.5, 0.75**0.5, 0]) - 0.5 * np.array([1.0, 0, 0])
    third = third - np.array([1.0, 0, 0]) / 2**0.5 - second / 8**0.5
    np.testing.assert_allclose(_decorrelate(x)[2], third / np.linalg.norm(third), atol=1e-6)


def test_orthogonal_rows_are_only_scaled():
    rows = np.linalg.qr(_gaussian((20, 8)))[0].T
    got = _decorrelate(np.float32(rows * np.arange(1, 9)[:, None]))
    np.testing.assert_allclose(got, rows, atol=1e-6)


@pytest.mark.parametrize("correlated", [0.0, 0.5, 0.99, 1.0])
def test_the_solve_at_most_doubles_and_rows_end_near_orthogonal(correlated):
    """``T + T' = Q Q' + I``, so ``|T^-1| <= 2``, even if all rows are the same."""
    x = (1 - correlated) * _gaussian((40, 80)) + correlated * _gaussian(80, seed=1)
    Q = x / np.linalg.norm(x, axis=1, keepdims=True)
    T = np.tril(Q @ Q.T)
    assert np.linalg.svd(np.linalg.inv(T), compute_uv=False)[0] <= 2 + 1e-9
    got = np.asarray(_decorrelate(np.float32(x)))
    assert np.isfinite(got).all()
    if correlated < 1:
        before, after = (
            np.abs(rows @ rows.T - np.eye(40)).mean() for rows in (Q, got.astype(np.float64))
        )
        assert after < before


@pytest.mark.parametrize("scale", [1e-36, 1e-3, 1e36])
def test_the_size_of_a_row_does_not_matter(scale):
    x = _gaussian((8, 20))
    scaled = x.astype(np.float32)
    scaled[3] *= np.float32(scale)
    np.testing.assert_allclose(_decorrelate(scaled), _oracle(x), atol=2e-5)


def test_rows_of_zeros_stay_zero_and_leave_the_others_alone():
    x = _gaussian((8, 20))
    x[2] = 0
    got = _decorrelate(np.float32(x))
    np.testing.assert_array_equal(got[2], 0)
    np.testing.assert_allclose(np.delete(got, 2, 0), _oracle(np.delete(x, 2, 0)), atol=TOLERANCE)
    np.testing.assert_array_equal(_decorrelate(np.zeros((3, 5), np.float32)), 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = jnp.asarray(_gaussian((8, 20)), dtype)
    got = _decorrelate(x)
    assert got.dtype == dtype
    exact = _oracle(np.asarray(x, np.float64))
    np.testing.assert_array_equal(got, jnp.asarray(_decorrelate(np.float32(x)), dtype))
    np.testing.assert_allclose(np.float64(got), exact, atol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(0, 8, 20), (3, 0, 20), (8, 0)], ids=str)
def test_empty_arrays_pass_through(shape):
    assert decorrelate(jnp.zeros(shape)).shape == shape


def test_large_matrices_of_a_batch_take_turns(monkeypatch):
    monkeypatch.setattr(_scheduling, "LARGE_SIDE", 7)
    seen, function = [], _decorrelation._decorrelate

    def spy(x):
        seen.append(x.shape)
        return function(x)

    monkeypatch.setattr(_decorrelation, "_decorrelate", spy)
    x = _gaussian((3, 8, 20))
    x[0] = 0
    tx = gum_optax.scale_by_decorrelation()
    update = jax.jit(tx.update, compiler_options=helpers.QUICK)
    got, _ = update({"large": np.float32(x), "small": np.float32(x[:, :4])}, optax.EmptyState())
    np.testing.assert_allclose(got["large"][1:], _oracle(x[1:]), atol=TOLERANCE)
    np.testing.assert_array_equal(got["large"][0], 0)
    np.testing.assert_allclose(got["small"][1:], _oracle(x[1:, :4]), atol=TOLERANCE)
    assert set(seen) == {(8, 20), (3, 4, 20)}


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_shardings_are_kept(kind):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", None, "b"))
    x = _gaussian((2, 8, 20))
    tx = gum_optax.scale_by_decorrelation()
    update = jax.jit(lambda x: tx.update(x, optax.EmptyState())[0])
    got = update(jax.device_put(np.float32(x), sharding))
    assert got.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(got, _oracle(x), atol=TOLERANCE)


@pytest.mark.parametrize(
    "recipe",
    [gum_optax.muon, functools.partial(gum_optax.gum, compression=gum_optax.galore(4, 10))],
    ids=["muon", "gum"],
)
def test_it_takes_the_place_of_newton_schulz(recipe):
    """After one step from zero, momentum is the gradient (in 8 bits, of one row: to 0.4 %)."""
    params = {"layers": [{"kernel": np.float32(_gaussian((8, 20), seed))} for seed in range(3)]}
    mud = gum_optax.scale_by_decorrelation()
    tx = recipe(1.0, consistent_rms=0.2, orthogonalizer=mud)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for update, G in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        if recipe is gum_optax.muon:
            expected = _oracle(np.float64(G))
        else:
            P = np.linalg.svd(np.float64(G))[0][:, :4]
            # Rows of P'G are orthogonal, so that they are only scaled.
            R = P.T @ np.float64(G)
            expected = P @ (R / np.linalg.norm(R, axis=1, keepdims=True))
        np.testing.assert_allclose(update, -0.2 * 20**0.5 * expected, atol=0.02)
