"""Sets of training runs: what is missing is run, at the same time, and nothing is lost."""

import dataclasses
import json

import pytest

from experiments import kills, runs, tune
from experiments.config import Config
from experiments.train import train


def pretrain(config, *, show):
    """Keeps the mean square of the last embedding."""
    result = train(config, show=show)
    return result, {"mean_square": float((result.params["embed"]["embedding"] ** 2).mean())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    corpus = str(kills.write_corpus(home / "corpus"))
    return Config(
        preset="tiny", steps=4, batch_size=2, rank=4, period=2, corpus=(corpus,),
        cache_dir=str(home / "cache"), validate_every=2, validation_batches=1,
    )  # fmt: skip


def configurations(base, home, **changes):
    # Of all optimizers these compile soonest.
    points = [dataclasses.replace(base, optimizer=name, **changes) for name in ("muon", "adamw")]
    return [dataclasses.replace(p, run_dir=runs.directory(str(home), p)) for p in points]


def test_a_set_is_completed_once_whoever_runs_it(base, tmp_path, capsys, monkeypatch):
    # The processes of a set compile as this one does: soon, and not for speed.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    configs = configurations(base, tmp_path / "parallel")
    together = runs.complete(configs, tmp_path / "parallel.json", jobs=2, trainer=pretrain)
    assert [e["config"]["optimizer"] for e in together] == ["muon", "adamw"]
    assert all(e["mean_square"] > 0 and [s for s, _ in e["curve"]] == [2, 4] for e in together)
    assert not list((tmp_path / "parallel").glob("*/*")), "run directories are cleared away"

    # One is there, the other missing: it is run alone, and equal to the one that ran beside it.
    out = tmp_path / "alone.json"
    out.write_text(json.dumps(together[:1]))
    capsys.readouterr()
    alone = runs.complete([*configs, configs[0]], out)
    assert "[1 of 1] adamw" in capsys.readouterr().out
    assert len(json.loads(out.read_text())) == 2 and alone[0] == alone[2] == together[0]
    assert alone[1]["validation_loss"] == pytest.approx(together[1]["validation_loss"], rel=1e-5)


def test_an_entry_from_before_an_option_has_its_default(base, tmp_path):
    config = dataclasses.replace(base, optimizer="muon")
    options = runs.identity(config)
    del options["restart"]
    out = tmp_path / "old.json"
    out.write_text(json.dumps([{"config": options, "validation_loss": 1.0}]))
    assert runs.complete([config], out)[0]["validation_loss"] == 1.0


def test_directories_tell_runs_apart(base):
    names = {
        runs.directory("x", dataclasses.replace(base, **change))
        for change in ({}, {"rank": 8}, {"seed": 1}, {"period": 3})
    }
    assert len(names) == 4
    grid = tune.Grid(optimizers=("gum", "adamw"), learning_rates=(0.1, 0.2), seeds=(0, 1))
    points = {(c.optimizer, c.learning_rate, c.seed) for c in tune.configurations(grid)}
    assert len(points) == len({c.run_dir for c in tune.configurations(grid)}) == 8


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_cores_are_shared_out(jobs):
    shares = runs._shares([0, 1], jobs)
    assert len(shares) == jobs and all(shares)
    assert {core for share in shares for core in share} == {0, 1}
