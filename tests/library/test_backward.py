"""Training on gradients that were compressed in the backward pass, against full gradients.

The gradients of single programs are tested in test_interception.py.
"""

# pyright: reportOptionalMemberAccess=false

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments.benchmarks.collectives import collectives
from gum_optax import LowRank, backward, carries, projectors, residuals, storages
from tests.helpers import QUICK, all_arguments, described, equations, jit_once, low_rank_state
from tests.tables import SIMPLE

WIDTH, HIDDEN, LAYERS, VOCABULARY, PERIOD, RANK = 6, 10, 4, 20, 2, 3
STEPS = 2 * PERIOD + 1
# Sums in another order, and Newton-Schulz steep at zero; the largest error measured is 3e-12.
TOLERANCE = 1e-10


def _model(dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return np.asarray(rng.normal(size=shape) / 3, dtype)

    return {
        "embed": normal(VOCABULARY, WIDTH),
        "layers": [
            {"up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, WIDTH), "bias": normal(HIDDEN)}
            for _ in range(LAYERS)
        ],
        "head": normal(WIDTH, VOCABULARY),
    }


def _loss(params, tokens):
    x = params["embed"][tokens[:, :-1]]
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"]
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _tokens(step: int, rows: int = 4) -> np.ndarray:
    return np.random.default_rng(100 + step).integers(0, VOCABULARY, (rows, 9))


def _compression(**options: Any) -> LowRank:
    merged: dict[str, Any] = {"rank": RANK, "period": PERIOD, "projector": SIMPLE.projector}
    merged |= {"residual": residuals.sampled(1)} | options
    return LowRank(**merged)


COLUMNS = residuals.through(gum_optax.normalize_columns())
OPTIMIZERS = {
    "gum": lambda: gum_optax.gum(0.05, _compression(), weight_decay=0.1),
    "an SVD's subspace, rotated": lambda: gum_optax.gum(
        0.05,
        _compression(
            projector=projectors.subspace_iteration, carry=carries.rotate, residual=residuals.drop()
        ),
    ),
    # A basis without zeros: of coordinates, the residual has rows of zeros, or of rounding errors
    # that Adam would magnify.
    "additive adamw": lambda: gum_optax.adamw(
        0.01,
        _compression(residual=residuals.sampled(2, form="additive"), projector=all_arguments),
    ),
    "adamw in 8 bits": lambda: gum_optax.adamw(
        0.01, _compression(residual=residuals.drop(), storage=storages.int8())
    ),
    "bases in 8 bits": lambda: gum_optax.gum(
        0.05,
        _compression(projector=all_arguments, carry=carries.rotate, basis_storage=storages.int8(4)),
    ),
    "columns": lambda: gum_optax.gum(0.05, _compression(residual=COLUMNS)),
    "undrawn through columns": lambda: gum_optax.gum(
        0.05,
        _compression(residual=residuals.sampled(1, undrawn=gum_optax.normalize_columns())),
    ),
    "apollo": lambda: gum_optax.adamw(0.01, gum_optax.apollo(rank=RANK, period=PERIOD)),
    "clipped, scheduled, injected": lambda: optax.chain(
        optax.clip_by_global_norm(1e3),
        optax.inject_hyperparams(gum_optax.gum, static_args=("compression",))(
            learning_rate=optax.linear_schedule(0.05, 0.01, STEPS), compression=_compression()
        ),
    ),
    "two of them": lambda: optax.partition(
        {
            "first": gum_optax.gum(0.05, _compression()),
            "others": gum_optax.gum(0.02, _compression(period=3, residual=residuals.drop())),
        },
        lambda params: {
            **dict.fromkeys(params, "others"),
            "layers": ["first" if i < 2 else "others" for i in range(LAYERS)],
        },
    ),
}


def _step(tx, loss=_loss):
    """The training step of the documentation."""
    refresh, value_and_grad = backward.refresh(loss, tx), backward.value_and_grad(loss, tx)

    def step(params, state, batch):
        state = refresh(params, state, batch)
        value, gradients = value_and_grad(params, state, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _standard_step(tx, loss=_loss):
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _trained(step, tx, params, **jit):
    """Parameters, state and losses; the step compiles once."""
    step = jit_once(step, compiler_options=QUICK, **jit)
    state, losses = jax.jit(tx.init)(params), []
    for t in range(STEPS):
        params, state, loss = step(params, state, _tokens(t))
        losses.append(float(loss))
    return params, state, losses


def _assert_close(actual, expected, atol=TOLERANCE):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# By `make slow`; each differs from one of the others in a part that has tests of its own.
SLOW = (
    *("additive adamw", "adamw in 8 bits", "columns", "undrawn through columns", "apollo"),
    *("an SVD's subspace, rotated", "two of them", "clipped, scheduled, injected"),
)


@jax.enable_x64(True)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in OPTIMIZERS]
)
def test_takes_the_steps_of_full_gradients(name):
    tx = OPTIMIZERS[name]()
    params = jax.tree.map(jnp.asarray, _model())
    expected = _trained(_standard_step(tx), tx, params)
    got = _trained(_step(tx), tx, params, donate_argnums=1)
    _assert_close(got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_by_hand():
    """One matrix, ``y = x W``, loss ``|y|^2 / 2``: G = x'x W, of a basis that is set by hand."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(7, 4)), rng.normal(size=(4, 9))
    basis = np.linalg.qr(rng.normal(size=(4, 2)))[0]
    tx = gum_optax.low_rank(optax.identity(), LowRank(rank=2, residual=residuals.drop()))
    params = {"w": jnp.asarray(w, jnp.float32)}
    state: Any = tx.init(params)
    state = state._replace(
        period=jnp.zeros((), jnp.int32), basis={"w": jnp.asarray(basis[None], jnp.float32)}
    )
    loss = lambda params, x: 0.5 * jnp.sum((x @ params["w"]) ** 2)  # noqa: E731
    value, gradients = backward.value_and_grad(loss, tx)(params, state, x)
    assert float(value) == pytest.approx(0.5 * np.sum((x @ w) ** 2), rel=1e-6)
    np.testing.assert_allclose(gradients["w"].low, basis.T @ x.T @ x @ w, rtol=1e-5, atol=1e-5)
    updates: Any = tx.update(gradients, state)[0]
    np.testing.assert_allclose(updates["w"], basis @ basis.T @ x.T @ x @ w, rtol=1e-5, atol=1e-5)


def test_half_precision():
    """Gradients of bfloat16 weights: within that precision of the projections of full ones."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), _model())
    tx = gum_optax.gum(0.05, _compression(residual=residuals.drop()))
    state = backward.refresh(_loss, tx)(params, tx.init(params), _tokens(0))
    _, gradients = jax.jit(backward.value_and_grad(_loss, tx))(params, state, _tokens(0))
    full = jax.jit(jax.grad(_loss))(params, _tokens(0))
    basis = low_rank_state(state).basis["layers.*.up"]
    for i, layer in enumerate(gradients["layers"]):
        low = layer["up"].low
        assert low.dtype == jnp.float32 and layer["up"].dtype == jnp.bfloat16
        expected = basis[i].T @ full["layers"][i]["up"].astype(jnp.float32)
        error = jnp.linalg.norm(low - expected) / jnp.linalg.norm(expected)
        assert float(error) < 2.0**-6  # Measured: 2^-8.
    updates, after = jax.jit(tx.update)(gradients, state, params)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_half_precision_is_summed_in_float32():
    """``P'G`` has the digits of its basis, whatever the model computes in.

    In the program: values do not tell, since XLA on CPUs may keep more digits than it is asked for.
    """
    tx = gum_optax.low_rank(optax.identity(), LowRank(rank=2, residual=residuals.drop()))
    params, x = {"w": np.ones((4, 9), jnp.bfloat16)}, np.ones((64, 4), jnp.bfloat16)
    state: Any = jax.eval_shape(tx.init, params)
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]))  # noqa: E731
    program = jax.make_jaxpr(backward.value_and_grad(loss, tx))(params, state, x)
    results = [
        equation.outvars[0].aval
        for equation, _ in equations(program)
        if equation.primitive.name == "dot_general"
    ]
    assert {r.dtype for r in results if r.shape == (2, 9)} == {jnp.dtype(jnp.float32)}


