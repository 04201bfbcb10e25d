"""The LLaMA: causality, rotary positions, grouped heads, published sizes, loss at the start."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import model
from experiments.config import Config, ConfigError

TINY = model.PRESETS["tiny"]


def logits_of(arch, tokens, seed=0):
    static, params = model.create(arch, seed=seed)
    return model.apply(static, params, tokens)


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
    np.testing.assert_allclose(grouped(x), full(x), rtol=1e-4, atol=1e-7)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    length = 40
    turned_q = model.rotary(jnp.tile(q, (1, length, 1, 1)), 10_000.0)[0, :, 0]
    turned_k = model.rotary(jnp.tile(k, (1, length, 1, 1)), 10_000.0)[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 5, 17):
        diagonal = jnp.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)  # float32 angles up to 40
    assert abs(scores[5, 0] - scores[0, 0]) > 1e-2


def test_rotary_keeps_position_zero_and_lengths():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    turned = model.rotary(x, 10_000.0)
    np.testing.assert_allclose(turned[:, 0], x[:, 0], rtol=1e-6)
    lengths = jnp.linalg.norm(turned, axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(x, axis=-1), rtol=1e-5)


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
    assert abs(model.loss(static, params, tokens) - math.log(TINY.vocab_size)) < 0.05


def test_bfloat16_computes_in_bfloat16_on_float32_weights(tokens):
    static, params = model.create(TINY, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = model.apply(static, params, tokens)
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
