"""Fallbacks against loops in float64, their bytes, and their use as an argument."""

# pyright: reportArgumentType=false, reportIndexIssue=false

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, fallbacks, residuals, storages
from tests import helpers

RNG = np.random.default_rng(0)
V, D = 150, 130  # both above 128, from which on a second moment is factored


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {
    "embed": normal(V, D),
    "lm_head": {"kernel": normal(D, V)},
    "norm": normal(D),
}
GRADIENTS = [jax.tree.map(lambda leaf: normal(*leaf.shape), PARAMS) for _ in range(3)]
RATE, DECAY = 0.1, 0.01


def run(fallback: Any, params: Any = PARAMS) -> list[Any]:
    """The updates of three steps."""
    tx, found = fallback.make(RATE, DECAY, None), []
    state = jax.jit(tx.init, compiler_options=helpers.QUICK)(params)
    step = jax.jit(tx.update, compiler_options=helpers.QUICK)
    for gradient in GRADIENTS:
        updates, state = step(gradient, state, params)
        found.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), updates))
    return found


def leaf_of(steps: list[Any], name: str) -> list[np.ndarray]:
    return [tree["lm_head"]["kernel"] if name == "head" else tree[name] for tree in steps]


# Oracles: a leaf's gradients, step after step, to directions --------------------------------------


