"""Two tables: the transformations of this package, and the trees that users may hand to them.

The suites ``test_conformance*.py`` run over both. Compiling takes nearly all of their time, so
every transformation has one compiled update, shared by the tests that change neither it nor the
types of its arguments.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import dimension_numbers, restarts, samplers

PERIOD = 2
STRUCTURE: dict[str, Any] = {"rank": 2, "period": PERIOD}


def _keyed(count: int) -> samplers.Sampling:
    """One of N, a function of the key that compiles at once (so not quite uniform)."""
    if count == 1:
        return samplers.fixed_size(1)(1)
    draw = lambda key: (jax.random.key_data(key)[:1] % count).astype(jnp.int32)  # noqa: E731
    return samplers.Sampling(1, 1 / count, draw)


def _coordinates(key: Any, gradient: Any, rank: int, previous_basis: Any) -> jax.Array:
    return jnp.eye(gradient.shape[0], rank)


SIMPLE: dict[str, Any] = {**STRUCTURE, "sampler": _keyed, "projector": _coordinates}
PROJECTED: dict[str, Any] = {**STRUCTURE, "projector": _coordinates}
_STACKS: dict[str, Any] = {"weight_dimension_numbers": dimension_numbers.scanned_layers}

# Bases of every kind: without state, one moment, two and a count, with parameters, a chain.
BASES: dict[str, Any] = {
    "identity": (optax.identity, {}),
    "trace": (lambda: optax.trace(0.9), {}),
    "adam": (optax.scale_by_adam, {}),
    "adamw": (lambda: optax.adamw(0.1, weight_decay=0.1), {"restart": False}),
    "nesterov": (lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), {"restart": restarts.rotate}),
}


def _around(base: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    make, options = BASES[base]
    return lambda parts=SIMPLE, **_: gum_optax.low_rank(make(), **options, **parts)


# name -> transformation, from the learning rate and from the parts that may be simplified.
TRANSFORMATIONS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "gum": lambda lr=0.1, **_: gum_optax.gum(lr, 2, PERIOD, 1, weight_decay=0.01, **_STACKS),
    "scale_by_gum": lambda parts=SIMPLE, **_: gum_optax.scale_by_gum(**parts),
    **{f"low_rank_{base}": _around(base) for base in BASES},
    "galore": lambda lr=0.1, parts=PROJECTED: gum_optax.galore(lr, **_STACKS, **parts),
    "golore": lambda lr=0.1, **_: gum_optax.golore(lr, 2, PERIOD, switch_step=2, **_STACKS),
    "unbiased_adamw": lambda lr=0.1, parts=SIMPLE: gum_optax.unbiased_adamw(lr, **_STACKS, **parts),
}
ALIASES = ["gum", "galore", "golore", "unbiased_adamw"]
# These come with a learning rate of their own.
OPTIMIZERS = [*ALIASES, "low_rank_adamw", "low_rank_nesterov"]
every = pytest.mark.parametrize("name", TRANSFORMATIONS)
# Where each case is a compilation of its own: every kind of base, slots or none, alias or engine.
each_kind = pytest.mark.parametrize("name", ["gum", "low_rank_adamw", "galore"])


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class Pair(NamedTuple):
    first: Any
    second: Any


_WIDE, _TALL = _array(5, 8), _array(8, 5)
_HALF = _array(5, 8, dtype=jnp.bfloat16)

# Every leaf is a matrix or a stack of matrices: for all transformations.
MATRICES: dict[str, Any] = {
    "separate": {"layers": [{"w": _WIDE}, {"w": _WIDE}], "single": _TALL},
    "stacked": {"layers": {"w": _array(3, 5, 8)}},
    "experts": {"layers": {"w": _array(2, 2, 8, 5)}},
    "rank above the short side": {"layers": [_array(2, 9), _array(2, 9)]},
    "mixed dtypes": {"layers": [{"w": _WIDE}, {"w": _HALF}, {"w": _HALF}], "single": _HALF},
    "frozen dict": flax.core.freeze({"layers": {"0": {"w": _WIDE}, "1": {"w": _WIDE}}}),
    "tuples": ((_WIDE, _WIDE), (_TALL, (_TALL,))),
    "named tuples": Pair(Pair(_WIDE, _WIDE), [_TALL, Pair(_TALL, None)]),
    "None leaves": {"w": [_WIDE, None, _WIDE], "none": None},
    "masked nodes": {"w": [_WIDE, optax.MaskedNode(), _WIDE]},
    "only None": [None],
    "empty dict": {},
    "empty list": [],
    "empty frozen dict": flax.core.freeze({}),
    "array": _WIDE,
}
# With leaves that are none: for those that have a fallback.
MODELS = {
    "vectors and tables": MATRICES["separate"] | {"bias": _array(8), "embed": _array(7, 5)},
    "stacked vectors": {"layers": {"w": _array(3, 5, 8), "bias": _array(3, 8)}, "x": _array()},
    "frozen model": flax.core.freeze({"layers": [_WIDE, _WIDE], "bias": _array(8)}),
    "no matrices": {"bias": _array(8), "embed": _array(7, 5), "none": None},
}
TREES = MATRICES | MODELS
CASES = [(name, tree) for name in TRANSFORMATIONS for tree in MATRICES]
CASES += [(name, tree) for name in ALIASES for tree in MODELS]
every_tree = pytest.mark.parametrize(("name", "tree"), CASES)


def values(description: Any, seed: int = 0, dtype: Any = None) -> Any:
    """A tree of Gaussian numbers, of the described shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype or leaf.dtype), description
    )


