"""Residual rules against the float64 reference, their laws, and examples worked out by hand."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import (
    LowRank,
    _scheduling,
    carries,
    low_rank,
    normalize_columns,
    projectors,
    residuals,
    scale_by_gain,
    storages,
)
from tests import cases, helpers, reference
from tests.cases import EXPERTS, SEPARATE, SQUARE, STACKED, label

BETA = 0.9
MUON = optax.chain(optax.trace(BETA), gum_optax.scale_by_polar())
# The inner transformation, and the same in the reference.
INNER: dict[str, Any] = {
    "identity": (optax.identity(), reference.identity()),
    "momentum": (optax.trace(BETA), reference.momentum(BETA)),
    "muon": (MUON, reference.momentum_polar(BETA)),
    "adam": (optax.scale_by_adam(), reference.adam()),
}


# A transformation of residuals, and the same in the reference.
THROUGH: dict[str, Any] = {
    "sign": (optax.scale_by_sign(), reference.sign()),
    "momentum": (optax.trace(0.5), reference.of_residual(reference.momentum(0.5))),
    "columns": (normalize_columns(), reference.columns()),
    "gain": (scale_by_gain(), reference.fira()),
    "gain without limit": (scale_by_gain(growth_limit=None), reference.fira(None)),
}


@pytest.mark.parametrize(
    ("case", "inner"),
    # A layout each, as the codec is that of the exclusive form: its cases are in test_low_rank.py.
    [(SEPARATE, "muon"), (STACKED, "adam"), (EXPERTS, "identity"), (SQUARE, "momentum")],
    ids=label,
)
def test_additive_form_equals_the_reference(case, inner):
    tx, oracle = INNER[inner]
    gradients = cases.gradients_of(case)
    rule = residuals.sampled(case.gamma, form="additive")
    compression = case.compression(residual=rule, projector=projectors.svd)
    run = cases.run(low_rank(tx, compression), case, gradients)
    sizes = run.sizes(case)
    expected = reference.sampled(oracle, gradients, form="additive", **sizes)
    cases.assert_close(run.updates, expected)
    exclusive = np.asarray(reference.sampled(oracle, gradients, **sizes))
    assert np.abs(run.updates - exclusive).max() > 0.1, "the two must be told apart"


@pytest.mark.parametrize(
    ("case", "inner", "form", "undrawn"),
    [
        (SEPARATE, "momentum", "exclusive", "momentum"),
        (SEPARATE, "muon", "additive", "gain"),
        (STACKED, "momentum", "exclusive", "gain"),
        (STACKED, "momentum", "additive", "columns"),
        (EXPERTS, "momentum", "exclusive", "columns"),
        (EXPERTS, "momentum", "additive", "momentum"),
        (SQUARE, "momentum", "exclusive", "sign"),
    ],
    ids=label,
)
def test_undrawn_matrices_send_their_residual_through_a_transformation(case, inner, form, undrawn):
    tx, oracle = INNER[inner]
    transformation, rule = THROUGH[undrawn]
    gradients = cases.gradients_of(case)
    residual = residuals.sampled(case.gamma, form=form, undrawn=transformation)
    compression = case.compression(residual=residual, projector=projectors.svd)
    run = cases.run(low_rank(tx, compression), case, gradients)
    sizes = run.sizes(case) | {"form": form}
    expected = reference.sampled(oracle, gradients, undrawn=rule, **sizes)
    cases.assert_close(run.updates, expected)
    dropped = np.asarray(reference.sampled(oracle, gradients, **sizes))
    assert np.abs(run.updates - dropped).max() > 0.1, "the two must be told apart"


@pytest.mark.parametrize(
    ("case", "inner", "rule"),
    [
        (SEPARATE, "identity", "momentum"),
        (SEPARATE, "adam", "gain"),
        (STACKED, "identity", "gain without limit"),
        (STACKED, "muon", "columns"),
        (EXPERTS, "adam", "gain"),
        (SQUARE, "adam", "sign"),
    ],
    ids=label,
)
def test_residuals_through_a_transformation_equal_the_reference(case, inner, rule):
    tx, oracle = INNER[inner]
    transformation, oracle_rule = THROUGH[rule]
    gradients = cases.gradients_of(case)
    compression = case.compression(
        residual=residuals.through(transformation), projector=projectors.svd, carry=carries.keep
    )
    run = cases.run(low_rank(tx, compression), case, gradients)
    assert run.draws == [set()] * cases.PERIODS
    sizes = {"rank": case.rank, "K": case.K, "bases": run.bases, "carry": "keep"}
    cases.assert_close(run.updates, reference.through(oracle, oracle_rule, gradients, **sizes))


@pytest.mark.parametrize(
    ("case", "inner", "large_side"),
    [
        (SEPARATE, "muon", 256), (STACKED, "momentum", 256), (EXPERTS, "muon", 256),
        # Matrices above this short side take turns in a loop.
        (STACKED, "momentum", 1), (EXPERTS, "muon", 1),
    ],
    ids=label,
)  # fmt: skip
def test_orthogonalized_residuals_equal_the_reference(monkeypatch, case, inner, large_side):
    monkeypatch.setattr(_scheduling, "LARGE_SIDE", large_side)
    tx, oracle = INNER[inner]

    def polar(state, E, R, D):
        size = ((E.shape[0] - R.shape[0]) / E.shape[1]) ** 0.5
        return 3 * reference.newton_schulz(size * E / np.linalg.norm(E, axis=0)), state

    gradients = cases.gradients_of(case)
    compression = case.compression(
        residual=residuals.orthogonalized(3.0), projector=projectors.svd, carry=carries.keep
    )
    run = cases.run(low_rank(tx, compression), case, gradients)
    sizes = {"rank": case.rank, "K": case.K, "bases": run.bases, "carry": "keep"}
    cases.assert_close(run.updates, reference.through(oracle, polar, gradients, **sizes))


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 2, 20, 12)], ids=str)
def test_orthogonalized_residuals_in_a_loop_keep_the_steps_of_momentum(monkeypatch, shape):
    """Also where the gradient of a matrix is zero, whose low-rank update is not."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2)]
    grads.append(grads[0].at[0].set(0))
    tx = low_rank(optax.trace(BETA), LowRank(4, 9, residuals.orthogonalized()))

    def run(large_side):
        monkeypatch.setattr(_scheduling, "LARGE_SIDE", large_side)
        state, steps = tx.init(grads[0]), []
        # A function of its own, since `jit` does not see that the constant has changed.
        update = jax.jit(lambda *arguments: tx.update(*arguments))
        for gradient in grads:
            step, state = update(gradient, state, gradient)
            steps.append(np.asarray(step, np.float32))
        return np.stack(steps), str(jax.make_jaxpr(update)(grads[0], state, grads[0]))

    (looped, program), (batched, other) = run(1), run(256)
    assert program.count("scan[") > other.count("scan[")
    assert np.abs(looped[2].reshape(-1, *shape[-2:])[0]).max() > 0.1
    np.testing.assert_allclose(looped, batched, atol=0.02, rtol=0.02)  # bfloat16


