"""Costs of updates on slices of TPUs: layouts, the table, and one compiled program."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import pods
from experiments.models import scanned
from experiments.models.presets import PRESETS
from experiments.trainer.config import ConfigError

ROOT = Path(__file__).parents[3]


def test_the_page_has_the_table_of_the_result_file():
    rows = json.loads((ROOT / "experiments/results/pods.json").read_text())["rows"]
    assert pods.table(rows) in (ROOT / "docs/pods.md").read_text()


def test_layouts_shard_the_width_or_the_layers():
    _, params = scanned.describe(pods.MODEL)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    found = {
        layout: {
            "/".join(entry.key for entry in path): sharding.spec
            for path, sharding in jax.tree_util.tree_flatten_with_path(
                pods.shardings(params, layout, mesh)
            )[0]
        }
        for layout in pods.LAYOUTS
    }
    width, layers = found["width"], found["layers"]
    assert width["layers/attn/q/kernel"] == P(None, "fsdp", None)
    assert width["layers/mlp/down/kernel"] == P(None, None, "fsdp")
    assert layers["layers/mlp/down/kernel"] == P("fsdp", None, None)
    assert width["embed/embedding"] == layers["embed/embedding"] == P(None, "fsdp")
    assert width["lm_head/kernel"] == layers["lm_head/kernel"] == P("fsdp", None)
    assert width["norm/scale"] == layers["layers/attn_norm/scale"] == P()


def test_an_unknown_program_is_named():
    with pytest.raises(ConfigError, match=r"update, SGD.*update, GUM"):
        pods.main(["--programs=update, SGD"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
def test_an_update_on_four_chips(monkeypatch, tmp_path):
    """AdamW sends nothing, Muon's Newton-Schulz gathers where the width is sharded."""
    arch = dataclasses.replace(PRESETS["tiny"], layers=4, width=256)
    monkeypatch.setattr(pods, "MODEL", arch)
    found = {
        name: pods.measure("v5e:2x2", "width", f"update, {name}")["collective_bytes"]
        for name in ("AdamW", "Muon")
    }
    assert not found["AdamW"]
    assert sum(found["Muon"].values()) > 0
