"""Losses: functions of weights and a batch that return a sum over tokens and their number.

The sum is a cross-entropy in nats. Sum and number are apart, so that parts of a batch, batches and
devices can be added up before the one division that gives the mean. Names of arrays carry their
shapes: B windows, L tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.models import llama

# (sum of losses float32[], number of tokens float32[]); by window, both are [B].
Sum = tuple[jax.Array, jax.Array]
Loss = Callable[[llama.Params, Any], Sum]


def mean(loss: Loss) -> Callable[[llama.Params, Any], jax.Array]:
    """Returns the function of weights and a batch that is the mean over the tokens that count."""

    def of_batch(params: llama.Params, batch: Any) -> jax.Array:
        total, count = loss(params, batch)
        return total / count

    return of_batch


def of_windows(static: Any, params: llama.Params, window_BxL: jax.Array) -> Sum:
    """Sums the cross-entropy of each token of windows `int32[B, L + 1]`, given those before it."""
    logits_BxLxV = llama.apply(static, params, window_BxL[:, :-1])
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, window_BxL[:, 1:])
    return loss_BxL.sum(), jnp.asarray(loss_BxL.size, jnp.float32)


def of_answers(static: Any, params: llama.Params, batch: dict[str, jax.Array]) -> Sum:
    """Sums the cross-entropy of the tokens of answers, in windows packed by `data.answers`."""
    totals_B, counts_B = of_answers_by_window(static, params, batch)
    return totals_B.sum(), counts_B.sum()


def of_answers_by_window(static: Any, params: llama.Params, batch: dict[str, jax.Array]) -> Sum:
    """Returns the sums of `of_answers` for each window, `[B]`."""
    tokens_BxL, segments_BxL = batch["tokens"], batch["segments"]
    logits_BxLxV = llama.apply(
        static, params, tokens_BxL[:, :-1], batch["positions"][:, :-1], segments_BxL[:, :-1]
    )
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxL[:, 1:])
    # A token counts if it is part of an answer and predicted from its own example, not from the end
    # of the one before it in the window.
    counts_BxL = batch["answer"][:, 1:] & (segments_BxL[:, 1:] == segments_BxL[:, :-1])
    return (loss_BxL * counts_BxL).sum(axis=1), counts_BxL.sum(axis=1).astype(jnp.float32)