def parameters(name: str, seed: int = 0, dtype: Any = None) -> Any:
    """Sampled matrices and a dense one; for aliases a vector and a table too."""
    kind = "vectors and tables" if name in ALIASES else "separate"
    return values(TREES[kind], seed, dtype)


@functools.cache
def compiled(name: str) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """A transformation and its compiled update, for arguments like `parameters` in float32."""
    optimizer = TRANSFORMATIONS[name]()
    return optimizer, jax.jit(optimizer.update)


def run(
    update: Any, state: Any, name: str, steps: int = 2 * PERIOD + 1, params: Any = None
) -> tuple[list[Any], Any]:
    """Updates over several periods on fixed gradients; returns all updates and the state."""
    params = parameters(name) if params is None else params
    results = []
    for step in range(steps):
        updates, state = update(parameters(name, seed=step + 1), state, params)
        results.append(updates)
    return results, state


def any_number_of_steps(optimizer: Any, params: Any, gradients: Any = None) -> tuple[Any, Any, Any]:
    """Described: the first state, that after any number of steps, and the updates.

    `jax.lax.scan` raises unless a step keeps the structure, shapes and dtypes of the state.
    """

    def steps(state: Any, gradients: Any, params: Any) -> Any:
        def step(state: Any, _: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradients, state, params)
            return state, updates

        return jax.lax.scan(step, state, length=PERIOD + 1)

    state = jax.eval_shape(optimizer.init, params)
    after, updates = jax.eval_shape(
        steps, state, params if gradients is None else gradients, params
    )
    one = jax.tree.map(lambda leaf: _array(*leaf.shape[1:], dtype=leaf.dtype), updates)
    return state, after, one


def program(function: Callable[..., Any], *args: Any) -> str:
    """What a function computes on its arguments' leaves, whatever containers hold them."""
    return str(jax.make_jaxpr(function)(*args))


def assert_equal(left: Any, right: Any) -> None:
    """The same tree, bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(left: Any, right: Any, atol: float = 5e-6) -> None:
    """The same tree, up to the order of float32 operations in another program.

    Measured over the tests here: 5e-7; 8e-6 where averages of gradients are orthogonalized.
    """
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)
