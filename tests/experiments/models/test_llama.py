"""The LLaMA: causality, rotary positions, heads, packed windows, published sizes, first loss."""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import llama, presets
from experiments.trainer import losses
from experiments.trainer.config import Config
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import architecture

TINY = presets.PRESETS["tiny"]
ONE_BLOCK = dataclasses.replace(TINY, layers=1)
FREQUENCIES = llama.frequencies(4, 10_000.0)
APPLY = jax.jit(llama.apply, static_argnums=0)
ROTARY = jax.jit(llama.rotary)
LLAMA_3_1 = presets.RopeScaling(8.0, 1.0, 4.0, original_length=8192)


@functools.cache
def create(arch, **options):
    """A model with its weights in NumPy."""
    static, params = llama.create(arch, **options)
    return static, jax.tree.map(np.asarray, params)


def logits_of(arch, tokens):
    return np.asarray(APPLY(*create(arch), tokens))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(TINY.vocab_size, size=(2, 12), dtype=np.int32)


def test_a_future_token_changes_no_earlier_logits(tokens):
    changed = tokens.copy()
    changed[:, 7] = (tokens[:, 7] + 1) % TINY.vocab_size
    before, after = logits_of(TINY, tokens), logits_of(TINY, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(before[:, 7:] != after[:, 7:], axis=-1))


@nnx.jit
def attend(attention, x):
    return attention(x)[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_attention_with_repeated_heads(kv_heads):
    arch = dataclasses.replace(TINY, kv_heads=kv_heads)
    head_dim = arch.width // arch.heads
    grouped = llama.Attention(arch, jnp.dtype("float32"), nnx.Rngs(0))
    full = llama.Attention(
        dataclasses.replace(arch, kv_heads=arch.heads), grouped.k.dtype, nnx.Rngs(1)
    )
    assert grouped.k.kernel.shape == (arch.width, kv_heads * head_dim)
    for name in ("q", "o"):
        getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
    for name in ("k", "v"):
        kernel = np.asarray(getattr(grouped, name).kernel[...])
        split = kernel.reshape(arch.width, kv_heads, head_dim)
        repeated = np.repeat(split, arch.heads // kv_heads, axis=1)
        getattr(full, name).kernel[...] = jnp.asarray(repeated.reshape(arch.width, arch.width))
    x = np.random.default_rng(1).normal(size=(2, 9, arch.width)).astype(np.float32)
    # Both sum the same float32 terms, in another order; values are near 1e-3.
    np.testing.assert_allclose(attend(grouped, x), attend(full, x), rtol=1e-4, atol=1e-7)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    length = 40
    turned_q, turned_k = (
        np.asarray(ROTARY(np.tile(x, (1, length, 1, 1)), FREQUENCIES))[0, :, 0] for x in (q, k)
    )
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 5, 17):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)  # float32 angles up to 40
    assert abs(scores[5, 0] - scores[0, 0]) > 1e-2


