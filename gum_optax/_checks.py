"""Checks of arguments and states: every error names the parameter, the value and the reason.

Tests: tests/library/test_bad_input.py.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def positive_int(name: str, value: Any) -> int:
    """Returns ``value`` as a Python int, or raises if it is not an int >= 1."""
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    return number


def non_negative_int(name: str, value: Any) -> int:
    """Returns ``value`` as a Python int, or raises if it is not an int >= 0."""
    number = _integer(name, value)
    if number < 0:
        raise ValueError(f"`{name}` must not be negative, got {value!r}.")
    return number


def _integer(name: str, value: Any) -> int:
    # First, since a bool is an int to `operator.index`: `rank=True` would become rank 1.
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got the bool {value!r}.")
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be a Python int, got the traced value {value}: it decides array shapes "
            "or the structure of the program, so it cannot change under jit."
        )
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an int, got {value!r} of type {type(value).__name__}."
        ) from None


def hyperparameter(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raises unless ``value`` is a finite number in ``[0, below)``.

    Traced values (from ``optax.inject_hyperparams``) cannot be read and pass unchecked.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        # `float` would read a number out of a string, and arithmetic would fail on it later.
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    if not 0.0 <= number < below:
        interval = "not be negative" if math.isinf(below) else f"lie in [0, {below:g})"
        raise ValueError(f"`{name}` must {interval}, got {value!r}.")


def scalar_or_schedule(name: str, value: Any) -> None:
    """Raises unless ``value`` is a schedule or a finite non-negative number."""
    if not callable(value):
        hyperparameter(name, value)


def function(name: str, value: Any, signature: str) -> Callable[..., Any]:
    """Returns ``value``, or raises if it cannot be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function {signature}, got {value!r} of type "
            f"{type(value).__name__}."
        )
    return value


def transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` has the two functions of an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, got {value!r} of type "
            f"{type(value).__name__}."
        )


def matrices(name: str, tree: Any) -> None:
    """Raises unless all leaves of a tree that the transformation `name` gets are matrices."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(jnp.shape(leaf)) < 2:
            raise ValueError(
                f"`{name}` needs leaves with at least 2 axes, [..., m, n], got shape "
                f"{jnp.shape(leaf)} at `{jax.tree_util.keystr(path)}`; give vectors and scalars "
                "another transformation, with `gum_optax.for_matrices` or `optax.partition`."
            )


def floating_dtype(name: str, value: Any) -> Any:
    """Returns ``value`` as a dtype, or raises if it is not a real float."""
    try:
        # NumPy takes None for float64.
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must be a real floating-point dtype, got {value!r}.")
    return dtype


def instance(name: str, value: Any, kind: type, such_as: str) -> None:
    """Raises unless ``value`` is a ``kind``; ``such_as`` follows its name, as an example of one."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__} {such_as}, got {value!r} of type "
            f"{type(value).__name__}."
        )


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of a few words."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def key(name: str, value: Any) -> None:
    """Raises unless ``value`` is a seed or a threefry key; computes nothing."""
    # 1. A seed: a Python int or anything that counts as one.
    if not isinstance(value, jax.Array | np.ndarray):
        _integer(name, value)
        return
    # 2. A typed key, `jax.random.key(0)`.
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(value))
        if "threefry" in implementation or "fry" in implementation:
            return
        described = f"a key of {implementation}"
    # 3. A seed in an array.
    elif value.ndim == 0:
        _integer(name, value)
        return
    # 4. Raw key data, `jax.random.PRNGKey(0)`.
    elif value.shape == (2,) and value.dtype == jnp.uint32:
        return
    else:
        described = f"data of shape {value.shape} and dtype {value.dtype}"
    raise ValueError(
        f"`{name}` must be an int seed or a threefry key (uint32[2]), got {described}; for other "
        "generators pass an int seed."
    )


def key_data(value: int | jax.Array) -> jax.Array:
    """Returns the raw ``uint32[2]`` threefry data of a seed or a key.

    The state holds raw threefry data: typed keys break ``flax.serialization`` and ``np.asarray``,
    and draws of other generators may depend on how arrays are sharded.
    """
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if np.ndim(value) == 0:
        traced = isinstance(value, jax.core.Tracer)
        seed = value if traced else operator.index(value)  # pyright: ignore[reportArgumentType]
        return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    # A copy: a state that shared the caller's buffer would delete it when it is donated.
    return jnp.array(value, jnp.uint32, copy=True)


# States and trees that must fit each other ---------------------------------------------------


def fits(expected: Any, state: Any, version: int) -> None:
    """Raises if a state was made for other parameters, other options or by another version.

    Args:
      expected: the `LowRankState` that ``init`` would make for the updates at hand, as shapes.
      state: the state that ``update`` was given.
      version: the version of the state's structure.
    """
    if type(state) is not type(expected):
        raise TypeError(
            f"`state` must be the LowRankState (version {version}) that `init` made, got "
            f"{type(state).__name__}; states of other versions cannot be restored."
        )
    # Version 4 differs in the keys of its dicts alone; since version 5 no key has a slash.
    if old := [name for name in getattr(state.basis, "keys", tuple)() if "/" in name]:
        raise ValueError(
            f"`state` is of version 4 or older, as its group `{old[0]}` shows; version {version} "
            f"calls it `{old[0].replace('/', '.')}`: replace `/` by `.` in the keys of its dicts."
        )
    # A state without leaves, as of an inner transformation without state, and None have the same
    # arrays, namely none: shapes cannot tell them apart.
    missing = (state.uncompressed is None) != (expected.uncompressed is None)
    same_shapes(expected, state, [".uncompressed"] if missing else [])


def same_shapes(expected: Any, state: Any, others: Sequence[str] = ()) -> None:
    """Raises unless a state has the arrays that are expected; ``others`` are known not to fit."""
    # One difference is enough for the error: the first array that is missing or of another shape.
    wanted, got = _shapes(expected), _shapes(state)
    paths = [path for path in [*wanted, *got] if wanted.get(path) != got.get(path)] + [*others]
    if not paths:
        return
    path = paths[0]
    raise ValueError(
        "The updates do not fit the optimizer state, which `init` made for other parameters or "
        f"options: `state{path}` should have shape {wanted.get(path, 'none (absent)')} and has "
        f"{got.get(path, 'none (absent)')}."
    )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def as_at_init(leaves: list[jax.Array], parameters: list[jax.Array] | None) -> list[Any]:
    """Describes the leaves as ``init`` saw them, with the dtypes of the parameters.

    Groups are told apart by dtype, and gradients may have another dtype than their parameters.
    """

    # A gradient that is not floating keeps its dtype, so that it is refused by name.
    def describe(gradient: Any, parameter: Any) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(gradient.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(gradient.shape, (parameter if floating else gradient).dtype)

    return list(map(describe, leaves, leaves if parameters is None else parameters))


def matching_leaves(params: Any, leaves: list[jax.Array], treedef: Any) -> list[jax.Array]:
    """Returns the leaves of ``params`` as arrays, or raises if they do not fit the updates."""
    parameters = jax.tree.leaves(params)
    shapes = [jnp.shape(p) for p in parameters]
    expected = [leaf.shape for leaf in leaves]
    if shapes != expected:
        raise ValueError(
            f"`params` must have the structure and shapes of the updates, {treedef} with shapes "
            f"{expected}; got {jax.tree.structure(params)} with shapes {shapes}."
        )
    return list(map(jnp.asarray, parameters))