def test_empty_slots_are_zero():
    """Full gradients make them so as well, and a direction of zero is what takes no time."""
    tx = gum_optax.low_rank(optax.identity(), LowRank(rank=2, residual=residuals.sampled(1)))
    params = {"w": [jnp.ones((4, 6)), jnp.ones((4, 6))]}
    state: Any = tx.init(params)
    state = state._replace(
        period=jnp.zeros((), jnp.int32), basis={"w/*": jnp.stack([jnp.eye(4, 2)] * 2)}
    )
    loss = lambda params, x: jnp.sum((x @ params["w"][0] @ params["w"][1].T) ** 2)  # noqa: E731
    function = jax.jit(backward.value_and_grad(loss, tx), compiler_options=QUICK)
    for slot, is_zero in ((2, True), (1, False)):
        slots = {"w/*": jnp.full((1,), slot, jnp.int32)}
        _, gradients = function(params, state._replace(slots=slots), np.ones((3, 4), np.float32))
        assert np.any(gradients["w"][0].low)
        assert (not np.any(gradients["w"][0].drawn)) == is_zero


def test_sources_are_found_in_the_order_of_their_states():
    """`optax.partition` calls ``init`` in one order and keeps states in another."""
    tx = optax.partition(
        {
            "later": gum_optax.gum(0.05, _compression(rank=2)),
            "earlier": gum_optax.gum(0.02, _compression(residual=residuals.drop())),
        },
        lambda params: {
            **dict.fromkeys(params, "earlier"),
            "layers": ["later" if i < 2 else "earlier" for i in range(LAYERS)],
        },
    )
    params = _model(np.float32)
    state = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(backward.refresh(_loss, tx), params, state, _tokens(0))
    assert described(after) == described(state)


