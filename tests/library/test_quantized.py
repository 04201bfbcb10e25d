"""`quantized` around transformations of every kind, and `muon`: values, bytes, trees, meshes."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools
import re
import warnings
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import LowRank, _packing, quantized, residuals, storages
from gum_optax._codes import Codes
from tests import helpers, tables

SMALLEST = 64
# A matrix, a stack of matrices with an odd last axis, and a vector that is small.
SHAPES = {"w": (8, 24), "odd": (2, 6, 11), "bias": (24,)}


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in SHAPES.items()}


PARAMS = gradient(100)


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


INNER = {
    "adamw": lambda: optax.adamw(0.1),
    "lion": lambda: optax.lion(0.1),
    "trace": lambda: optax.trace(0.9),
    "muon": lambda: optax.contrib.muon(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax.ema(0.5)),
    "masked": lambda: optax.masked(optax.adam(0.1), _matrices),
    "partition": lambda: optax.partition(
        {True: optax.sgd(0.1, momentum=0.9), False: optax.adam(0.1)}, _matrices
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(0.1)),
    "gum": lambda: gum_optax.gum(0.1, tables.SIMPLE),
    "no state": lambda: optax.sgd(0.1),
}
every_inner = pytest.mark.parametrize("name", INNER)
STORAGES = {
    "int8": storages.int8(16),
    "float8": storages.float8(16),
    "int6": storages.int6(16),
    "int4": storages.int4(16),
}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
# Small models are mostly uncompressed, and a stack goes to the fallback.
pytestmark = pytest.mark.filterwarnings("ignore:None of .* is compressed", "ignore:.*fallback")
few = functools.partial(quantized, smallest=SMALLEST)


def rounded(storage: storages.Storage, key: int | None) -> storages.Storage:
    return storage if key is None else storages.at_random(storage, key)


quick = functools.partial(jax.jit, compiler_options=helpers.QUICK)


def steps(tx: Any, count: int = 3) -> tuple[list[Any], Any]:
    update, state, results = quick(tx.update), quick(tx.init)(PARAMS), []
    for seed in range(count):
        updates, state = update(gradient(seed), state, PARAMS)
        results.append(updates)
    return results, state


# Values -------------------------------------------------------------------------------------------


@every_inner
def test_with_a_plain_storage_it_is_the_inner_transformation(name):
    """The same programs, whose results are the same bit for bit, in the same trees."""
    inner = INNER[name]()
    wrapped = quantized(inner, storages.plain(), smallest=0)
    states = [jax.eval_shape(tx.init, PARAMS) for tx in (wrapped, inner)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert tables.program(wrapped.init, PARAMS) == tables.program(inner.init, PARAMS)
    args = PARAMS, states[1], PARAMS
    results = [jax.eval_shape(tx.update, *args) for tx in (wrapped, inner)]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    assert tables.program(wrapped.update, *args) == tables.program(inner.update, *args)


@every_storage
def test_a_step_starts_from_the_decoded_state(storage):
    """Step by step against the inner transformation, packed and unpacked by hand."""
    inner = optax.scale_by_adam()
    tx, by_hand = few(inner, storage), quick(inner.init)(PARAMS)
    other = storages.by_path(lambda path: storages.plain() if "bias" in str(path) else storage)

    @quick
    def step_by_hand(gradients, state):
        updates, new = inner.update(gradients, state, PARAMS)
        packed = _packing.pack(other, new)
        return updates, packed, _packing.unpack(other, packed, inner.init(PARAMS))

    update, state = quick(tx.update), quick(tx.init)(PARAMS)
    for seed in range(3):
        updates, state = update(gradient(seed), state, PARAMS)
        expected, packed, by_hand = step_by_hand(gradient(seed), by_hand)
        tables.assert_close(updates, expected)
        # Codes are integers, so they are equal.
        tables.assert_close(state, packed)


def test_jit_equals_eager():
    """Of an array that is packed and one that is not, since every operation is compiled alone."""
    tx = few(optax.adamw(0.1))
    params, gradients = ({k: tree[k] for k in ("odd", "bias")} for tree in (PARAMS, gradient(0)))
    jitted = quick(tx.update)(gradients, quick(tx.init)(params), params)
    tables.assert_close(jitted, tx.update(gradients, tx.init(params), params))


def test_adam_in_8_bits_learns_a_badly_scaled_quadratic():
    """Curvatures over six decades: no code is zero, so no quotient explodes."""
    curvature = jnp.logspace(-3, 3, 512).reshape(4, 128)
    start = jnp.ones((4, 128))

    @functools.partial(jax.jit, static_argnums=0)
    def losses(tx_name: str, params: Any) -> Any:
        tx = {"plain": optax.adam(0.01), "int8": few(optax.adam(0.01), storages.int8())}[tx_name]

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(curvature * params, state, params)
            return (params + updates, state), jnp.max(jnp.abs(updates))

        (params, _), largest = jax.lax.scan(step, (params, tx.init(params)), length=300)
        return jnp.sum(curvature * params**2), jnp.max(largest)

    (plain, _), (int8, largest) = losses("plain", start), losses("int8", start)
    assert largest < 0.02
    assert int8 < 1e-3 * jnp.sum(curvature) and plain < 1e-3 * jnp.sum(curvature)


# Rounding at random -------------------------------------------------------------------------------


def test_a_slow_second_moment_is_followed_only_at_random():
    """With b2 = .99 a step changes it by a hundredth; levels are 6 to 12 % apart."""
    scales = jnp.asarray(2.0 ** np.random.default_rng(0).uniform(-4, 0, (2, 512)), jnp.float32)
    like = jax.eval_shape(optax.scale_by_rms().init, scales).nu

    def mean_ratio(key: int | None) -> float:
        tx = few(optax.scale_by_rms(0.99), rounded(storages.float8(), key))

        def step(state, key):
            gradients = scales * jax.random.normal(key, scales.shape)
            return tx.update(gradients, state)[1], None

        keys = jax.random.split(jax.random.key(1), 1500)
        state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(scales))
        nu = (state if key is None else state.inner).nu
        unsigned: Any = storages.float8(non_negative=lambda path: True)
        decoded = unsigned.choose(()).unpack(nu, like)
        return float(jnp.mean(decoded / scales**2))

    # Measured: 1.39 and 1.00; the mean of 1024 averages of 200 squares is off by .003.
    assert mean_ratio(None) > 1.25
    assert abs(mean_ratio(0) - 1) < 0.02


def test_random_bits_change_with_the_step_and_the_array_and_not_with_the_run():
    pair = {"a": PARAMS["w"], "b": PARAMS["w"]}
    tx = few(optax.trace(0.9), storages.at_random(storages.int4(16), 3))
    update = quick(tx.update)
    _, first = update(pair, tx.init(pair))
    assert first.step == 1
    tables.assert_equal(first, update(pair, tx.init(pair))[1])
    different = [first.inner.trace["a"].codes != first.inner.trace["b"].codes]
    # The same sum, one step later, and with another key.
    later = update(pair, tx.init(pair)._replace(step=jnp.int32(1)))[1]
    other = few(optax.trace(0.9), storages.at_random(storages.int4(16), jax.random.key(4))).update(
        pair, tx.init(pair)
    )[1]
    different += [first.inner.trace["a"].codes != s.inner.trace["a"].codes for s in (later, other)]
    assert all(0.2 < each.mean() < 0.9 for each in different)


def test_both_states_of_low_rank_have_random_bits_of_their_own():
    """With equal gradients, of compressed matrices and of others: momentum is rounded apart."""
    storage = storages.at_random(storages.int4(16))
    compression = LowRank(4, 1, projector=helpers.first_coordinates, storage=storage)
    same = np.linspace(0.1, 1, 48, dtype=np.float32)
    params = {"a": [np.tile(same, (8, 1))] * 4, "b": np.tile(same, (4, 1))}
    tx = gum_optax.low_rank(optax.trace(0.9), compression)
    update = quick(tx.update)
    _, first = update(params, tx.init(params))
    arrays = [*first.inner.trace.values(), *first.uncompressed.trace.values()]
    leaves = jax.tree.leaves(arrays, is_leaf=lambda node: isinstance(node, Codes))
    # A slot is zero inside the basis, and where nothing is drawn; zeros are a level.
    codes = [tuple(row) for leaf in leaves for row in np.asarray(leaf.codes).reshape(-1, 24)]
    codes = [row for row in codes if len(set(row)) > 1]
    assert len(set(codes)) == len(codes) >= 4 * 4 + 4
    tables.assert_equal(first, update(params, tx.init(params))[1])
    with pytest.raises(ValueError, match="`basis_storage` must not round `at_random`"):
        LowRank(4, basis_storage=storages.at_random(storages.int8()))
    with pytest.raises(ValueError, match="put `at_random` around `by_path`"):
        inside = storages.by_path(lambda path: storage)
        few(optax.trace(0.9), inside).init(PARAMS)


def test_momentum_in_bfloat16_is_rounded_at_random():
    storage, ones = storages.cast(jnp.bfloat16), {"w": jnp.full((64, 64), 1 + 2.0**-10)}
    tx = few(optax.trace(0.9), storages.at_random(storage))
    _, state = quick(tx.update)(ones, tx.init(ones))
    found = np.asarray(state.inner.trace["w"], np.float32)
    # An eighth of the way from 1 to the next number, 1 + 2 ** -7.
    assert set(np.unique(found)) == {1.0, 1 + 2.0**-7}
    assert abs((found > 1).mean() - 1 / 8) < 5 * np.sqrt(7 / 64 / 4096)


@pytest.mark.parametrize("storage", [storages.cast(jnp.float16), storages.cast("float8_e4m3fn")])
def test_a_storage_without_rounding_at_random_is_named(storage):
    tx = few(optax.trace(0.9), storages.at_random(storage))
    with pytest.raises(
        ValueError, match=r"`storage`: the storage of .trace\['odd'\] has no rounding"
    ):
        tx.update(PARAMS, tx.init(PARAMS))
    plain = few(optax.trace(0.9), storages.at_random(storages.plain()))
    _, state = plain.update(PARAMS, plain.init(PARAMS))
    tables.assert_equal(
        state.inner, optax.trace(0.9).update(PARAMS, optax.trace(0.9).init(PARAMS))[1]
    )
    with pytest.raises(TypeError, match=r"`state` must be a `RoundingState`.* got a TraceState"):
        tx.update(PARAMS, few(optax.trace(0.9), storage).init(PARAMS))


# Bytes, dtypes, trees -----------------------------------------------------------------------------


def test_bytes_of_adam_by_hand():
    """A block of 12 or 11 of each row has, with 8 bits, a byte for each number and four for the
    scale; with 6 bits nine and four; with 4 bits half a byte for each, and two (of nu four)."""
    numbers = 8 * 24 + 2 * 6 * 11
    blocks = 8 * 2 + 2 * 6 * 1
    small = 2 * 4 * 24 + 4  # Two moments of the bias, and the count.
    for storage, expected in (
        (storages.int8(16), 2 * (numbers + 4 * blocks)),
        (storages.int6(16), 2 * (9 * (8 * 2 + 2 * 6 * 1) + 4 * blocks)),
        (storages.int4(16), 2 * (numbers + 12) // 2 + (2 + 4) * blocks),
    ):
        state = jax.eval_shape(few(optax.scale_by_adam(), storage).init, PARAMS)
        assert helpers.state_bytes(state) == expected + small


def test_second_moments_and_small_arrays():
    # The codes of int8 have a dtype for each kind of moment.
    state = jax.eval_shape(few(optax.scale_by_adam(), storages.int8()).init, PARAMS)
    assert state.mu["w"].codes.dtype == jnp.int8
    assert state.nu["w"].codes.dtype == jnp.uint8
    assert state.mu["bias"].dtype == jnp.float32
    assert state.count.dtype == jnp.int32
    everything = jax.eval_shape(quantized(optax.scale_by_adam(), smallest=0).init, PARAMS)
    assert isinstance(everything.mu["bias"], Codes)
    nothing = jax.eval_shape(quantized(optax.scale_by_adam()).init, PARAMS)
    assert not any(
        isinstance(x, Codes)
        for x in jax.tree.leaves(nothing, is_leaf=lambda x: isinstance(x, Codes))
    )
    # A parameter that is called nu has momentum of both signs.
    named = jax.eval_shape(few(optax.trace(0.9), storages.int8()).init, {"nu": PARAMS["w"]})
    assert named.trace["nu"].codes.dtype == jnp.int8


@pytest.mark.parametrize(("storage", "kept"), [(None, True), (storages.int8(block=None), False)])
def test_adam_keeps_the_momentum_of_rare_words(storage, kept):
    """A row of a head holds all words, and gradients of rare ones are smaller by three decades.

    Their momentum is below the first level of linear codes, so that Adam takes a tenth of the step.
    """
    words = np.logspace(0, -3, 64)  # the size of gradients of each word
    tx = few(optax.adam(1.0), *([] if storage is None else [storage]))
    params, ratios = {"head": jnp.zeros((80, 64))}, np.zeros(())
    state, exact = tx.init(params), optax.adam(1.0).init(params)
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal((80, 64))
        gradients = {"head": jnp.asarray(words * (1 + 0.1 * noise), jnp.float32)}
        updates, state = quick(tx.update)(gradients, state)
        expected, exact = quick(optax.adam(1.0).update)(gradients, exact)
        ratios = np.asarray(updates["head"] / expected["head"])
    # Of each word, as rows are alike.
    found = ratios.mean(axis=0)
    assert np.abs(found[: None if kept else 16] - 1).max() < 0.1
    assert (found[-8:].max() < 0.2) != kept


OPTAX = {
    "amsgrad": (lambda: optax.scale_by_amsgrad(), {"nu", "nu_max"}),
    "adagrad": (lambda: optax.scale_by_rss(), {"sum_of_squares"}),
    "adadelta": (lambda: optax.scale_by_adadelta(), {"e_g", "e_x"}),
    "rmsprop": (lambda: optax.scale_by_rms(), {"nu"}),
    "prodigy": (lambda: optax.contrib.prodigy(), {"exp_avg_sq"}),
    "adan": (lambda: optax.scale_by_adan(), {"n"}),
}


@pytest.mark.parametrize("name", OPTAX)
def test_second_moments_of_optax(name):
    make, fields = OPTAX[name]
    state = jax.eval_shape(few(make(), storages.int8()).init, {"w": PARAMS["w"]})
    found = {
        path[-3].name
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if leaf.dtype == jnp.uint8
    }
    assert found == fields


def test_keys_of_parameters_are_no_fields():
    """A parameter may have any name; those of moments are given by the transformation."""
    state = optax.scale_by_adam().init({"nu": jnp.ones(3)})
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert [storages.field("nu")(path) for path in paths] == [False, False, True]


def test_what_a_compression_has_packed_stays():
    """`quantized` around a `LowRank` with a storage of its own: codes are not coded again."""
    own = LowRank(2, 2, projector=helpers.first_coordinates, storage=storages.int8(4))
    params = {"w": [np.ones((4, 8), np.float32)] * 4}
    tx = gum_optax.low_rank(optax.trace(0.9), own)
    around = gum_optax.quantized(tx, storages.int4(4), smallest=0)
    state, expected = (jax.eval_shape(each.init, params) for each in (around, tx))
    assert helpers.described(state) == helpers.described(expected)
    _, after = jax.eval_shape(around.update, params, state)
    assert helpers.described(after) == helpers.described(expected)


def test_own_rules_by_path():
    is_nu = storages.field("nu")
    storage = storages.by_path(lambda path: storages.int8() if is_nu(path) else storages.int4())
    state = jax.eval_shape(few(optax.scale_by_adam(), storage).init, PARAMS)
    assert state.mu["w"].codes.shape == (8, 12)
    assert state.nu["w"].codes.shape == (8, 24) and state.nu["w"].codes.dtype == jnp.uint8
    mean = storages.int8(non_negative=lambda path: False)
    state = jax.eval_shape(few(optax.scale_by_adam(), mean).init, PARAMS)
    assert state.nu["w"].codes.dtype == jnp.int8


@every_inner
@every_storage
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_are_stable(name, storage, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    before, after, updates = tables.any_number_of_steps(few(INNER[name](), storage), params)
    assert helpers.described(after) == helpers.described(before)
    assert helpers.described(updates) == helpers.described(params)


@every_storage
def test_types_are_stable_with_random_bits(storage):
    before, after, _ = tables.any_number_of_steps(
        few(optax.adamw(0.1), storages.at_random(storage)), PARAMS
    )
    assert helpers.described(after) == helpers.described(before)


@pytest.mark.parametrize("tree", ["only None", "empty dict", "None leaves", "masked nodes"])
def test_trees_without_arrays(tree):
    params = tables.values(tables.TREES[tree])
    tx = quantized(optax.adam(0.1), smallest=0)
    updates, state = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert helpers.described(state) == helpers.described(jax.eval_shape(tx.init, params))


def test_integers_and_keys_are_untouched():
    inner = optax.add_noise(0.1, 0.5, 3)
    state = few(inner).init(PARAMS)
    assert helpers.described(state) == helpers.described(inner.init(PARAMS))


@pytest.mark.parametrize("key", [None, 0])
def test_no_second_compilation_and_donation(key):
    tx = few(optax.adamw(0.1), rounded(storages.float8(), key))

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = helpers.jit_once(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = quick(tx.init)(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            old = jax.tree.leaves((params, state))
            params, state = step(params, state, gradient(seed))
            assert all(leaf.is_deleted() for leaf in old)


def test_extra_arguments_and_injected_hyperparameters():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    updates, _ = quantized(inner).update(PARAMS, quantized(inner).init(PARAMS), PARAMS, value=3.0)
    tables.assert_equal(updates, jax.tree.map(lambda p: jnp.float32(3) * p, PARAMS))
    make = optax.inject_hyperparams(lambda learning_rate, b1: few(optax.adam(learning_rate, b1)))
    results, state = steps(make(learning_rate=optax.constant_schedule(0.1), b1=0.8))
    tables.assert_close(results, steps(few(optax.adam(0.1, 0.8)))[0])
    assert state.hyperparams["b1"] == np.float32(0.8)
    muon = optax.inject_hyperparams(gum_optax.muon, static_args="storage")
    jax.eval_shape(lambda p: muon(0.1, beta=0.9).init(p), PARAMS)


@pytest.mark.parametrize("key", [None, 0])
def test_checkpoints(tmp_path, key):
    tx = few(optax.adamw(0.1), rounded(storages.int4(), key))
    _, state = steps(tx, 2)
    restored = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    tables.assert_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        orbax = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    tables.assert_equal(orbax, state)
    # Resumed bit for bit, by the program that has made the steps.
    resumed = jax.tree.map(np.asarray, orbax)
    tables.assert_equal(*(quick(tx.update)(gradient(2), s, PARAMS) for s in (resumed, state)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: few(optax.adamw(0.01)),
        lambda: few(optax.adamw(0.01), storages.at_random(storages.float8())),
        lambda: gum_optax.muon(0.01, storages.int4()),
    ],
)
def test_flax_nnx(make):
    """Its optimizer has variables in the state, which turn NamedTuples into mappings."""
    from flax import nnx

    model: Any = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    x = gradient(0)["w"].repeat(8, axis=0)[:, :1].repeat(64, axis=1)

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: loss({"kernel": m.kernel, "bias": m.bias}, x))(model)
        optimizer.update(model, grads)

    tx = make()

    @quick
    def plain_step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = quick(tx.init)(params)
    for _ in range(3):
        step(model, optimizer)
        params, state = plain_step(params, state)
    np.testing.assert_allclose(model.kernel[...], np.asarray(params["kernel"]), atol=1e-4)


def test_map_params_changes_nothing():
    tx = few(optax.adamw(0.1))
    state = quick(tx.init)(PARAMS)
    tables.assert_equal(optax.tree.map_params(tx, lambda x: x + 1, state), state)


def test_bases_of_low_rank_stay_and_its_moments_do_not():
    tx = quantized(gum_optax.low_rank(optax.scale_by_adam(), tables.SIMPLE), smallest=0)
    matrices = [PARAMS["w"]] * 4
    state = jax.eval_shape(tx.init, matrices)
    assert state.basis["*"].dtype == jnp.float32
    assert isinstance(state.inner.mu["*"].low, Codes)
    assert isinstance(state.inner.nu["*"].low, Codes)
    # A state that has a storage of its own is not packed twice.
    inner = gum_optax.low_rank(
        optax.scale_by_adam(), LowRank(2, 2, residuals.sampled(1), storage=storages.int4())
    )
    twice, once = (jax.eval_shape(t.init, matrices) for t in (quantized(inner, smallest=0), inner))
    assert helpers.described(twice) == helpers.described(once)


PLANNED = {
    "adamw": lambda: few(optax.adamw(0.1)),
    "adamw, at random": lambda: few(optax.adamw(0.1), storages.at_random(storages.float8())),
    "muon": lambda: gum_optax.muon(0.1),
    "muon, lean fallback": lambda: gum_optax.muon(0.1, fallback=few(optax.adamw(0.1))),
    "all of gum": lambda: few(gum_optax.gum(0.1, LowRank(2, 2)), storages.int4()),
    "storage": lambda: gum_optax.adamw(0.1, LowRank(2, 2, storage=storages.int8())),
    "both": lambda: few(gum_optax.adamw(0.1, LowRank(2, 2, storage=storages.int4()))),
    "feedback": lambda: few(gum_optax.gum(0.1, LowRank(2, 2, residuals.feedback()))),
}


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_counts_to_the_byte(name):
    tx = PLANNED[name]()
    params = {"layers": [dict(PARAMS) for _ in range(4)], "embed": np.ones((40, 24), np.float32)}
    plan = gum_optax.memory_plan(tx, params)
    assert plan.total_bytes == helpers.state_bytes(jax.eval_shape(tx.init, params))
    assert all(row.bytes >= 0 for row in plan.rows)
    if name == "muon, lean fallback":
        [row] = [row for row in plan.rows if row.name == "embed"]
        assert row.bytes == 2 * (40 * 24 + 4 * 40)
    if name in ("all of gum", "storage", "both", "feedback"):
        [shared] = [row for row in plan.rows if row.treatment == "shared"]
        assert shared.bytes < 100


def test_a_fresh_state_is_packed_by_the_program_and_not_while_it_is_compiled():
    """XLA folds constants on one core, at a microsecond a number: minutes for an embedding."""
    params = {"w": jnp.zeros((64, 512))}
    hlo = jax.jit(lambda: few(optax.trace(0.9)).init(params)).lower().compile().as_text() or ""
    # The largest magnitude of each block is computed when the program runs.
    assert re.search(r"= \S+ (reduce|fusion|call|while)\(", hlo)


def test_temporaries_hold_no_decoded_state():
    """Compiled for CPUs, where arrays take turns."""
    leaves = [jax.ShapeDtypeStruct((128, 512), jnp.float32)] * 8
    tx = quantized(optax.trace(0.9))

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, leaves)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(leaves, state, leaves).compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 0.5 * 8 * 4 * 128 * 512


# Meshes -------------------------------------------------------------------------------------------

MODES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


def mesh_of(mode: str) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(MODES[mode],) * 2)


def test_codes_and_scales_are_sharded_as_their_parameters():
    params = {"w": jnp.zeros((16, 64)), "odd": jnp.zeros((16, 6)), "stack": jnp.zeros((4, 8, 16))}
    specs = {"w": P("fsdp", "tensor"), "odd": P("fsdp", "tensor"), "stack": P("fsdp", None, None)}
    found = gum_optax.state_shardings(
        few(optax.trace(0.9), storages.int4(16)), params, specs, mesh_of("Auto")
    )
    trace = jax.tree.map(lambda sharding: sharding.spec, found.trace)
    assert trace["w"] == Codes(P("fsdp", "tensor"), P("fsdp", "tensor"))
    # Three bytes, and one block, cannot be cut in two.
    assert trace["odd"] == Codes(P("fsdp"), P("fsdp"))
    assert trace["stack"] == Codes(P("fsdp"), P("fsdp"))


@pytest.mark.parametrize(("block", "spec"), [(16, P("fsdp", "tensor")), (64, P("fsdp"))])
def test_codes_of_six_bits_are_cut_between_blocks(block, spec):
    """A block's codes are spread over its bytes, so that one of two halves cannot be decoded."""
    params, specs = {"w": jnp.zeros((16, 64))}, {"w": P("fsdp", "tensor")}
    found = gum_optax.state_shardings(
        few(optax.trace(0.9), storages.int6(block)), params, specs, mesh_of("Auto")
    )
    assert found.trace["w"].codes.spec == spec


