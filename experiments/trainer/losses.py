"""What is minimized: from a batch to the sum of its tokens' losses, in nats, and their number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.models import llama

Sum = tuple[jax.Array, jax.Array]
# From weights and a batch to such a sum.
Loss = Callable[[llama.Params, Any], Sum]


def mean(loss: Loss) -> Callable[[llama.Params, Any], jax.Array]:
    """The mean over the tokens that count."""

    def of_batch(params: llama.Params, batch: Any) -> jax.Array:
        total, count = loss(params, batch)
        return total / count

    return of_batch


def of_windows(static: Any, params: llama.Params, window_BxL: jax.Array) -> Sum:
    """Cross-entropy of each token of a window given those before it."""
    logits_BxLxV = llama.apply(static, params, window_BxL[:, :-1])
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, window_BxL[:, 1:])
    return loss_BxL.sum(), jnp.asarray(loss_BxL.size, jnp.float32)


def of_answers(static: Any, params: llama.Params, batch: dict[str, jax.Array]) -> Sum:
    """Cross-entropy of the tokens of answers alone, in windows packed as in `data.answers`."""
    totals_B, counts_B = of_answers_by_window(static, params, batch)
    return totals_B.sum(), counts_B.sum()


def of_answers_by_window(static: Any, params: llama.Params, batch: dict[str, jax.Array]) -> Sum:
    """The same sums for each window."""
    tokens_BxL, segments_BxL = batch["tokens"], batch["segments"]
    logits_BxLxV = llama.apply(
        static, params, tokens_BxL[:, :-1], batch["positions"][:, :-1], segments_BxL[:, :-1]
    )
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxL[:, 1:])
    counts_BxL = batch["answer"][:, 1:] & (segments_BxL[:, 1:] == segments_BxL[:, :-1])
    return (loss_BxL * counts_BxL).sum(axis=1), counts_BxL.sum(axis=1).astype(jnp.float32)
