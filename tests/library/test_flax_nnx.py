"""`nnx.Optimizer` on models of every kind gives the updates of a plain tree of arrays."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments.examples import flax_nnx
from tests.helpers import QUICK, low_rank_state
from tests.tables import SIMPLE, assert_close, assert_equal

WIDTH, HIDDEN, LAYERS, STEPS = 8, 16, 2, 3
INPUTS = np.random.default_rng(0).standard_normal((32, WIDTH)).astype(np.float32)


def _linear(inputs, outputs, rngs, axes):
    """A linear layer whose parameters carry the mesh axes that shard them, if any."""
    kernel, bias = nnx.initializers.lecun_uniform(), nnx.initializers.zeros_init()
    if axes:
        kernel = nnx.with_partitioning(kernel, axes)
        bias = nnx.with_partitioning(bias, axes[1:])
    return nnx.Linear(inputs, outputs, kernel_init=kernel, bias_init=bias, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs, sharded=False):
        self.up = _linear(WIDTH, HIDDEN, rngs, ("fsdp", "tensor") if sharded else None)
        self.down = _linear(HIDDEN, WIDTH, rngs, ("tensor", "fsdp") if sharded else None)

    def __call__(self, x, **options):
        return x + self.down(jnp.tanh(self.up(x, **options)), **options)


class Layers(nnx.Module):
    """Separate layers, in a container of a user's choice."""

    def __init__(self, rngs, container=nnx.List, **options):
        self.layers = container([Block(rngs, **options) for _ in range(LAYERS)])

    def __call__(self, x, **options):
        layers = self.layers
        for layer in layers.values() if isinstance(layers, nnx.Dict) else layers:
            x = layer(x, **options)
        return x


class Stacked(nnx.Module):
    """The same layers as one, created by `nnx.vmap` and applied by `nnx.scan`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def create(rngs):
            return Block(rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, layer):
            return layer(x)

        return apply(x, self.layers)


def _dict(blocks):
    return nnx.Dict({f"layer_{i}": block for i, block in enumerate(blocks)})


MODELS = {
    "list": Layers,
    "dict": functools.partial(Layers, container=_dict),
    "stacked": Stacked,
}


def _optimizer():
    """Sampled residuals and a fallback, around what is cheap to compile."""
    ready = gum_optax.dimension_numbers.scanned_layers
    matrices = gum_optax.low_rank(optax.trace(0.9), SIMPLE)
    return gum_optax.for_matrices(matrices, 0.1, weight_dimension_numbers=ready)


def _loss(model, **options):
    return jnp.mean((model(INPUTS, **options) - 1.0) ** 2)


def _train(model, optimizer, **options):
    """A few steps under `nnx.jit`; returns the number of compilations."""
    compilations = 0

    @nnx.jit
    def step(model, optimizer):
        nonlocal compilations
        compilations += 1
        gradients = nnx.grad(functools.partial(_loss, **options))(model)
        optimizer.update(model, gradients)

    for _ in range(STEPS):
        step(model, optimizer)
    return compilations


def _parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _train_plain(model):
    """The same steps on the plain tree of arrays, without NNX's optimizer."""
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    params, tx = nnx.to_pure_dict(state), _optimizer()

    def loss(params):
        copied = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(copied, params)
        return _loss(nnx.merge(graph, copied, rest))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    return params, opt_state


@functools.cache
def _expected():
    return _train_plain(Layers(nnx.Rngs(0)))


def _assert_same(model, optimizer, expected):
    """Parameters up to the order of float32 sums in another program: 4e-7 was measured."""
    params, opt_state = expected
    assert_close(_parameters(model), params)
    state = low_rank_state(nnx.as_pure(optimizer.opt_state))
    assert_equal(state.slots, low_rank_state(opt_state).slots)
    assert_equal(state.key, low_rank_state(opt_state).key)


@pytest.mark.parametrize("kind", ["list", pytest.param("dict", marks=pytest.mark.slow), "stacked"])
def test_an_optimizer_does_what_the_plain_tree_does(kind):
    model = MODELS[kind](nnx.Rngs(0))
    expected = _expected() if kind == "list" else _train_plain(model)
    optimizer = nnx.Optimizer(model, _optimizer(), wrt=nnx.Param)
    assert _train(model, optimizer) == 1
    _assert_same(model, optimizer, expected)
    assert int(optimizer.step[...]) == STEPS


def _mesh(kind):
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))


def _create():
    model = Layers(nnx.Rngs(0), sharded=True)
    return model, nnx.Optimizer(model, _optimizer(), wrt=nnx.Param)


def _create_abstractly(mesh):
    """Shapes first, then everything where it belongs: nothing is ever whole on one device.

    Metadata know where parameters, moments of their shape and low-rank states belong.
    """
    model, optimizer = nnx.eval_shape(_create)
    graph, shapes = nnx.split((model, optimizer))
    shardings = nnx.get_named_sharding(shapes, mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(_create()), out_shardings=shardings)())


CREATE = {"eagerly": lambda mesh: _create(), "abstractly": _create_abstractly}


