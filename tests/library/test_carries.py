"""Carries: state that continues in a new basis, state that restarts, and states that raise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, low_rank, projectors, residuals
from tests import cases, helpers, reference, tables
from tests.cases import EXPERTS, SEPARATE, STACKED, label

BETA = 0.9
# The inner transformation, and the same in the reference.
INNER: dict[str, Any] = {
    "momentum": (optax.trace(BETA), reference.momentum(BETA)),
    "muon": (
        optax.chain(optax.trace(BETA), gum_optax.scale_by_polar()),
        reference.momentum_polar(BETA),
    ),
    "adam": (optax.scale_by_adam(), reference.adam()),
}


@pytest.mark.parametrize(("inner", "case"), [("muon", STACKED), ("adam", SEPARATE)], ids=label)
def test_kept_low_rank_states_go_on_and_slots_restart(case, inner):
    # Adam has one count for all matrices, which cannot restart for some: it runs without slots.
    case = case if inner == "muon" else case._replace(gamma=0)
    tx, oracle = INNER[inner]
    gradients = cases.gradients_of(case)
    compression = case.compression(carry=carries.keep, projector=projectors.svd)
    run = cases.run(low_rank(tx, compression), case, gradients)

    def expected(carry: str) -> np.ndarray:
        return np.asarray(reference.sampled(oracle, gradients, carry=carry, **run.sizes(case)))

    cases.assert_close(run.updates, expected("keep"))
    assert np.abs(run.updates - expected("restart")).max() > 0.1, "the two must be told apart"


@pytest.mark.parametrize(
    ("inner", "case"), [("muon", SEPARATE), ("momentum", STACKED), ("momentum", EXPERTS)], ids=label
)
def test_rotated_momentum_goes_on_in_the_new_basis(case, inner):
    tx, oracle = INNER[inner]
    gradients = cases.gradients_of(case)
    compression = case.compression(carry=carries.rotate, projector=projectors.svd)
    run = cases.run(low_rank(tx, compression), case, gradients)

    def expected(carry: str) -> np.ndarray:
        return np.asarray(reference.sampled(oracle, gradients, carry=carry, **run.sizes(case)))

    cases.assert_close(run.updates, expected("rotate"))
    assert np.abs(run.updates - expected("keep")).max() > 0.1, "the two must be told apart"


@pytest.mark.parametrize(
    ("rule", "case"),
    [("feedback", STACKED._replace(K=1)), ("through", SEPARATE), ("additive", EXPERTS)],
    ids=label,
)
def test_rotation_beside_other_residual_rules(rule, case):
    """With feedback at every step, this is LDAdam's first moment."""
    rules: dict[str, Any] = {
        "feedback": residuals.feedback(),
        "through": residuals.through(optax.scale_by_sign()),
        "additive": residuals.sampled(case.gamma, form="additive"),
    }
    gradients = cases.gradients_of(case._replace(K=max(case.K, 2)))
    compression = case.compression(
        residual=rules[rule], carry=carries.rotate, projector=projectors.svd
    )
    tx, oracle = INNER["momentum"]
    run = cases.run(low_rank(tx, compression), case, gradients)
    sizes = {"rank": case.rank, "K": case.K, "bases": run.bases, "carry": "rotate"}
    if rule == "feedback":
        expected = reference.feedback(oracle, gradients, **sizes)
    elif rule == "through":
        expected = reference.through(oracle, reference.sign(), gradients, **sizes)
    else:
        drawn = {"q": case.q, "draws": run.draws, "form": rule}
        expected = reference.sampled(oracle, gradients, **drawn, **sizes)
    cases.assert_close(run.updates, expected)


