"""The LLaMA: causality, rotary positions, heads, packed windows, published sizes, first loss."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import losses, model
from experiments.config import Config, ConfigError

TINY = model.PRESETS["tiny"]
FREQUENCIES = model.frequencies(4, 10_000.0)
APPLY = jax.jit(model.apply, static_argnums=0)
LLAMA_3_1 = model.RopeScaling(8.0, 1.0, 4.0, original_length=8192)


def logits_of(arch, tokens, seed=0):
    static, params = model.create(arch, seed=seed)
    return APPLY(static, params, tokens)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, 12), 0, TINY.vocab_size)


def test_a_future_token_changes_no_earlier_logits(tokens):
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % TINY.vocab_size)
    before, after = logits_of(TINY, tokens), logits_of(TINY, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(before[:, 7:] != after[:, 7:], axis=-1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_attention_with_repeated_heads(kv_heads):
    arch = dataclasses.replace(TINY, kv_heads=kv_heads)
    head_dim = arch.width // arch.heads
    grouped = model.Attention(arch, jnp.dtype("float32"), nnx.Rngs(0))
    full = model.Attention(
        dataclasses.replace(arch, kv_heads=arch.heads), grouped.k.dtype, nnx.Rngs(1)
    )
    assert grouped.k.kernel.shape == (arch.width, kv_heads * head_dim)
    for name in ("q", "o"):
        getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
    for name in ("k", "v"):
        kernel = getattr(grouped, name).kernel[...].reshape(arch.width, kv_heads, head_dim)
        repeated = jnp.repeat(kernel, arch.heads // kv_heads, axis=1)
        getattr(full, name).kernel[...] = repeated.reshape(arch.width, arch.width)
    x = jax.random.normal(jax.random.key(1), (2, 9, arch.width))
    # Both sum the same float32 terms, in another order; values are near 1e-3.
    np.testing.assert_allclose(grouped(x)[0], full(x)[0], rtol=1e-4, atol=1e-7)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    length = 40
    turned_q = model.rotary(jnp.tile(q, (1, length, 1, 1)), FREQUENCIES)[0, :, 0]
    turned_k = model.rotary(jnp.tile(k, (1, length, 1, 1)), FREQUENCIES)[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 5, 17):
        diagonal = jnp.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)  # float32 angles up to 40
    assert abs(scores[5, 0] - scores[0, 0]) > 1e-2


def test_rotary_keeps_position_zero_and_lengths():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    turned = model.rotary(x, FREQUENCIES)
    np.testing.assert_allclose(turned[:, 0], x[:, 0], rtol=1e-6)
    lengths = jnp.linalg.norm(turned, axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_positions_may_be_given():
    x = jax.random.normal(jax.random.key(0), (2, 6, 2, 8))
    turned = model.rotary(x, FREQUENCIES)
    chosen = jnp.array([[3, 1, 4], [0, 5, 5]])
    rows = jnp.arange(2)[:, None]
    turned_there = model.rotary(x[rows, chosen], FREQUENCIES, chosen)
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


@pytest.mark.parametrize("scaling", [LLAMA_3_1, model.RopeScaling(32.0, 2.0, 8.0, 1024)])
def test_scaled_frequencies_are_those_of_llama_3_1(scaling):
    half, theta = 64, 500_000.0
    plain = [theta ** (-i / half) for i in range(half)]
    wanted = np.array([scaled_frequency(frequency, scaling) for frequency in plain])
    kept, slowed = wanted == plain, wanted == np.array(plain) / scaling.factor
    assert kept.any() and slowed.any() and not (kept | slowed).all()
    # Measured: 1.0e-6; a float32 power of a number near 5e5.
    np.testing.assert_allclose(model.frequencies(half, theta, scaling), wanted, rtol=5e-6)


def test_biases_are_added_to_queries_keys_and_values():
    _, params = model.create(dataclasses.replace(TINY, qkv_bias=True))
    attention = params["layers"][0]["attn"]
    shapes = {name: part["bias"].shape for name, part in attention.items() if "bias" in part}
    assert shapes == {"q": (32,), "k": (16,), "v": (16,)}
    assert not any(attention[name]["bias"].any() for name in shapes)
    linear = model.Linear(3, 5, jnp.dtype("float32"), nnx.Rngs(0), bias=True)
    plain = model.Linear(3, 5, jnp.dtype("float32"), nnx.Rngs(0))
    x, bias = jnp.ones((2, 4, 3)), jnp.arange(5.0)
    assert linear.bias is not None
    linear.bias[...] = bias
    np.testing.assert_array_equal(linear(x), plain(x) + bias)


def test_a_bias_of_the_keys_shifts_them_before_they_are_turned(tokens):
    """Added after, it would change each score by one that depends on the query alone: nothing."""
    static, params = model.create(dataclasses.replace(TINY, qkv_bias=True))
    before = APPLY(static, params, tokens)
    for block in params["layers"].values():
        block["attn"]["k"]["bias"] = jnp.full(16, 50.0)
    assert jnp.abs(APPLY(static, params, tokens) - before).max() > 1e-4


def test_the_width_of_a_head_may_be_given():
    shapes = jax.eval_shape(lambda: model.create(dataclasses.replace(TINY, head_dim=16))[1])
    kernels = {name: part["kernel"].shape for name, part in shapes["layers"][0]["attn"].items()}
    assert kernels == {"q": (32, 64), "k": (32, 32), "v": (32, 32), "o": (64, 32)}


def test_norms_use_the_given_epsilon():
    logits = logits_of(dataclasses.replace(TINY, norm_eps=1e6), jnp.array([[1, 2]]))
    assert jnp.abs(logits).max() < 1e-3  # what is normalized vanishes beside it


@pytest.mark.parametrize("options", [{}, {"rope_scaling": LLAMA_3_1, "qkv_bias": True}])
def test_packed_segments_are_read_as_if_alone(options):
    arch = dataclasses.replace(TINY, **options)
    static, params = model.create(arch)
    lengths = (5, 1, 9)
    parts = [jax.random.randint(jax.random.key(n), (1, n), 0, arch.vocab_size) for n in lengths]
    padding = jnp.zeros((1, 3), jnp.int32)
    window = jnp.concatenate([*parts, padding], axis=1)
    positions = jnp.concatenate([jnp.arange(n) for n in (*lengths, 3)])[None]
    segments = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([*lengths, 3]))[None]
    packed = APPLY(static, params, window, positions, segments)
    assert jnp.isfinite(packed).all()
    alone = jnp.concatenate([APPLY(static, params, part) for part in parts], axis=1)
    # Logits below 0.5; measured: 6e-8, sums over more, zero, terms.
    np.testing.assert_allclose(packed[:, : sum(lengths)], alone, atol=1e-6)
    assert jnp.abs(APPLY(static, params, window) - packed)[:, 5:].max() > 1e-3


def test_remat_changes_memory_alone():
    arch = dataclasses.replace(TINY, layers=6, seq_len=128)
    window = jax.random.randint(jax.random.key(0), (4, arch.seq_len + 1), 0, arch.vocab_size)
    results, temporary = [], []
    for remat in (False, True):
        static, params = model.create(arch, remat=remat)
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
    assert temporary[1] < 0.5 * temporary[0]  # measured: 5.6 MiB and 17.0 MiB


# Counted from the published shapes: 2 V d + layers (4 d^2 + 3 d f + 2 d) + d.
@pytest.mark.parametrize(
    ("preset", "count"),
    [("60m", 58_073_600), ("130m", 134_105_856), ("350m", 367_969_280), ("1b", 1_339_082_752)],
)
def test_presets_have_the_published_numbers_of_parameters(preset, count):
    arch = model.PRESETS[preset]
    params = jax.eval_shape(lambda: model.create(arch)[1])
    assert model.parameter_count(params) == count


def test_nano_has_eight_blocks_of_grouped_heads():
    arch = model.PRESETS["nano"]
    assert (arch.layers, arch.width, arch.heads, arch.kv_heads) == (8, 128, 4, 2)
    params = jax.eval_shape(lambda: model.create(arch)[1])
    assert sorted(params["layers"]) == list(range(8))
    assert params["layers"][0]["attn"]["k"]["kernel"].shape == (128, 64)
    assert params["layers"][0]["mlp"]["down"]["kernel"].shape == (352, 128)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_a_uniform_guess(tied, tokens):
    static, params = model.create(dataclasses.replace(TINY, tied=tied))
    assert ("lm_head" in params) is not tied
    # Weights of 0.02 and a normalized input of width 32 give logits of deviation 0.11.
    first = jax.jit(losses.mean(partial(losses.of_windows, static)))(params, tokens)
    assert abs(first - math.log(TINY.vocab_size)) < 0.05


def test_bfloat16_computes_in_bfloat16_on_float32_weights(tokens):
    static, params = model.create(TINY, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = APPLY(static, params, tokens)
    assert logits.dtype == jnp.float32
    exact = logits_of(TINY, tokens)
    assert 0 < jnp.abs(logits - exact).max() < 0.05  # 8 bits of mantissa, logits below 1


def test_the_seed_decides_the_weights():
    first, again, other = (model.create(TINY, seed=seed)[1] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [params["layers"][0]["attn"]["q"]["kernel"] for params in (first, other)]
    assert np.any(kernels[0] != kernels[1])


def test_options_replace_the_presets_vocabulary_and_window():
    arch = model.architecture(Config(preset="60m", vocab_size=1000, seq_len=64))
    assert (arch.vocab_size, arch.seq_len, arch.width) == (1000, 64, 512)


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="--preset: there is no 'nanno'; did you mean 'nano'"):
        model.architecture(Config(preset="nanno"))  # pyright: ignore[reportArgumentType]
