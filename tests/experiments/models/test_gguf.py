"""Reading a GGUF file gives the Hugging Face checkpoint from which it was made."""

import json
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.models.weights import load as pretrained
from experiments.trainer.options import ConfigError
from tests.data.parity import make as parity

# The golden vocabulary as a byte-level BPE spells it; one token is made by a merge.
TOKENS = [{" ": "Ġ", "\n": "Ċ", "}": "ab"}.get(text, text) for text in parity.VOCABULARY]
KINDS = [3 if text == "<|im_end|>" else 1 for text in TOKENS]
CHAT = [{"role": "user", "content": "ab 12"}]


def tensors_of(family):
    return load_file(parity.GOLDEN / family / "model.safetensors")


def permuted(weight, heads):
    """As llama.cpp's converter stores the rows of q and k: the two halves of a head interleaved."""
    rows = []
    for head in np.split(weight, heads):
        first, second = np.split(head, 2)
        rows += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(rows)


def write(file, family, *, kind="llama", tensors=None, quantization=None, **metadata):
    """Writes a golden checkpoint as GGUF; `__` stands for a dot in the name of further metadata."""
    config = json.loads((parity.GOLDEN / family / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model(metadata.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    for name, value in metadata.items():
        add: Any = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in (tensors or tensors_of(family)).items():
        values, role = tensor.astype(np.float32), name.split(".")[-2]
        values = permuted(values, heads[role]) if role in heads else values
        stored = names.get_name(name, (".weight",)) or name
        if quantization and role == "down_proj":
            writer.add_tensor(stored, gguf.quants.quantize(values, quantization),
                              raw_dtype=quantization)  # fmt: skip
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("family", ["llama2", "smollm2"])  # own head; tied, with grouped queries
def test_a_gguf_file_holds_the_model_it_was_made_from(family, tmp_path):
    found = pretrained.load(str(write(tmp_path / "model.gguf", family)))
    expected = pretrained.load(str(parity.GOLDEN / family))
    assert found.arch == expected.arch
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_it_can_be_saved_as_safetensors(tmp_path):
    found = pretrained.load(str(write(tmp_path / "model.gguf", "smollm2")))
    pretrained.save(tmp_path / "saved", found.params, found.config, found.tokenizer)
    again = pretrained.load(str(tmp_path / "saved"))
    assert (again.arch, again.config) == (found.arch, found.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    assert again.tokenizer.apply_chat_template(CHAT) == found.tokenizer.apply_chat_template(CHAT)


def test_quantized_tensors_are_the_numbers_they_stand_for(tmp_path):
    q8, name = gguf.GGMLQuantizationType.Q8_0, "model.layers.1.mlp.down_proj.weight"
    found = pretrained.load(str(write(tmp_path / "model.gguf", "llama2", quantization=q8)))
    kernel, exact = found.params["layers"][1]["mlp"]["down"]["kernel"], tensors_of("llama2")[name].T
    # Steps of 1/127 of the largest of each 32 numbers, which is below 1 here.
    np.testing.assert_allclose(kernel, exact, rtol=0, atol=0.5 / 127)
    assert np.abs(kernel - exact).max() > 0


def test_the_tokenizer_splits_digits_merges_and_keeps_special_tokens(tmp_path):
    tokenizer = pretrained.load(str(write(tmp_path / "model.gguf", "llama2"))).tokenizer
    text = "ab 12\n<|im_end|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokens == ["ab", "Ġ", "1", "2", "Ċ", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "ab 12\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token is None
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "ab 12<|im_end|>"


@pytest.mark.parametrize("options, text", [
    ({"kind": "qwen2"}, "has the architecture 'qwen2'; only llama is supported"),
    ({"tokenizer": "llama"}, "tokenizer is 'llama'"),
    ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'"),
    ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token is true"),
    ({"tensors": {"rope_freqs.weight": np.ones(3)}}, "rope_freqs.weight [3] is unknown"),
    ({"tensors": {"rope_freqs.weight": np.ones(3)}}, "model.norm.weight [24] is missing"),
])  # fmt: skip
def test_what_is_not_supported_is_named(options, text, tmp_path):
    file = write(tmp_path / "model.gguf", "llama2", **options)
    with pytest.raises(ConfigError) as caught:
        pretrained.load(str(file))
    assert text in str(caught.value) and str(caught.value).startswith("`model`: ")


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1])
def test_a_truncated_file_is_refused(size, tmp_path):
    file = write(tmp_path / "model.gguf", "llama2")
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ConfigError, match=r"^`model`: cannot read .*model\.gguf as GGUF"):
        pretrained.load(str(file))
