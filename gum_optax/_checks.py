"""Argument checks: every error names the parameter, the value and the reason."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from gum_optax._typing import Key


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


def floating_dtype(name: str, value: Any) -> Any:
    """Returns ``value`` as a dtype (None stays None), or raises if it is not a real float."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must be a real floating-point dtype, got {value!r}.")
    return dtype


def key_data(key: Key) -> jax.Array:
    """Returns the raw ``uint32[2]`` threefry data of a seed or a key.

    The state holds raw threefry data: typed keys break ``flax.serialization`` and ``np.asarray``,
    and draws of other generators may depend on how arrays are sharded.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if np.ndim(key) == 0:
        return jax.random.key_data(jax.random.key(_integer("key", key), impl="threefry2x32"))
    data = jnp.asarray(key)
    if data.shape != (2,) or data.dtype != jnp.uint32:
        raise ValueError(
            "`key` must be an int seed or a threefry key (uint32[2]), got data of shape "
            f"{data.shape} and dtype {data.dtype}; for other generators pass an int seed."
        )
    # A copy: a state that shared the caller's buffer would delete it when it is donated.
    return jnp.array(data, copy=True)