def test_rounded_bases_leave_nothing_of_an_orthogonalized_residual_inside():
    """With P in 8 bits, E keeps 1 % of the dominant directions, which would be lifted to one."""
    rng = np.random.default_rng(0)
    strong = 100 * rng.normal(size=(16, 4)) @ rng.normal(size=(4, 40))
    params = {"layers": [np.float32(strong + rng.normal(size=(16, 40))) for _ in range(2)]}
    P = np.linalg.svd(strong)[0][:, :4]

    def inside(rule):
        """The norm of the updates' part inside the basis, where low-rank updates are zero."""
        compression = LowRank(4, 9, rule, projectors.svd, basis_storage=storages.int8(16))
        tx = low_rank(optax.scale(0.0), compression)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        return max(np.linalg.norm(P.T @ np.asarray(U)) for U in updates["layers"])

    polar = optax.chain(normalize_columns(), gum_optax.scale_by_polar())
    assert inside(residuals.orthogonalized(1.0)) < 0.02  # measured 0.009
    assert inside(residuals.through(polar)) > 1  # measured 1.9


# LDAdam and Dion refresh at every step; between refreshes the rule must hold as well.
@pytest.mark.parametrize(
    ("case", "inner", "decay"),
    [
        (SEPARATE._replace(K=1), "adam", 0.0),
        (SEPARATE, "muon", 0.0),
        (STACKED._replace(K=1), "momentum", 0.7),
        (STACKED, "identity", 0.0),
        (EXPERTS, "identity", 0.7),
        (SQUARE, "adam", 0.0),
    ],
    ids=label,
)
def test_feedback_equals_the_reference(case, inner, decay):
    tx, oracle = INNER[inner]
    gradients = cases.gradients_of(case._replace(K=max(case.K, 2)))
    compression = case.compression(residual=residuals.feedback(decay), projector=projectors.svd)
    run = cases.run(low_rank(tx, compression), case, gradients)
    # What Adam sees depends on the signs of singular vectors; the others show that the basis comes
    # from the corrected gradient.
    bases = run.bases if inner == "adam" else None
    sizes = {"rank": case.rank, "K": case.K, "bases": bases}
    cases.assert_close(run.updates, reference.feedback(oracle, gradients, decay=decay, **sizes))


