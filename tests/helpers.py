"""Tools of several test files: shapes, layouts of parameters, runs of an optimizer."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gum_optax import LowRankState, dimension_numbers, samplers
from gum_optax._paths import leaves_with_names

# For files whose models are so small that a rank of 16 makes few of their matrices smaller.
MOSTLY_UNCOMPRESSED = pytest.mark.filterwarnings(
    "ignore:.*run through the inner transformation uncompressed:UserWarning"
)

# One shape for each branch of the code that transposes tall matrices.
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8)}

# The same N matrices as separate leaves, as one leaf [L, m, n], as one leaf [L, E, m, n].
LAYOUTS = ("separate", "stacked", "experts")


# Compiling takes most of the time of a test: machine code is not optimized, XLA's own passes run.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}


def gradients(seed: int, *shape: int) -> np.ndarray:
    """Returns random arrays ``shape``, matrices on the last two axes with a falling spectrum.

    Each singular value is 0.7 times the one before it. The gaps make leading subspaces in float32
    equal to those in float64.
    """
    noise = np.random.default_rng(seed).normal(size=shape)
    left, _, right = np.linalg.svd(noise, full_matrices=False)
    return (left * 0.7 ** np.arange(left.shape[-1])) @ right


def pack(layout: str, matrices: Any) -> Any:
    """Packs N matrices ``[N, m, n]`` into a tree; "experts" are pairs if N is even."""
    if layout == "separate":
        return {"layers": [{"w": matrix} for matrix in matrices]}
    if layout == "experts":
        matrices = matrices.reshape(-1, 2 - len(matrices) % 2, *matrices.shape[1:])
    return {"layers": {"w": matrices}}


def unpack(tree: Any) -> np.ndarray:
    """Returns the matrices ``[N, m, n]`` of a tree, in the order of `pack`."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(-1, *leaf.shape[-2:]) for leaf in leaves])


def group_name(layout: str) -> str:
    """Returns the name of the group of the matrices of `pack`."""
    return "layers.*.w" if layout == "separate" else "layers.w"


def first_coordinates(key: Any, gradient: Any, rank: int, previous_basis: Any) -> jax.Array:
    """A user's projector: cheap to compile, and far from any subspace of the gradient."""
    return jnp.eye(gradient.shape[0], rank)


def all_arguments(key: Any, gradient: Any, rank: int, previous_basis: Any) -> jax.Array:
    """A user's projector, not orthonormal: cheap to compile, and it depends on all arguments."""
    low_bits = jax.random.key_data(key)[-1] % 1024
    return gradient[:, :rank] + 0.5 * previous_basis + low_bits.astype(gradient.dtype) / 1024


def table_sampler(slots: int, probability: float, table: Sequence[Sequence[int]]) -> Any:
    """Makes a user's sampler: one of the listed draws, selected by the key."""

    def draw(key: jax.Array) -> jax.Array:
        return jnp.asarray(table, jnp.int32)[jax.random.randint(key, (), 0, len(table), jnp.int32)]

    return lambda count: samplers.Sampling(slots, probability, draw)


_numbers = itertools.count()


def jit_once(function: Callable[..., Any], **options: Any) -> Any:
    """Jits a function and makes a second trace, and so a second compilation, an error."""

    def once(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # chex counts traces by source text and name, so each function needs a name of its own.
    once.__name__ = f"{getattr(function, '__name__', 'function')}_{next(_numbers)}"
    return jax.jit(chex.assert_max_traces(once, n=1), **options)


def run(
    tx: optax.GradientTransformation, trees: Iterable[Any], params: Any = None, state: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Yields the updates and the state after each step, jitted."""
    update = jax.jit(tx.update, compiler_options=QUICK)
    for tree in trees:
        state = tx.init(tree) if state is None else state
        updates, state = update(tree, state, params)
        yield updates, state


def train(tx: optax.GradientTransformation, trees: Iterable[Any], params: Any) -> list[Any]:
    """Returns the parameters after each step."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for grads in trees:
        params, state = step(params, state, grads)
        history.append(params)
    return history


def low_rank_state(state: Any) -> LowRankState:
    """Returns the only state of `low_rank` in the state of an optimizer."""
    found = [
        part
        for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LowRankState))
        if isinstance(part, LowRankState)
    ]
    assert len(found) == 1, f"{len(found)} states of `low_rank`"
    return found[0]


def letters(params: Any, numbers: Any) -> dict[str, str]:
    """Returns path -> a letter per axis: ``i`` input side, ``o`` output, ``b`` batch; or ""."""
    found = {}
    resolved = dimension_numbers.resolve(params, numbers)
    for (path, leaf), number in zip(leaves_with_names(params), resolved, strict=True):
        found[path] = ""
        if number is not None:
            _, inputs, outputs = dimension_numbers.axes(leaf.shape, number)
            found[path] = "".join(
                "i" if axis in inputs else "o" if axis in outputs else "b"
                for axis in range(len(leaf.shape))
            )
    return found


def tree_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Returns ``{"a/b": shape}`` as nested dicts of ``ShapeDtypeStruct``."""
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return tree


def drawn(slots: Any, count: int) -> set[int]:
    """Returns the set of drawn matrices; ``count`` stands for an empty slot."""
    return {int(index) for index in np.asarray(slots) if index < count}


def described(state: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    """Returns path, shape and dtype of each leaf."""
    return [
        (jax.tree_util.keystr(path), jnp.shape(leaf), jnp.result_type(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]


def state_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, or of descriptions."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def equations(
    jaxpr: Any, times: int = 1, pick: Callable[[Sequence[Any]], Collection[Any]] = list
) -> Iterator[tuple[Any, int]]:
    """Yields all equations of a jaxpr, nested ones too, each with the number of times that it runs.

    The body of a scan runs as often as its length. ``pick`` selects the branches of a conditional.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation, times
        loop = equation.params["length"] if equation.primitive.name == "scan" else 1
        for name, value in equation.params.items():
            parts = value if isinstance(value, tuple | list) else [value]
            bodies = [part for part in parts if hasattr(getattr(part, "jaxpr", part), "eqns")]
            for body in pick(bodies) if name == "branches" else bodies:
                yield from equations(body, times * loop, pick)
