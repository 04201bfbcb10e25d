"""Loops and sequences change the order of work but no result."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gum_optax import _scheduling, newton_schulz
from gum_optax._scheduling import in_sequence, is_large, one_by_one, scheduled_after
from tests.helpers import QUICK


def _gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _one_by_one(function):
    return jax.jit(lambda x: one_by_one(function, x), compiler_options=QUICK)


_LOOP = _one_by_one(newton_schulz)
_BATCH = jax.jit(newton_schulz, compiler_options=QUICK)


@pytest.mark.parametrize(
    ("shape", "large"),
    [
        ((256, 1000), False),
        ((257, 1000), True),
        ((1000, 257), True),
        ((8, 1000, 256), False),
        ((8, 2, 257, 257), True),
    ],
    ids=str,
)
def test_the_short_side_decides_what_is_large(shape, large):
    assert _scheduling.LARGE_SIDE == 256
    matrices: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert is_large(matrices) == large


# One by one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 9), (2, 3, 9, 6), (1, 5, 5), (6, 9)], ids=str)
def test_the_loop_equals_the_batch(shape):
    x = _gaussian(*shape)
    got = _LOOP(x)
    assert got.shape == shape
    # Products of one matrix and of a batch may sum in another order. Measured: 5e-7.
    np.testing.assert_allclose(got, _BATCH(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 6, 9), (3, 0, 9), (2, 0, 3, 4)], ids=str)
def test_the_loop_over_nothing_is_nothing(shape):
    assert _LOOP(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_loop_keeps_the_dtype(dtype):
    assert jax.eval_shape(_LOOP, _gaussian(2, 4, 6).astype(dtype)).dtype == dtype


def test_zero_matrices_cost_no_newton_schulz():
    calls = []

    def counted(matrix):
        jax.debug.callback(lambda: calls.append(1))
        return newton_schulz(matrix)

    loop = _one_by_one(counted)
    for zeros in ([], [1], [0, 2, 3], [0, 1, 2, 3]):
        x = _gaussian(4, 6, 9)
        x[zeros] = 0
        calls.clear()
        got = np.asarray(loop(x))
        jax.effects_barrier()
        assert len(calls) == 4 - len(zeros), zeros
        np.testing.assert_allclose(got, _BATCH(x), atol=1e-5)
        np.testing.assert_array_equal(got[zeros], 0.0)


def test_a_matrix_that_is_not_finite_is_not_skipped():
    x = np.zeros((2, 3, 4), np.float32)
    x[1, 0, 0] = np.nan
    got = _one_by_one(lambda matrix: matrix + matrix)(x)
    np.testing.assert_array_equal(got, x)


# In sequence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [None, np.ones(3), np.full((2, 2), np.nan), np.zeros((0, 3))])
def test_a_sequence_is_a_map_in_order(after):
    xs, names = [_gaussian(2, 3, seed=i) for i in range(4)], "abcd"
    seen = []

    def double(x, name):
        seen.append(name)
        return 2 * x

    after = None if after is None else after.astype(np.float32)
    got = jax.jit(lambda xs, after: in_sequence(double, xs, names, after=after))(xs, after)
    assert "".join(seen) == names
    for result, x in zip(got, xs, strict=True):
        np.testing.assert_array_equal(result, 2 * x)


def test_a_sequence_of_nothing_is_empty():
    assert in_sequence(jnp.sin, []) == []


def test_columns_of_a_sequence_have_equal_lengths():
    with pytest.raises(ValueError, match="shorter"):
        in_sequence(jnp.multiply, [jnp.ones(2)] * 2, [jnp.ones(2)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_waiting_changes_no_value(dtype):
    value = np.array([1.5, -0.0, np.inf, -np.inf, np.nan, 3e38]).astype(dtype)
    others = np.zeros((2, 3), np.float32), np.float32(np.nan), np.array([np.inf], jnp.bfloat16)
    for other in others:
        got = jax.jit(scheduled_after)(value, other)
        assert got.dtype == dtype
        got, expected = (np.asarray(x, np.float32) for x in (got, value))
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_xla_cannot_remove_the_wait():
    """The comparison with itself survives compilation for CPUs, so there is an order."""
    compiled = jax.jit(scheduled_after).lower(jnp.ones(4), jnp.ones(3)).compile()
    assert "compare(" in (compiled.as_text() or "")


def test_other_backends_and_meshes_do_not_wait():
    exported = jax.export.export(jax.jit(scheduled_after), platforms=["cuda"])
    assert "compare" not in exported(jnp.ones(4), jnp.ones(3)).mlir_module()
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    value = jax.device_put(jnp.arange(4.0), sharding)
    assert scheduled_after(value, jnp.ones(3)) is value


STACKS = {
    "estimates": """
params = {f"w{i}": np.ones((16, 512, 512 + 16 * i), np.float32) for i in range(3)}
loss = lambda params: sum((w**2).sum() for w in params.values())
estimate = jax.jit(estimators.zeroth_order(loss, estimators.orthonormal(64, period=1)))
for step in range(4):
    jax.block_until_ready(estimate(params, key=0, step=step))
""",
    "factored momentum": """
shapes = [(16, 256, 256 + 16 * i) for i in range(3)]
params = [np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in shapes]
tx = gum_optax.scale_by_factored_momentum(32)
state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
for _ in range(4):
    _, state = jax.block_until_ready(update(params, state))
""",
}


@pytest.mark.slow  # seconds if all is well, and a minute if not
@pytest.mark.parametrize("program", STACKS.values(), ids=STACKS)
def test_decompositions_of_stacks_wait_for_one_another(program):
    """On two threads, two decompositions of stacks at a time would wait for each other forever."""
    head = """
import os
if hasattr(os, "sched_setaffinity"):  # JAX makes a thread for each core that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, numpy as np, gum_optax
from gum_optax import estimators
"""
    # More threads of OpenBLAS within the pool's threads take ten times as long.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", head + program]
    subprocess.run(command, env=environment, check=True, timeout=100)
