"""Newton-Schulz against optax and a loop in float64."""

# Malformed arguments are the point of some tests.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import _orthogonal, _scheduling, newton_schulz
from tests import helpers

MUON = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)
SHAPES = [(8, 20), (20, 8), (12, 12), (1, 9), (9, 1), (1, 1), (3, 8, 20), (2, 3, 20, 8)]

# Float32 against float64 over all cases here: measured 1.4e-6 (entries of size about 0.3).
TOLERANCE = 1e-5


def _gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _float32(x):
    return np.asarray(x, np.float32)


# Coefficients are given as tuples, to be hashed.
_newton_schulz = jax.jit(
    newton_schulz,
    static_argnames=("ns_coeffs", "ns_steps", "eps"),
    compiler_options=helpers.QUICK,
)


def _oracle(x, coefficients=MUON, steps=5, eps=1e-8):
    """Muon's iteration of one matrix, straight from its definition, in float64."""
    x = np.asarray(x, np.float64)
    if x.ndim > 2:
        return np.stack([_oracle(part, coefficients, steps, eps) for part in x])
    triples = coefficients if np.ndim(coefficients) == 2 else [coefficients] * steps
    y = x / (np.linalg.norm(x) + eps)
    for a, b, c in triples:
        gram = y @ y.T
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y


@functools.partial(jax.jit, compiler_options=helpers.QUICK)
def _each(updates):
    return [newton_schulz(x) for x in updates]


@functools.partial(jax.jit, compiler_options=helpers.QUICK)
def _polar(updates):
    return gum_optax.scale_by_polar().update(updates, optax.EmptyState())[0]


ARRAYS = [_gaussian(shape) for shape in SHAPES]


def test_equals_the_float64_loop():
    for x, got in zip(ARRAYS, _each([_float32(x) for x in ARRAYS]), strict=True):
        assert got.shape == x.shape
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, _oracle(x), atol=TOLERANCE, err_msg=str(x.shape))


SPECTRA = {
    "flat": np.ones(12),
    "to_1e-2": np.logspace(0, -2, 12),
    "to_1e-6": np.logspace(0, -6, 12),
    "rank_one": np.eye(12)[0],
    "one_large": np.r_[1, np.full(11, 1e-4)],
}


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-6), (5, 4e-5), (7, 5e-4)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_very_wide_matrices_equal_the_float64_loop(spectrum, steps, tolerance):
    """Where n is many times m the iteration runs on Gram matrices, whose spectra are squared."""
    left, _, right = np.linalg.svd(_gaussian((12, 200)), full_matrices=False)
    x = left * SPECTRA[spectrum] @ right
    got = _newton_schulz(_float32([x, x[::-1]]), ns_steps=steps)
    expected = _oracle([x, x[::-1]], steps=steps)
    # Measured 4.1e-7, 3.4e-5 and 2.3e-4 (on another CPU 2e-7, 2e-5 and 2.3e-4); the iteration on
    # the matrix itself 1e-7, 1.3e-5 and 1.5e-4. One unit in the last place at one, times the slope
    # of 3.4, is 4e-7.
    assert np.linalg.norm(got - expected, 2, axis=(-2, -1)).max() < tolerance


def test_very_wide_matrices_equal_the_float64_loop_to_rounding():
    with jax.enable_x64(True):
        x = _gaussian((6, 40))
        np.testing.assert_allclose(_newton_schulz(x), _oracle(x), atol=1e-13)


def test_equals_optax_muon_without_momentum():
    # The first three arrays are matrices: wide, tall and square.
    tree = [_float32(x) for x in ARRAYS[:3]]
    muon = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=[optax.contrib.MuonDimensionNumbers()] * 3,
    )
    update = jax.jit(lambda x: muon.update(x, muon.init(x))[0], compiler_options=helpers.QUICK)
    iterated, expected = _each([_float32(x) for x in ARRAYS])[:3], update(tree)
    for one, other, want in zip(iterated, _polar(tree), expected, strict=True):
        np.testing.assert_allclose(one, want, atol=TOLERANCE)
        np.testing.assert_allclose(other, want, atol=TOLERANCE)


