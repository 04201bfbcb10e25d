"""Learning rates and decoupled weight decay: their types, and the decay that optimizers share.

Tests: tests/library/test_fallbacks.py, tests/library/test_recipes.py.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import optax

from gum_optax._paths import PyTree

Number: TypeAlias = float | jax.Array

ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule
"""A learning rate: a number, or a function of the step count."""

Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None
"""True for the leaves that something applies to: a tree or prefix tree, or a function of one."""


def decoupled_decay(weight_decay: Number, mask: Mask) -> optax.GradientTransformation:
    """U -> U + weight_decay * W, before the learning rate."""
    # Without decay there is no transformation to run; a traced value may be anything.
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)
