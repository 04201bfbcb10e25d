"""Optimizer state of large models, against numbers computed by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import large_models
from experiments.trainer.options import ConfigError

# Published counts of parameters; cards round them to 8.03B, 7.62B, 9.24B and 70.6B.
PUBLISHED = {
    "Llama-3-8B": 8_030_261_248,
    "Qwen2.5-7B": 7_615_616_512,
    "Gemma-2-9B": 9_241_705_984,
    "Llama-3-70B": 70_553_706_496,
}

# Llama-3-8B: matrices of one layer with the short side first, 32 of each.
SIDES = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
MATRICES = 32 * sum(m * n for m, n in SIDES)
WORDS = 2 * 128_256 * 4096


@pytest.fixture(scope="module")
def state():
    """Of each optimizer for Llama-3-8B."""
    return large_models.plan(large_models.Config(), large_models.MODELS["Llama-3-8B"])["state"]


@pytest.mark.parametrize("name", large_models.MODELS)
def test_models_have_as_many_parameters_as_published(name):
    leaves = jax.tree.leaves(large_models.parameters(large_models.MODELS[name]))
    assert sum(leaf.size for leaf in leaves) == PUBLISHED[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_gum_holds_float32_bases_small_momenta_and_two_slots_of_each_role(state):
    bases = 32 * sum(4 * m * 128 for m, _ in SIDES)
    momenta = 32 * sum(2 * 128 * n for _, n in SIDES)
    slots = sum(2 * 2 * m * n for m, n in SIDES)
    moments = 4 * (PUBLISHED["Llama-3-8B"] - MATRICES)
    # Two int32 for the slots of each role; step, period, key, and the step of AdamW.
    small = len(SIDES) * 8 + 20
    assert state["GUM"] == {
        "bytes": bases + momenta + slots + moments + small,
        "embedding_and_head_bytes": 4 * WORDS,
    }
    assert bases + momenta + slots == 1648 * 2**20  # 64 k, 64 v, 160 q, 160 o, 400 each of the MLP


def test_others_hold_what_they_must(state):
    total = PUBLISHED["Llama-3-8B"]
    assert state["AdamW"] == {"bytes": 4 * total + 4, "embedding_and_head_bytes": 4 * WORDS}
    counters = 1000  # steps, keys, coefficients: less than this
    muon = 2 * MATRICES + 4 * (total - MATRICES)
    assert 0 <= state["Muon"]["bytes"] - muon < counters
    galore = 32 * sum(4 * m * 512 + 2 * 2 * 512 * n for m, n in SIDES) + 4 * (total - MATRICES)
    assert 0 <= state["GaLore"]["bytes"] - galore < counters


def test_embedding_and_head_are_most_of_gums_state(state):
    # Two moments in bfloat16, in 8 bits, or a factored second moment and no first one.
    each = {optimizer: row["embedding_and_head_bytes"] for optimizer, row in state.items()}
    assert each == dict.fromkeys(each, 4 * WORDS) | {
        "8-bit AdamW": 2 * WORDS, "8-bit Muon, lean": 0, "8-bit GUM, lean": 0,
    }  # fmt: skip
    assert 0.70 < 4 * WORDS / state["GUM"]["bytes"] < 0.72


def test_a_tied_head_is_counted_once():
    """One table in Gemma 2, whose head is tied to it; two in the others."""
    words = {"Qwen2.5-7B": 2 * 152_064 * 3584, "Gemma-2-9B": 256_000 * 3584}
    for name, count in words.items():
        params = large_models.parameters(dataclasses.replace(large_models.MODELS[name], layers=2))
        found = large_models.state(large_models.optimizers(large_models.Config())["GUM"], params)
        assert found["embedding_and_head_bytes"] == 4 * count


def test_lean_gum_of_8_billion_parameters_fits_into_three_quarters_of_a_gibibyte(state):
    # A byte for each number, and a scale of four bytes for each block of 128 numbers, 256 or 224.
    bases = 32 * sum(m * (128 + 4) for m, _ in SIDES)
    rows = {4096: 4096 + 4 * 16, 14336: 14336 + 4 * 64}
    momenta = 32 * sum(128 * rows[n] for _, n in SIDES)
    slots = sum(2 * m * rows[n] for m, n in SIDES)
    # Rows and columns of two tables in float32; norms as they are; counters and stand-ins.
    rest = 2 * 4 * (128_256 + 4096) + 4 * 65 * 4096
    total = state["8-bit GUM, lean"]["bytes"]
    assert 0 <= total - (bases + momenta + slots + rest) < 1000
    assert total < 0.75 * 2**30


def test_norms_and_biases_are_counted():
    gemma, qwen = (
        large_models.parameters(large_models.MODELS[n]) for n in ("Gemma-2-9B", "Qwen2.5-7B")
    )
    vectors = [leaf.shape for leaf in jax.tree.leaves(gemma) if len(leaf.shape) == 1]
    assert vectors == [(3584,)] * (4 * 42 + 1)
    assert qwen["layers"][0]["attn"]["k"]["bias"].shape == (4 * 128,)
    assert "bias" not in qwen["layers"][0]["attn"]["o"]


def test_prints_and_writes_what_was_asked_for(tmp_path, capsys, monkeypatch):
    # Two layers are enough here; each takes time to trace.
    two = dataclasses.replace(large_models.MODELS["Gemma-2-9B"], layers=2)
    monkeypatch.setitem(large_models.MODELS, "Gemma-2-9B", two)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(large_models.parameters(two)))
    out = tmp_path / "plans.json"
    arguments = ["--models", "Gemma-2-9B", "--rank", "64", "--dtype", "float32"]
    assert large_models.main([*arguments, "--out", str(out)]) == 0
    written = json.loads(out.read_text())["models"]
    assert list(written) == ["Gemma-2-9B"]
    assert written["Gemma-2-9B"]["parameter_bytes"] == 4 * parameters
    printed = capsys.readouterr().out
    assert written["Gemma-2-9B"]["plan"] in printed
    assert "GUM at rank 64, GaLore at 512" in printed


def test_an_unknown_model_is_an_error():
    with pytest.raises(ConfigError, match=r"`models`.*Gemma-2-9B"):
        large_models.main(["--models", "Gemma-2-9"])