ITERATIONS = {
    "one step": (MUON, 1),
    "eight steps": (MUON, 8),
    "cubic": (CUBIC, 5),
    "steps from k": ([CUBIC] * 3, 5),
    "mixed": ([MUON, MUON, CUBIC, (2.0, -1.5, 0.5)], 5),
    "numpy": (np.array([MUON, CUBIC]), 1),
    "jax": (jnp.array([MUON, CUBIC]), 1),
}


def test_coefficients_and_steps():
    x = _gaussian((8, 20))

    @functools.partial(jax.jit, compiler_options=helpers.QUICK)
    def iterated(x):
        return {name: newton_schulz(x, *iteration) for name, iteration in ITERATIONS.items()}

    for name, got in iterated(_float32(x)).items():
        coefficients, steps = ITERATIONS[name]
        expected = _oracle(x, np.asarray(coefficients, np.float64), steps)
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, err_msg=name)


def test_a_convergent_iteration_reaches_the_polar_factor():
    x = _gaussian((8, 20))
    left, _, right = np.linalg.svd(x, full_matrices=False)
    got = _newton_schulz(_float32(x), CUBIC, 25)
    np.testing.assert_allclose(got, left @ right, atol=TOLERANCE)


def test_singular_values_end_near_one():
    values = np.linalg.svd(_newton_schulz(_float32(_gaussian((8, 20)))))[1]
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 8, 20)], ids=str)
def test_zero_stays_zero(shape):
    zero = np.zeros(shape, np.float32)
    np.testing.assert_array_equal(_newton_schulz(zero), zero)
    np.testing.assert_array_equal(_newton_schulz(zero, eps=0.0), zero)


def test_a_zero_matrix_in_a_batch_leaves_the_others_alone():
    x = _gaussian((3, 8, 20))
    x[1] = 0
    got = np.asarray(_newton_schulz(_float32(x)))
    np.testing.assert_array_equal(got[1], np.zeros((8, 20)))
    np.testing.assert_allclose(got, _oracle(x), atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e30, 1e37])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_extreme_scales_follow_the_definition(scale, eps):
    """At 1e30 squares overflow float32, at 1e-30 they vanish; and eps must still be in force."""
    x = _gaussian((8, 20))
    got = _newton_schulz(_float32(scale * x), eps=eps)
    expected = _oracle(scale * x, eps=eps)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_half_precision_keeps_its_dtype_and_stays_finite(dtype, scale):
    x = _gaussian((8, 20))
    got = _newton_schulz((_float32(x) * np.float32(scale)).astype(dtype))
    assert got.dtype == dtype
    # Measured: 0.053 in bfloat16 (eps 2^-8 grows through five steps of slope 3.4).
    np.testing.assert_allclose(np.asarray(got, np.float64), _oracle(x), atol=0.1)


def test_gradient_scale_does_not_matter():
    x = _float32(_gaussian((8, 20)))
    np.testing.assert_allclose(_newton_schulz(x), _newton_schulz(1024 * x), atol=1e-6)


def test_scale_by_polar_takes_trees_with_batches():
    tree = {"a": _gaussian((8, 20)), "b": [_gaussian((2, 20, 8)), _gaussian((1, 3))]}
    got = _polar(jax.tree.map(_float32, tree))
    for result, x in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(result, _oracle(x), atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 8, 20), (3, 0, 20), (8, 0), (2, 0, 3, 4)], ids=str)
def test_empty_arrays_pass_through(shape):
    zero = np.zeros(shape, np.float32)
    assert newton_schulz(jnp.asarray(zero)).shape == shape
    assert _polar(zero).shape == shape


# (shape, whether it is looped over) with matrices above a short side of 7 called large.
LOOPED = [((3, 8, 20), True), ((2, 3, 20, 8), True), ((3, 7, 20), False), ((8, 20), False)]