# Accumulation ------------------------------------------------------------------------------------


@jax.enable_x64(True)
def test_microbatches_sum_to_the_batch():
    tx, params = OPTIMIZERS["gum"](), jax.tree.map(jnp.asarray, _model())
    batch = _tokens(0, rows=6)
    state = backward.refresh(_loss, tx)(params, tx.init(params), batch)
    function = backward.value_and_grad(_loss, tx)
    parts = optax.microbatching.microbatch(
        function, 2, 2, optax.microbatching.AccumulationType.MEAN
    )
    whole, summed = (
        jax.jit(f, compiler_options=QUICK)(params, state, batch) for f in (function, parts)
    )
    _assert_close(summed, whole, 1e-14)


@pytest.mark.slow
def test_multi_steps_accumulate_projections():
    """With accumulators like the gradients; bases come from the first mini-step alone.

    In float32, in which the largest difference measured is 1e-6: `optax.MultiSteps` fails on
    float64.
    """
    inner, params = OPTIMIZERS["gum"](), _model(np.float32)
    multi = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
    tx: Any = optax.GradientTransformation(multi.init, multi.update)  # pyright: ignore[reportArgumentType]
    refresh, value_and_grad = backward.refresh(_loss, tx), backward.value_and_grad(_loss, tx)
    state = multi.init(params)
    zeros = jax.eval_shape(value_and_grad, params, state, _tokens(0))[1]
    state = state._replace(acc_grads=jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), zeros))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def mini_step(params, state, batch):
        state = refresh(params, state, batch)
        _, gradients = value_and_grad(params, state, batch)
        updates, state = multi.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state, first, second):
        """The same by hand: the basis of the first half, the mean of both."""
        state = backward.refresh(_loss, inner)(params, state, first)
        function = backward.value_and_grad(_loss, inner)
        halves = [function(params, state, half)[1] for half in (first, second)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
        updates, state = inner.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = params, inner.init(params)
    for t in range(PERIOD + 1):
        halves = _tokens(2 * t), _tokens(2 * t + 1)
        expected, expected_state = step(expected, expected_state, *halves)
        for half in halves:
            params, state = mini_step(params, state, half)
        _assert_close(params, expected, 1e-5)
    # A gradient that is not finite changes nothing but the count of what was skipped.
    broken = {**params, "head": jnp.asarray(params["head"]).at[0, 0].set(jnp.nan)}
    after, skipped = mini_step(broken, state, _tokens(0))
    _assert_close(after["layers"], params["layers"], 0)
    assert bool(skipped.skip_state["should_skip"])


# Refreshes ---------------------------------------------------------------------------------------


def test_a_refresh_is_made_once_and_only_when_due():
    # Bases that depend on gradients, so that those of another batch are others.
    params, tx = _model(np.float32), gum_optax.gum(0.05, _compression(projector=all_arguments))
    refresh = jax.jit(backward.refresh(_loss, tx), compiler_options=QUICK)
    first = refresh(params, tx.init(params), _tokens(0))
    assert int(low_rank_state(first).period) == 0
    # Of another batch, in the same step: the same arrays.
    _assert_close(refresh(params, first, _tokens(1)), first, 0)

    def after(steps):
        return optax.tree.set(first, count=jnp.asarray(steps, jnp.int32))

    _assert_close(refresh(params, after(PERIOD - 1), _tokens(1)), after(PERIOD - 1), 0)
    second = low_rank_state(refresh(params, after(PERIOD), _tokens(1)))
    assert int(second.period) == 1
    # The momentum restarts, and bases are new.
    assert not np.array_equal(
        second.basis["layers.*.up"], low_rank_state(first).basis["layers.*.up"]
    )


def _layer(x, layer):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None


def _called_twice(params, x):
    encode = jax.jit(lambda x: jax.lax.scan(_layer, x, params)[0])
    return jnp.sum(encode(x) * encode(x + 1))


BODIES = {
    "recomputed": jax.checkpoint(_layer),
    "a recomputed block in a function": jax.jit(jax.checkpoint(_layer)),
    "a block in a block": jax.checkpoint(jax.checkpoint(_layer)),
    "not recomputed": _layer,
    "cast in front of the block": lambda x, layer: jax.checkpoint(_layer)(
        x, jax.tree.map(jnp.sin, layer)
    ),
    "used beside the block": lambda x, layer: jax.checkpoint(_layer)(x + layer["down"][0], layer),
}
SCANS = {
    name: lambda params, x, body=body: jnp.sum(jax.lax.scan(body, x, params)[0] ** 2)
    for name, body in BODIES.items()
} | {"one function, called twice": _called_twice}


@pytest.mark.parametrize("name", SCANS)
@jax.enable_x64(True)
def test_the_bases_of_scanned_layers_are_those_of_full_gradients(name):
    loss, params = SCANS[name], _stacked(_model())
    x = np.random.default_rng(1).normal(size=(5, WIDTH))
    tx = gum_optax.gum(
        0.05,
        _compression(residual=residuals.drop(), projector=all_arguments),
        weight_dimension_numbers=gum_optax.dimension_numbers.scanned_layers,
    )
    program = jax.jit(backward.refresh(loss, tx), compiler_options=QUICK).trace(
        params, tx.init(params), x
    )
    _, expected = jax.jit(tx.update)(jax.grad(loss)(params, x), tx.init(params), params)
    found = program.lower().compile()(params, tx.init(params), x)
    _assert_close(low_rank_state(found).basis, low_rank_state(expected).basis, 1e-13)
    # The backward pass reads the layers from their stack, and needs no copy of it.
    kept = {
        result.aval.shape
        for equation, _ in equations(program.jaxpr)
        if equation.primitive.name == "scan"
        for result in equation.outvars
    }
    # A cast is a copy, and the sum of the gradients of two calls is a stack.
    if name not in ("cast in front of the block", "one function, called twice"):
        assert (LAYERS, WIDTH, HIDDEN) not in kept and (LAYERS, HIDDEN, WIDTH) not in kept


@pytest.mark.parametrize("name", ["recomputed", "not recomputed"])
@jax.enable_x64(True)
def test_codes_of_bases_are_unpacked_layer_by_layer(name):
    """Projections and drawn residuals are those of the bases that a step unpacks."""
    loss, params = SCANS[name], _stacked(_model())
    x = np.random.default_rng(1).normal(size=(5, WIDTH)) / 50
    tx = gum_optax.gum(
        0.05,
        _compression(projector=all_arguments, basis_storage=storages.int8(4)),
        weight_dimension_numbers=gum_optax.dimension_numbers.scanned_layers,
    )
    state = jax.jit(backward.refresh(loss, tx))(params, tx.init(params), x)
    program = jax.jit(backward.value_and_grad(loss, tx), compiler_options=QUICK).trace(
        params, state, x
    )
    _, gradients = program.lower().compile()(params, state, x)
    full = jax.jit(jax.grad(loss))(params, x)
    own = low_rank_state(state)
    for group, codes in own.basis.items():
        side = "up" if "up" in group else "down"
        basis = storages.int8(4).unpack(codes, jnp.zeros((LAYERS, WIDTH, RANK)))
        G = full[side] if side == "up" else full[side].mT
        low = basis.mT @ G
        _assert_close(gradients[side].low, low, 1e-13)
        [drawn] = own.slots[group]
        _assert_close(gradients[side].drawn[0], G[drawn] - basis[drawn] @ low[drawn], 1e-13)
    # No equation outside of the loops makes the bases of all layers.
    outside = {
        result.aval.shape
        for equation in program.jaxpr.eqns
        for result in equation.outvars
        if jnp.issubdtype(result.aval.dtype, jnp.floating)
    }
    assert (LAYERS, WIDTH, RANK) not in outside and (LAYERS, RANK, HIDDEN) in outside


def _stacked(params: Any) -> Any:
    """The matrices of all layers of a model, one stack for each role."""
    layers = params["layers"]
    return {role: np.stack([layer[role] for layer in layers]) for role in ("up", "down")}


def test_a_forgotten_refresh_shows():
    params, tx = _model(np.float32), OPTIMIZERS["gum"]()
    function = jax.jit(backward.value_and_grad(_loss, tx), compiler_options=QUICK)
    value, gradients = function(params, tx.init(params), _tokens(0))
    assert np.isfinite(value) and np.isfinite(gradients["head"]).all()
    for layer in gradients["layers"]:
        assert np.isnan(layer["up"].low).all() and np.isnan(layer["down"].low).all()


def test_a_weight_without_use_stays():
    """Its gradient is zero, and so are its basis and its update."""
    params = _model(np.float32) | {"layers": [{"up": np.ones((6, 10), np.float32)}] * 3}
    tx = gum_optax.gum(0.05, _compression(residual=residuals.drop()))

    def loss(params, tokens):
        used = params["layers"][0]["up"]
        return jnp.sum((params["embed"][tokens] @ used) ** 2)

    params, _, value = jax.jit(_step(tx, loss))(params, tx.init(params), _tokens(0))
    assert np.isfinite(value)
    assert not np.allclose(params["layers"][0]["up"], 1)
    np.testing.assert_array_equal(params["layers"][1]["up"], 1)
    uses = backward.explain(loss, tx, params, _tokens(0))
    assert [(use.products, use.others) for use in uses] == [(1, ()), (0, ()), (0, ())]


def test_aux_and_keyword_arguments():
    params, tx = _model(np.float32), OPTIMIZERS["gum"]()

    def loss(params, tokens, *, scale):
        value = _loss(params, tokens)
        return scale * value, {"unscaled": value, "name": None}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, state, tokens):
        state = backward.refresh(loss, tx, has_aux=True)(params, state, tokens, scale=2.0)
        return backward.value_and_grad(loss, tx, has_aux=True)(params, state, tokens, scale=2.0)

    (value, aux), _ = both(params, tx.init(params), _tokens(0))
    assert set(aux) == {"unscaled", "name"}
    assert float(value) == pytest.approx(2 * float(aux["unscaled"]))


