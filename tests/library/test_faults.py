"""Extreme gradients: NaN, Inf, zero for many steps, 1e30 and 1e-30."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gum_optax import LowRank, carries, low_rank, residuals, scale_by_gum, scale_by_polar
from tests import helpers
from tests.tables import PROJECTORS

PERIOD = 3
BAD_STEPS = (PERIOD, PERIOD + 1)  # at a refresh, and inside a period
STRUCK = [False, True, False, True, False]  # the matrices that `spoil` strikes


@functools.cache
def gum(projector: str = "subspace_iteration") -> tuple[Any, Any]:
    """GUM and its compiled update; without `eps`, so that it has no scale of its own."""
    compression = LowRank(2, PERIOD, residuals.sampled(1), PROJECTORS[projector])
    tx = scale_by_gum(compression, orthogonalizer=scale_by_polar(eps=0.0))
    return tx, jax.jit(tx.update, compiler_options=helpers.QUICK)


def run(trees: Sequence[dict], projector: str = "subspace_iteration") -> Iterator[tuple[Any, Any]]:
    """Yields the updates and the state after each step."""
    tx, update = gum(projector)
    state = tx.init(trees[0])
    for tree in trees:
        updates, state = update(tree, state)
        yield updates, state


def gradients(step: int, dtype: Any = jnp.float32) -> dict:
    """Two separate leaves, two stacked matrices, and a single one, whose group is uncompressed."""
    wide = helpers.gradients(2 * step, 2, *helpers.SHAPES["wide"])
    tall = helpers.gradients(2 * step + 1, 2, *helpers.SHAPES["tall"])
    return tree_of([*wide, *tall, wide[0] + wide[1]], dtype)


def tree_of(matrices: Sequence[Any], dtype: Any = None) -> dict:
    first, second, third, fourth, single = (np.asarray(matrix, dtype) for matrix in matrices)
    layers = [{"w": first}, {"w": second}]
    return {"layers": layers, "stacked": np.stack([third, fourth]), "single": single}


def matrices_of(tree: dict) -> list[np.ndarray]:
    """The inverse of `tree_of`."""
    layers = [layer["w"] for layer in tree["layers"]]
    return [np.asarray(matrix) for matrix in (*layers, *tree["stacked"], tree["single"])]


def spoil(tree: dict, value: float, struck: Sequence[bool] = STRUCK) -> dict:
    """One entry of each struck matrix becomes `value`."""
    matrices = [matrix.copy() for matrix in matrices_of(tree)]
    for matrix, strikes in zip(matrices, struck, strict=True):
        matrix[2, 3] = value if strikes else matrix[2, 3]
    return tree_of(matrices)


def scaled(tree: dict, *scales: float) -> dict:
    """Matrix after matrix times the scales, which are repeated."""
    matrices = enumerate(matrices_of(tree))
    return tree_of([(x * scales[i % len(scales)]).astype(x.dtype) for i, x in matrices])


def broken(tree: dict) -> list[bool]:
    """Of each matrix, whether an entry is not finite."""
    return [not np.isfinite(matrix).all() for matrix in matrices_of(tree)]


def is_finite(tree: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# The others by `make slow`: a start from the last basis, with and without one of LAPACK's routines.
@pytest.mark.parametrize(
    "projector",
    [
        pytest.param(p, marks=[] if p in ("svd", "subspace_iteration") else [pytest.mark.slow])
        for p in PROJECTORS
    ],
)
def test_a_spoiled_gradient_costs_its_matrix_one_period(projector):
    """Without a guard. No other matrix is touched, and the next refresh starts anew."""
    for bad_step, value in itertools.product(BAD_STEPS, (np.nan, np.inf)):
        trees = [gradients(step) for step in range(3 * PERIOD)]
        trees[bad_step] = spoil(trees[bad_step], value)
        for step, (updates, state) in enumerate(run(trees, projector)):
            spoiled = bad_step <= step < 2 * PERIOD
            assert broken(updates) == (STRUCK if spoiled else [False] * len(STRUCK)), step
            assert is_finite(state) != spoiled


def test_what_is_never_restarted_stays_spoiled():
    """As in plain Muon: uncompressed groups, and all low-rank momentum that a carry keeps."""
    trees = [gradients(step) for step in range(3 * PERIOD)]
    trees[1] = spoil(trees[1], np.nan, [False] * 4 + [True])
    *_, (updates, _) = run(trees)
    assert broken(updates) == [False] * 4 + [True]

    trees[1] = spoil(gradients(1), np.nan)
    drop, projector = residuals.drop(), PROJECTORS["svd"]
    going_on = low_rank(optax.trace(0.9), LowRank(2, PERIOD, drop, projector, carry=carries.keep))
    *_, (updates, _) = helpers.run(going_on, trees)
    assert broken(updates) == STRUCK


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_error_buffer_stays_spoiled(value):
    """Error feedback adds the residual of a step to the next gradient, for ever."""
    feedback = residuals.feedback()
    tx = low_rank(optax.identity(), LowRank(2, PERIOD, feedback, helpers.first_coordinates))
    trees = [gradients(step) for step in range(2 * PERIOD)]
    trees[1] = spoil(trees[1], value)
    *_, (updates, state) = helpers.run(tx, trees)
    assert broken(updates) == STRUCK
    errors = [state.residual["layers.*.w"][i] for i in (0, 1)]
    assert [bool(np.isfinite(error).all()) for error in errors] == [True, False]


def test_a_guarded_step_is_as_if_it_had_not_been():
    """``optax.apply_if_finite`` keeps the state to the bit, so what follows is the same."""
    tx = optax.apply_if_finite(gum("svd")[0], 10)
    update = jax.jit(tx.update, compiler_options=helpers.QUICK)
    trees = [gradients(step) for step in range(2 * PERIOD)]
    state: Any = tx.init(trees[0])
    guarded = state
    for step, tree in enumerate(trees):
        for value in (np.nan, -np.inf) if step in BAD_STEPS else ():
            updates, guarded = update(spoil(tree, value), guarded)
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
            jax.tree.map(np.testing.assert_array_equal, guarded.inner_state, state.inner_state)
        expected, state = update(tree, state)
        updates, guarded = update(tree, guarded)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert int(guarded.inner_state.count) == 2 * PERIOD
    assert int(guarded.total_notfinite) == 2 * len(BAD_STEPS)


@pytest.mark.parametrize(
    "projector",
    [
        pytest.param(p, marks=[] if p in ("svd", "subspace_iteration") else [pytest.mark.slow])
        for p in PROJECTORS
    ],
)
def test_an_expert_unused_for_two_periods_then_learns(projector):
    unused = 2 * PERIOD + 1  # until after a refresh: the first gradient meets a basis of nothing
    trees = [gradients(step) for step in range(4 * PERIOD)]
    trees[:unused] = [scaled(tree, 1, 0) for tree in trees[:unused]]
    for step, (updates, state) in enumerate(run(trees, projector)):
        basis = np.asarray(state.basis["stacked"])
        # Measured 6e-7.
        np.testing.assert_allclose(basis.mT @ basis, [np.eye(2)] * 2, rtol=0, atol=3e-6)
        size = np.linalg.norm(matrices_of(updates)[3])
        if step < unused:
            assert size == 0
        else:
            # Two to six singular values, which Newton-Schulz leaves between 0.7 and 1.2.
            assert 0.9 < size < 3, step


# Powers of two change no rounding, so that everything but the range of numbers is the same.
HUGE, SMALL = 2.0**100, 2.0**-100  # 1.3e30, 7.9e-31


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scales", [(HUGE,), (SMALL,), (HUGE, SMALL, 1.0)], ids=str)
def test_directions_do_not_depend_on_the_size_of_gradients(scales, dtype):
    """Neither of all, nor of one matrix beside the next."""
    trees = [gradients(step, dtype) for step in range(PERIOD + 1)]
    sized = run([scaled(tree, *scales) for tree in trees])
    for (updates, state), (plain, _) in zip(sized, run(trees), strict=True):
        assert is_finite(state)
        for got, expected in zip(matrices_of(updates), matrices_of(plain), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_the_estimate_is_linear_over_sixty_orders_of_magnitude():
    tx = low_rank(optax.identity(), LowRank(2, 2))
    update = jax.jit(tx.update, compiler_options=helpers.QUICK)
    tree = gradients(0)
    plain, _ = update(tree, tx.init(tree))
    for factor in (HUGE, SMALL):
        updates, _ = update(scaled(tree, factor), tx.init(tree))
        jax.tree.map(np.testing.assert_array_equal, scaled(updates, 1 / factor), plain)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e-30])
def test_extreme_entries_within_a_matrix(value):
    """Among entries of size 1, and among zeros."""
    tree = spoil(gradients(0), value)
    lonely = spoil(scaled(tree, 0), value)
    for updates, state in run([tree, lonely, lonely, tree]):
        assert is_finite(state)
        # Newton-Schulz leaves singular values below 1.2.
        assert max(np.linalg.norm(matrix, 2) for matrix in matrices_of(updates)) < 1.25