@pytest.mark.parametrize(("shape", "looped"), LOOPED, ids=str)
def test_large_matrices_of_a_batch_are_orthogonalized_one_by_one(monkeypatch, shape, looped):
    monkeypatch.setattr(_scheduling, "LARGE_SIDE", 7)
    seen = []

    def spy(x, *args):
        seen.append(x.shape)
        return newton_schulz(x, *args)

    monkeypatch.setattr(_orthogonal, "newton_schulz", spy)
    x = _gaussian(shape)
    x[0] = 0
    update = jax.jit(gum_optax.scale_by_polar().update, compiler_options=helpers.QUICK)
    got, _ = update(_float32(x), optax.EmptyState())
    np.testing.assert_allclose(got, _oracle(x), atol=TOLERANCE)
    assert set(seen) == {shape[-2:] if looped else shape}


@pytest.mark.parametrize("shape", [*(shape for shape, _ in LOOPED), (1, 8, 20)], ids=str)
def test_results_are_projected_out_of_bases(monkeypatch, shape):
    """``F - P P'F`` where there is a basis, whether matrices are looped over or not."""
    monkeypatch.setattr(_scheduling, "LARGE_SIDE", 7)
    x = _gaussian(shape)
    bases = np.linalg.qr(_gaussian((*shape[:-1], 3)))[0]
    updates, outside = {"a": _float32(x), "b": _float32(x)}, {"a": _float32(bases), "b": None}
    update = jax.jit(gum_optax.scale_by_polar().update, compiler_options=helpers.QUICK)
    got, _ = update(updates, optax.EmptyState(), None, outside=outside)
    polar = _oracle(x)
    expected = polar - bases @ (np.swapaxes(bases, -1, -2) @ polar)
    np.testing.assert_allclose(got["a"], expected, atol=TOLERANCE)
    np.testing.assert_allclose(got["b"], polar, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_scale_by_polar_keeps_shardings(monkeypatch, kind):
    monkeypatch.setattr(_scheduling, "LARGE_SIDE", 7)  # or a loop would gather the batch
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", None, "b"))
    x = _gaussian((2, 8, 20))
    update = jax.jit(lambda x: gum_optax.scale_by_polar().update(x, optax.EmptyState())[0])
    got = update(jax.device_put(_float32(x), sharding))
    assert got.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(got, _oracle(x), atol=TOLERANCE)


BAD_COEFFICIENTS = {
    "two": (1.0, 2.0),
    "four": (1.0, 2.0, 3.0, 4.0),
    "scalar": 1.5,
    "none of them": np.zeros((0, 3)),
    "pairs": np.ones((2, 2)),
    "three axes": np.ones((1, 1, 3)),
    "nan": (float("nan"), 1.0, 1.0),
    "inf": (float("inf"), 1.0, 1.0),
    "text": ("a", "b", "c"),
    "None": None,
    "ragged": [(1.0, 2.0, 3.0), (1.0, 2.0)],
}


@pytest.mark.parametrize("coefficients", BAD_COEFFICIENTS.values(), ids=BAD_COEFFICIENTS)
@pytest.mark.parametrize(
    "build",
    [
        lambda c: newton_schulz(np.ones((2, 3), np.float32), c),
        lambda c: gum_optax.scale_by_polar(c),
    ],
    ids=["newton_schulz", "scale_by_polar"],
)
def test_bad_coefficients_fail_at_once(coefficients, build):
    with pytest.raises((TypeError, ValueError), match="`ns_coeffs` must"):
        build(coefficients)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "5", None], ids=repr)
def test_bad_steps_fail_at_once(steps):
    for build in (
        lambda: newton_schulz(np.ones((2, 3), np.float32), ns_steps=steps),
        lambda: gum_optax.scale_by_polar(ns_steps=steps),
    ):
        with pytest.raises((TypeError, ValueError), match="`ns_steps` must"):
            build()