ON_MESHES = {
    # Of 30 numbers, the last of four blocks is shorter, and the mesh cuts the second.
    "adamw, int8": few(optax.adamw(0.1), storages.int8(8)),
    "adamw, at random": few(optax.adamw(0.1), storages.at_random(storages.float8(8))),
    "momentum, bfloat16 at random": few(
        optax.trace(0.9), storages.at_random(storages.cast("bfloat16"))
    ),
    # Of 24 numbers four blocks, of 30 four with a shorter one, in bytes for eight each.
    "momentum, int6": few(optax.trace(0.9), storages.int6(8)),
    "muon, int4": gum_optax.for_matrices(
        optax.chain(few(optax.trace(0.9), storages.int4(16)), gum_optax.scale_by_polar()), 0.1
    ),
}
ON_MESH = tables.values(
    {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"w": (8, 24), "uneven": (8, 30), "bias": (24,)}.items()
    }
)


def results_on_mesh(tx: Any, params: Any, state: Any, place: Any) -> Any:
    gradients = [jax.device_put(tables.values(ON_MESH, seed), place) for seed in (1, 2, 3)]
    # A compiled program refuses arrays of other types or shardings than it was made for.
    # Where a mesh cuts blocks, steps need `out_shardings` to keep the sharding of the state.
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = jax.jit(tx.update, out_shardings=(None, where))
    update = update.lower(gradients[0], state, params).compile(helpers.QUICK)
    results = []
    for each in gradients:
        updates, state = update(each, state, params)
        results.append(updates)
    return jax.device_get(results)


