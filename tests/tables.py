"""The tables of the library's tests: transformations, their parts, and trees of parameters.

A new projector, residual rule, carry or storage joins its table here and no other file; so does a
new optimizer. The suites ``test_conformance*.py`` run every transformation over every tree. Tracing
and compiling take nearly all of their time, so every transformation has one compiled update
(`compiled`), shared by the tests that change neither it nor the types of its arguments, and one
update under ``jit`` (`traced`), whose traces are shared by the tests that only look at types.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import (
    LowRank,
    carries,
    dimension_numbers,
    normalize_columns,
    projectors,
    residuals,
    samplers,
    storages,
)
from tests import helpers

# Parts -------------------------------------------------------------------------------------------

PROJECTORS: dict[str, Any] = {
    "svd": projectors.svd,
    "subspace_iteration": projectors.subspace_iteration,
    # Little oversampling, for matrices as small as those of the tests.
    "randomized_svd": functools.partial(projectors.randomized_svd, oversampling=1),
    "random_orthonormal": projectors.random_orthonormal,
    "grassmann": projectors.grassmann(),
}
every_projector = pytest.mark.parametrize("projector", PROJECTORS.values(), ids=PROJECTORS)

RESIDUALS: dict[str, Any] = {
    "drop": residuals.drop(),
    "sampled": residuals.sampled(1),
    "additive": residuals.sampled(1, form="additive"),
    "sampled, undrawn through columns": residuals.sampled(1, undrawn=normalize_columns()),
    "through columns": residuals.through(normalize_columns()),
    "through momentum": residuals.through(optax.trace(0.5)),
    "guided by a gain": residuals.guided(gum_optax.scale_by_gain()),
    "feedback": residuals.feedback(0.5),
}
every_residual = pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)

CARRIES: dict[str, Any] = {
    "restart": carries.restart,
    "keep": carries.keep,
    "rotate": carries.rotate,
}
every_carry = pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)

STORAGES: dict[str, storages.Storage] = {
    "bfloat16": storages.cast(jnp.bfloat16),
    "int8": storages.int8(),
    # Several blocks on an axis, also of matrices as small as those of the tests.
    "int4": storages.int4(4),
}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)

# Inner transformations of every kind: without state, with one moment, with two and a count, with
# parameters as input, a chain. Each has the options of `LowRank` with which it is tested.
INNER: dict[str, tuple[Callable[[], optax.GradientTransformation], dict[str, Any]]] = {
    "identity": (optax.identity, {}),
    "trace": (lambda: optax.trace(0.9), {}),
    "adam": (optax.scale_by_adam, {}),
    "adamw": (lambda: optax.adamw(0.1, weight_decay=0.1), {"carry": carries.keep}),
    "nesterov": (
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        {"carry": carries.rotate},
    ),
}

# Compressions ------------------------------------------------------------------------------------

RANK, PERIOD = 2, 2


def _one_of(count: int) -> samplers.Sampling:
    """Draws one of N by a function of the key that compiles fast (so not exactly uniform)."""
    if count == 1:
        return samplers.fixed_size(1)(1)

    def draw(key: jax.Array) -> jax.Array:
        return (jax.random.key_data(key)[:1] % count).astype(jnp.int32)

    return samplers.Sampling(1, 1 / count, draw)


def _coordinates(key: Any, gradient: Any, rank: int, previous_basis: Any) -> jax.Array:
    """A projector onto neighbouring coordinates, from a start given by the key: compiles fast."""
    m = gradient.shape[0]
    first = jax.random.key_data(key)[0] % m
    return jnp.roll(jnp.eye(m, rank), first.astype(jnp.int32), axis=0)


# With the default projector and sampler, and with the cheapest ones.
STRUCTURE = LowRank(RANK, PERIOD, residuals.sampled(1))
SIMPLE = LowRank(RANK, PERIOD, residuals.sampled(_one_of), _coordinates)
PROJECTED = gum_optax.galore(RANK, PERIOD, projector=_coordinates)

# Transformations ---------------------------------------------------------------------------------

_STACKED: dict[str, Any] = {"weight_dimension_numbers": dimension_numbers.scanned_layers}


def gum(learning_rate: Any, compression: LowRank) -> optax.GradientTransformationExtraArgs:
    return gum_optax.gum(learning_rate, compression, weight_decay=0.01, **_STACKED)


def adamw(learning_rate: Any, compression: LowRank) -> optax.GradientTransformationExtraArgs:
    return gum_optax.adamw(learning_rate, compression, **_STACKED)


def galore(learning_rate: Any, compression: LowRank) -> optax.GradientTransformationExtraArgs:
    return gum_optax.adamw(learning_rate, compression, weight_decay=0.0, **_STACKED)


def muon(learning_rate: Any, _: LowRank) -> optax.GradientTransformationExtraArgs:
    """Full-rank momentum in 8 bits, small arrays too, and the leanest fallback."""
    momentum = gum_optax.quantized(optax.trace(0.9), storages.int8(4), smallest=0)
    return gum_optax.for_matrices(
        optax.chain(momentum, gum_optax.scale_by_polar(ns_steps=1)),
        learning_rate,
        fallback=gum_optax.fallbacks.factored(),
        **_STACKED,
    )


def everything_in_8_bits(
    learning_rate: Any, compression: LowRank
) -> optax.GradientTransformationExtraArgs:
    return gum_optax.quantized(adamw(learning_rate, compression), storages.int8(4), smallest=0)


def _around(inner: str) -> Callable[[Any, LowRank], optax.GradientTransformationExtraArgs]:
    return lambda learning_rate, compression: gum_optax.low_rank(INNER[inner][0](), compression)


_replace = functools.partial(dataclasses.replace, SIMPLE)

# name -> (function from a learning rate and a compression to an optimizer, its compression)
TRANSFORMATIONS: dict[str, tuple[Callable[[Any, LowRank], Any], LowRank]] = {
    "gum": (gum, SIMPLE),
    "scale_by_gum": (lambda _, compression: gum_optax.scale_by_gum(compression), SIMPLE),
    **{f"low_rank_{inner}": (_around(inner), _replace(**INNER[inner][1])) for inner in INNER},
    # The default projector and sampler, around the transformation that compiles fastest.
    "low_rank_identity": (_around("identity"), STRUCTURE),
    "adamw": (adamw, SIMPLE),
    "adamw_galore": (galore, PROJECTED),
    # A switch of projectors; those of GoLore are in test_projectors.py.
    "adamw_golore": (
        galore,
        gum_optax.golore(
            RANK,
            PERIOD,
            switch_step=PERIOD,
            before=helpers.first_coordinates,
            after=_coordinates,
        ),
    ),
    "gum_galore": (gum, PROJECTED),
    "muon in 8 bits": (muon, SIMPLE),
    "everything in 8 bits": (everything_in_8_bits, SIMPLE),
    "projfactor": (
        lambda _, compression: gum_optax.low_rank(optax.ema(0.9), compression),
        gum_optax.projfactor(RANK, PERIOD, projector=_coordinates),
    ),
    # Every residual rule that is not in one of these; `drop` is in GaLore.
    **{
        name: (_around("trace"), _replace(residual=residual))
        for name, residual in RESIDUALS.items()
        if name not in ("drop", "sampled")
    },
    # Methods with states of their own, which need no compression.
    "dion2": (lambda *_: gum_optax.scale_by_dion2(0.5), SIMPLE),
    "factored_momentum": (lambda *_: gum_optax.scale_by_factored_momentum(RANK), SIMPLE),
    "adam_mini": (lambda *_: gum_optax.scale_by_adam_mini(), SIMPLE),
    "racs": (lambda *_: gum_optax.scale_by_racs(), SIMPLE),
    "adalomo": (lambda learning_rate, _: gum_optax.adalomo(learning_rate), SIMPLE),
    # Codes with both moments of Adam, since second moments have separate maps; and bases.
    **{
        f"{name} storage": (
            _around("adam" if "int" in name else "trace"),
            _replace(storage=storage, basis_storage=storage),
        )
        for name, storage in STORAGES.items()
    },
}
# Optimizers of whole models, with a fallback.
ALIASES = ["gum", "adamw", "adamw_galore", "adamw_golore", "gum_galore"]
ALIASES += ["muon in 8 bits", "everything in 8 bits"]
# Transformations that include a learning rate.
OPTIMIZERS = [*ALIASES, "low_rank_adamw", "low_rank_nesterov", "adalomo"]
every = pytest.mark.parametrize("name", TRANSFORMATIONS)
# The ones that are compiled and run over all trees and types. The factory and the compression of
# the others are in one of these.
COMPILED = [name for name in TRANSFORMATIONS if name not in ("adamw", "gum_galore")]
every_compiled = pytest.mark.parametrize("name", COMPILED)
# The ones with a `LowRankState`.
FULL_RANK = ("muon in 8 bits", "dion2", "factored_momentum", "adam_mini", "racs", "adalomo")
LOW_RANK = [name for name in COMPILED if name not in FULL_RANK]
# A small selection for tests that compile each case: with slots and without, with a fallback and
# without, with one moment and with two.
KINDS = ["gum", "low_rank_adamw", "adamw_galore"]
each_kind = pytest.mark.parametrize("name", KINDS)


def transformation(
    name: str, learning_rate: Any = 0.1, **parts: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation of the table, with the given options of its compression replaced."""
    make, compression = TRANSFORMATIONS[name]
    return make(learning_rate, dataclasses.replace(compression, **parts))