def adam(gradients: list[np.ndarray]) -> list[np.ndarray]:
    m, v, found = np.zeros_like(gradients[0]), np.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        found.append(m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
    return found


def factored(gradients: list[np.ndarray], b1: float = 0.0) -> list[np.ndarray]:
    g = gradients[0]
    rows, columns = np.zeros(g.shape[0]), np.zeros(g.shape[-1])
    whole, m, found = np.zeros(g.shape), np.zeros(g.shape), []
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        if g.ndim == 2:
            for i in range(g.shape[0]):
                rows[i] = beta * rows[i] + (1 - beta) * np.mean(g[i] ** 2)
            for j in range(g.shape[1]):
                columns[j] = beta * columns[j] + (1 - beta) * np.mean(g[:, j] ** 2)
            second = np.outer(rows, columns) / rows.mean()
        else:
            second = whole = beta * whole + (1 - beta) * g**2
        u = g / np.sqrt(second)
        u = u / max(1.0, math.sqrt(np.mean(u**2)))
        m = b1 * m + (1 - b1) * u
        found.append(m / (1 - b1**t))
    return found


def columns(gradients: list[np.ndarray], b1: float) -> list[np.ndarray]:
    m, found = np.zeros_like(gradients[0]), []
    for g in gradients:
        m = b1 * m + (1 - b1) * g
        u = np.zeros_like(m)
        for j in range(m.shape[1]):
            u[:, j] = m[:, j] / math.sqrt(np.mean(m[:, j] ** 2))
        found.append(u)
    return found


PLAIN = storages.plain()
CASES = {
    "adamw": (fallbacks.adamw(), {"embed": adam, "head": adam, "norm": adam}),
    "adamw, stored": (fallbacks.adamw(storage=PLAIN), {"embed": adam, "head": adam, "norm": adam}),
    "factored": (
        fallbacks.factored(),
        {"embed": factored, "head": factored, "norm": factored},
    ),
    "factored, momentum": (
        fallbacks.factored(0.9, PLAIN),
        dict.fromkeys(["embed", "head", "norm"], lambda gs: factored(gs, 0.9)),
    ),
    "columns": (
        fallbacks.columns(0.9, PLAIN),
        {
            "embed": lambda gs: columns(gs, 0.0),
            "head": lambda gs: columns(gs, 0.9),
            "norm": adam,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_the_equations(name):
    fallback, oracles = CASES[name]
    found = run(fallback)
    for leaf, oracle in oracles.items():
        gradients = [g.astype(np.float64) for g in leaf_of(GRADIENTS, leaf)]
        weights = leaf_of([PARAMS], leaf)[0]
        for actual, direction in zip(leaf_of(found, leaf), oracle(gradients), strict=True):
            # U -> -rate * (U + decay * W)
            expected = -RATE * (direction + DECAY * weights)
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("stored", "exact", "bound"),
    [
        (fallbacks.adamw(storage=storages.float8()), fallbacks.adamw(), 0.05),
        (fallbacks.factored(0.9), fallbacks.factored(0.9, PLAIN), 0.04),
        (fallbacks.columns(), fallbacks.columns(storage=PLAIN), 0.04),
    ],
    ids=["adamw", "factored", "columns"],
)
def test_eight_bits_stay_near_float32(stored, exact, bound):
    """Relative errors of three steps; of linear codes they are .007, of the others .026."""
    for few, many in zip(run(stored), run(exact), strict=True):
        for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
            assert np.linalg.norm(one - other) < bound * np.linalg.norm(other)


NUMBERS = V * D
SCALES = 4 * V  # of tables and heads, one block of 130 or 150 numbers for each row
BYTES = {
    "adamw": (fallbacks.adamw(), 2 * (2 * 4 * NUMBERS + 4 * D) + 4),
    # Vectors are below the smallest size, and stay in float32.
    "adamw, int8": (
        fallbacks.adamw(storage=storages.int8()),
        2 * (2 * NUMBERS + 4 * V + 4 * D) + 2 * 4 * D + 4,
    ),
    # Rows, columns and a stand-in of one number each; a vector has two stand-ins.
    "factored": (fallbacks.factored(), 2 * 4 * (V + D + 1) + 4 * (D + 2) + 4),
    "factored, momentum": (
        fallbacks.factored(0.9),
        2 * 4 * (V + D + 1) + 4 * (D + 2) + 4 + 2 * NUMBERS + 4 * V + 4 * D + 4 * D + 4,
    ),
    "columns": (fallbacks.columns(), NUMBERS + 4 * D + 4 + 2 * 4 * D + 4),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_by_hand(name):
    fallback, expected = BYTES[name]
    state = jax.eval_shape(fallback.make(RATE, 0.0, None).init, PARAMS)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == expected


@pytest.mark.parametrize("name", BYTES)
def test_the_plan_counts_to_the_byte(name):
    params = PARAMS | {"layers": [{"w": normal(8, 12)} for _ in range(4)]}
    tx = gum_optax.gum(0.1, LowRank(2), fallback=BYTES[name][0])
    plan = gum_optax.memory_plan(tx, params)
    state = jax.eval_shape(tx.init, params)
    assert plan.total_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    by_name = {row.name: row.bytes for row in plan.rows if row.treatment == "fallback"}
    assert set(by_name) == {"embed", "lm_head.kernel", "norm"}
    if name == "columns":
        assert by_name["embed"] == 0
        assert by_name["lm_head.kernel"] == NUMBERS + 4 * D


def test_second_moments_of_narrow_weights_are_float32():
    """In bfloat16 they stop to change once the decay is within 2 ** -8 of one."""
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    tx = fallbacks.factored().make(RATE, 0.0, None)
    state = jax.eval_shape(tx.init, narrow)
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}
    updates, after = jax.eval_shape(tx.update, narrow, state, narrow)
    assert after == state
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("path", "head"),
    [
        ("lm_head/kernel", True),
        ("output/kernel", True),
        ("decoder/logits", True),
        ("embed_tokens/embedding", False),
        ("wte/embedding", False),
        ("wpe/embedding", False),
        ("pos_emb", False),
    ],
)
def test_heads_have_momentum_and_tables_have_none(path, head):
    *outer, last = path.split("/")
    params: Any = {last: jax.ShapeDtypeStruct((V, D), jnp.float32)}
    for name in reversed(outer):
        params = {name: params}

    def momentum(fallback: Any) -> bool:
        state = jax.eval_shape(fallback.make(RATE, 0.0, None).init, params)
        return any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(state))

    assert momentum(fallbacks.columns()) == head
    assert momentum(fallbacks.columns(is_head=lambda path: True))
    assert not momentum(fallbacks.columns(is_head=lambda path: False))


# How optimizers are given one ---------------------------------------------------------------------

# Whatever matrices get; it compiles at once.
CHEAP = LowRank(2, 2, residuals.drop(), helpers.first_coordinates)
DIRECTION = optax.identity()
OPTIMIZERS = {
    "gum": lambda **kw: gum_optax.gum(RATE, CHEAP, orthogonalizer=DIRECTION, **kw),
    "muon": lambda **kw: gum_optax.muon(RATE, orthogonalizer=DIRECTION, **kw),
    "adamw": lambda **kw: gum_optax.adamw(RATE, CHEAP, **kw),
    "for_matrices": lambda **kw: gum_optax.for_matrices(DIRECTION, RATE, **kw),
}
WHOLE: Any = {"embed": PARAMS["embed"], "layers": [{"w": normal(8, 12)} for _ in range(2)]}
ONES: Any = jax.tree.map(np.ones_like, WHOLE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fallback_gets_rate_decay_and_mask(name):
    options = {"weight_decay": 0.5, "weight_decay_mask": {"embed": True, "layers": False}}
    asked = [
        {"fallback": fallbacks.factored()},
        {"fallback": fallbacks.factored(), "fallback_learning_rate": 0.3},
        {"fallback": fallbacks.adamw()},
        {},
    ]

    @functools.partial(jax.jit, compiler_options=helpers.QUICK)
    def embeddings(gradients: Any, params: Any) -> Any:
        made = [OPTIMIZERS[name](**options, **each) for each in asked]
        return [tx.update(gradients, tx.init(params), params)[0]["embed"] for tx in made]

    same, own, given, default = embeddings(ONES, WHOLE)
    # Of a gradient of ones, the first direction is a matrix of ones.
    direction = 1 + 0.5 * WHOLE["embed"]
    np.testing.assert_allclose(same, -RATE * direction, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own, -0.3 * direction, rtol=1e-5, atol=1e-6)
    # By default it is AdamW, whose first direction is one, too, up to eps.
    np.testing.assert_allclose(default, -RATE * direction, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(default, given)


def test_rates_are_injected():
    tx = optax.inject_hyperparams(gum_optax.gum)(
        learning_rate=RATE,
        compression=CHEAP,
        orthogonalizer=DIRECTION,
        fallback=fallbacks.factored(),
        fallback_learning_rate=optax.linear_schedule(0.2, 0.0, 2),
    )
    step = jax.jit(tx.update, compiler_options=helpers.QUICK)
    state, sizes = tx.init(WHOLE), []
    for _ in range(3):
        updates, state = step(ONES, state, WHOLE)
        sizes.append(float(np.abs(updates["embed"]).mean()))
    np.testing.assert_allclose(sizes, [0.2, 0.1, 0.0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fallbacks.adamw(b1=1.0), "b1"),
        (lambda: fallbacks.adamw(b2=-0.1), "b2"),
        (lambda: fallbacks.adamw(eps=math.nan), "eps"),
        (lambda: fallbacks.adamw(storage="int8"), "storage"),
        (lambda: fallbacks.factored(b1=1.5), "b1"),
        (lambda: fallbacks.factored(decay_rate=-1.0), "decay_rate"),
        (lambda: fallbacks.factored(0.9, 8), "storage"),
        (lambda: fallbacks.factored(storage=8), "storage"),
        (lambda: fallbacks.columns(b1="0.9"), "b1"),
        (lambda: fallbacks.columns(storage=None), "storage"),
        (lambda: fallbacks.columns(is_head="lm_head"), "is_head"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        make()
