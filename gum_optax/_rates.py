"""Types of learning rates and masks, and the decoupled weight decay that optimizers share.

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
"""True for the leaves that weight decay applies to: a tree, a prefix tree, or a function."""


def decoupled_decay(weight_decay: Number, mask: Mask) -> optax.GradientTransformation:
    """Returns the transformation ``U -> U + weight_decay * W``, for use before the learning rate.

    Args:
      weight_decay: a number or a traced scalar, >= 0.
      mask: the leaves that decay; None: all.
    """
    # Without decay there is nothing to run, and `update` needs no `params`. A traced value cannot
    # be compared.
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)
