"""Codes of 8, 6 and 4 bits: every map against loops in float64, and laws of all maps."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gum_optax import _codes, _maps, storages
from tests import helpers

# The oracle ---------------------------------------------------------------------------------------

NORMAL = [-0.8785, -0.6995, -0.5531, -0.4265, -0.3114, -0.2038, -0.1010, 0.0]
NORMAL += [0.0967, 0.1944, 0.2949, 0.4013, 0.5171, 0.6474, 0.8011, 1.0]
# Eight levels in each of 32 octaves below 1, and 1 itself, less the first.
OCTAVES = [*[2.0**e * (1 + f / 8) for e in range(-32, 0) for f in range(8)][1:], 1.0]
# Less two: code 0 is zero.
FLOATS = [2.0**e * (1 + f / 8) for e in range(-16, 0) for f in range(8)][2:]
QUARTERS = [*[2.0**e * (1 + f / 4) for e in range(-16, 0) for f in range(4)][1:], 1.0]


class Case(NamedTuple):
    """A map and its equations, with the bytes of a scale."""

    map: Any
    levels: list[float]
    unsigned: bool  # No negative levels, and none that is zero: errors are those of ratios.
    scale_bytes: int
    bound: float  # Of |x - x^| / N, or of |x - x^| / x if unsigned.
    l2: float  # On Gaussian numbers, squared if unsigned, in blocks of `block`; measured.

    @property
    def block(self) -> int:
        return {4: 32, 6: 128, 8: 256}[self.map.bits]

    def bytes_of_codes(self, blocks: list[range]) -> int:
        """Of a row, in blocks filled up to fours (6 bits: three bytes) or twos (4 bits: one)."""
        if self.map.bits == 8:
            return sum(map(len, blocks))
        codes, bytes_ = {6: (4, 3), 4: (2, 1)}[self.map.bits]
        return len(blocks) * bytes_ * math.ceil(len(blocks[0]) / codes)


CASES = {
    "linear 8": Case(
        _maps.LINEAR_8, [c / 127 for c in range(-127, 128)], False, 4, 1 / 254, 0.0071
    ),
    "float 8": Case(
        _maps.FLOAT_8, [*(-x for x in FLOATS), -1.0, 0.0, *FLOATS, 1.0], False, 4, 1 / 17, 0.027
    ),
    "linear 6": Case(_maps.LINEAR_6, [c / 31 for c in range(-31, 32)], False, 4, 1 / 62, 0.0275),
    # A scale of bfloat16 is off by 2 ** -9 at most, and no level is near -1.
    "normal 4": Case(_maps.NORMAL_4, NORMAL, False, 2, 0.1215 + 2**-8, 0.081),
    # The worst number lies between a power of two and the next level, 1 + 1/8 or 2 times as large.
    "octaves 8": Case(_maps.OCTAVES_8, OCTAVES, True, 4, 1 / 17, 0.025),
    "octaves 6": Case(_maps.OCTAVES_6, QUARTERS, True, 4, 1 / 9, 0.048),
    "octaves 4": Case(_maps.OCTAVES_4, [2.0 ** (c - 15) for c in range(16)], True, 4, 1 / 3, 0.16),
}
every_map = pytest.mark.parametrize("name", CASES)
every_storage = pytest.mark.parametrize(
    "storage",
    [storages.int8(), storages.float8(), storages.int6(), storages.int4()],
    ids=["int8", "float8", "int6", "int4"],
)
LENGTHS = [1, 2, 7, 31, 33, 64, 90]
every_length = pytest.mark.parametrize("n", LENGTHS)
BLOCK = 16


def blocks_of(n: int, block: int) -> list[range]:
    """Where the blocks of an axis are: a power of two of them if it divides the axis."""
    count = math.ceil(n / block)
    power = 1
    while power < count:
        power *= 2
    count = power if n % power == 0 else count
    length = math.ceil(n / count)
    return [range(start, min(start + length, n)) for start in range(0, n, length)]


def oracle(case: Case, block: int, row: list[float]) -> tuple[list[float], list[float]]:
    """A row decoded, and its scales, one number after the other."""
    decoded, scales = [], []
    for where in blocks_of(len(row), block):
        numbers = [row[i] for i in where]
        scale = max(numbers, key=abs)
        if case.map in (_maps.LINEAR_8, _maps.LINEAR_6, _maps.FLOAT_8):
            scale = abs(scale)
        if case.scale_bytes == 2:
            scale = float(np.asarray(scale, jnp.bfloat16))
        scales.append(scale)
        for x in numbers:
            u = x / scale if scale else 0.0
            nearest = min(case.levels, key=lambda k, u=u: abs(k - u))
            decoded.append(scale * nearest)
    return decoded, scales


def numbers(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Gaussian numbers in float32; their squares where a map has no negative levels."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(x**2 if CASES[name].unsigned else x, np.float32)


# A program is compiled for each map and each tree of shapes, so several arrays are coded at once.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _there(name: str, tree: Any, block: int) -> Any:
    return jax.tree.map(lambda x: _codes.encode(CASES[name].map, block, x), tree)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _back(name: str, packed: Any, like: Any, block: int) -> Any:
    decode = functools.partial(_codes.decode, CASES[name].map, block)
    return jax.tree.map(lambda x, codes: decode(codes, x), like, packed)


def there(name: str, tree: Any, block: int = BLOCK) -> Any:
    return _there(name, tree, block)


def back(name: str, packed: Any, like: Any, block: int = BLOCK) -> Any:
    return jax.tree.map(np.asarray, _back(name, packed, like, block))


def round_trip(name: str, tree: Any, block: int = BLOCK) -> Any:
    return back(name, there(name, tree, block), tree, block)


@functools.cache
def rows(name: str, seed: int, sign: int = 1) -> tuple[Any, Any, Any]:
    """Twenty rows of every length, their codes, and the numbers that these decode to."""
    x = {n: sign * numbers(name, 20, n, seed=seed) for n in LENGTHS}
    packed = there(name, x)
    return x, packed, back(name, packed, x)


@every_map
@every_length
def test_codes_are_those_of_the_equations(name, n):
    x, packed, decoded = (part[n] for part in rows(name, seed=0))
    expected, scales = zip(
        *(oracle(CASES[name], BLOCK, [float(v) for v in row]) for row in x[:3]), strict=True
    )
    np.testing.assert_allclose(np.asarray(packed.scale, np.float64)[:3], scales, rtol=1e-7)
    np.testing.assert_allclose(decoded[:3], expected, rtol=1e-5)


# Laws ---------------------------------------------------------------------------------------------


@every_map
@every_length
def test_the_error_has_a_bound(name, n):
    x, _, decoded = (part[n] for part in rows(name, seed=1))
    case, error = CASES[name], np.abs(decoded - x)
    for where in blocks_of(n, BLOCK):
        block, extreme = x[:, where], np.abs(x[:, where]).max(axis=1, keepdims=True)
        # Below the least level numbers are rounded up to it.
        allowed = case.bound * (block if case.unsigned else extreme)
        if case.unsigned:
            allowed = np.maximum(allowed, case.levels[0] * extreme)
        assert (error[:, where] <= allowed * (1 + 1e-5)).all()


def test_floats_keep_their_relative_precision_over_sixteen_octaves():
    exponents = np.linspace(-20, 0, 4 * BLOCK).reshape(4, BLOCK)
    exponents[:, 0] = 0  # Every block has the largest number, one.
    x = np.asarray(2.0**exponents, np.float32)
    for signed in (x, -x):
        decoded = round_trip("float 8", signed)
        kept = exponents >= -15
        relative = np.abs(decoded - signed) / x
        assert 0.05 < relative[kept].max() < 1 / 16.9
        assert not decoded[exponents < -17].any()
        again = (there("float 8", each).codes for each in (signed, decoded))
        np.testing.assert_array_equal(*again)


@every_map
def test_the_error_of_gaussian_numbers_is_the_documented_one(name):
    case, x = CASES[name], numbers(name, 64, 1024, seed=2)
    error = np.linalg.norm(round_trip(name, x, case.block) - x) / np.linalg.norm(x)
    assert 0.8 * case.l2 < error < case.l2


@every_map
@every_length
def test_what_was_decoded_is_encoded_to_the_same_codes(name, n):
    _, packed, decoded = rows(name, seed=3)
    again = there(name, decoded)
    for one, other in zip(packed[n], again[n], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# All numbers that 16 random bits stand for.
SHARES = ((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)


@every_map
def test_the_mean_over_all_random_bits_is_the_number(name):
    """By enumeration; a number between two levels has one of these two."""
    levels = np.sort(np.asarray(CASES[name].levels))
    rng = np.random.default_rng(0)
    which = np.append(rng.integers(0, len(levels) - 1, 30), [0, len(levels) - 2])
    low, high = levels[which], levels[which + 1]
    u = (low + (high - low) * rng.uniform(0.001, 0.999, low.shape)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=helpers.QUICK)
    def found(u):
        codes = CASES[name].map.to_codes(jnp.broadcast_to(u, SHARES.shape), SHARES)
        return CASES[name].map.to_levels(codes, jnp.float32)

    for i in range(len(u)):
        decoded = np.asarray(found(u[i]), np.float64)
        # The levels of the program are float32.
        up = np.abs(decoded - high[i]) < np.abs(decoded - low[i])
        np.testing.assert_allclose(decoded, np.where(up, high[i], low[i]), rtol=1e-6, atol=1e-30)
        # Half of the least step of the bits, and float32's rounding of sums below 128.
        assert abs(decoded.mean() - u[i]) <= (high[i] - low[i]) * 2**-15 + 1e-6 * abs(u[i])


@functools.partial(jax.jit, static_argnums=0)
def at_random(name: str, tree: Any, key: jax.Array) -> Any:
    return jax.tree.map(lambda x: _codes.encode(CASES[name].map, BLOCK, x, key), tree)


@every_map
def test_random_bits_do_not_change_what_was_decoded(name):
    _, packed, decoded = rows(name, seed=3)
    for seed in range(3):
        again = at_random(name, decoded, jax.random.key(seed))
        for n in LENGTHS:
            for one, other in zip(packed[n], again[n], strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("name", ["linear 8", "normal 4", "octaves 8"])
def test_the_mean_over_keys_is_the_array(name):
    """Of whole arrays, whose numbers have bits of their own; `NORMAL_4` has scales in bfloat16."""
    x, count = numbers(name, 6, 2 * BLOCK + 1, seed=8), 2000
    keys = jax.random.split(jax.random.key(0), count)
    decode = functools.partial(_codes.decode, CASES[name].map, BLOCK, like=jnp.asarray(x))
    packed = jax.vmap(lambda key: at_random(name, x, key))(keys)
    decoded = np.asarray(jax.jit(jax.vmap(decode))(packed), np.float64)
    # Five standard errors of each number, or a rounding error.
    bound = 5 * decoded.std(axis=0) / np.sqrt(count) + 1e-6 * np.abs(x)
    found = np.abs(decoded.mean(axis=0) - x) < bound
    if name == "normal 4":
        # No level lies below -0.8785, and a scale may be rounded to less than numbers near it.
        blocks = [x[:, list(where)] for where in blocks_of(x.shape[1], BLOCK)]
        u = [b / np.take_along_axis(b, np.abs(b).argmax(1)[:, None], 1) for b in blocks]
        u = np.concatenate(u, axis=1)
        found |= (u < -0.87) | ((u > 0.99) & (u < 1))
        assert 0 < (u < -0.87).sum() < 20
    assert found.all()
    # Errors of neighbours are not correlated.
    errors = (decoded - x).reshape(count, -1)
    errors = errors[:, errors.std(axis=0) > 1e-4 * np.abs(x).max()]
    correlations = np.corrcoef(errors, rowvar=False) - np.eye(errors.shape[1])
    if name != "normal 4":  # There, a scale is shared by the numbers of a block.
        assert np.abs(correlations).max() < 6 / np.sqrt(count)


@pytest.mark.parametrize("name", ["linear 8", "float 8", "linear 6", "normal 4"])
@every_length
def test_signs_are_treated_alike(name, n):
    (*_, decoded), (*_, negative) = rows(name, seed=4), rows(name, seed=4, sign=-1)
    np.testing.assert_array_equal(negative[n], -decoded[n])


@every_map
def test_extremes_of_either_sign_decay_as_they_do_in_float32(name):
    """Signed maps of other libraries lose a tenth of a negative extreme at every encoding."""
    x = numbers(name, 4, 2 * BLOCK, seed=5)
    if not CASES[name].unsigned:
        x[::2] = -np.abs(x[::2])
    first, beta, steps = np.abs(x).max(axis=1), 0.9, 50
    packed = there(name, x)
    for _ in range(steps):
        packed = there(name, beta * back(name, packed, x))
    last = np.abs(back(name, packed, x)).max(axis=1)
    # Fifty roundings to bfloat16, of 2 ** -9 at most and of either sign; else of 2 ** -24.
    tolerance = 0.05 if CASES[name].scale_bytes == 2 else 1e-5
    np.testing.assert_allclose(last, beta**steps * first, rtol=tolerance)


@every_map
def test_the_extreme_of_a_block_is_exact(name):
    x = numbers(name, 64, 2 * BLOCK, seed=6)
    packed = there(name, x)
    decoded = back(name, packed, x).reshape(64, 2, BLOCK)
    largest = np.abs(decoded).max(axis=-1)
    np.testing.assert_array_equal(largest, np.abs(np.asarray(packed.scale, np.float32)))


@every_map
def test_zeros_stay_zeros_and_nothing_finite_becomes_nan(name):
    zeros = np.zeros((4, 2 * BLOCK), np.float32)
    assert not round_trip(name, zeros).any()
    # A zero beside others, the least normal number, denormal ones, and the largest.
    limits = np.finfo(np.float32)
    values = itertools.product([0, limits.tiny, 1e-40, 1e-45, 1, limits.max], repeat=3)
    x = np.asarray(list(values), np.float32)  # A block in each row.
    for y in (x,) if CASES[name].unsigned else (x, -x):
        decoded = round_trip(name, y)
        assert np.isfinite(decoded).all()
        extremes = np.minimum(x.max(axis=1), limits.max / 4)
        np.testing.assert_allclose(np.abs(decoded).max(axis=1), extremes, rtol=2**-8, atol=1.2e-38)


@every_map
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "negative"])
def test_what_cannot_be_kept_is_nan_and_other_blocks_are_not(name, bad):
    if bad == "negative" and not CASES[name].unsigned:
        return
    x = numbers(name, 4, 2 * BLOCK)
    expected = round_trip(name, x)
    x[1, 3] = -1e-3 if bad == "negative" else bad
    decoded = np.array(round_trip(name, x))
    assert np.isnan(decoded[1, :BLOCK]).all()
    decoded[1, :BLOCK] = expected[1, :BLOCK]
    np.testing.assert_array_equal(decoded, expected)


def test_a_map_without_negative_levels_has_no_zero():
    x = np.tile(np.asarray([0.0, 1.0, 1e-30, 4.0], np.float32), (4, BLOCK // 2))
    for name, case in CASES.items():
        assert (round_trip(name, x) > 0).all() == case.unsigned


# Shapes, dtypes, bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "block", "count", "length"),
    [
        (4096, 256, 16, 256),
        (11008, 256, 64, 172),  # 43 blocks of 256 would be cut by a mesh of two devices.
        (1376, 256, 8, 172),
        (509, 256, 2, 255),
        (96, 32, 4, 24),
        (90, 32, 3, 30),
        (7, 256, 1, 7),
        (5, 1, 5, 1),
    ],
)
def test_blocks(n, block, count, length):
    assert _codes.cut(n, block) == (count, length)
    assert len(blocks_of(n, block)) == count


@every_map
@every_length
def test_bytes(name, n):
    case = CASES[name]
    packed = jax.eval_shape(lambda x: there(name, x), jax.ShapeDtypeStruct((3, 5, n), jnp.float32))
    blocks = blocks_of(n, BLOCK)
    expected = 15 * (case.bytes_of_codes(blocks) + case.scale_bytes * len(blocks))
    assert helpers.state_bytes(packed) == expected


@every_map
@jax.enable_x64(True)
def test_dtypes(name):
    """Decoded to float32, or float64; values of float64 are not narrowed by their scales."""
    x = {
        dtype: numbers(name, 2, 24).astype(dtype)
        for dtype in ("bfloat16", "float16", "float32", "float64")
    }
    as_float32 = np.stack([array.astype("float32") for array in x.values()])
    # Beside a scale in bfloat16, numbers out of its range are cut to it.
    limits = np.stack([x["float64"] * 1e300, x["float64"] * 1e-300])
    decoded, expected, cut = round_trip(name, (x, as_float32, limits))
    for (dtype, got), want in zip(decoded.items(), expected, strict=True):
        assert got.dtype == jnp.promote_types(dtype, jnp.float32)
        np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float64" else 0)
    assert np.isfinite(cut).all()


@every_storage
def test_scalars_and_empty_arrays_stay(storage):
    for array in (jnp.float32(3), jnp.zeros((3, 0)), jnp.zeros(0)):
        packed = storage.pack(array)
        assert packed is array
        assert storage.unpack(packed, array) is array


@every_storage
def test_jit_equals_eager(storage):
    x = jnp.asarray(numbers("linear 8", 4, 90))
    expected, jitted = storage.pack(x), jax.jit(storage.pack)(x)
    for one, other in zip(expected, jitted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    unpacked = [f(expected, x) for f in (storage.unpack, jax.jit(storage.unpack))]
    np.testing.assert_array_equal(*unpacked)