# Laws ---------------------------------------------------------------------------------------------


@cases.each(SEPARATE, STACKED, EXPERTS)
def test_feedback_loses_nothing(case):
    """Decoded gradients and the last error add up to the sum of all gradients."""
    gradients = cases.gradients_of(case)
    compression = case.compression(
        residual=residuals.feedback(), projector=helpers.first_coordinates
    )
    with jax.enable_x64(True):
        trees = [helpers.pack(case.layout, G_t) for G_t in gradients]
        runs = list(helpers.run(low_rank(optax.identity(), compression), trees))
        [error] = runs[-1][1].residual.values()
        total = sum(helpers.unpack(updates) for updates, _ in runs) + helpers.unpack(error)
        assert np.abs(helpers.unpack(error)).max() > 0.1
    # Measured: 4e-16.
    np.testing.assert_allclose(total, gradients.sum(0), rtol=0, atol=1e-13)


def test_feedback_keeps_dions_momentum():
    """M <- B - (1 - mu) P P'B with B = M + G, which at full rank is momentum: M <- mu (M + G)."""
    mu = 0.8
    gradients = helpers.gradients(0, 6, 2, 10, 6)
    rule = residuals.feedback(mu)
    tx = low_rank(optax.identity(), LowRank(2, 1, rule, projectors.svd))
    momentum = np.zeros_like(gradients[0])
    with jax.enable_x64(True):
        for G_t, (_, state) in zip(gradients, helpers.run(tx, gradients), strict=True):
            corrected = momentum + G_t
            for i, B in enumerate(corrected):
                P = np.linalg.svd(B)[2][:2].T  # Tall: the short side is on the right.
                momentum[i] = B - (1 - mu) * B @ P @ P.T
            [error] = state.residual["param"]
            np.testing.assert_allclose(error, momentum, rtol=0, atol=1e-12)  # Measured: 3e-15.


def recorder(told: list[Any]) -> optax.GradientTransformationExtraArgs:
    """Keeps what a transformation of residuals is told, and changes nothing.

    For one trace; see `first_step`, which turns what was kept into numbers.
    """

    def update(updates, state, params=None, **extra_args):
        assert params is None
        told.append((updates, extra_args))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def first_step(tx: Any, tree: Any, *kept: list[Any]) -> Any:
    """The first updates, and the values of what spies have kept meanwhile, compiled together."""

    @functools.partial(jax.jit, compiler_options=helpers.QUICK)
    def step(tree):
        return tx.update(tree, tx.init(tree))[0], *kept

    return jax.tree.map(np.asarray, step(tree))