@functools.cache
def results_on_one_device(name: str) -> Any:
    tx = ON_MESHES[name]
    return results_on_mesh(tx, ON_MESH, quick(tx.init)(ON_MESH), None)


@pytest.mark.parametrize("mode", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])
@pytest.mark.parametrize("name", ON_MESHES)
def test_a_mesh_changes_no_value(name, mode):
    tx, mesh = ON_MESHES[name], mesh_of(mode)
    specs = {"w": P("fsdp", "tensor"), "uneven": P(None, "tensor"), "bias": P("tensor")}
    place = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    expected = results_on_one_device(name)
    with jax.set_mesh(mesh):
        placed = jax.device_put(ON_MESH, place)
        shardings = gum_optax.state_shardings(tx, placed, place)
        state = jax.jit(tx.init, out_shardings=shardings)(placed)
        # Without `jit`, arrays lie there as well.
        same = jax.tree.map(
            lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
            tx.init(placed),
            shardings,
        )
        assert all(jax.tree.leaves(same))
        actual = results_on_mesh(tx, placed, state, place)
    helpers.assert_trees_close(actual, expected, 2e-5)


# Bad input ----------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    for bad in (8, None, storages.int8, jnp.int8):
        with pytest.raises(TypeError, match="`storage` must be a Storage"):
            quantized(optax.adam(0.1), bad)
        with pytest.raises(TypeError, match="`storage` must be a Storage"):
            gum_optax.muon(0.1, bad)
    for bad in ("0", 1.5, [0, 1]):
        with pytest.raises((TypeError, ValueError), match="`key` must be"):
            storages.at_random(storages.int8(), bad)
    with pytest.raises(TypeError, match=r"`choose\(path\)` must be a Storage"):
        few(optax.adam(0.1), storages.by_path(lambda path: 8)).init(PARAMS)


