"""What the optimizers share: from a base to a direction, from a direction to an optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from gum_optax import _checks, samplers
from gum_optax._injection import handing_over
from gum_optax._low_rank import low_rank
from gum_optax._matrices import as_matrices, partition_matrices
from gum_optax._typing import DimensionNumbers, PyTree, ScalarOrSchedule

Mask = PyTree | Callable[[PyTree], PyTree] | None


def sampled(
    make_base: Callable[..., optax.GradientTransformation],
    hyperparameters: dict[str, Any],
    full_rank_layers: int,
    sampler: samplers.Sampler | None,
    **engine: Any,
) -> optax.GradientTransformationExtraArgs:
    """The engine, its other arguments ``engine``, around ``make_base(**hyperparameters)``."""
    if sampler is None:
        sampler = samplers.fixed_size(full_rank_layers)
    return handing_over(partial(low_rank, sampler=sampler, **engine), make_base, **hyperparameters)


def optimizer(
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: float | jax.Array,
    weight_decay_mask: Mask,
    weight_dimension_numbers: DimensionNumbers | None,
    fallback: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Matrices to a direction, weight decay and learning rate; everything else to the fallback."""
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    _checks.hyperparameter("weight_decay", weight_decay)
    if fallback is None:
        fallback = optax.adamw(learning_rate, weight_decay=0.0)
    _checks.transformation("fallback", fallback)
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = (
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, weight_decay_mask)
    )
    return partition_matrices(
        lambda numbers: optax.chain(
            as_matrices(direction, numbers), decay, optax.scale_by_learning_rate(learning_rate)
        ),
        fallback,
        weight_dimension_numbers,
    )
