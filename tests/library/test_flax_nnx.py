"""Under `nnx.Optimizer`, on models of every make: what happens to a plain tree of arrays."""

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


@pytest.mark.parametrize("kind", MODELS)
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

    Metadata know where parameters belong, and moments of their shape; of a low-rank state
    `state_shardings` knows.
    """
    model, optimizer = nnx.eval_shape(_create)
    graph, shapes = nnx.split((model, optimizer))
    params = nnx.state(model, nnx.Param)
    opt_state = gum_optax.state_shardings(
        optimizer.tx, params, nnx.get_named_sharding(params, mesh)
    )
    nnx.update((model, optimizer), nnx.get_named_sharding(shapes, mesh))
    optimizer.opt_state = jax.tree.map(
        lambda variable, sharding: variable.replace(sharding),
        optimizer.opt_state,
        nnx.as_pure(opt_state),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    shardings = nnx.state((model, optimizer))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(_create()), out_shardings=shardings)())


CREATE = {"eagerly": lambda mesh: _create(), "abstractly": _create_abstractly}


# Each way and each mode once by `make test`, and the other two pairs by `make slow`.
@pytest.mark.parametrize(
    ("way", "mode"),
    [
        ("eagerly", AxisType.Explicit),
        ("abstractly", AxisType.Auto),
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


@pytest.mark.slow
def test_the_example_learns():
    losses = flax_nnx.train(steps=60)
    assert losses[-1] < 0.7 * losses[0]
