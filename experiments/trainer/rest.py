"""Fallbacks, the optimizers of embedding, head and norms: the values of the option `fallback`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import optax

import gum_optax
from experiments.trainer.schedules import schedule
from gum_optax import fallbacks, storages

if TYPE_CHECKING:
    from experiments.trainer.config import Training

FALLBACKS: dict[str, Callable[["Training"], gum_optax.Fallback]] = {
    "adamw": lambda run: fallbacks.adamw(b2=run.b2),
    "adamw_float8": lambda run: fallbacks.adamw(b2=run.b2, storage=storages.float8()),
    "adamw_float8_at_random": lambda run: fallbacks.adamw(
        b2=run.b2, storage=storages.at_random(storages.float8(), run.seed)
    ),
    "adamw8": lambda run: fallbacks.adamw(b2=run.b2, storage=storages.int8(256)),
    "adamw8_rows": lambda run: fallbacks.adamw(b2=run.b2, storage=storages.int8(block=None)),
    "factored": lambda run: fallbacks.factored(),
    "factored_momentum": lambda run: fallbacks.factored(0.9, storages.int8()),
    "factored_momentum_float8": lambda run: fallbacks.factored(0.9, storages.float8()),
    "columns": lambda run: fallbacks.columns(),
}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(FALLBACKS)]


def build(run: "Training") -> optax.GradientTransformation:
    """Returns the fallback of a run, with its learning rate and weight decay."""
    rate = schedule(run, run.fallback_learning_rate)
    return FALLBACKS[run.fallback](run).make(rate, run.weight_decay, decayed)


def matrix_or_rest(params: optax.Params) -> optax.Params:
    """Returns a tree like `params` of labels: hidden matrices "matrix", all else "rest"."""
    numbers = gum_optax.dimension_numbers.default(params)
    return jax.tree.map(lambda _, number: "rest" if number is None else "matrix", params, numbers)


def decayed(params: optax.Params) -> optax.Params:
    """Returns a tree like `params` of bools: weight decay applies to all but norms and biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