def test_a_state_of_other_options_is_refused_by_name():
    state = few(optax.trace(0.9)).init(PARAMS)
    with pytest.raises(ValueError, match=r"`state.trace\['odd'\]"):
        few(optax.trace(0.9), storages.int4()).update(PARAMS, state)
    with pytest.raises(ValueError, match=r"`state.trace\['odd'\]"):
        quantized(optax.trace(0.9)).update(PARAMS, state)


# Muon ---------------------------------------------------------------------------------------------


def test_with_plain_momentum_it_is_optax_muon():
    params = {"w": PARAMS["w"], "tall": PARAMS["w"].T.copy(), "bias": PARAMS["bias"]}
    mine = gum_optax.muon(0.1, storages.plain(), weight_decay=0.01)
    theirs = optax.contrib.muon(0.1, beta=0.95, nesterov=False, weight_decay=0.01)
    states = [quick(tx.init)(params) for tx in (mine, theirs)]
    updates = [quick(tx.update) for tx in (mine, theirs)]
    for seed in range(4):
        grads = gradient(seed)
        grads = {"w": grads["w"], "tall": grads["w"].T.copy(), "bias": grads["bias"]}
        (one, states[0]), (other, states[1]) = (
            update(grads, state, params) for update, state in zip(updates, states, strict=True)
        )
        for name in ("w", "tall"):
            np.testing.assert_allclose(one[name], other[name], atol=2e-5)


