"""Models of Equinox, Haiku and Keras: callable roots, and lists without names.

Keras itself is left out, since it needs a backend of several hundred megabytes. Its stateless calls
pass ``model.trainable_variables`` to an optimizer: a flat list of arrays in the order of layers.
"""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false

import collections
import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import dimension_numbers
from tests.helpers import described, jit_once, low_rank_state
from tests.tables import (
    PROJECTED,
    RANK,
    SIMPLE,
    any_number_of_steps,
    assert_close,
    assert_equal,
    program,
)

WIDTH, HIDDEN = 6, 10
# More inputs than features: of gradients without full rank, Newton-Schulz magnifies the rounding.
INPUTS = np.asarray(np.random.default_rng(0).normal(size=(32, WIDTH)), np.float32)
TARGETS = np.cumsum(INPUTS, axis=-1)


class Block(eqx.Module):
    """Two weights ``[out, in]``, as all of Equinox has them."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=up)
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=down)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(eqx.Module):
    """The root can be called: whoever asks `callable` whether it is a function is answered yes."""

    blocks: list[Block]
    name: str = "a field that is no array"

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@functools.cache
def _model():
    make = eqx.filter_jit(lambda keys: Model([Block(key) for key in keys]))
    return make(jax.random.split(jax.random.key(0), 2))


def _params():
    return eqx.filter(_model(), eqx.is_array)


def _replaced(kind, weight, bias):
    """A tree rooted in the module, with one value at all weights and one at all biases."""
    values = {2: weight, 1: bias}
    return jax.tree.map(lambda leaf: values[leaf.ndim], kind)


# One of each factory, with slots and without.
OPTIMIZERS = {
    "gum": functools.partial(gum_optax.gum, 0.1, SIMPLE),
    "adamw": functools.partial(gum_optax.adamw, 0.1, PROJECTED),
    "for_matrices": functools.partial(
        gum_optax.for_matrices, gum_optax.low_rank(optax.trace(0.9), SIMPLE), 0.1
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


TURNED = dimension_numbers.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


def _turned(params):
    """Rows and columns turned, for weights ``[out, in]``."""
    return jax.tree.map(lambda leaf: TURNED if leaf.ndim == 2 else None, params)


def _plain(module):
    """The same leaves by the same names and in the same order, in containers."""

    def linear(layer):
        return collections.OrderedDict(weight=layer.weight, bias=layer.bias)

    blocks = [
        collections.OrderedDict(up=linear(block.up), down=linear(block.down))
        for block in module.blocks
    ]
    return {"blocks": blocks}


@every_optimizer
def test_an_equinox_model_runs_the_program_of_a_tree_of_dicts(name):
    """`optax.partition` would call a tree of labels whose root is a module.

    Of the dicts it must be said that their weights are ``[out, in]``.
    """
    optimizer, params = OPTIMIZERS[name](), _params()
    assert callable(params)
    of_dicts = OPTIMIZERS[name](weight_dimension_numbers=_turned)
    # One trace for all that is done with the same types.
    optimizer = optimizer._replace(update=jax.jit(optimizer.update))
    state, plain = optimizer.init(params), of_dicts.init(_plain(params))
    assert program(optimizer.init, params) == program(of_dicts.init, _plain(params))
    assert program(optimizer.update, params, state, params) == program(
        jax.jit(of_dicts.update), _plain(params), plain, _plain(params)
    )
    first, after, updates = any_number_of_steps(optimizer, params)
    assert described(after) == described(first) == described(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert set(low_rank_state(state).basis) == {"blocks.*.up.weight", "blocks.*.down.weight"}
    assert_equal(optax.tree.map_params(optimizer, lambda x: x, state), state)


def _gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape), p.dtype), _params())


def test_an_equinox_model_learns_by_its_own_idiom():
    optimizer = gum_optax.gum(0.05, SIMPLE)
    traces = []

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((jax.vmap(model)(INPUTS) - TARGETS) ** 2)

    @eqx.filter_jit
    def step(model, state):
        traces.append(None)
        value, gradients = loss(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    model = _model()
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    values = []
    for _ in range(40):
        model, state, value = step(model, state)
        values.append(float(value))
    assert len(traces) == 1
    assert values[-1] < 0.5 * values[0]


@every_optimizer
def test_dimension_numbers_rooted_in_a_module(name):
    """A tree, a function and the default say the same: weights are ``[out, in]``."""
    params = _params()
    tree = _replaced(params, TURNED, None)
    given = OPTIMIZERS[name](weight_dimension_numbers=tree)
    function = OPTIMIZERS[name](weight_dimension_numbers=lambda params: tree)
    state, after, updates = any_number_of_steps(given, params)
    assert described(after) == described(state)
    assert described(updates) == described(params)
    assert described(jax.eval_shape(function.init, params)) == described(state)
    default = jax.eval_shape(OPTIMIZERS[name]().init, params)
    assert described(low_rank_state(state)) == described(low_rank_state(default))


def test_shape_scaling_knows_that_equinox_has_outputs_first():
    """``sqrt(max(1, fan_out / fan_in))``, by default and by dimension numbers of one's own."""
    params, gradients = _params(), _gradients(0)

    def first_updates(**numbers):
        optimizer = gum_optax.gum(1.0, SIMPLE, orthogonalizer=optax.identity(), **numbers)
        state = jax.jit(optimizer.init)(params)
        updates, _ = jax.jit(optimizer.update)(gradients, state, params)
        return jax.tree.map(np.asarray, updates.blocks[0])

    inputs_first = dimension_numbers.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    default = first_updates()
    wrong = first_updates(weight_dimension_numbers=_replaced(params, inputs_first, None))
    factor = np.float32(np.sqrt(HIDDEN / WIDTH))
    # [10, 6] maps 6 to 10 features.
    assert_close(default.up.weight, factor * wrong.up.weight)
    assert_close(default.down.weight, wrong.down.weight / factor)


