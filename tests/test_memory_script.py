"""The memory tables: exact against real optimizers on a preset that fits."""

import json

import jax
import optax

from experiments import memory, model


def test_state_bytes_are_what_adamw_allocates():
    params = memory.parameter_shapes("nano")
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    sizes = memory.state_bytes("nano", memory.Config(rank=16))
    assert sizes["AdamW"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert sizes["parameters"] == 4 * model.parameter_count(params)
    assert sizes["GUM"] < sizes["Muon"] < sizes["AdamW"]


def test_writes_the_result(tmp_path, capsys):
    out = tmp_path / "memory.json"
    arguments = ["--presets", "60m", "--compiled", "--rank", "64", "--out", str(out)]
    assert memory.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["config"]["rank"] == 64
    assert set(result["state_bytes"]["60m"]) == {"parameters", "AdamW", "Muon", "GaLore", "GUM"}
    assert result["temporary_bytes"] == {}
    assert "60m" in capsys.readouterr().out