def test_rotary_keeps_position_zero_and_lengths():
    x = np.random.default_rng(0).normal(size=(2, 6, 2, 8)).astype(np.float32)
    turned = np.asarray(ROTARY(x, FREQUENCIES))
    np.testing.assert_allclose(turned[:, 0], x[:, 0], rtol=1e-6)
    lengths = np.linalg.norm(turned, axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_positions_may_be_given():
    x = np.random.default_rng(0).normal(size=(2, 6, 2, 8)).astype(np.float32)
    turned = np.asarray(ROTARY(x, FREQUENCIES))
    chosen = np.array([[3, 1, 4], [0, 5, 5]])
    rows = np.arange(2)[:, None]
    turned_there = ROTARY(x[rows, chosen], FREQUENCIES, chosen)
    np.testing.assert_array_equal(turned_there, turned[rows, chosen])


def scaled_frequency(frequency, scaling):
    """LLaMA 3.1's rule for one channel, by wavelength, in float64."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_length / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize("scaling", [LLAMA_3_1, presets.RopeScaling(32.0, 2.0, 8.0, 1024)])
def test_scaled_frequencies_are_those_of_llama_3_1(scaling):
    half, theta = 64, 500_000.0
    plain = [theta ** (-i / half) for i in range(half)]
    wanted = np.array([scaled_frequency(frequency, scaling) for frequency in plain])
    kept, slowed = wanted == plain, wanted == np.array(plain) / scaling.factor
    assert kept.any() and slowed.any() and not (kept | slowed).all()
    # Measured: 1.0e-6; a float32 power of a number near 5e5.
    found = jax.jit(llama.frequencies, static_argnums=(0, 1, 2))(half, theta, scaling)
    np.testing.assert_allclose(found, wanted, rtol=5e-6)


def test_biases_are_added_to_queries_keys_and_values():
    _, params = create(dataclasses.replace(ONE_BLOCK, qkv_bias=True))
    attention = params["layers"][0]["attn"]
    shapes = {name: part["bias"].shape for name, part in attention.items() if "bias" in part}
    assert shapes == {"q": (32,), "k": (16,), "v": (16,)}
    assert not any(attention[name]["bias"].any() for name in shapes)
    linear = llama.Linear(3, 5, jnp.dtype("float32"), nnx.Rngs(0), bias=True)
    plain = llama.Linear(3, 5, jnp.dtype("float32"), nnx.Rngs(0))
    x: Any = np.ones((2, 4, 3), np.float32)
    bias = np.arange(5, dtype=np.float32)
    assert linear.bias is not None
    linear.bias[...] = bias
    np.testing.assert_array_equal(linear(x), plain(x) + bias)


def test_a_bias_of_the_keys_shifts_them_before_they_are_turned(tokens):
    """Added after, it would change each score by one that depends on the query alone: nothing."""
    static, params = create(dataclasses.replace(ONE_BLOCK, qkv_bias=True))

    def biased(path, leaf):
        names = [key.key for key in path[-2:]]
        return np.full_like(leaf, 50) if names == ["k", "bias"] else leaf

    shifted = jax.tree.map_with_path(biased, params)
    before, after = (np.asarray(APPLY(static, p, tokens)) for p in (params, shifted))
    assert np.abs(after - before).max() > 1e-4


def test_the_width_of_a_head_may_be_given():
    shapes = jax.eval_shape(lambda: llama.create(dataclasses.replace(TINY, head_dim=16))[1])
    kernels = {name: part["kernel"].shape for name, part in shapes["layers"][0]["attn"].items()}
    assert kernels == {"q": (32, 64), "k": (32, 32), "v": (32, 32), "o": (64, 32)}


def test_norms_use_the_given_epsilon():
    arch = dataclasses.replace(ONE_BLOCK, norm_eps=1e6)
    logits = logits_of(arch, np.array([[1, 2]], np.int32))
    assert np.abs(logits).max() < 1e-3  # what is normalized vanishes beside it


@pytest.mark.parametrize("options", [{}, {"rope_scaling": LLAMA_3_1, "qkv_bias": True}])
def test_packed_segments_are_read_as_if_alone(options):
    arch = dataclasses.replace(ONE_BLOCK, **options)
    static, params = create(arch)
    lengths, padding = (5, 1, 9), 3
    total = sum(lengths) + padding
    parts = np.split(np.random.default_rng(0).integers(arch.vocab_size, size=15), [5, 6])
    window = np.concatenate([*parts, np.zeros(padding)]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, padding])[None]
    packed = np.asarray(APPLY(static, params, window, positions, segments))
    assert np.isfinite(packed).all()

    def unpacked(tokens):
        # Zeros follow, which none of the tokens sees, so that one program serves all.
        alone = np.pad(tokens, (0, total - len(tokens))).astype(np.int32)[None]
        return np.asarray(APPLY(static, params, alone))[:, : len(tokens)]

    alone = np.concatenate([unpacked(part) for part in parts], axis=1)
    # Logits below 0.5; measured: 6e-8, sums over more, zero, terms.
    np.testing.assert_allclose(packed[:, : sum(lengths)], alone, atol=1e-6)
    assert np.abs(unpacked(window[0]) - packed)[:, 5:].max() > 1e-3


@pytest.mark.slow
def test_remat_changes_memory_alone():
    arch = dataclasses.replace(TINY, layers=4, seq_len=128)
    size = (4, arch.seq_len + 1)
    window = np.random.default_rng(0).integers(arch.vocab_size, size=size, dtype=np.int32)
    results, temporary = [], []
    for remat in (False, True):
        static, params = create(arch, remat=remat)
        step = jax.jit(jax.value_and_grad(losses.mean(partial(losses.of_windows, static))))
        # XLA's default order on a CPU runs what it can early, and so keeps what was to be dropped.
        compiled = step.lower(params, window).compile(
            {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        )
        results.append(compiled(params, window))
        analysis: Any = compiled.memory_analysis()
        temporary.append(analysis.temp_size_in_bytes)
    # Measured: equal to the last bit; the compiler may fuse the recomputation otherwise.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *results)
    assert temporary[1] < 0.5 * temporary[0]  # measured: 5.5 MiB and 12.4 MiB


# Counted from the published shapes: 2 V d + layers (4 d^2 + 3 d f + 2 d) + d.
@pytest.mark.parametrize(
    ("preset", "count"),
    [("60m", 58_073_600), ("130m", 134_105_856), ("350m", 367_969_280), ("1b", 1_339_082_752)],
)
def test_presets_have_the_published_numbers_of_parameters(preset, count):
    arch = presets.PRESETS[preset]
    params = jax.eval_shape(lambda: llama.create(arch)[1])
    assert llama.parameter_count(params) == count


def test_nano_has_eight_blocks_of_grouped_heads():
    arch = presets.PRESETS["nano"]
    assert (arch.layers, arch.width, arch.heads, arch.kv_heads) == (8, 128, 4, 2)
    params = jax.eval_shape(lambda: llama.create(arch)[1])
    assert sorted(params["layers"]) == list(range(8))
    assert params["layers"][0]["attn"]["k"]["kernel"].shape == (128, 64)
    assert params["layers"][0]["mlp"]["down"]["kernel"].shape == (352, 128)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_a_uniform_guess(tied, tokens):
    static, params = create(dataclasses.replace(TINY, tied=tied))
    assert ("lm_head" in params) is not tied
    # Weights of 0.02 and a normalized input of width 32 give logits of deviation 0.11.
    first = jax.jit(losses.mean(partial(losses.of_windows, static)))(params, tokens)
    assert abs(first - math.log(TINY.vocab_size)) < 0.05


def test_bfloat16_computes_in_bfloat16_on_float32_weights(tokens):
    static, params = create(TINY, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = APPLY(static, params, tokens)
    assert logits.dtype == jnp.float32
    exact = logits_of(TINY, tokens)
    assert 0 < np.abs(logits - exact).max() < 0.05  # 8 bits of mantissa, logits below 1


def test_the_seed_decides_the_weights():
    first, again, other = (llama.create(TINY, seed=seed)[1] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [params["layers"][0]["attn"]["q"]["kernel"] for params in (first, other)]
    assert np.any(kernels[0] != kernels[1])


def test_options_replace_the_presets_vocabulary_and_window():
    arch = architecture(Config(preset="60m", vocab_size=1000, seq_len=64))
    assert (arch.vocab_size, arch.seq_len, arch.width) == (1000, 64, 512)


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="`preset`: there is no 'nanno'; did you mean 'nano'"):
        architecture(Config(preset="nanno"))  # pyright: ignore[reportArgumentType]