MASKS = {
    "tree": lambda tree: tree,
    "function": lambda tree: lambda params: tree,
}


@every_optimizer
def test_a_weight_decay_mask_rooted_in_a_module_is_a_tree_and_no_function(name):
    params = _params()
    tree = _replaced(params, True, False)

    def update_of(**options):
        optimizer = OPTIMIZERS[name](weight_decay=0.5, **options)
        state = jax.eval_shape(optimizer.init, params)
        return program(optimizer.update, params, state, params)

    programs = {update_of(weight_decay_mask=mask(tree)) for mask in MASKS.values()}
    assert len(programs) == 1
    assert update_of() not in programs


@pytest.mark.parametrize("kind", MASKS)
def test_a_weight_decay_mask_rooted_in_a_module_decides_what_decays(kind):
    params = jax.tree.map(np.asarray, _params())
    zeros = jax.tree.map(np.zeros_like, params)
    mask = MASKS[kind](_replaced(params, False, True))
    optimizer = gum_optax.for_matrices(
        optax.scale(0.0), 0.1, weight_decay=0.5, weight_decay_mask=mask
    )
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        # Learning rate times weight decay; of zero gradients there is no other update.
        assert_close(update, np.float32(-0.1 * 0.5 if param.ndim == 1 else 0.0) * param)


def test_haiku_parameters():
    """Modules by name, numbered from the second on: layers of one shape form one group."""

    def forward(x):
        for _ in range(3):
            x = x + hk.Linear(WIDTH, name="linear")(jnp.tanh(x))
        return x

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(model.init)(jax.random.key(0), INPUTS)
    optimizer = gum_optax.gum(0.05, SIMPLE)

    def loss(params):
        return jnp.mean((model.apply(params, INPUTS) - TARGETS) ** 2)

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step, state = jit_once(step), jax.jit(optimizer.init)(params)
    loss = jax.jit(loss)
    before = loss(params)
    for _ in range(20):
        params, state = step(params, state)
    assert {name: basis.shape for name, basis in low_rank_state(state).basis.items()} == {
        "linear_*.w": (3, WIDTH, RANK)
    }
    assert loss(params) < 0.8 * before


def test_keras_variables_without_names():
    """``[kernel, bias, kernel, bias]``: kernels of one shape form one group, ``*[6,10]``.

    Of their use it is known which of them are matrices, `init` warns without it.
    """
    shapes = [(WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,)] * 3
    rng = np.random.default_rng(0)
    variables = [np.asarray(rng.normal(size=shape), np.float32) for shape in shapes]

    def apply(variables, x):
        for kernel, bias in zip(variables[::2], variables[1::2], strict=True):
            x = jnp.tanh(x @ kernel + bias)
        return x

    numbers = dimension_numbers.infer(apply, variables, INPUTS)
    optimizer = gum_optax.gum(0.1, SIMPLE, weight_dimension_numbers=numbers)
    state, after, updates = any_number_of_steps(optimizer, variables)
    assert described(after) == described(state)
    assert described(updates) == described(variables)
    assert {name: basis.shape for name, basis in low_rank_state(state).basis.items()} == {
        "*[6,10]": (3, WIDTH, RANK),
        "*[10,6]": (3, WIDTH, RANK),
    }
    with pytest.warns(UserWarning, match="The 12 leaves have no names"):
        jax.eval_shape(gum_optax.gum(0.1, SIMPLE).init, variables)
