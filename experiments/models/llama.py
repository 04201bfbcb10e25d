"""A LLaMA in Flax NNX: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Each block adds attention and a gated network to the residual stream x::

    x = x + attn(norm(x))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))

Shapes are written into names: B batch, L length, S slots that are attended to, D model width,
H query heads, K key/value heads, E width of a head, V vocabulary. Frequencies and angles have half
a head's width, one for each pair of channels.

References: Touvron et al., arXiv 2302.13971; Su et al., arXiv 2104.09864 (rotary positions);
Ainslie et al., arXiv 2305.13245 (grouped-query attention).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.presets import Architecture, RopeScaling

Params = dict[str, Any]

_init = nnx.initializers.normal(0.02)

# The mesh axes that divide each axis of a weight [in, out], by the name of its module. A module
# that reads the residual stream has its input over fsdp and its output over tensor; one that writes
# to it has them the other way round. A bias is divided as the output. The embedding has its rows,
# the vocabulary, over both: with its columns over fsdp, the compiler was seen to replicate whole
# activations for the lookup of tokens. Norms are replicated.
_READS = ("q", "k", "v", "gate", "up", "lm_head")
_WRITES = ("o", "down")
MESH_AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(_READS, (("fsdp",), ("tensor",))),
    **dict.fromkeys(_WRITES, (("tensor",), ("fsdp",))),
    "embed": (("tensor", "fsdp"),),
}


def frequencies(half: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Returns the radians per position of each of `half` pairs of channels, float32 [half].

    Args:
      half: half the width of a head.
      theta: base of the frequencies, ``f_i = theta^(-i / half)``.
      scaling: slower rotations for longer windows, see `RopeScaling`.
    """
    frequency_E = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency_E
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Full turns in the original window decide: from `high` on a frequency is kept, up to `low` it
    # is divided by the factor, and in between the two are interpolated.
    turns_E = scaling.original_length * frequency_E / (2 * jnp.pi)
    kept_E = jnp.clip((turns_E - low) / (high - low), 0, 1)
    return kept_E * frequency_E + (1 - kept_E) * frequency_E / scaling.factor


def rotary(
    x_BxLxHxE: jax.Array, frequency_E: jax.Array, positions_BxL: jax.Array | None = None
) -> jax.Array:
    """Rotates each pair of channels `(i, i + E/2)` by its frequency times the position.

    Args:
      x_BxLxHxE: queries or keys.
      frequency_E: radians per position, `[E / 2]`.
      positions_BxL: positions of the tokens. None: 0, 1, 2, ...
    """
    if positions_BxL is None:
        positions_BxL = jnp.arange(x_BxLxHxE.shape[1])[None]
    # In float32 whatever the dtype of x: bfloat16 holds integers exactly only up to 256.
    angle_BxLx1xE = positions_BxL.astype(jnp.float32)[..., None, None] * frequency_E
    cos, sin = jnp.cos(angle_BxLx1xE), jnp.sin(angle_BxLx1xE)
    a, b = jnp.split(x_BxLxHxE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxLxHxE.dtype)


class Cache(NamedTuple):
    """Keys and values of the tokens that a block has seen, in the slots before `end`."""

    k_BxSxKxE: jax.Array
    v_BxSxKxE: jax.Array
    end: jax.Array | int

    def append(self, k_BxLxKxE: jax.Array, v_BxLxKxE: jax.Array) -> "Cache":
        """Returns the cache with L more slots filled; so many must be free."""
        k_BxSxKxE, v_BxSxKxE = (
            jax.lax.dynamic_update_slice_in_dim(seen, new, self.end, axis=1)
            for seen, new in ((self.k_BxSxKxE, k_BxLxKxE), (self.v_BxSxKxE, v_BxLxKxE))
        )
        return Cache(k_BxSxKxE, v_BxSxKxE, self.end + k_BxLxKxE.shape[1])

    def grow(self, slots: int) -> "Cache":
        """Returns the cache with room for `slots` further tokens."""
        k_BxSxKxE, v_BxSxKxE = (
            jnp.pad(seen, ((0, 0), (0, slots), (0, 0), (0, 0)))
            for seen in (self.k_BxSxKxE, self.v_BxSxKxE)
        )
        return Cache(k_BxSxKxE, v_BxSxKxE, self.end)