@pytest.mark.parametrize(
    ("rule", "case"), [("drop", STACKED), ("through", SEPARATE), ("feedback", EXPERTS)], ids=label
)
def test_moments_go_on_in_the_new_basis(rule, case):
    """LDAdam's carry, without slots and beside two rules for the residual."""
    rules: dict[str, Any] = {
        "drop": (residuals.drop(), reference.of_residual(lambda state, E: (0 * E, state))),
        "through": (residuals.through(optax.scale_by_sign()), reference.sign()),
        "feedback": (residuals.feedback(), None),
    }
    residual, oracle = rules[rule]
    gradients = cases.gradients_of(case)
    carry = carries.projection_aware()
    compression = case.compression(residual=residual, carry=carry, projector=projectors.svd)
    run = cases.run(low_rank(optax.scale_by_adam(), compression), case, gradients)

    def expected(carry: str) -> np.ndarray:
        sizes = {"rank": case.rank, "K": case.K, "bases": run.bases, "carry": carry}
        if oracle is None:
            return np.asarray(reference.feedback(reference.adam(), gradients, **sizes))
        return np.asarray(reference.through(reference.adam(), oracle, gradients, **sizes))

    cases.assert_close(run.updates, expected("projection_aware"))
    assert np.abs(run.updates - expected("keep")).max() > 0.1, "the two must be told apart"


B1, B2 = 0.9, 0.999
CARRY_MOMENTS = jax.jit(carries.projection_aware(B1, B2))