RNG = np.random.default_rng(0)
TARGET = 0.05 * np.asarray(RNG.standard_normal((64, 96)), np.float32)
NOISE = np.asarray(RNG.standard_normal((100, 64, 96)), np.float32)


@functools.cache
def trained(storage: Any) -> np.ndarray:
    tx = gum_optax.muon(optax.linear_schedule(0.02, 0.0, 100), storage)

    def step(carry, noise):
        params, state = carry
        grads = jax.tree.map(lambda p: p - TARGET + 0.1 * noise, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @quick
    def train(noise):
        params = {"w": jnp.zeros_like(TARGET)}
        return jax.lax.scan(step, (params, tx.init(params)), noise)[0][0]["w"]

    return np.asarray(train(NOISE))


PLAIN = storages.plain()


@pytest.mark.parametrize(
    ("storage", "share"), [(storages.int8(), 0.03), (storages.int6(), 0.1), (storages.int4(), 0.3)]
)
def test_quantized_muon_stays_near_muon(storage, share):
    """A hundred steps on a linear model with noise; the distance is that of the weights."""
    plain, coded = trained(PLAIN), trained(storage)
    assert np.linalg.norm(coded - plain) < share * np.linalg.norm(plain)
    losses = [np.linalg.norm(w - TARGET) for w in (plain, coded)]
    assert losses[1] < 1.02 * losses[0] < 0.5 * np.linalg.norm(TARGET)


def test_muon_keeps_an_eighth_of_the_bytes_of_adamw():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    plan = gum_optax.memory_plan(gum_optax.muon(0.1), params)
    assert plan.adamw_bytes / 8 < plan.total_bytes < plan.adamw_bytes / 7.8