# Trees -------------------------------------------------------------------------------------------


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallableTree:
    """A tree whose root can be called, like an Equinox model."""

    layers: Any
    bias: Any = None

    def __call__(self, inputs: Any) -> Any:
        raise AssertionError("A model is no function of its parameters.")


_WIDE, _TALL = _array(5, 8), _array(8, 5)
_HALF = _array(5, 8, dtype=jnp.bfloat16)

# Trees for all transformations: every leaf is a matrix or a stack of matrices.
MATRICES: dict[str, Any] = {
    "separate": {"layers": [{"w": _WIDE}, {"w": _WIDE}], "single": _TALL},
    "stacked": {"layers": {"w": _array(3, 5, 8)}},
    "experts": {"layers": {"w": _array(2, 2, 8, 5)}},
    "rank above the short side": {"layers": [_array(2, 9), _array(2, 9)]},
    "mixed dtypes": {"layers": [{"w": _WIDE}, {"w": _HALF}, {"w": _HALF}], "single": _HALF},
    "only None": [None],
    "empty dict": {},
    "empty list": [],
    "empty frozen dict": flax.core.freeze({}),
    "array": _WIDE,
}
# The same matrices in other containers. `low_rank` flattens trees before its parts see them, so one
# transformation of each kind is enough.
CONTAINERS: dict[str, Any] = {
    "frozen dict": flax.core.freeze({"layers": {"0": {"w": _WIDE}, "1": {"w": _WIDE}}}),
    "tuples": ((_WIDE, _WIDE), (_TALL, (_TALL,))),
    "named tuples": Pair(Pair(_WIDE, _WIDE), [_TALL, Pair(_TALL, None)]),
    "callable root": CallableTree([CallableTree(_WIDE), CallableTree(_WIDE)]),
    "None leaves": {"w": [_WIDE, None, _WIDE], "none": None},
    "masked nodes": {"w": [_WIDE, optax.MaskedNode(), _WIDE]},
}
# Trees for optimizers with a fallback: some leaves are not matrices.
MODELS: dict[str, Any] = {
    "vectors and tables": MATRICES["separate"] | {"bias": _array(8), "embed": _array(7, 5)},
    "stacked vectors": {"layers": {"w": _array(3, 5, 8), "bias": _array(3, 8)}, "x": _array()},
    "no matrices": {"bias": _array(8), "embed": _array(7, 5), "none": None},
}
# The same in other containers, which only the labels of leaves depend on: for both factories.
MODEL_CONTAINERS: dict[str, Any] = {
    "frozen model": flax.core.freeze({"layers": [_WIDE, _WIDE], "bias": _array(8)}),
    "callable model": CallableTree(
        [CallableTree(_WIDE, _array(8)), CallableTree(_WIDE, _array(8))]
    ),
    # Haiku: modules by name, numbered from the second on, with leaves `w` and `b`.
    "haiku": {
        "mlp/~/linear": {"w": _WIDE, "b": _array(8)},
        "mlp/~/linear_1": {"w": _WIDE, "b": _array(8)},
        "mlp/~/linear_2": {"w": _WIDE, "b": _array(8)},
    },
    # Keras, whose stateless calls take variables as a list without names.
    "keras": [_WIDE, _array(8), _TALL, _array(5), _WIDE, _array(8), _TALL, _array(5)],
}
TREES = MATRICES | CONTAINERS | MODELS | MODEL_CONTAINERS
# Nothing is compressed here: a group of one matrix is always drawn, and rank 2 is the short side.
_UNCOMPRESSED = ("array", "named tuples", "rank above the short side")
expects_no_compression = pytest.mark.filterwarnings("ignore:None of .* is compressed:UserWarning")


