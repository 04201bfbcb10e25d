"""`Architecture`, the shape of a LLaMA, and the presets that have a name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary positions for longer windows, as in LLaMA 3.1 (`rope_type: llama3`).

    A pair of channels that turns fewer than `low_freq_factor` times in `original_length` tokens
    turns `factor` times slower. One that turns more than `high_freq_factor` times is unchanged. In
    between, frequencies are interpolated. See `llama.frequencies`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a LLaMA.

    Attributes:
      width: D, width of the residual stream.
      hidden: width of the gated network (SwiGLU).
      layers: number of blocks.
      heads: H, number of query heads.
      kv_heads: K, number of key/value heads; it divides `heads`.
      vocab_size: V, rows of the embedding.
      seq_len: tokens in a training window; in a pretrained model, its context.
      tied: whether the head is the transposed embedding.
      rope_theta: base of the rotary frequencies.
      rope_scaling: slower rotary positions, if any.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    #: Width of a head. None: `width // heads`.
    head_dim: int | None = None
    #: Whether queries, keys and values have biases, as in Qwen2.5.
    qkv_bias: bool = False
    #: Added to the mean square in RMSNorm.
    norm_eps: float = 1e-6


# width, hidden, layers, heads, kv_heads. From 60m on these are the configurations of GaLore's C4
# experiments (arXiv 2403.03507).
PRESETS = {
    "tiny": Architecture(32, 88, 2, 4, 2, vocab_size=320, seq_len=32),
    "nano": Architecture(128, 352, 8, 4, 2, vocab_size=2048, seq_len=128),
    "deep": Architecture(128, 352, 16, 4, 2, vocab_size=2048, seq_len=128),
    "60m": Architecture(512, 1376, 8, 8, 8, vocab_size=32_000, seq_len=256),
    "130m": Architecture(768, 2048, 12, 12, 12, vocab_size=32_000, seq_len=256),
    "350m": Architecture(1024, 2736, 24, 16, 16, vocab_size=32_000, seq_len=256),
    "1b": Architecture(2048, 5461, 24, 32, 32, vocab_size=32_000, seq_len=256),
}