class _Keys:
    """The keys of `nnx.Rngs(seed)`, without its counter, which is an array and slow to trace."""

    def __init__(self, seed: int):
        self._key, self._counts = jax.random.key(seed), itertools.count()

    def params(self) -> jax.Array:
        return jax.random.fold_in(self._key, next(self._counts))


class Linear(nnx.Module):
    """A matrix `[in, out]` with or without bias, applied to flattened leading axes.

    With one large product, the backward pass on CPUs was measured 1.6 times as fast as with
    separate batch axes. Weights are stored in float32 and cast to `dtype` for the computation.
    """

    def __init__(
        self, fan_in: int, fan_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, bias: bool = False
    ):
        self.kernel = nnx.Param(_init(rngs.params(), (fan_in, fan_out)))
        self.bias = nnx.Param(jnp.zeros(fan_out)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # [..., in] -> [rows, in] @ [in, out] -> [..., out]
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = (rows @ self.kernel[...].astype(self.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Causal self-attention; each key/value head serves `heads / kv_heads` query heads."""

    # `scanned` puts a form in its place that holds fewer scores at a time.
    attend: Callable[..., jax.Array] = staticmethod(jax.nn.dot_product_attention)

    def __init__(self, arch: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim = arch.head_dim or arch.width // arch.heads
        self.theta, self.scaling = arch.rope_theta, arch.rope_scaling
        q_width, kv_width = arch.heads * self.head_dim, arch.kv_heads * self.head_dim
        self.q = Linear(arch.width, q_width, dtype, rngs, bias=arch.qkv_bias)
        self.k = Linear(arch.width, kv_width, dtype, rngs, bias=arch.qkv_bias)
        self.v = Linear(arch.width, kv_width, dtype, rngs, bias=arch.qkv_bias)
        self.o = Linear(q_width, arch.width, dtype, rngs)

    def __call__(
        self,
        x_BxLxD: jax.Array,
        positions_BxL: jax.Array | None = None,
        mask_BxLxS: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns the output `[B, L, D]` and the cache with the keys and values of these tokens.

        Without a cache, a token attends to itself and earlier tokens, as far as the mask allows.
        With one, the mask alone decides: its S slots are those of the cache after these tokens
        were appended.
        """
        frequency_E = frequencies(self.head_dim // 2, self.theta, self.scaling)

        def heads(y_BxLxD):
            return y_BxLxD.reshape(*y_BxLxD.shape[:2], -1, self.head_dim)

        # 1. Queries, keys and values; positions rotate the first two.
        q_BxLxHxE = rotary(heads(self.q(x_BxLxD)), frequency_E, positions_BxL)
        k_BxLxKxE = rotary(heads(self.k(x_BxLxD)), frequency_E, positions_BxL)
        v_BxLxKxE = heads(self.v(x_BxLxD))
        # 2. The keys and values to attend to.
        if cache is None:
            seen = Cache(k_BxLxKxE, v_BxLxKxE, x_BxLxD.shape[1])
        else:
            seen = cache.append(k_BxLxKxE, v_BxLxKxE)
        # 3. Attention. Scores are scaled by 1 / sqrt(E), JAX's default.
        y_BxLxHxE = self.attend(
            q_BxLxHxE,
            seen.k_BxSxKxE,
            seen.v_BxSxKxE,
            mask=None if mask_BxLxS is None else mask_BxLxS[:, None],
            is_causal=cache is None,
        )
        return self.o(y_BxLxHxE.reshape(*x_BxLxD.shape[:2], -1)), seen


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = Linear(arch.width, arch.hidden, dtype, rngs)
        self.up = Linear(arch.width, arch.hidden, dtype, rngs)
        self.down = Linear(arch.hidden, arch.width, dtype, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x_BxLxD)) * self.up(x_BxLxD))


class Block(nnx.Module):
    """Attention and SwiGLU, each on normalized input and added to the residual stream."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_norm = _norm(arch, dtype, rngs)
        self.attn = Attention(arch, dtype, rngs)
        self.mlp_norm = _norm(arch, dtype, rngs)
        self.mlp = SwiGLU(arch, dtype, rngs)

    def __call__(
        self,
        x_BxLxD: jax.Array,
        positions_BxL: jax.Array | None = None,
        mask_BxLxS: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns the residual stream after this block and the cache of its attention."""
        y_BxLxD, seen = self.attn(self.attn_norm(x_BxLxD), positions_BxL, mask_BxLxS, cache)
        x_BxLxD = x_BxLxD + y_BxLxD
        return x_BxLxD + self.mlp(self.mlp_norm(x_BxLxD)), seen


def _recomputed(block: Block, *arguments: Any) -> Any:
    """Calls a block so that its backward pass recomputes everything between input and output.

    It uses `jax.checkpoint` because `nnx.remat` refuses a model that was split outside of the trace
    in which it runs.
    """
    static, state = nnx.split(block)
    return jax.checkpoint(lambda state, *args: nnx.merge(static, state)(*args))(state, *arguments)


class Llama(nnx.Module):
    """The model, from tokens int `[B, L]` to logits float32 `[B, L, V]`."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs, *, remat: bool):
        self.embed = nnx.Embed(
            arch.vocab_size, arch.width, dtype=dtype, embedding_init=_init, rngs=rngs
        )
        # A list, not a scanned stack: each block has leaves of its own. `scanned` is the other
        # form.
        self.layers = nnx.List([Block(arch, dtype, rngs) for _ in range(arch.layers)])
        self.norm = _norm(arch, dtype, rngs)
        if not arch.tied:
            self.lm_head = Linear(arch.width, arch.vocab_size, dtype, rngs)
        self.tied, self.remat, self.dtype = arch.tied, remat, dtype

    def __call__(
        self,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array | None = None,
        segments_BxL: jax.Array | None = None,
    ) -> jax.Array:
        mask_BxLxL = None if segments_BxL is None else same_segment(segments_BxL)
        return self.logits(self.hidden(tokens_BxL, positions_BxL, mask_BxLxL)[0])

    def hidden(
        self,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array | None = None,
        mask_BxLxS: jax.Array | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """Returns the residual stream after the last block and the cache of each block."""
        call = _recomputed if self.remat else Block.__call__
        x_BxLxD = self.embed(tokens_BxL)
        seen = []
        for block, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x_BxLxD, cache = call(block, x_BxLxD, positions_BxL, mask_BxLxS, cache)
            seen.append(cache)
        return x_BxLxD, seen

    def logits(self, x_BxLxD: jax.Array) -> jax.Array:
        """Returns float32 logits `[B, L, V]` from the residual stream `[B, L, D]`."""
        x_BxLxD = self.norm(x_BxLxD)
        # A tied head is the transposed embedding.
        logits_BxLxV = self.embed.attend(x_BxLxD) if self.tied else self.lm_head(x_BxLxD)
        return logits_BxLxV.astype(jnp.float32)


def _norm(arch: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(arch.width, epsilon=arch.norm_eps, dtype=dtype, rngs=rngs)


def same_segment(segments_BxL: jax.Array) -> jax.Array:
    """Returns the mask `bool[B, L, L]` of pairs of tokens in the same segment."""
    return segments_BxL[:, :, None] == segments_BxL[:, None, :]


def create(
    arch: Architecture, *, dtype: str = "float32", seed: int = 0, remat: bool = False
) -> tuple[Any, Params]:
    """Makes a model with random weights.

    `apply(static, params, tokens)` runs it. Under `jax.eval_shape` no array is made.

    Args:
      arch: the shape of the model.
      dtype: dtype of the computation; weights are float32.
      seed: seed of the weights.
      remat: whether to store only the inputs of blocks for the backward pass, which recomputes all
        other activations.

    Returns:
      The static part of the model and its weights, a nested dict of arrays.
    """
    rngs: Any = _Keys(seed)
    static, state = nnx.split(Llama(arch, jnp.dtype(dtype), rngs, remat=remat))
    return static, nnx.to_pure_dict(state)


def apply(
    static: Any,
    params: Params,
    tokens_BxL: jax.Array,
    positions_BxL: jax.Array | None = None,
    segments_BxL: jax.Array | None = None,
) -> jax.Array:
    """Returns the logits, float32 `[B, L, V]`, of a model from `create`.

    Args:
      static: static part of the model, from `create`.
      params: its weights.
      tokens_BxL: token ids, one window per row.
      positions_BxL: position of each token, for the rotary embedding. None: 0, 1, 2, ...
      segments_BxL: number of the sequence in a packed window that each token is part of and
        attends to. Padding is segment 0. None: each window is one sequence.
    """
    return nnx.merge(static, params)(tokens_BxL, positions_BxL, segments_BxL)


def parameter_count(params: Params) -> int:
    """Returns the number of scalars in `params`, which may be arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
