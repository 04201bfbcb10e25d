"""Names for the types that recur in signatures."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any
"""Any tree of arrays: parameters, updates, states."""

Key: TypeAlias = int | jax.Array
"""A seed, or a threefry key (typed, or raw ``uint32[2]``)."""

ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule
"""A learning rate: a number, or a function of the step count."""

DimensionNumbers: TypeAlias = PyTree | Callable[[PyTree], PyTree]
"""``optax.contrib.MuonDimensionNumbers``, a tree or prefix tree of them, or a callable."""

Projector: TypeAlias = Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array]
"""``(key, gradient [m, n], rank, previous_basis [m, r]) -> basis [m, r]``."""
