"""`low_rank` with the paper's rule against the float64 reference, over several periods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, projectors, residuals, samplers
from tests import cases, helpers, reference
from tests.cases import CASES, EXPERTS, FLOAT32, FLOAT64, KEY, SEPARATE, STACKED, Case, label

BETA = 0.9


# Float32 adds rounding and nothing else: two cases show its size.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, np.float64) for case in CASES] + [(case, np.float32) for case in (SEPARATE, STACKED)],
    ids=label,
)
def test_gum_equals_the_reference(case, dtype):
    gradients = cases.gradients_of(case)
    tx = gum_optax.scale_by_gum(case.compression(projector=projectors.svd), beta=BETA)
    updates, draws, _ = cases.run(tx, case, gradients, dtype)
    assert [len(draw) for draw in draws] == [case.q * case.N] * cases.PERIODS
    assert case.gamma == 0 or set.union(*draws) > set.intersection(*draws)
    expected = reference.sampled(
        reference.momentum_polar(BETA),
        gradients,
        rank=case.rank,
        K=case.K,
        q=case.q,
        draws=draws,
    )
    cases.assert_close(updates, expected, FLOAT64 if dtype == np.float64 else FLOAT32)


MUON = optax.chain(optax.trace(BETA), gum_optax.scale_by_polar())
NESTEROV = optax.chain(optax.trace(BETA, nesterov=True), gum_optax.scale_by_polar())
INNER = {
    "momentum": (optax.trace(BETA), reference.momentum(BETA)),
    "muon": (MUON, reference.momentum_polar(BETA)),
    "nesterov": (NESTEROV, reference.momentum_polar(BETA, nesterov=True)),
    "adam": (optax.scale_by_adam(), reference.adam()),
    "identity": (optax.identity(), reference.identity()),
}


# Adam sees coordinates, so the bases are the library's, vector by vector. In one case they are of
# the default projector, which also shows that the reference needs nothing of the SVD.
@pytest.mark.parametrize(
    ("inner", "case", "projector"),
    [
        ("nesterov", SEPARATE, projectors.svd),
        ("adam", SEPARATE, projectors.subspace_iteration),
        ("adam", EXPERTS, projectors.svd),
        ("identity", STACKED, projectors.svd),
    ],
    ids=label,
)
def test_other_inner_transformations_equal_the_reference(case, inner, projector):
    inner, oracle = INNER[inner]
    gradients = cases.gradients_of(case)
    compression = case.compression(projector=projector)
    run = cases.run(gum_optax.low_rank(inner, compression), case, gradients)
    cases.assert_close(run.updates, reference.sampled(oracle, gradients, **run.sizes(case)))


TABLE = ([4, 0], [5, 5], [2, 5], [1, 3], [5, 2])  # 5 is an empty slot.


@pytest.mark.parametrize(
    ("inner", "case"),
    [("muon", STACKED), ("momentum", STACKED._replace(layout="separate"))],
    ids=label,
)
def test_users_sampler_with_empty_slots_equals_the_reference(case, inner):
    tx, oracle = INNER[inner]
    gradients = helpers.gradients(1, 8 * case.K, case.N, *helpers.SHAPES[case.shape])
    sampler = helpers.table_sampler(2, 0.3, TABLE)
    compression = case.compression(residual=residuals.sampled(sampler), projector=projectors.svd)
    updates, draws, _ = cases.run(gum_optax.low_rank(tx, compression), case, gradients)
    assert {len(draw) for draw in draws} == {0, 1, 2}
    assert all(draw in [helpers.drawn(row, case.N) for row in TABLE] for draw in draws)
    expected = reference.sampled(oracle, gradients, rank=case.rank, K=case.K, q=0.3, draws=draws)
    cases.assert_close(updates, expected)


def test_single_matrix_with_bernoulli_equals_the_reference():
    case = Case("separate", "wide", 1, 1, 2, 3)
    gradients = helpers.gradients(2, 12, 1, *helpers.SHAPES[case.shape])
    compression = case.compression(
        residual=residuals.sampled(samplers.bernoulli(0.4)), projector=projectors.svd
    )
    tx = gum_optax.scale_by_gum(compression, beta=BETA)
    updates, draws, _ = cases.run(tx, case, gradients)
    assert set() in draws
    assert {0} in draws
    expected = reference.sampled(
        reference.momentum_polar(BETA), gradients, rank=case.rank, K=case.K, q=0.4, draws=draws
    )
    cases.assert_close(updates, expected)


def test_groups_of_one_tree_do_not_touch_each_other():
    K, rank, gamma = 2, 3, 1
    steps = 2 * K
    wide = helpers.gradients(3, steps, 4, 6, 10)
    tall = helpers.gradients(4, steps, 3, 9, 5)
    small = helpers.gradients(5, steps, 2, rank, 7)  # rank >= m: uncompressed.
    single = helpers.gradients(6, steps, 1, 8, 8)  # One matrix: uncompressed.
    compression = LowRank(rank, K, residuals.sampled(gamma), projector=projectors.svd, key=KEY)
    inner, oracle = INNER["momentum"]
    tx = gum_optax.low_rank(inner, compression)
    updates: dict[str, list[np.ndarray]] = {"up": [], "down": [], "small": [], "single": []}
    draws = []
    with jax.enable_x64(True):
        trees = [
            {
                # Interleaved leaves, so that a group's leaves are not neighbours.
                "layers": [{"up": w, "down": t} for w, t in zip(wide[s], tall[s], strict=False)]
                + [{"up": wide[s, 3]}],
                "small": small[s],
                "single": single[s, 0],
            }
            for s in range(steps)
        ]
        for update, state in helpers.run(tx, trees):
            draws.append(state.slots)
            updates["up"].append(np.stack([layer["up"] for layer in update["layers"]]))
            updates["down"].append(np.stack([layer["down"] for layer in update["layers"][:3]]))
            updates["small"].append(np.asarray(update["small"]))
            updates["single"].append(np.asarray(update["single"])[None])
    assert set(draws[0]) == {"layers.*.up", "layers.*.down"}
    for name, G in (("up", wide), ("down", tall)):
        N = G.shape[1]
        drawn = [helpers.drawn(slots[f"layers.*.{name}"], N) for slots in draws[::K]]
        expected = reference.sampled(oracle, list(G), rank=rank, K=K, q=gamma / N, draws=drawn)
        cases.assert_close(np.stack(updates[name]), expected)
    for name, G in (("small", small), ("single", single)):
        cases.assert_close(np.stack(updates[name]), reference.uncompressed(oracle, list(G)))


def test_layouts_of_the_same_matrices_agree():
    case = Case("", "tall", 6, 2, 2, 3)
    gradients = cases.gradients_of(case)
    # A basis of the key, so that the keys of the matrices must agree as well.
    compression = case.compression(projector=helpers.all_arguments)
    tx = gum_optax.low_rank(optax.trace(BETA), compression)
    separate, *others = (
        cases.run(tx, case._replace(layout=layout), gradients) for layout in helpers.LAYOUTS
    )
    for other in others:
        assert other.draws == separate.draws
        np.testing.assert_array_equal(other.bases, separate.bases)
        cases.assert_close(other.updates, separate.updates)


def test_an_empty_slot_holds_zero():
    """It reads some matrix, and the inner transformation must see nothing of it."""
    sampler = helpers.table_sampler(2, 0.4, [[1, 3]])  # Of three matrices: 3 stands for none.
    compression = LowRank(2, 2, residuals.sampled(sampler), helpers.first_coordinates)
    tx = gum_optax.low_rank(optax.trace(BETA), compression)
    tree = helpers.pack("separate", np.ones((3, 6, 10), np.float32))
    [(_, state)] = helpers.run(tx, [tree])
    drawn, empty = state.inner.trace["layers.*.w"].residual
    assert np.any(drawn) and not np.any(empty)


# Slots are put in their places one by one where they are few, and by a scatter where they are many.
@pytest.mark.parametrize(
    ("leaves", "experts", "gamma", "form"),
    [(3, 2, 3, "exclusive"), (3, 4, 6, "additive")],
    ids=["few slots", "many slots"],
)
def test_several_stacks_are_one_group(leaves, experts, gamma, form):
    """A slot serves a matrix of one of several leaves: of the right one, at the right place."""
    case = Case("", "tall", leaves * experts, gamma, 2, 2)
    gradients = cases.gradients_of(case)
    rule = residuals.sampled(gamma, form=form)
    compression = case.compression(residual=rule, projector=helpers.all_arguments)
    tx = gum_optax.low_rank(optax.trace(BETA), compression)
    updates, draws, bases = [], [], []
    with jax.enable_x64(True):
        stacks = gradients.reshape(len(gradients), leaves, experts, *gradients.shape[2:])
        trees = [{"layers": [{"w": stack} for stack in G_t]} for G_t in stacks]
        for t, (update, state) in enumerate(helpers.run(tx, trees)):
            updates.append(helpers.unpack(update))
            if t % case.K == 0:
                basis = np.asarray(state.basis["layers.*.w"])
                assert basis.shape[:2] == (leaves, experts)
                bases.append(basis.reshape(case.N, *basis.shape[2:]))
                draws.append(helpers.drawn(state.slots["layers.*.w"], case.N))
    # Some period draws from more than one leaf, and not from its first matrices alone.
    assert any(len({i // experts for i in draw}) > 1 and max(draw) >= 2 for draw in draws)
    options = {"rank": case.rank, "K": case.K, "bases": bases, "form": form}
    oracle = reference.momentum(BETA)
    expected = reference.sampled(oracle, gradients, q=case.q, draws=draws, **options)
    cases.assert_close(np.stack(updates), expected)


@cases.each(SEPARATE)
def test_inner_transformation_sees_compressed_parameters(case):
    """The codec is linear: decay inside is compressed and expanded like a gradient."""
    gradients = cases.gradients_of(case)
    W = helpers.gradients(7, case.N, *helpers.SHAPES[case.shape])
    compression = case.compression(projector=projectors.svd)
    tx = gum_optax.low_rank(optax.add_decayed_weights(0.5), compression)
    run = cases.run(tx, case, gradients, params=W)
    expected = reference.sampled(reference.identity(), gradients + 0.5 * W, **run.sizes(case))
    cases.assert_close(run.updates, expected)


# A rank for each group ----------------------------------------------------------------------------


def test_a_rank_for_each_group_equals_separate_runs():
    """Groups share nothing: together at ranks of their own, they are as each is alone."""
    ranks = {"attn.*": 2, "mlp.*": 4, "wide": 99}
    gradients = [
        {
            "attn": list(helpers.gradients(3 * step, 2, 8, 8)),
            "mlp": list(helpers.gradients(3 * step + 1, 3, 6, 11)),
            "wide": helpers.gradients(3 * step + 2, 2, 5, 9),
        }
        for step in range(4)
    ]
    gradients = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), gradients)

    def by_group(group):
        return ranks[group.name]

    def momentum(rank):
        sampled = residuals.sampled(1)
        return gum_optax.low_rank(
            optax.trace(BETA), LowRank(rank, 2, sampled, helpers.first_coordinates, key=KEY)
        )

    together = list(helpers.run(momentum(by_group), gradients))
    _, state = together[-1]
    assert {name: basis.shape for name, basis in state.basis.items()} == {
        "attn.*": (2, 8, 2),
        "mlp.*": (3, 6, 4),
    }
    trace = state.inner.trace
    assert {name: part.low.shape for name, part in trace.items()} == {
        "attn.*": (2, 2, 8),
        "mlp.*": (3, 4, 11),
    }
    assert set(state.uncompressed.trace) == {"wide"}, "its rank is above its short side"
    for name, rank in ranks.items():
        part = name.removesuffix(".*")
        alone = optax.trace(BETA) if name == "wide" else momentum(rank)
        runs = zip(together, helpers.run(alone, [{part: G[part]} for G in gradients]), strict=True)
        for (got, _), (expected, _) in runs:
            # Two programs of one computation.
            helpers.assert_trees_close({part: got[part]}, expected, 1e-5)


def _matrix(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_rank_of_the_group_sees_the_group():
    seen = {}

    def rank(group):
        seen[group.name] = (group.m, group.n, group.count, group.rank)
        return group.m // 2

    params = {"a": [_matrix(8, 5)] * 3, "b": _matrix(2, 4, 12)}
    tx = gum_optax.low_rank(optax.identity(), LowRank(rank))
    state = jax.eval_shape(tx.init, params)
    assert seen == {"a.*": (5, 8, 3, 0), "b": (4, 12, 2, 0)}
    assert {name: basis.shape[-1] for name, basis in state.basis.items()} == {"a.*": 2, "b": 2}


@pytest.mark.parametrize("rank", [0, -1, 1.5, None, True])
def test_a_rank_of_the_group_is_checked(rank):
    tx = gum_optax.low_rank(optax.identity(), LowRank(lambda group: rank))
    with pytest.raises((TypeError, ValueError), match=r"`rank` of the group `\*` must"):
        tx.init([_matrix(4, 6)] * 2)


def test_groups_of_one_shape_are_projected_as_each_is_alone():
    """One loop serves all groups of a shape: no matrix gets another's gradient or key."""
    groups: dict[str, Any] = {
        "wide": list(np.asarray(helpers.gradients(0, 3, 5, 8), np.float32)),
        "tall": list(np.asarray(helpers.gradients(1, 2, 8, 5), np.float32)),
        "stacked": np.asarray(helpers.gradients(2, 4, 5, 8), np.float32),
        "other": list(np.asarray(helpers.gradients(3, 2, 5, 9), np.float32)),
    }
    compression = LowRank(2, 2, residuals.drop(), helpers.all_arguments)
    tx = gum_optax.low_rank(optax.identity(), compression)

    def bases(tree):
        # Two refreshes: the second starts from the bases of the first.
        *_, (_, state) = helpers.run(tx, [tree, tree, jax.tree.map(np.negative, tree)])
        return state.basis

    together = bases(groups)
    assert len(together) == 4
    for part, leaves in groups.items():
        [(group, alone)] = bases({part: leaves}).items()
        np.testing.assert_allclose(together[group], alone, rtol=0, atol=2e-6)