# Each way and each mode once by `make test`, and the other two pairs by `make slow`.
@pytest.mark.parametrize(
    ("way", "mode"),
    [
        ("eagerly", AxisType.Explicit),
        pytest.param("abstractly", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("eagerly", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("abstractly", AxisType.Explicit, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_models_with_sharding_metadata(way, mode):
    options = {"out_sharding": P()} if mode is AxisType.Explicit else {}
    mesh = _mesh(mode)
    with jax.set_mesh(mesh):
        model, optimizer = CREATE[way](mesh)
        _assert_sharded(model, optimizer)
        _train(model, optimizer, **options)
        _assert_same(model, optimizer, _expected())
        _assert_sharded(model, optimizer)


def _assert_sharded(model, optimizer):
    """Bases by the m axis, that of `WIDTH`; the fallback's moments as their parameters."""
    assert model.layers[0].up.kernel.sharding.spec == P("fsdp", "tensor")
    state = nnx.as_pure(optimizer.opt_state)
    for name, basis in low_rank_state(state).basis.items():
        assert basis.sharding.shard_shape(basis.shape) == (LAYERS, WIDTH // 2, 2), name
    moments = optax.tree.get(state, "ScaleByAdamState").mu
    assert moments["layers"][0]["up"]["bias"].sharding.spec == P("tensor")


# Metadata of the state ---------------------------------------------------------------------------


class Attention(nnx.Module):
    """Kernels with heads, sharded by logical axes that rules map to those of a mesh."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(
                    4,
                    WIDTH,
                    decode=False,
                    use_bias=False,
                    kernel_init=nnx.with_partitioning(init, ("embed", "heads", None)),
                    out_kernel_init=nnx.with_partitioning(init, ("heads", None, "embed")),
                    rngs=rngs,
                )
                for _ in range(3)
            ]
        )


METADATA = {
    "gum": lambda: _optimizer(),
    "muon, in 8 bits, of kernels with heads": lambda: gum_optax.muon(
        0.1, weight_dimension_numbers=gum_optax.dimension_numbers.flax
    ),
    "gum, of kernels with heads": lambda: gum_optax.for_matrices(
        gum_optax.low_rank(optax.trace(0.9), SIMPLE),
        0.1,
        weight_dimension_numbers=gum_optax.dimension_numbers.flax,
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_trainers_read_the_shardings_of_the_state_from_metadata(name):
    """Trainers of tunix and MaxText shard an `nnx.Optimizer` by `nnx.get_partition_spec` alone."""
    mesh, tx = _mesh(AxisType.Auto), METADATA[name]()
    rules = [("embed", "fsdp"), ("heads", "tensor")]

    def create():
        model = Layers(nnx.Rngs(0), sharded=True) if name == "gum" else Attention(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        model, optimizer = nnx.eval_shape(create)
        params = nnx.state(model, nnx.Param)
        expected = gum_optax.state_shardings(tx, params, nnx.get_named_sharding(params, mesh))
        found = nnx.get_named_sharding(nnx.state(optimizer, nnx.OptState), mesh)
    found, expected = (
        [_entries(sharding) for sharding in jax.tree.leaves(tree)]
        for tree in (found["opt_state"], nnx.as_pure(expected))
    )
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert sum(map(bool, found)) >= 6, "or nothing is sharded"


def _entries(sharding):
    # Metadata name axes of unknown length, so that no axis is cut along two of them.
    entries = [entry[0] if isinstance(entry, tuple) else entry for entry in sharding.spec]
    while entries and entries[-1] is None:
        entries.pop()
    return entries


def test_scanned_layers_as_maxtext_describes_them():
    """Its metadata leave the axis over layers to two keys of its own."""
    kernel = nnx.Param(
        jax.ShapeDtypeStruct((WIDTH, 6, HIDDEN), jnp.float32),
        out_sharding=("embed", "mlp"),
        param_scan_axis=1,
        partition_name="layers",
        eager_sharding=False,
    )
    rule = functools.partial(gum_optax.dimension_numbers.scanned_layers, layer_axis=1)
    tx = gum_optax.gum(0.1, SIMPLE, weight_dimension_numbers=rule)
    state = low_rank_state(jax.eval_shape(tx.init, nnx.State({"wi": kernel})))
    [basis], [low] = state.basis.values(), jax.tree.leaves(state.inner, is_leaf=_is_low)[:1]
    assert basis.shape == (6, WIDTH, 2)
    assert basis.get_metadata()["out_sharding"] == ("layers", "embed")
    assert low.low.get_metadata()["out_sharding"] == ("layers", None, "mlp")


def _is_low(node):
    return isinstance(node, gum_optax.Compressed)


def test_boxed_states_keep_their_structure_without_nnx_optimizer():
    """`init` and `update` on the state of a model itself, in the way of optax."""
    tx = _optimizer()
    with jax.set_mesh(_mesh(AxisType.Auto)):
        model = nnx.eval_shape(lambda: Layers(nnx.Rngs(0), sharded=True))
    params = nnx.state(model, nnx.Param)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_the_example_learns():
    losses = flax_nnx.train(steps=60)
    assert losses[-1] < 0.7 * losses[0]