def carry_moments(turn: Any, m: Any, v: Any, t: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected moments after a carry, of one group of one matrix [r, 1], and one slot."""

    def adam(t: int, m: Any, v: Any, slot: float) -> Any:
        def moments(low: Any) -> Any:
            arrays = np.asarray(low, np.float32)[:, None], np.full((1, 2, 1), slot, np.float32)
            return {"w": gum_optax.Compressed(*jax.device_put(arrays))}

        return optax.ScaleByAdamState(np.asarray(t, np.int32), moments(m), moments(v))

    fresh = adam(0, [0, 0], [0, 0], 0)
    state = adam(t, np.multiply(m, 1 - B1**t), np.multiply(v, 1 - B2**t), 5)
    eye, turned = {"w": np.eye(2, dtype=np.float32)}, {"w": np.asarray(turn, np.float32).T}
    after = jax.tree.map(np.asarray, CARRY_MOMENTS(fresh, state, eye, turned))
    for slots in (after.mu["w"].residual, after.nu["w"].residual):
        assert not slots.any(), "slots restart"
    assert int(after.count) == t
    low = [part["w"].low[:, 0] for part in (after.mu, after.nu)]
    return low[0] / (1 - B1**t), low[1] / (1 - B2**t)


def test_carried_moments_by_hand():
    """A turn by 45 degrees of m = (1, 0), v = (1, 1) has v = (1, 1) again."""
    half = 0.5**0.5
    m, v = carry_moments([[half, half], [-half, half]], [1, 0], [1, 1])
    np.testing.assert_allclose(m, [half, -half], rtol=1e-5)
    np.testing.assert_allclose(v, [1, 1], rtol=1e-4)
    # A signed permutation is exact: first moments change their signs, squares do not.
    m, v = carry_moments([[0, -1], [1, 0]], [2, 3], [5, 10])
    np.testing.assert_allclose(m, [-3, 2], rtol=1e-5)
    np.testing.assert_allclose(v, [10, 5], rtol=1e-4)


def test_moments_of_nothing_are_carried_nowhere():
    """Before the first step t = 0, and both moments are zero: nothing may be divided by zero."""
    tx = around(optax.scale_by_adam(), carries.projection_aware())
    [(_, state)] = helpers.run(tx, [GROUP])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "inner", [optax.trace(0.9), optax.scale_by_amsgrad()], ids=["trace", "amsgrad"]
)
def test_a_carry_of_moments_needs_adam(inner):
    """AMSGrad's greatest second moment would be left behind in the old basis."""
    with pytest.raises(ValueError, match=r"projection_aware.*`mu` and `nu`"):
        around(inner, carries.projection_aware()).init(TREE)


def test_moments_are_carried_inside_of_wrappers():
    """A masked group has no moments; that of the other is carried as if it were alone."""

    def momenta(inner, tree):
        carry = carries.projection_aware()
        tx = low_rank(inner, LowRank(2, 2, residuals.drop(), projectors.svd, carry))
        *_, (_, state) = helpers.run(
            tx, [jax.tree.map(lambda g, s=s: s * g, tree) for s in (1, 2, 3)]
        )
        nodes = jax.tree.leaves(state.inner, is_leaf=carries._is_adam)
        [adam] = filter(carries._is_adam, nodes)
        return adam.mu["a.*"].low, adam.nu["a.*"].low

    masked = momenta(optax.masked(optax.scale_by_adam(), only("a")), TREE)
    alone = momenta(optax.scale_by_adam(), {"a": TREE["a"]})
    for got, expected in zip(masked, alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_decays_of_a_carry_of_moments_are_checked():
    with pytest.raises(ValueError, match="`b2`"):
        carries.projection_aware(b2=1.0)


def test_a_users_carry_is_given_both_states_and_both_bases():
    """Half of the low-rank momentum goes on."""

    def halve(fresh, old, previous_basis, basis):
        assert previous_basis.keys() == basis.keys() == {"*"}
        low, residual = old.trace["*"].low, fresh.trace["*"].residual
        return old._replace(trace={"*": gum_optax.Compressed(low / 2, residual)})

    tree = [np.full((2, 3), i + 1, np.float32) for i in range(3)]
    drop = residuals.drop()
    tx = low_rank(optax.trace(1.0), LowRank(1, 2, drop, helpers.first_coordinates, carry=halve))
    momenta = [
        float(state.inner.trace["*"].low[0, 0, 0]) for _, state in helpers.run(tx, [tree] * 5)
    ]
    assert momenta == [1.0, 2.0, 2.0, 3.0, 2.5]


# Where slots and low-rank states cannot be told apart ---------------------------------------------

TREE = {
    "a": [np.asarray(G, np.float32) for G in helpers.gradients(0, 4, 5, 8)],
    "b": np.asarray(helpers.gradients(1, 3, 8, 5), np.float32),
}
GROUP = TREE["a"][:2]  # The smallest that is compressed, for what all groups share.
FLAT = optax.flatten(optax.trace(0.9))
GOING_ON = {"keep": carries.keep, "rotate": carries.rotate}
each_going_on = pytest.mark.parametrize("name", GOING_ON)


def around(inner: optax.GradientTransformation, carry: Any) -> Any:
    """Low rank with one slot for each group, refreshed every other step."""
    return low_rank(inner, dataclasses.replace(tables.SIMPLE, carry=carry))


@each_going_on
def test_a_carry_raises_at_init_if_the_state_does_not_keep_the_structure_of_the_gradients(name):
    """One array for all groups would carry the slots' momentum over to other matrices."""
    tx = around(FLAT, GOING_ON[name])
    message = rf"`carry=carries\.{name}` needs .*`state\.trace` .*Use `carries\.restart`"
    with pytest.raises(ValueError, match=message):
        tx.init(TREE)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, TREE)


@each_going_on
def test_an_optimizer_raises_likewise(name):
    compression = LowRank(2, 2, residuals.sampled(1), carry=GOING_ON[name])
    tx = gum_optax.for_matrices(low_rank(FLAT, compression), 0.1)
    with pytest.raises(ValueError, match=r"carry=.*carries\.restart"):
        tx.init(TREE)


def test_restart_suits_any_state():
    scales = (1.0, -2.0, 0.5, 3.0, 1.0)
    trees = [jax.tree.map(lambda leaf, s=s: s * leaf, TREE) for s in np.asarray(scales, np.float32)]
    flat = helpers.run(around(FLAT, carries.restart), trees)
    plain = helpers.run(around(optax.trace(0.9), carries.restart), trees)
    for (got, _), (expected, _) in zip(flat, plain, strict=True):
        helpers.assert_trees_close(got, expected, 1e-6)


def only(names: str) -> Any:
    """A mask of the groups whose names begin with one of the letters."""
    return lambda tree: {name: name[0] in names for name in tree}


# Each keeps the structure of its gradients, or keeps nothing that belongs to a group.
SUITABLE: dict[str, Any] = {
    "identity": optax.identity(),
    "trace": optax.trace(0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-1.0)),
    "a count": optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: 1.0 + count)),
    "masked": optax.masked(optax.trace(0.9), only("a")),
    "masked, nothing": optax.masked(optax.trace(0.9), only("")),
    "partition": optax.partition(
        {"first": optax.trace(0.9), "second": optax.trace(0.5)},
        lambda tree: {name: "first" if name[0] == "a" else "second" for name in tree},
    ),
    "partition by group": optax.partition(
        {"a.*": optax.trace(0.9), "b": optax.trace(0.5)}, lambda tree: {name: name for name in tree}
    ),
    "injected": optax.inject_hyperparams(optax.trace)(0.9),
    "guarded": optax.apply_if_finite(optax.trace(0.9), 5),
    "accumulated": optax.MultiSteps(optax.trace(0.9), 2).gradient_transformation(),
}


