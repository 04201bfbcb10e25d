"""The engine against the float64 reference, over several periods."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import projectors, restarts, samplers
from tests import helpers, reference

PERIODS = 3
BETA = 0.9
# Chosen so that in every case some matrix is full-rank in one period and low-rank in another.
KEY = 0

# Largest errors measured, relative to the largest entry: 4e-12 in float64, 1e-3 in float32, where
# Newton-Schulz multiplies the rounding of vanishing singular values by 3.4445^5 = 485.
FLOAT64, FLOAT32 = 1e-9, 5e-3


class Case(NamedTuple):
    """N matrices, at most gamma of them full-rank, refreshed every K steps."""

    layout: str
    shape: str
    N: int
    gamma: int
    K: int
    rank: int

    @property
    def q(self) -> float:
        return min(self.gamma, self.N // 2) / self.N


CASES = [
    Case("separate", "wide", 2, 1, 3, 2),
    Case("separate", "tall", 3, 1, 5, 3),
    Case("separate", "square", 4, 2, 1, 1),
    Case("separate", "tall", 6, 2, 3, 5),
    Case("stacked", "wide", 5, 2, 3, 2),
    Case("stacked", "square", 2, 1, 5, 4),
    Case("experts", "wide", 4, 1, 5, 3),
    Case("experts", "tall", 6, 2, 3, 2),
    Case("experts", "square", 4, 0, 1, 5),
]
SEPARATE, STACKED, EXPERTS = CASES[1], CASES[4], CASES[7]


def label(value: Any) -> str:
    if isinstance(value, Case):
        return "-".join(map(str, value))
    return getattr(value, "__name__", str(value))


def cases(*chosen: Case) -> Any:
    return pytest.mark.parametrize("case", chosen, ids=label)


class Run(NamedTuple):
    updates: np.ndarray  # [t, i, m, n]
    draws: list[set[int]]
    bases: list[np.ndarray]


def gradients_of(case: Case, seed: int = 0) -> np.ndarray:
    return helpers.gradients(seed, PERIODS * case.K, case.N, *helpers.SHAPES[case.shape])


def run(tx: Any, case: Case, gradients: np.ndarray, dtype: Any = np.float64, params: Any = None):
    """Runs the engine; per period, keeps the draw and the bases that it used."""
    double = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    name = helpers.stack_name(case.layout)
    updates, draws, bases = [], [], []
    with double:
        trees = [helpers.pack(case.layout, jnp.asarray(G_t, dtype)) for G_t in gradients]
        params = None if params is None else helpers.pack(case.layout, jnp.asarray(params, dtype))
        for t, (update, state) in enumerate(helpers.run(tx, trees, params)):
            assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, trees[0])
            updates.append(helpers.unpack(update))
            draw = helpers.drawn(state.slots.get(name, []), case.N)
            basis = np.asarray(state.basis[name])
            basis = basis.reshape(-1, *basis.shape[-2:])  # Experts have an axis of their own.
            assert updates[-1].dtype == basis.dtype == dtype
            if t % case.K == 0:
                draws.append(draw)
                bases.append(basis)
            assert draw == draws[-1], "a draw holds for its period"
            np.testing.assert_array_equal(basis, bases[-1], "a basis holds for its period")
    return Run(np.stack(updates), draws, bases)


def assert_close(actual: np.ndarray, expected: Any, tolerance: float) -> None:
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{error:.1e}"


# Float32 adds rounding and nothing else: two cases show its size.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, np.float64) for case in CASES] + [(case, np.float32) for case in (SEPARATE, STACKED)],
    ids=label,
)
def test_gum_equals_the_reference(case, dtype):
    gradients = gradients_of(case)
    tx = gum_optax.scale_by_gum(
        case.rank, case.K, case.gamma, beta=BETA, projector=projectors.svd, key=KEY
    )
    updates, draws, _ = run(tx, case, gradients, dtype)
    assert [len(draw) for draw in draws] == [case.q * case.N] * PERIODS
    assert case.gamma == 0 or set.union(*draws) > set.intersection(*draws)
    expected = reference.low_rank(
        reference.momentum_polar(BETA),
        gradients,
        rank=case.rank,
        K=case.K,
        q=case.q,
        draws=draws,
    )
    assert_close(updates, expected, FLOAT64 if dtype == np.float64 else FLOAT32)


MUON = optax.chain(optax.trace(BETA), gum_optax.scale_by_polar())
NESTEROV = optax.chain(optax.trace(BETA, nesterov=True), gum_optax.scale_by_polar())
BASES = {
    "nesterov": (NESTEROV, reference.momentum_polar(BETA, nesterov=True)),
    "adam": (optax.scale_by_adam(), reference.adam()),
    "identity": (optax.identity(), reference.identity()),
}


# Adam sees coordinates, so the bases are the engine's, vector by vector. They come from the default
# projector, which also shows that the reference needs nothing of the SVD.
@pytest.mark.parametrize(
    ("base", "case"),
    [("nesterov", SEPARATE), ("adam", SEPARATE), ("adam", EXPERTS), ("identity", STACKED)],
    ids=label,
)
def test_other_bases_equal_the_reference(case, base):
    inner, oracle = BASES[base]
    gradients = gradients_of(case)
    tx = gum_optax.low_rank(
        inner, rank=case.rank, period=case.K, sampler=samplers.fixed_size(case.gamma), key=KEY
    )
    updates, draws, bases = run(tx, case, gradients)
    expected = reference.low_rank(
        oracle, gradients, rank=case.rank, K=case.K, q=case.q, draws=draws, bases=bases
    )
    assert_close(updates, expected, FLOAT64)


@pytest.mark.parametrize(("base", "case"), [("muon", STACKED), ("adam", SEPARATE)], ids=label)
def test_without_restart_low_rank_states_go_on_and_slots_restart(case, base):
    # Adam has one count for all matrices, which cannot restart for some: it runs without slots.
    gamma = case.gamma if base == "muon" else 0
    q = case.q if gamma else 0.0
    inner, oracle = (MUON, reference.momentum_polar(BETA)) if base == "muon" else BASES[base]
    gradients = gradients_of(case)
    tx = gum_optax.low_rank(
        inner,
        rank=case.rank,
        period=case.K,
        sampler=samplers.fixed_size(gamma),
        restart=False,
        key=KEY,
    )
    updates, draws, bases = run(tx, case, gradients)

    def expected(*, restart: bool) -> np.ndarray:
        return np.asarray(
            reference.low_rank(
                oracle,
                gradients,
                rank=case.rank,
                K=case.K,
                q=q,
                draws=draws,
                bases=bases,
                restart=restart,
            )
        )

    assert_close(updates, expected(restart=False), FLOAT64)
    assert np.abs(updates - expected(restart=True)).max() > 0.1, "the two must be told apart"


@pytest.mark.parametrize("case", [SEPARATE, STACKED, EXPERTS], ids=label)
def test_rotated_momentum_goes_on_in_the_new_basis(case):
    gradients = gradients_of(case)
    tx = gum_optax.low_rank(
        MUON,
        rank=case.rank,
        period=case.K,
        sampler=samplers.fixed_size(case.gamma),
        restart=restarts.rotate,
        key=KEY,
    )
    updates, draws, bases = run(tx, case, gradients)

    def expected(*, rotate: bool) -> np.ndarray:
        sizes = {"rank": case.rank, "K": case.K, "q": case.q, "draws": draws, "bases": bases}
        base = reference.momentum_polar(BETA)
        found = reference.low_rank(base, gradients, restart=False, rotate=rotate, **sizes)
        return np.asarray(found)

    assert_close(updates, expected(rotate=True), FLOAT64)
    assert np.abs(updates - expected(rotate=False)).max() > 0.1, "the two must be told apart"


TABLE = ([4, 0], [5, 5], [2, 5], [1, 3], [5, 2])  # 5 is an empty slot.


@cases(STACKED, STACKED._replace(layout="separate"))
def test_users_sampler_with_empty_slots_equals_the_reference(case):
    gradients = helpers.gradients(1, 8 * case.K, case.N, *helpers.SHAPES[case.shape])
    tx = gum_optax.low_rank(
        MUON,
        rank=case.rank,
        period=case.K,
        projector=projectors.svd,
        sampler=helpers.table_sampler(2, 0.3, TABLE),
        key=KEY,
    )
    updates, draws, _ = run(tx, case, gradients)
    assert {len(draw) for draw in draws} == {0, 1, 2}
    assert all(draw in [helpers.drawn(row, case.N) for row in TABLE] for draw in draws)
    expected = reference.low_rank(
        reference.momentum_polar(BETA), gradients, rank=case.rank, K=case.K, q=0.3, draws=draws
    )
    assert_close(updates, expected, FLOAT64)


def test_single_matrix_with_bernoulli_equals_the_reference():
    case = Case("separate", "wide", 1, 1, 2, 3)
    gradients = helpers.gradients(2, 12, 1, *helpers.SHAPES[case.shape])
    tx = gum_optax.scale_by_gum(
        case.rank,
        case.K,
        beta=BETA,
        projector=projectors.svd,
        sampler=samplers.bernoulli(0.4),
        key=KEY,
    )
    updates, draws, _ = run(tx, case, gradients)
    assert set() in draws
    assert {0} in draws
    expected = reference.low_rank(
        reference.momentum_polar(BETA), gradients, rank=case.rank, K=case.K, q=0.4, draws=draws
    )
    assert_close(updates, expected, FLOAT64)


def test_stacks_of_one_tree_do_not_touch_each_other():
    K, rank, gamma = 2, 3, 1
    steps = 2 * K
    wide = helpers.gradients(3, steps, 4, 6, 10)
    tall = helpers.gradients(4, steps, 3, 9, 5)
    small = helpers.gradients(5, steps, 2, rank, 7)  # rank >= m: dense.
    single = helpers.gradients(6, steps, 1, 8, 8)  # One matrix: dense.
    tx = gum_optax.scale_by_gum(rank, K, gamma, beta=BETA, projector=projectors.svd, key=KEY)
    updates: dict[str, list[np.ndarray]] = {"up": [], "down": [], "small": [], "single": []}
    draws = []
    with jax.enable_x64(True):
        trees = [
            {
                # Interleaved leaves, so that a stack's leaves are not neighbours.
                "layers": [{"up": w, "down": t} for w, t in zip(wide[s], tall[s], strict=False)]
                + [{"up": wide[s, 3]}],
                "small": small[s],
                "single": single[s, 0],
            }
            for s in range(steps)
        ]
        for update, state in helpers.run(tx, jax.tree.map(jnp.asarray, trees)):
            draws.append(state.slots)
            updates["up"].append(np.stack([layer["up"] for layer in update["layers"]]))
            updates["down"].append(np.stack([layer["down"] for layer in update["layers"][:3]]))
            updates["small"].append(np.asarray(update["small"]))
            updates["single"].append(np.asarray(update["single"])[None])
    assert set(draws[0]) == {"layers/*/up", "layers/*/down"}
    muon = reference.momentum_polar(BETA)
    for name, G in (("up", wide), ("down", tall)):
        N = G.shape[1]
        drawn = [helpers.drawn(slots[f"layers/*/{name}"], N) for slots in draws[::K]]
        expected = reference.low_rank(muon, list(G), rank=rank, K=K, q=gamma / N, draws=drawn)
        assert_close(np.stack(updates[name]), expected, FLOAT64)
    for name, G in (("small", small), ("single", single)):
        assert_close(np.stack(updates[name]), reference.uncompressed(muon, list(G)), FLOAT64)


def test_layouts_of_the_same_matrices_agree():
    case = Case("", "tall", 6, 2, 2, 3)
    gradients = gradients_of(case)
    # A random basis, so that the keys of the matrices must agree as well.
    tx = gum_optax.scale_by_gum(
        case.rank, case.K, case.gamma, projector=projectors.random_orthonormal, key=KEY
    )
    separate, *others = (
        run(tx, case._replace(layout=layout), gradients) for layout in helpers.LAYOUTS
    )
    for other in others:
        assert other.draws == separate.draws
        np.testing.assert_array_equal(other.bases, separate.bases)
        assert_close(other.updates, separate.updates, FLOAT64)


@cases(SEPARATE)
def test_base_sees_compressed_parameters(case):
    """The codec is linear: decay inside the base is compressed and expanded like a gradient."""
    gradients = gradients_of(case)
    W = helpers.gradients(7, case.N, *helpers.SHAPES[case.shape])
    tx = gum_optax.low_rank(
        optax.add_decayed_weights(0.5),
        rank=case.rank,
        period=case.K,
        sampler=samplers.fixed_size(case.gamma),
        key=KEY,
    )
    updates, draws, bases = run(tx, case, gradients, params=W)
    expected = reference.low_rank(
        reference.identity(),
        gradients + 0.5 * W,
        rank=case.rank,
        K=case.K,
        q=case.q,
        draws=draws,
        bases=bases,
    )
    assert_close(updates, expected, FLOAT64)
