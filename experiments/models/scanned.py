"""The LLaMA of `llama` with its layers in one loop, for models whose layers fill a device.

The weights of one role are one leaf `[layers, ...]`, so that the program has one block however many
layers there are. Memory is bounded in three places:

1. Every block is recomputed in the backward pass.
2. Attention takes `QUERIES` queries at a time: no L x L scores.
3. The loss takes `TOKENS` tokens at a time: no L x V logits.

Names have the shapes of `llama`; C is a chunk of tokens and N the number of chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from experiments.models.llama import Llama, Params
from experiments.models.presets import Architecture

QUERIES = 512
"""Number of queries whose scores against all keys exist at a time."""
TOKENS = 512
"""Number of tokens, over all windows, whose logits exist at a time."""


class Static(NamedTuple):
    """The static parts of one block, and of the modules around the blocks."""

    block: Any
    around: Any


def describe(arch: Architecture, dtype: str = "bfloat16") -> tuple[Static, Params]:
    """Returns the static parts of the model and the shapes of its weights; no array is made.

    Args:
      arch: the shape of the model.
      dtype: dtype of the weights and of the computation.
    """
    static = None

    # 1. Split the first block off the model. All blocks have its static part; the others go.
    def create() -> Params:
        # Static parts are no arrays, so `eval_shape` cannot return them.
        nonlocal static
        model = Llama(arch, jnp.dtype(dtype), nnx.Rngs(0), remat=False)
        first = model.layers[0]
        first.attn.attend = attend_by_chunks
        block, weights = nnx.split(first)
        model.layers = nnx.List([])
        around, others = nnx.split(model)
        static = Static(block, around)
        return nnx.to_pure_dict(others) | {"layers": nnx.to_pure_dict(weights)}

    params = jax.eval_shape(create)
    assert static is not None

    # 2. Stack the block's shapes: [...] -> [layers, ...].
    def leaf(like: jax.ShapeDtypeStruct, *lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *like.shape), jnp.dtype(dtype))

    layers = jax.tree.map(lambda like: leaf(like, arch.layers), params.pop("layers"))
    return static, jax.tree.map(leaf, params) | {"layers": layers}


def loss(
    static: Static,
    params: Params,
    windows_BxL: jax.Array,
    place: Callable[[jax.Array], jax.Array] = lambda x_BxLxD: x_BxLxD,
) -> jax.Array:
    """Returns the mean cross-entropy of each token given those before it, in nats.

    Args:
      static: static parts of the model, from `describe`.
      params: the weights.
      windows_BxL: token ids, `[B, L + 1]`.
      place: constrains the sharding of activations on a mesh.
    """
    around = nnx.merge(static.around, {k: v for k, v in params.items() if k != "layers"})

    # 1. One layer. The backward pass keeps its input alone.
    @jax.checkpoint
    def layer(x_BxLxD: jax.Array, weights: Params) -> jax.Array:
        weights = jax.tree.map(_in_row_major_order, weights)
        return place(nnx.merge(static.block, weights)(x_BxLxD)[0])

    # 2. All layers, in a loop over the leading axis of their weights.
    x_BxLxD = place(around.embed(windows_BxL[:, :-1]))
    x_BxLxD, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x_BxLxD, params["layers"])

    # 3. The summed loss of C tokens of each window; the logits are recomputed.
    @jax.checkpoint
    def of_chunk(x_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
        logits_BxCxV = around.logits(x_BxCxD)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxCxV, targets_BxC).sum()

    # 4. The loop over chunks, so many that all windows together have TOKENS tokens in one.
    targets_BxL = windows_BxL[:, 1:]
    chunks = jax.tree.map(partial(_chunks, size=TOKENS // len(windows_BxL)), (x_BxLxD, targets_BxL))
    total, _ = jax.lax.scan(lambda sum, c: (sum + of_chunk(*c), None), jnp.zeros(()), chunks)
    return total / targets_BxL.size


def _in_row_major_order(weight: jax.Array) -> jax.Array:
    """Constrains the weight of one layer to the memory layout that it has in the stack.

    For queries, keys and values the TPU's compiler prefers the other order of axes, and would copy
    the stacks of all layers into it: a gigabyte and a half for Llama-3-8B.
    """
    return with_layout_constraint(weight, Layout(tuple(range(weight.ndim))))


def attend_by_chunks(
    q_BxLxHxE: jax.Array,
    k_BxLxKxE: jax.Array,
    v_BxLxKxE: jax.Array,
    mask: jax.Array | None = None,
    is_causal: bool = True,
) -> jax.Array:
    """Computes causal `jax.nn.dot_product_attention` for `QUERIES` queries at a time.

    The length must be a multiple of `QUERIES`, or below it. A mask is not supported.
    """
    assert is_causal and mask is None
    length = q_BxLxHxE.shape[1]
    chunk = min(QUERIES, length)

    @jax.checkpoint
    def some(q_BxCxHxE: jax.Array, start: jax.Array) -> jax.Array:
        # Query start + i attends to the keys up to its own.
        seen_CxL = start + jnp.arange(chunk)[:, None] >= jnp.arange(length)
        mask = seen_CxL[None, None]
        return jax.nn.dot_product_attention(q_BxCxHxE, k_BxLxKxE, v_BxLxKxE, mask=mask)

    starts = jnp.arange(0, length, chunk)
    y_NxBxCxHxE = jax.lax.map(lambda pair: some(*pair), (_chunks(q_BxLxHxE, chunk), starts))
    return y_NxBxCxHxE.swapaxes(0, 1).reshape(q_BxLxHxE.shape)


def _chunks(array_BxL: jax.Array, size: int) -> jax.Array:
    """Cuts `[B, L, ...]` along L into `[N, B, C, ...]`; the sharding of the axis B is kept."""
    B, L, *rest = array_BxL.shape
    return array_BxL.reshape(B, -1, min(size, L), *rest).swapaxes(0, 1)