class _Block(nnx.Module):
    """A layer of a model whose kernels say how they are sharded, and one that does not."""

    def __init__(self, rngs, names):
        def kernel(*axes):
            initializer = nnx.initializers.lecun_normal()
            return nnx.with_partitioning(initializer, axes) if names else initializer

        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, kernel_init=kernel(None, "data"))
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs, kernel_init=kernel("data", None))

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@pytest.mark.parametrize(
    "names", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "with metadata"]
)
def test_an_unmodified_nnx_model(names):
    """Its state is a tree of variables, and so are gradients, optimizer states and updates."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = nnx.List([_Block(nnx.Rngs(seed), names) for seed in range(LAYERS)])
        static, params = nnx.split(model, nnx.Param)

        def loss(params, x):
            for block in nnx.merge(static, params):
                x = block(x)
            return jnp.mean((x - 1) ** 2)

        # A restored state comes without a call of `init` before.
        tx = gum_optax.gum(0.05, _compression())
        x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
        assert len(backward.explain(loss, tx, params, x)) == 2 * LAYERS
        expected, state = params, tx.init(params)
        own, own_state = params, state
        standard, step = (
            jax.jit(make(tx, loss), compiler_options=QUICK) for make in (_standard_step, _step)
        )
        for _ in range(PERIOD + 1):
            expected, state, _ = standard(expected, state, x)
            own, own_state, _ = step(own, own_state, x)
    assert jax.tree.structure(own) == jax.tree.structure(params)
    assert jax.tree.structure(own_state) == jax.tree.structure(state)
    # In float32; Newton-Schulz is steep at zero.
    _assert_close(own, expected, 2e-4)


# No gradient of full size ------------------------------------------------------------------------


def _programs(residual):
    """The backward pass of full gradients and of compressed ones, compiled, of larger matrices."""
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(8, 48, 112)).astype(np.float32) / 10,
        "down": rng.normal(size=(8, 112, 48)).astype(np.float32) / 10,
    }
    x = rng.normal(size=(32, 48)).astype(np.float32)

    def loss(params, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, params)[0] ** 2)

    tx = gum_optax.low_rank(optax.trace(0.9), LowRank(rank=4, residual=residual))
    state = tx.init(params)
    full = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    own = jax.jit(backward.value_and_grad(loss, tx)).lower(params, state, x).compile()
    return full, own


def _whole_products(compiled):
    """Of each product of the backward pass with a result of 48 x 112: whether it is in a branch."""
    hlo = compiled.as_text()
    branches = re.findall(r"branch_computations=\{([^}]*)\}", hlo)
    names = {name.strip(" %") for names in branches for name in names.split(",")}
    found, inside = [], ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line.split()[0].lstrip("%")
        if re.search(r"= f32\[(?:48,112|112,48)\]\S* dot\(.*transpose\(jvp", line):
            found.append(inside in names)
    return found


@pytest.mark.parametrize("gamma", [0, 1])
def test_the_program_makes_no_gradient_of_full_size(gamma):
    """Products of 48 x 112 are gone, but for those of drawn matrices, in branches."""
    full, own = _programs(residuals.sampled(gamma) if gamma else residuals.drop())
    assert _whole_products(full) == [False, False]
    assert (len(_whole_products(own)) > 0) == (gamma > 0)
    assert all(_whole_products(own))
    # Results are smaller by the gradients, and temporaries are not larger by them.
    size = 8 * 2 * 48 * 112 * 4
    bytes_of = [compiled.memory_analysis() for compiled in (full, own)]
    saved = bytes_of[0].output_size_in_bytes - bytes_of[1].output_size_in_bytes
    assert saved > (0.9 - gamma / 8) * size
    assert bytes_of[1].temp_size_in_bytes < bytes_of[0].temp_size_in_bytes + 0.3 * size


# On eight devices --------------------------------------------------------------------------------


# No axis of a weight equals another or the tokens of a step, so that sums between devices tell.
ON_MESH = {"data parallel": (P(), P()), "fsdp": (P("data"), P(None, "data"))}


def _regression(params, x):
    """No product of sharded axes: on Explicit ones a model must tell how its result lies."""
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return jnp.mean((x - 1) ** 2)


@functools.cache
@jax.enable_x64(True)
def _on_mesh(name, mode, function):
    """A mesh, and a step that was compiled for it with its first arguments."""
    kind = AxisType.Auto if mode == "Auto" else AxisType.Explicit
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rng, (up, down) = np.random.default_rng(0), ON_MESH[name]
    params = {
        "layers": [
            {"up": rng.normal(size=(16, 24)) / 4, "down": rng.normal(size=(24, 16)) / 4}
            for _ in range(LAYERS)
        ]
    }
    # Bases of the coordinates are exact in 8 bits, so that no rounding tells devices apart.
    tx = gum_optax.gum(0.05, _compression(basis_storage=storages.int8(4)))
    where = {
        "layers": [{"up": NamedSharding(mesh, up), "down": NamedSharding(mesh, down)}] * LAYERS
    }
    placed = jax.device_put(params, where)
    state = jax.device_put(tx.init(params), gum_optax.state_shardings(tx, placed, where))
    x = rng.normal(size=(32, 16))
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(function(tx)).lower(placed, state, batch).compile(QUICK)
    return mesh, tx, (params, x), (placed, state, batch), compiled


def _gradients_alone(tx):
    return backward.value_and_grad(_regression, tx)


def _full_gradients_alone(tx):
    return lambda params, state, x: jax.value_and_grad(_regression)(params, x)


def _regression_step(tx):
    return _step(tx, _regression)


@jax.enable_x64(True)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("data parallel", "Auto", marks=pytest.mark.slow),
        pytest.param("data parallel", "Explicit", marks=pytest.mark.slow),
        pytest.param("fsdp", "Auto", marks=pytest.mark.slow),
    ],
)
def test_equals_the_unsharded_run(name, mode):
    mesh, tx, (params, x), (placed, state, batch), step = _on_mesh(name, mode, _regression_step)
    alone, own = jax.jit(_regression_step(tx), compiler_options=QUICK), tx.init(params)
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            # A compiled program refuses arrays of other shardings than it was made for.
            placed, state, _ = step(placed, state, batch)
    for _ in range(STEPS):
        params, own, _ = alone(params, own, x)
    _assert_close(placed, params)


@jax.enable_x64(True)
def test_data_parallel_devices_exchange_projections():
    """Sums of gradients between devices fall from [16, 24] to [r, 24] for each matrix."""
    sent = []
    for function in (_full_gradients_alone, _gradients_alone):
        *_, compiled = _on_mesh("data parallel", "Auto", function)
        found = collectives(compiled.as_text() or "")
        assert {each.kind for each in found} == {"all-reduce"}
        sent.append(sum(each.bytes * each.times for each in found))
    scalar, matrices = 8, 2 * LAYERS
    assert sent[0] == 8 * matrices * 16 * 24 + scalar
    slots = 2 * 8 * 16 * 24  # The drawn matrix of each role.
    assert sent[1] <= 8 * matrices * RANK * 24 + scalar + matrices // 2 * slots


# Errors ------------------------------------------------------------------------------------------


def _call(tx, loss=_loss, params=None, state=None, **options):
    params = _model(np.float32) if params is None else params
    state = tx.init(params) if state is None else state
    return jax.eval_shape(backward.value_and_grad(loss, tx, **options), params, state, _tokens(0))


def test_errors_name_the_argument_and_the_reason():
    gum = OPTIMIZERS["gum"]()
    with pytest.raises(TypeError, match=r"`loss` must be"):
        backward.value_and_grad(3, gum)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"`tx` must be"):
        backward.refresh(_loss, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`tx` has no compressed .* no `low_rank` is in it"):
        _call(optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"`tx` has no compressed .* a wrapper packs their state"):
        _call(gum_optax.quantized(gum, smallest=1))
    with pytest.raises(ValueError, match=r"reads gradients before they are projected"):
        _call(gum_optax.gum(0.1, _compression(residual=residuals.feedback())))
    with pytest.raises(ValueError, match=r"`state` must be the state of `tx`: it has no"):
        _call(gum, state=optax.adam(1e-3).init(_model(np.float32)))
    other = gum_optax.gum(0.1, _compression(rank=2))
    with pytest.raises(ValueError, match=r"`state` must be the state of `tx` for these `params`"):
        _call(gum, state=other.init(_model(np.float32)))
    with pytest.raises(TypeError, match=r"`loss` must return a real scalar"):
        _call(gum, loss=lambda params, tokens: params["embed"])
    with pytest.raises(TypeError, match=r"`loss` must return a pair \(value, aux\)"):
        _call(gum, has_aux=True)


def test_gradients_must_be_projected_all_or_none():
    params, tx = _model(np.float32), OPTIMIZERS["gum"]()
    state = tx.init(params)
    _, gradients = jax.eval_shape(backward.value_and_grad(_loss, tx), params, state, _tokens(0))
    mixed = {**gradients, "layers": [gradients["layers"][0], *params["layers"][1:]]}
    with pytest.raises(ValueError, match=r"are projected, those of `layers\.\*\.\w+` are not"):
        jax.eval_shape(tx.update, mixed, state, params)


def test_a_full_gradient_that_must_arise_is_told():
    tx = OPTIMIZERS["gum"]()

    def loss(params, tokens):
        return _loss(params, tokens) + jnp.sum(params["layers"][1]["up"] ** 2)

    with pytest.warns(
        UserWarning, match=r"1 of 8 compressed leaves .*`layers/1/up` \(integer_pow\)"
    ):
        _call(tx, loss=loss)