@pytest.mark.parametrize("shape", helpers.SHAPES)
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_projected_is_what_the_inner_transformation_saw_and_projected_update_what_it_gave(
    layout, shape
):
    m, n = sorted(helpers.SHAPES[shape])
    seen, told = [], []

    def inner(updates, state, params=None):
        # Exact, so that it is the same wherever the compiler computes it.
        given = jax.tree.map(lambda x: -2.0 * x, updates)
        seen.append((updates, given))
        return given, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), inner)
    rule = residuals.through(recorder(told))
    tx = low_rank(spy, LowRank(2, 1, rule, helpers.first_coordinates))
    matrices = np.asarray(helpers.gradients(0, 4, *helpers.SHAPES[shape]), np.float32)
    tree = helpers.pack(layout, matrices)
    _, [(saw, gave)], told = first_step(tx, tree, seen, told)

    assert saw[helpers.group_name(layout)].residual is None, "through has no slots"
    saw, gave = (np.asarray(part[helpers.group_name(layout)].low) for part in (saw, gave))
    leaves = jax.tree.leaves(tree)
    # [*lead, 2, n] -> one array for each leaf
    saw, gave = (part if len(leaves) > 1 else part[None] for part in (saw, gave))
    assert len(told) == len(leaves)
    for (residual, extra), leaf, projected, update in zip(told, leaves, saw, gave, strict=True):
        wide = np.asarray(leaf).swapaxes(-1, -2) if shape == "tall" else np.asarray(leaf)
        assert residual.shape == (*leaf.shape[:-2], m, n)
        assert extra.keys() == {"projected", "projected_update"}
        np.testing.assert_array_equal(extra["projected"], projected)
        np.testing.assert_array_equal(extra["projected_update"], update)
        np.testing.assert_allclose(projected, wide[..., :2, :], rtol=1e-6)
        expected = np.concatenate([0 * wide[..., :2, :], wide[..., 2:, :]], -2)
        np.testing.assert_allclose(residual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["exclusive", "additive"])
def test_undrawn_is_told_the_projection_without_its_weight(form):
    told = []
    rule = residuals.sampled(1, form=form, undrawn=recorder(told))
    tx = low_rank(optax.identity(), LowRank(2, 1, rule, helpers.first_coordinates))
    tree = list(np.asarray(helpers.gradients(0, 3, 5, 8), np.float32))
    _, told = first_step(tx, tree, told)
    weight = 1.0 if form == "additive" else 1.5
    for (_, extra), leaf in zip(told, tree, strict=True):
        np.testing.assert_allclose(extra["projected"], leaf[:2], rtol=1e-6)
        np.testing.assert_allclose(extra["projected_update"], weight * leaf[:2], rtol=1e-6)


@pytest.mark.parametrize("rule", ["through", "undrawn"])
def test_a_refresh_does_not_touch_the_state_of_a_transformation_of_residuals(rule):
    counter = optax.scale_by_schedule(lambda count: 1.0 + count)
    rules = {
        "through": residuals.through(counter),
        "undrawn": residuals.sampled(1, undrawn=counter),
    }
    tx = low_rank(optax.trace(0.9), LowRank(2, 2, rules[rule], helpers.first_coordinates))
    ones = functools.partial(np.ones, dtype=np.float32)
    tree = {"a": [ones((4, 6))] * 3, "b": ones((2, 6, 4))}
    *_, (_, state) = helpers.run(tx, [tree] * 5)
    counts = {name: [int(leaf.count) for leaf in part] for name, part in state.residual.items()}
    assert counts == {"a.*": [5, 5, 5], "b": [5]}


# By hand ------------------------------------------------------------------------------------------


def first_update(gradient: Any, inner: Any, residual: Any) -> np.ndarray:
    """The first update of one matrix 2 x 3, on the basis e1."""
    tx = low_rank(inner, LowRank(1, 1, residual, helpers.first_coordinates))
    return first_step(tx, np.asarray(gradient, np.float32))[0]


def test_frugal_by_hand():
    sign = optax.scale_by_sign()
    got = first_update([[3, 0, 1], [4, 2, -1]], sign, residuals.through(sign))
    np.testing.assert_array_equal(got, [[1, 0, 1], [1, 1, -1]])


