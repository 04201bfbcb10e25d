"""Batched greedy decoding with a key-value cache.

1. Pad the prompts of a batch on the left, so that all end in the same slot.
2. Prefill: run the model on the prompts once, and keep keys and values.
3. Append the likeliest token to each answer, and run the model on this token alone; repeat until
   every answer has ended or has its maximal length.

Padding is a segment of its own, which no token of a prompt attends to: the answer to a prompt does
not depend on the other prompts of its batch.

Shapes are written into names as in `llama`; N is the maximal length of an answer.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.models import llama as model
from experiments.trainer import mesh as meshes

_NOTHING = -1  # stands in the slots after the end of an answer
_WIDTHS = 32  # prompts are padded to a multiple of this length, so that many share a compilation


class _State(NamedTuple):
    """The state that one step of decoding hands to the next.

    Attributes:
      step: int32[], tokens chosen so far.
      answers_BxN: the tokens chosen so far, then `_NOTHING`.
      running_B: whether an answer has not ended.
      caches: keys and values of each block.
    """

    step: jax.Array
    answers_BxN: jax.Array
    running_B: jax.Array
    caches: list[model.Cache]


def greedy(
    static: Any,
    params: model.Params,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Continues each prompt, one likeliest token after the other.

    Compiles once per padded length of prompts. In the context of a mesh, each batch is divided
    among its devices.

    Args:
      static: static part of the model, from `llama.create`.
      params: its weights.
      prompts: token ids, at least one in each prompt.
      stop: tokens that end an answer.
      max_new_tokens: maximal length of an answer, at least 1.
      batch_size: prompts to answer at a time.
      progress: called after each batch with the number of prompts in it.

    Returns:
      The new tokens of each prompt, without the one that ended them.

    Raises:
      ValueError: a prompt is empty.
    """
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"`prompts`: {empty[:5]} are empty; there is nothing to continue")
    context = jax.sharding.get_mesh()
    decode = partial(_decode, static, None if context.empty else context, max_new_tokens)
    stop_tokens = np.array(sorted(stop), np.int32)
    # Prompts of similar length share a batch, so that there is little padding. The longest go
    # first.
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[]] * len(prompts)
    for first in range(0, len(by_length), batch_size):
        batch = by_length[first : first + batch_size]
        tokens_BxL, segments_BxL = _pad([prompts[i] for i in batch], min(batch_size, len(prompts)))
        answers_BxN = np.asarray(decode(params, tokens_BxL, segments_BxL, stop_tokens))
        for i, answer_N in zip(batch, answers_BxN, strict=False):  # rows of padding come last
            answers[i] = answer_N[answer_N != _NOTHING].tolist()
        if progress:
            progress(len(batch))
    return answers


def _pad(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segments of a batch, int32 [rows, L]; segment 0 is padding, 1 a prompt.

    All batches have the same number of rows, so that a smaller last one compiles no program.
    """
    width = -(-max(map(len, prompts)) // _WIDTHS) * _WIDTHS
    tokens_BxL, segments_BxL = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxL[row, width - len(prompt) :] = prompt
        segments_BxL[row, width - len(prompt) :] = 1
    return tokens_BxL, segments_BxL


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    static: Any,
    mesh: Mesh | None,
    max_new_tokens: int,
    params: model.Params,
    tokens_BxL: jax.Array,
    segments_BxL: jax.Array,
    stop: jax.Array,
) -> jax.Array:
    """Returns the answers, int32 [B, N], each followed by `_NOTHING`."""
    # 1. Divide the rows among the devices.
    divided = PartitionSpec() if mesh is None else meshes.batch_sharding(mesh).spec
    tokens_BxL, segments_BxL = (_lay(mesh, x, divided) for x in (tokens_BxL, segments_BxL))
    padding_Bx1 = (segments_BxL == 0).sum(axis=1, keepdims=True)
    dtype = nnx.merge(static, params).dtype
    # 2. Cast the weights once; the modules would do it at every step.
    llama = nnx.merge(static, jax.tree.map(lambda leaf: leaf.astype(dtype), params))

    # 3. The loop: forward with the token chosen last, choose the next.
    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & state.running_B.any()

    def step(state: _State) -> _State:
        return _choose(llama, stop, *_forward(llama, padding_Bx1, state))

    first = _choose(llama, stop, *_prefill(llama, tokens_BxL, segments_BxL, max_new_tokens))
    last = jax.lax.while_loop(unfinished, step, first)
    # 4. Replicated, as every process reads all answers.
    return _lay(mesh, last.answers_BxN, PartitionSpec())


def _lay(mesh: Mesh | None, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Constrains the sharding of an array; without a mesh, does nothing."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) if mesh else x


def _prefill(
    llama: model.Llama, tokens_BxL: jax.Array, segments_BxL: jax.Array, max_new_tokens: int
) -> tuple[_State, jax.Array]:
    """Returns the state after the prompts, with room for the answers, and the residual stream."""
    padding_Bx1 = (segments_BxL == 0).sum(axis=1, keepdims=True)
    # The first token of each prompt has position 0, whatever padding is before it.
    positions_BxL = jnp.maximum(jnp.arange(tokens_BxL.shape[1]) - padding_Bx1, 0)
    x_BxLxD, caches = llama.hidden(tokens_BxL, positions_BxL, model.same_segment(segments_BxL))
    state = _State(
        step=jnp.int32(0),
        answers_BxN=jnp.full((len(tokens_BxL), max_new_tokens), _NOTHING),
        running_B=segments_BxL.any(axis=1),  # rows of padding never run
        caches=[cache.grow(max_new_tokens) for cache in caches],
    )
    return state, x_BxLxD


def _forward(llama: model.Llama, padding_Bx1: jax.Array, state: _State) -> tuple[_State, jax.Array]:
    """Returns the state and the residual stream `[B, 1, D]` after the token chosen last."""
    # An answer that has ended continues with token 0, and its results are ignored.
    token_Bx1 = jnp.maximum(state.answers_BxN[:, state.step - 1, None], 0)
    slots_S, slot = jnp.arange(state.caches[0].k_BxSxKxE.shape[1]), state.caches[0].end
    # A token attends to the slots after the padding, up to its own.
    seen_Bx1xS = ((padding_Bx1 <= slots_S) & (slots_S <= slot))[:, None]
    x_Bx1xD, caches = llama.hidden(token_Bx1, slot - padding_Bx1, seen_Bx1xS, state.caches)
    return state._replace(caches=caches), x_Bx1xD


def _choose(llama: model.Llama, stop: jax.Array, state: _State, x_BxLxD: jax.Array) -> _State:
    """Appends the likeliest next token to each answer that has not ended."""
    token_B = jnp.argmax(llama.logits(x_BxLxD[:, -1:])[:, 0], axis=-1)
    running_B = state.running_B & ~jnp.isin(token_B, stop)
    chosen_B = jnp.where(running_B, token_B, _NOTHING)
    answers_BxN = state.answers_BxN.at[:, state.step].set(chosen_B)
    return _State(state.step + 1, answers_BxN, running_B, state.caches)