def slots_of(state: Any) -> list[Any]:
    """The residual of every `Compressed` in a state."""

    def is_compressed(node):
        return isinstance(node, gum_optax.Compressed)

    nodes = jax.tree.leaves(state, is_leaf=is_compressed)
    return [node for node in nodes if is_compressed(node)]


def gaussian(tree: Any) -> Any:
    """Random numbers for the floating leaves of a tree of shapes, and ones for the others."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (rng.normal(size=leaf.shape) if floating else np.ones(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


@each_going_on
@pytest.mark.parametrize("inner", SUITABLE)
def test_slots_restart_and_low_rank_states_go_on_inside_of_wrappers(inner, name):
    """Between two refreshes at one basis, low-rank states must not change, and slots be zero."""
    tx = around(SUITABLE[inner], GOING_ON[name])
    # A carry looks at structures, which are the same after any number of steps.
    shapes = jax.eval_shape(tx.init, TREE)
    _, after = jax.eval_shape(tx.update, TREE, shapes)
    assert helpers.described(after) == helpers.described(shapes)
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.inner)
    old = gaussian(shapes.inner)
    basis: Any = {
        key: np.broadcast_to(np.eye(*leaf.shape[-2:], dtype=leaf.dtype), leaf.shape)
        for key, leaf in shapes.basis.items()
    }
    carried = GOING_ON[name](fresh, old, basis, basis)
    assert jax.tree.structure(carried) == jax.tree.structure(old)
    stateless = inner in ("identity", "masked, nothing")
    assert stateless or any(np.any(before.residual) for before in slots_of(old))
    for before, after in zip(slots_of(old), slots_of(carried), strict=True):
        np.testing.assert_allclose(after.low, before.low, rtol=1e-6)
        assert not np.any(after.residual)


@each_going_on
def test_a_count_that_matrices_share_goes_on(name):
    """Adam's, and those of schedules; ``rotate`` is for momentum alone, so it has no Adam."""
    inner = optax.scale_by_adam() if name == "keep" else SUITABLE["a count"]
    *_, (_, state) = helpers.run(around(inner, GOING_ON[name]), [GROUP] * 5)
    [count] = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.dtype == jnp.int32]
    assert int(count) == 5


def test_restart_restarts_the_count():
    *_, (_, state) = helpers.run(around(optax.scale_by_adam(), carries.restart), [GROUP] * 5)
    assert int(state.inner.count) == 1


@pytest.mark.parametrize(
    "inner",
    [optax.scale_by_adam(), optax.chain(optax.clip(1.0), optax.lamb(0.1))],
    ids=["adam", "chain"],
)
def test_second_moments_do_not_rotate(inner):
    with pytest.raises(ValueError, match=r"`carry=carries\.rotate` .* second moment .*nu.*keep"):
        around(inner, carries.rotate).init(TREE)


@pytest.mark.parametrize("rank", [2, 4])
def test_states_of_other_shapes_do_not_rotate(rank):
    """Adafactor's factors, also where their axes happen to have the sizes of a state's."""
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    compression = LowRank(rank, 2, residuals.drop(), carry=carries.rotate)
    with pytest.raises(ValueError, match=r"`carry=carries\.rotate` .* `a\.\*`"):
        low_rank(inner, compression).init({"a": TREE["a"]})


@pytest.mark.parametrize("name", [*GOING_ON, "restart"])
def test_a_carry_of_no_groups_raises_nothing(name):
    """Where nothing is compressed there is nothing to carry, whatever the inner state is."""
    carry = getattr(carries, name)
    one_array = optax.GradientTransformation(lambda params: jnp.zeros(3), optax.identity().update)
    low_rank(one_array, LowRank(2, 2, carry=carry)).init({})
    with pytest.warns(UserWarning, match="None of 1 group"):
        low_rank(one_array, LowRank(9, 2, carry=carry)).init({"w": np.ones((4, 6), np.float32)})
