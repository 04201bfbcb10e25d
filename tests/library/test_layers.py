"""`layer_by_layer`: the updates of separate layers, in the memory of one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import InParts, layer_by_layer, quantized, scale_by_polar
from tests import tables

# Four layers on the first axis, three experts on the second, and two leaves that have no layers.
AXES = {"embed": None, "layers": 0, "experts": 1, "norm": None}
LAYERS, EXPERTS = 4, 3
STEPS = 3
# Of XLA, which is not what these tests look at.
QUICK = {"xla_backend_optimization_level": 0}


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return {
        "embed": normal(7, 8),
        "layers": {"up": normal(LAYERS, 8, 12), "bias": normal(LAYERS, 12)},
        "experts": normal(8, EXPERTS, 6),
        "norm": normal(8),
    }


def separate(tree):
    """The trees that the inner transformation is given: four layers, three experts, the rest."""
    layers = [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)]
    experts = [tree["experts"][:, i] for i in range(EXPERTS)]
    return [*layers, *experts, {"embed": tree["embed"], "norm": tree["norm"]}]


INNER = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "muon": lambda: optax.chain(optax.trace(0.9), scale_by_polar()),
    "8 bits": lambda: quantized(optax.adamw(0.1), smallest=0),
    "on a schedule": lambda: optax.sgd(optax.linear_schedule(1.0, 0.0, 4), momentum=0.9),
}


@pytest.mark.parametrize("name", INNER)
def test_equals_separate_layers(name):
    inner = INNER[name]()
    if name == "muon":  # only matrices
        cut = lambda t: {"layers": {"up": t["layers"]["up"]}, "experts": t["experts"]}  # noqa: E731
        axes = {"layers": 0, "experts": 1}
        parts = lambda t: [*t["layers"]["up"], *t["experts"].transpose(1, 0, 2)]  # noqa: E731
    else:
        cut, axes, parts = (lambda t: t), AXES, separate
    params = cut(tree(0))
    tx = layer_by_layer(inner, axes)
    update: Any = jax.jit(tx.update, compiler_options=QUICK)
    state, states = tx.init(params), [inner.init(p) for p in parts(params)]
    alone = jax.jit(inner.update, compiler_options=QUICK)
    for step in range(STEPS):
        gradients = cut(tree(step + 1))
        updates, state = update(gradients, state, params)
        assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, params)
        expected = []
        for i, (g, p) in enumerate(zip(parts(gradients), parts(params), strict=True)):
            u, states[i] = alone(g, states[i], p)
            expected.append(u)
        for got, want in zip(parts(updates), expected, strict=True):
            # The same operations on one matrix each, in two programs. Measured: 1e-6.
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(AXES, marks=pytest.mark.slow),
        AXES | {"embed": InParts(2, -1), "norm": InParts(LAYERS)},
    ],
    ids=["layers", "parts"],
)
def test_adamw_is_that_of_stacked_leaves(axes):
    params = tree(0)
    plain, own = optax.adamw(0.1), layer_by_layer(optax.adamw(0.1), axes)
    one, other = plain.init(params), own.init(params)
    for step in range(STEPS):
        updates, one = plain.update(tree(step + 1), one, params)
        got, other = own.update(tree(step + 1), other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, updates)


def test_takes_the_memory_of_one_layer():
    """Of 8-bit AdamW on 16 layers, no array in float32 is larger than a layer; all is in place."""
    inner = quantized(optax.adamw(1e-3))

    def temporaries(tx, *shape):
        params = {"up": jax.ShapeDtypeStruct(shape, jnp.float32)}
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        memory: Any = step.lower(params, state, params).compile().memory_analysis()
        assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
        return memory.temp_size_in_bytes

    layer = 256 * 512 * 4
    # Measured: 5 layers, of two moments and what they are made from, and 40.
    stack, table = (16, 256, 512), (16 * 256, 512)
    assert temporaries(layer_by_layer(inner, 0), *stack) < 6 * layer
    assert temporaries(layer_by_layer(inner, InParts(16)), *table) < 6 * layer
    assert temporaries(inner, *stack) > 16 * layer


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_on_a_mesh(mode):
    """Sharded on other axes than that of the layers, state and updates lie as weights do."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(mode,))
    params = {"up": tree(0)["layers"]["up"], "embed": tree(0)["embed"][:6]}
    tx = layer_by_layer(optax.adamw(0.1), {"up": 0, "embed": InParts(3)})
    expected: Any = tx.update(params, tx.init(params), params)[0]
    place = jax.tree.map(lambda _: jax.NamedSharding(mesh, P(None, "fsdp")), params)
    where = gum_optax.state_shardings(tx, params, place)
    assert where.layers["4"][0].mu["up"].spec == P(None, "fsdp")
    assert where.layers["3"][0].mu["embed"].spec == P(None, None, "fsdp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, place)
        state = jax.jit(tx.init, out_shardings=where)(placed)
        updates, after = jax.jit(tx.update, out_shardings=(place, where))(placed, state, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)
    assert after.layers["4"][0].nu["up"].sharding.is_equivalent_to(place["up"], 3)


def test_types_and_structure_stay():
    params = tree(0, jnp.bfloat16)
    tx = layer_by_layer(quantized(optax.adamw(0.1), smallest=0), AXES)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert after == state
    assert updates == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    # Counts, codes and scales: those of a layer, for each layer.
    assert state.layers["4"][0].count.shape == (LAYERS,)
    assert state.layers["3"][0].mu["experts"].codes.shape == (EXPERTS, 8, 6)


def test_axes_by_a_function_and_wrappers():
    params = tree(0)
    by_name = functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda path, _: AXES[path[0].key],
    )
    seen = []

    def note(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    inner: Any = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), note)  # pyright: ignore[reportArgumentType]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        layer_by_layer(optax.chain(inner, optax.sgd(1.0)), by_name),
    )
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-6)
    # Once for the rest, and once for each number of layers: loops are traced.
    assert len(seen) == 3
    injected = optax.inject_hyperparams(
        lambda learning_rate: layer_by_layer(optax.adam(learning_rate), AXES)
    )(learning_rate=0.0)
    updates, state = injected.update(params, injected.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    # Optimizer states are mapped where they are like parameters.
    mapped = optax.tree.map_params(injected, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"up": 3}, ValueError, r"`axes` is 3 for `up`, which has 3 axes: \(4, 8, 12\)"),
        ({"up": -4}, ValueError, "`axes` is -4 for `up`"),
        ({"up": True}, TypeError, "`axes` must hold ints, `InParts` and None, got True for `up`"),
        ({"up": "layers"}, TypeError, "got 'layers' for `up`"),
        ({"down": 0}, ValueError, "`axes` must be a tree of ints, `InParts` and None like the"),
        ({"up": InParts(3)}, ValueError, "cuts `up` into 3 parts, which must divide axis 0 of"),
        ({"up": InParts(0)}, ValueError, "`axes` of `up` must be at least 1, got 0"),
        ({"up": InParts(2, 3)}, ValueError, "`axes` is 3 for `up`, which has 3 axes"),
    ],
)
def test_axes_that_do_not_fit(axes, error, message):
    with pytest.raises(error, match=message):
        layer_by_layer(optax.sgd(1.0), axes).init({"up": np.zeros((4, 8, 12), np.float32)})


def test_axes_may_be_a_tree_that_can_be_called():
    """Axes of an Equinox model, made by ``jax.tree.map``, are such a tree."""
    params = tables.CallableTree(np.ones((3, 4, 5), np.float32), np.ones(4, np.float32))
    tx = layer_by_layer(optax.trace(0.9), tables.CallableTree(0, None))
    state = jax.eval_shape(tx.init, params)
    assert state.layers["3"].trace.layers.shape == (3, 4, 5)
    assert state.rest.trace.bias.shape == (4,)


def test_the_inner_transformation_is_one():
    with pytest.raises(TypeError, match=r"`inner` must be an optax\.GradientTransformation"):
        layer_by_layer(optax.adamw, 0)  # pyright: ignore[reportArgumentType]