def test_drop_by_hand():
    got = first_update([[3, 0, 1], [4, 2, -1]], optax.identity(), residuals.drop())
    np.testing.assert_array_equal(got, [[3, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("shape", helpers.SHAPES)
def test_a_column_normalized_residual_has_the_size_of_the_directions_that_are_left_out(shape):
    """Its Frobenius norm is sqrt(m - r), as if m - r singular values had been set to one."""
    G = np.asarray(helpers.gradients(0, 3, *helpers.SHAPES[shape]), np.float32)
    m, n = sorted(helpers.SHAPES[shape])

    def updates(residual):
        tx = low_rank(optax.identity(), LowRank(2, 1, residual, helpers.first_coordinates))
        return first_step(tx, G)[0]

    added = updates(residuals.through(normalize_columns())) - updates(residuals.drop())
    np.testing.assert_allclose(np.linalg.norm(added, axis=(-2, -1)), np.sqrt(m - 2), rtol=1e-5)
    along = -1 if shape == "tall" else -2
    np.testing.assert_allclose(np.linalg.norm(added, axis=along), np.sqrt((m - 2) / n), rtol=1e-5)


# A user's rule, and the shape of states -----------------------------------------------------------


def test_a_users_rule_replaces_functions_of_a_ready_one():
    """Half of the residual comes along as it is."""

    def decode(period, updates, encoded, gradients, state):
        kept, _ = residuals.drop().decode(period, updates, encoded, gradients, state)
        [seen] = residuals.drop().decode(period, encoded, encoded, gradients, state)[0]
        return [kept[0] + 0.5 * (gradients[0] - seen)], state + 1

    mine = residuals.drop()._replace(init=lambda group: jnp.zeros((), jnp.int32), decode=decode)
    tx = low_rank(optax.scale(2.0), LowRank(1, 1, mine, helpers.first_coordinates))
    G = np.asarray([[3.0, 0, 1], [4, 2, -1]], np.float32)
    *_, (updates, state) = helpers.run(tx, [G] * 3)
    np.testing.assert_array_equal(updates, [[6, 0, 2], [2, 1, -0.5]])
    assert int(state.residual["param"]) == 3


def test_a_users_rule_may_leave_groups_uncompressed():
    mine = residuals.drop()._replace(uncompressed=lambda group: "mine" if group.name == "b" else "")
    tree = {"a": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    tree |= {"b": tree["a"]}
    tx = low_rank(optax.trace(0.9), LowRank(2, 1, mine))
    state = jax.eval_shape(tx.init, tree)
    assert set(state.basis) == {"a"}
    plan = gum_optax.memory_plan(tx, tree)
    assert {row.name: row.why for row in plan.rows[:2]} == {"a": "", "b": "mine"}


@pytest.mark.parametrize(
    "rule",
    [
        residuals.drop(),
        residuals.sampled(1),
        residuals.sampled(1, form="additive"),
        residuals.sampled(1, undrawn=optax.trace(0.5)),
        residuals.through(optax.trace(0.5)),
        residuals.feedback(0.5),
    ],
    ids=["drop", "sampled", "additive", "undrawn", "through", "feedback"],
)
def test_states_keep_their_shapes_and_dtypes_over_steps(rule):
    """In bfloat16, where a float32 basis promotes whatever it touches."""
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    tree = {"a": [half((6, 4))] * 3, "b": half((2, 3, 4, 6))}
    tx = low_rank(optax.trace(0.9), LowRank(2, 2, rule, helpers.first_coordinates))
    state = jax.eval_shape(tx.init, tree)
    updates, after = jax.eval_shape(tx.update, tree, state)
    assert helpers.described(after) == helpers.described(state)
    assert helpers.described(updates) == helpers.described(tree)
    assert all(dtype == jnp.bfloat16 for _, shape, dtype in helpers.described(state.residual))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: residuals.sampled(-1), "gamma"),
        (lambda: residuals.sampled(1.5), "gamma"),
        (lambda: residuals.sampled(1, form="both"), "form"),
        (lambda: residuals.sampled(1, undrawn="sign"), "undrawn"),
        (lambda: residuals.orthogonalized(-1.0), "scale"),
        (lambda: residuals.orthogonalized(2.0, None), "orthogonalizer"),
        (lambda: residuals.through(None), "transformation"),
        (lambda: residuals.through(optax.identity), "transformation"),
        (lambda: residuals.feedback(1.0), "decay"),
        (lambda: residuals.feedback(-0.1), "decay"),
        (lambda: residuals.feedback("0.5"), "decay"),
    ],
)
def test_malformed_arguments_are_named(make, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        make()