def _cases() -> list[Any]:
    pairs = [(name, tree) for name in COMPILED for tree in MATRICES]
    pairs += [(name, tree) for name in (*KINDS, "through momentum") for tree in CONTAINERS]
    pairs += [(name, tree) for name in ALIASES if name in COMPILED for tree in MODELS]
    pairs += [(name, tree) for name in ("gum", "adamw_galore") for tree in MODEL_CONTAINERS]
    return [
        pytest.param(*pair, marks=[expects_no_compression] if pair[1] in _UNCOMPRESSED else [])
        for pair in pairs
    ]


every_tree = pytest.mark.parametrize(("name", "tree"), _cases())


def values(description: Any, seed: int = 0, dtype: Any = None) -> Any:
    """Returns a tree of Gaussian numbers in NumPy arrays with the described shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(rng.standard_normal(leaf.shape), dtype or leaf.dtype), description
    )


def parameters(name: str, seed: int = 0, dtype: Any = None) -> Any:
    """Returns sampled matrices and a single one; for whole models also a vector and a table."""
    kind = "vectors and tables" if name in ALIASES else "separate"
    return values(TREES[kind], seed, dtype)


# Runs --------------------------------------------------------------------------------------------


@functools.cache
def compiled(name: str) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """Returns a transformation and its compiled update, for arguments like float32 `parameters`."""
    optimizer = traced(name)
    return optimizer, helpers.jit_once(optimizer.update)


@functools.cache
def traced(name: str) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose update is traced once for each type of its arguments."""
    optimizer = transformation(name)
    return optimizer._replace(update=jax.jit(optimizer.update))


