"""Linen's `TrainState`, boxed and sharded, gives the updates of a plain tree of arrays."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import gum_optax
from experiments.examples import flax_linen
from tests.helpers import QUICK, jit_once, low_rank_state
from tests.tables import SIMPLE, assert_close, assert_equal, program

WIDTH, HEADS, LAYERS, STEPS = 8, 4, 2, 3
INPUTS, TARGETS = np.random.default_rng(0).normal(size=(2, 4, 8, WIDTH)).astype(np.float32)


def _kernel(*axes):
    """An initializer whose results are boxed, with the mesh axes that shard them."""
    return nn.with_partitioning(nn.initializers.lecun_uniform(), axes)


class Attention(nn.Module):
    """A residual layer, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            HEADS,
            use_bias=False,  # A key's bias has no gradient but rounding, which Adam magnifies.
            kernel_init=_kernel("fsdp", "tensor", None),
            out_kernel_init=_kernel("tensor", None, "fsdp"),
        )
        return x + attention(x, x), None


class Model(nn.Module):
    """Stacked attention kernels ``[layers, embed, heads, head_dim]`` and separate dense ones."""

    @nn.compact
    def __call__(self, x):
        attention = nn.scan(
            Attention,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = attention(name="attention")(x, None)
        for layer in range(LAYERS):
            x = x + jnp.tanh(nn.Dense(WIDTH, kernel_init=_kernel("fsdp", "tensor"))(x))
            x = nn.LayerNorm(name=f"norm_{layer}")(x)
        return x


def _optimizer():
    """Sampled residuals and a fallback, around what is cheap to compile."""
    ready = gum_optax.dimension_numbers.flax
    matrices = gum_optax.low_rank(optax.trace(0.9), SIMPLE)
    return gum_optax.for_matrices(matrices, 0.1, weight_dimension_numbers=ready)


def _create():
    params = Model().init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=Model().apply, params=params, tx=_optimizer())
    # Flax counts from a Python int, and so compiles twice.
    return state.replace(step=jnp.zeros((), jnp.int32))


@functools.cache
def _created():
    """Created where it belongs: parameters by their boxes, the state by `state_shardings`."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = jax.eval_shape(_create)
    shardings = nn.get_sharding(shapes, mesh)
    shardings = shardings.replace(
        opt_state=gum_optax.state_shardings(shapes.tx, shapes.params, shardings.params)
    )
    # Without `jax.set_mesh`, under which Linen applies the three axes of an attention kernel's box
    # to the two that the kernel is initialized in.
    return jax.jit(_create, out_shardings=shardings)(), shardings


def _loss(params):
    return jnp.mean((Model().apply({"params": params}, INPUTS) - TARGETS) ** 2)


def _train(state, shardings):
    """Some steps, compiled once."""

    def step(state):
        return state.apply_gradients(grads=jax.grad(_loss)(state.params))

    step = jit_once(step, out_shardings=shardings, compiler_options=QUICK)
    for _ in range(STEPS):
        state = step(state)
    return state


@functools.cache
def _expected():
    """The same on a plain dict of arrays, without Flax's containers and on one device."""
    params, tx = jax.device_get(nn.meta.unbox(_created()[0].params)), _optimizer()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(_loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def _assert_same(state):
    """Parameters up to the order of float32 sums in another program."""
    params, opt_state = _expected()
    assert_close(nn.meta.unbox(state.params), params)
    got, expected = low_rank_state(state.opt_state), low_rank_state(opt_state)
    assert_equal((got.slots, got.key, got.count), (expected.slots, expected.key, expected.count))


def test_every_role_is_a_group():
    groups = {name: basis.shape for name, basis in low_rank_state(_expected()[1]).basis.items()}
    attention = "attention.MultiHeadDotProductAttention_*"
    assert groups == {
        "Dense_*.kernel": (LAYERS, WIDTH, 2),
        **{f"{attention}.{role}.kernel": (LAYERS, WIDTH, 2) for role in ("query", "key", "value")},
        f"{attention}.out.kernel": (LAYERS, WIDTH, 2),
    }


def test_boxed_parameters_run_the_program_of_the_plain_tree():
    tx = _optimizer()
    # One trace for all arguments of the same types.
    tx = tx._replace(update=jax.jit(tx.update))
    boxed = jax.eval_shape(_create).params
    plain = nn.meta.unbox(boxed)
    of_boxes, of_arrays = (
        program(tx.update, params, jax.eval_shape(tx.init, params), params)
        for params in (boxed, plain)
    )
    assert of_boxes == of_arrays


def test_boxed_parameters_on_a_mesh():
    state, shardings = _created()
    _assert_sharded(state)
    state = _train(state, shardings)
    _assert_same(state)
    _assert_sharded(state)


def _assert_sharded(state):
    for basis in low_rank_state(state.opt_state).basis.values():
        assert basis.sharding.shard_shape(basis.shape)[-2] < WIDTH
    kernel = state.params["Dense_0"]["kernel"].unbox()
    assert kernel.sharding.shard_shape(kernel.shape) == (WIDTH // 2, WIDTH // 4)


@pytest.mark.slow
def test_the_example_learns():
    losses = flax_linen.train(steps=60)
    assert losses[-1] < 0.7 * losses[0]
