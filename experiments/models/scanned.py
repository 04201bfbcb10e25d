"""The LLaMA of `llama` with its layers in one loop, for models whose layers fill a device.

The weights of one role lie in one leaf `[layers, ...]`, so that the program has one block however
many layers there are. Every block is recomputed in the backward pass, and nothing that grows with
the square of the tokens or with the vocabulary exists for all tokens at once. Shapes in names are
those of `llama`; C is a chunk of tokens.
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
"""Queries whose scores against all keys exist at once."""
TOKENS = 512
"""Tokens whose logits exist at once."""


class Static(NamedTuple):
    """What is no array: of one block, and of what lies around the blocks."""

    block: Any
    around: Any


def describe(arch: Architecture, dtype: str = "bfloat16") -> tuple[Static, Params]:
    """The model, and the shapes of its weights; no array is made.

    Args:
      arch: the shape of the model.
      dtype: of the weights and of the computation.
    """
    static = None

    def create() -> Params:
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
    """Mean cross-entropy of each token of a window given those before it.

    Args:
      static: what is no array.
      params: the weights.
      windows_BxL: tokens.
      place: constrains activations to their places on a mesh.
    """
    around = nnx.merge(static.around, {k: v for k, v in params.items() if k != "layers"})

    @jax.checkpoint
    def layer(x_BxLxD: jax.Array, weights: Params) -> jax.Array:
        weights = jax.tree.map(_in_row_major_order, weights)
        return place(nnx.merge(static.block, weights)(x_BxLxD)[0])

    x_BxLxD = place(around.embed(windows_BxL[:, :-1]))
    x_BxLxD, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x_BxLxD, params["layers"])

    @jax.checkpoint
    def of_chunk(x_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
        logits_BxCxV = around.logits(x_BxCxD)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxCxV, targets_BxC).sum()

    targets_BxL = windows_BxL[:, 1:]
    chunks = jax.tree.map(partial(_chunks, size=TOKENS // len(windows_BxL)), (x_BxLxD, targets_BxL))
    total, _ = jax.lax.scan(lambda sum, c: (sum + of_chunk(*c), None), jnp.zeros(()), chunks)
    return total / targets_BxL.size


def _in_row_major_order(weight: jax.Array) -> jax.Array:
    """The weight, of one layer, as it lies in the stack.

    For queries, keys and values the TPU's compiler prefers the other order, and would copy the
    stacks of all layers: a gigabyte and a half of Llama-3-8B.
    """
    return with_layout_constraint(weight, Layout(tuple(range(weight.ndim))))


def attend_by_chunks(
    q_BxLxHxE: jax.Array,
    k_BxLxKxE: jax.Array,
    v_BxLxKxE: jax.Array,
    mask: jax.Array | None = None,
    is_causal: bool = True,
) -> jax.Array:
    """`jax.nn.dot_product_attention` for some queries at a time; causal, without a mask."""
    assert is_causal and mask is None
    length = q_BxLxHxE.shape[1]
    chunk = min(QUERIES, length)

    @jax.checkpoint
    def some(q_BxCxHxE: jax.Array, start: jax.Array) -> jax.Array:
        seen_CxL = start + jnp.arange(chunk)[:, None] >= jnp.arange(length)
        mask = seen_CxL[None, None]
        return jax.nn.dot_product_attention(q_BxCxHxE, k_BxLxKxE, v_BxLxKxE, mask=mask)

    starts = jnp.arange(0, length, chunk)
    y_NxBxCxHxE = jax.lax.map(lambda pair: some(*pair), (_chunks(q_BxLxHxE, chunk), starts))
    return y_NxBxCxHxE.swapaxes(0, 1).reshape(q_BxLxHxE.shape)


def _chunks(array_BxL: jax.Array, size: int) -> jax.Array:
    """Parts of the length, `[N, B, C, ...]`; windows that are on several devices stay there."""
    B, L, *rest = array_BxL.shape
    return array_BxL.reshape(B, -1, min(size, L), *rest).swapaxes(0, 1)