@functools.cache
def first_state(name: str) -> Any:
    """Returns the state of `compiled` before its first step."""
    return compiled(name)[0].init(parameters(name))


def run(
    update: Any, state: Any, name: str, steps: int = 2 * PERIOD + 1, params: Any = None
) -> tuple[list[Any], Any]:
    """Runs several periods on fixed gradients; returns the updates of all steps and the state."""
    params = parameters(name) if params is None else params
    results = []
    for step in range(steps):
        updates, state = update(parameters(name, seed=step + 1), state, params)
        results.append(updates)
    return results, state


def any_number_of_steps(optimizer: Any, params: Any, gradients: Any = None) -> tuple[Any, Any, Any]:
    """Returns descriptions of the first state, of the state after a step, and of the updates.

    One step keeps the structure, shapes and dtypes of the state, and so does any number of steps.
    """
    state = jax.eval_shape(optimizer.init, params)
    # A jitted function has a method of its own, which reuses its traces.
    described = getattr(
        optimizer.update, "eval_shape", functools.partial(jax.eval_shape, optimizer.update)
    )
    updates, after = described(params if gradients is None else gradients, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert helpers.described(after) == helpers.described(state)
    return state, after, updates


def program(function: Callable[..., Any], *args: Any) -> str:
    """Returns the jaxpr of a function as text, which does not depend on the containers of leaves.

    Jitted functions, such as those of `traced`, reuse their traces.
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    return str(jitted.trace(*args).jaxpr)


def assert_equal(left: Any, right: Any) -> None:
    """Asserts that two trees are equal in dtypes and values, bit for bit."""
    chex.assert_trees_all_equal_dtypes(left, right)
    chex.assert_trees_all_equal(left, right, strict=True)


def assert_close(left: Any, right: Any, atol: float = 5e-6) -> None:
    """Asserts that two trees have equal dtypes and values up to the order of float32 operations.

    Measured over these tests: 5e-7, and 8e-6 if averages of gradients are orthogonalized.
    """
    chex.assert_trees_all_equal_dtypes(left, right)
    chex.assert_trees_all_close(left, right, atol=atol, rtol=1e-5, strict=True)
