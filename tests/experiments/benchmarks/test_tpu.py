"""Training steps that the TPU's compiler compiles, on a model of one block."""

import dataclasses
import importlib.util
import json

import pytest

from experiments.benchmarks import parameters, tpu
from experiments.models.presets import PRESETS
from experiments.trainer.config import ConfigError

pytestmark = pytest.mark.slow

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`"
)


@pytest.fixture
def tiny(monkeypatch):
    """A model of one block in the place of LLaMA-1B."""
    arch = dataclasses.replace(PRESETS["tiny"], layers=1)
    monkeypatch.setitem(tpu.MODELS, "LLaMA-1B", arch)
    return arch


@needs_libtpu
def test_a_step_on_one_chip(tiny, tmp_path, capsys):
    out = tmp_path / "tpu.json"
    options = ["--models=LLaMA-1B", "--batches=4 x 1024", "--steps=AdamW", "--kinds=v5e"]
    assert tpu.main([*options, f"--out={out}"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    # Two moments of everything, in the weights' dtype, and a count.
    assert row["state_bytes"] == 2 * row["parameter_bytes"] + 4
    # Arguments are padded to the chip's tiles, and updated in place but for the loss.
    assert row["argument_bytes"] >= row["parameter_bytes"] + row["state_bytes"]
    assert row["alias_bytes"] >= row["parameter_bytes"] + row["state_bytes"]
    assert row["argument_bytes"] < row["peak_bytes"] <= row["sum_bytes"]

    # What is in the file is not compiled again.
    before = out.stat().st_mtime_ns
    assert tpu.main([*options, f"--out={out}"]) == 0
    assert out.stat().st_mtime_ns == before
    assert "AdamW" in capsys.readouterr().out


@needs_libtpu
def test_gradients_of_four_chips_are_summed(tiny):
    row = tpu.measure("LLaMA-1B", "4 x 1024", "AdamW", "4 v5e")
    sent = row["collective_bytes"]["all-reduce"]
    # Every gradient, in bfloat16; that of the head in each of the eight chunks of the loss.
    _, params = tpu.scanned.describe(tiny)
    expected = parameters.size(params) + 7 * parameters.size(params["lm_head"])
    assert expected <= sent < 1.05 * expected


def test_an_unknown_chip_is_named():
    with pytest.raises(ConfigError, match=r"v9.*v5p"):
        tpu.main(["--kinds=v9"])
