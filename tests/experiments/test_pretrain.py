"""The training program as a person runs it: interrupted, killed, resumed, mistyped."""

import dataclasses
import json
import os
import signal
import sys
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pretrain
from experiments.models.presets import PRESETS
from experiments.reliability import kills
from experiments.trainer import metrics, optimizers
from experiments.trainer.config import Config, ConfigError, Optimizer, Preset, check
from experiments.trainer.loop import Result
from experiments.trainer.recipes import RECIPES

STEPS = kills.SMALL["steps"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small corpus; beside it the cache of its tokens."""
    return kills.write_corpus(tmp_path_factory.mktemp("training") / "corpus")


def options(text, run_dir, optimizer, **more):
    places = {"corpus": text, "cache_dir": text.parent / "cache", "run_dir": run_dir}
    # Keys and values, 16 wide, are not compressed at rank 16: a step compiles sooner.
    # And one call of LAPACK sooner than a power iteration.
    projector = {"projector": "svd"} if optimizer == "gum" else {}
    return kills.SMALL | places | projector | {"optimizer": optimizer, "rank": 16} | more


def command(text, run_dir, optimizer, *more):
    return [*kills.command(options(text, run_dir, optimizer)), *map(str, more)]


def start(text, run_dir, optimizer, **more):
    compiled = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # that of all tests
    return kills.start(options(text, run_dir, optimizer, **more), compiled)


def interrupt(process, run_dir, number, after):
    """Sends a signal once the metrics show step `after`, then waits for the end."""
    return kills.interrupt(process, number, lambda: kills.steps_done(run_dir) >= after)


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """An uninterrupted run with GUM: its directory, exit code and output."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    return run_dir, *kills.finish(start(text, run_dir, "gum"))


def test_a_run_leaves_metrics_checkpoints_events_and_a_picture(unbroken):
    run_dir, code, out, error = unbroken
    assert (code, error) == (0, "")
    assert [r["step"] for r in kills.sequence(run_dir) if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in kills.sequence(run_dir) if "validation_loss" in r] == [25, 50, STEPS]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(file.stat().st_size > 1000 for file in (run_dir / "tensorboard").glob("*tfevents*"))
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"50", "60"}
    described = json.loads((run_dir / "config.json").read_text())
    assert described["config"]["optimizer"] == "gum"
    assert described["versions"]["jax"]
    assert "layers/*/attn/q/kernel" in out  # the memory plan
    assert "validation loss" in out


def test_training_lowers_the_loss(unbroken):
    losses = [record["loss"] for record in kills.sequence(unbroken[0]) if "loss" in record]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_a_run_broken_by_every_signal_has_the_losses_of_an_unbroken_one(unbroken, text, tmp_path):
    run_dir = tmp_path / "broken"
    killed = interrupt(start(text, run_dir, "gum"), run_dir, signal.SIGKILL, after=13)
    assert killed[0] == -signal.SIGKILL
    for number, after in ((signal.SIGTERM, 24), (signal.SIGINT, 40)):
        process = start(text, run_dir, "gum", resume=True)
        code, out, error = interrupt(process, run_dir, number, after)
        assert code == 128 + number, error
        assert f"stopped by {number.name} after step" in out
        assert out.rstrip().endswith("--resume")
    code, _, error = kills.finish(start(text, run_dir, "gum", resume=True))
    assert (code, error) == (0, "")
    assert kills.sequence(run_dir) == kills.sequence(unbroken[0])


@pytest.mark.slow
def test_adamw_resumes_exactly_too(text, tmp_path):
    processes = {name: start(text, tmp_path / name, "adamw") for name in ("whole", "broken")}
    interrupt(processes["broken"], tmp_path / "broken", signal.SIGTERM, after=5)
    resumed = kills.finish(start(text, tmp_path / "broken", "adamw", resume=True))
    assert (resumed[0], kills.finish(processes["whole"])[0]) == (0, 0)
    assert kills.sequence(tmp_path / "broken") == kills.sequence(tmp_path / "whole")


MISTAKES = {
    "option": (["--rnk", "3"], "--rnk, 3; did you mean --rank?"),
    "not a number": (["--rank", "many"], "--rank: invalid literal for int() with base 10: 'many'"),
    "value": (["--rank", "0"], "--rank is 0; it must be at least 1"),
    "share": (["--warmup", "1.5"], "--warmup is 1.5; it must be between 0 and 1"),
    "preset": (["--preset", "60"], "invalid choice '60' for argument '--preset'"),
    "optimizer": (["--optimizer", "gun"], "invalid choice 'gun' for argument '--optimizer'"),
    "file": (["--corpus", "nowhere.txt"], "--corpus: there is no file or directory nowhere.txt"),
    "tokenizer": (["--tokenizer", "no.json"], "--tokenizer: there is no file no.json"),
    "nothing to resume": (["--resume"], "has no checkpoint; start without --resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(mistake, tmp_path, monkeypatch, capfd):
    arguments, message = MISTAKES[mistake]
    assert run_main([*arguments, "--run-dir", str(tmp_path / "run")], monkeypatch) == 2
    out, error = capfd.readouterr()
    assert error.startswith("experiments.pretrain: error: ")
    assert message in error
    assert (error.count("\n"), out) == (1, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "already has checkpoints; add --resume"),
        (["--resume", "--seed", "1"], "--seed is 1, but this run began with 0"),
        (["--resume", "--rank", "4"], "--rank is 4, but this run began with 16"),
        (
            ["--resume", "--optimizer", "galore"],
            "--optimizer is galore, but this run began with gum",
        ),
    ],
)
def test_a_run_directory_is_for_one_run(unbroken, text, more, message, monkeypatch, capfd):
    before = kills.sequence(unbroken[0])
    arguments = command(text, unbroken[0], "gum", *more)[3:]
    assert run_main(arguments, monkeypatch) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert kills.sequence(unbroken[0]) == before


def test_a_changed_corpus_is_not_resumed(unbroken, text, monkeypatch, capfd):
    file = text / "00.txt"
    old = file.read_text()
    file.write_text("other " + old)
    try:
        assert run_main(command(text, unbroken[0], "gum", "--resume")[3:], monkeypatch) == 2
    finally:
        file.write_text(old)
    assert "has changed since this run began" in capfd.readouterr().err


def test_help_explains_every_option(monkeypatch, capfd):
    with pytest.raises(SystemExit, match="0"):
        run_main(["--help"], monkeypatch)
    text = capfd.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "Share of the steps over which the learning rate rises" in " ".join(
        text.replace("│", "").split()
    )


def run_main(arguments, monkeypatch):
    """The program in this process: the exit code."""
    from experiments import pretrain
    from experiments.trainer import cli

    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    return cli.run(pretrain.main, pretrain.PROGRAM)


def test_the_options_name_every_optimizer_and_preset():
    assert set(typing.get_args(Optimizer)) == set(optimizers.OPTIMIZERS)
    assert set(typing.get_args(Preset)) == set(PRESETS)


def test_the_schedule_warms_up_and_decays():
    rate = optimizers.schedule(Config(steps=100, learning_rate=1.0, warmup=0.1))
    values = np.asarray(jax.jit(jax.vmap(rate))(np.arange(100)))
    assert 0 < values[0] < values[5] < values[10]
    assert values.max() == values[10] == 1.0
    assert np.all(np.diff(values[10:]) < 0)
    assert 0.1 <= values[99] < 0.11


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ConfigError, match="did you mean 'gum'"):
        optimizers.build(Config(optimizer="gun"), 8)  # pyright: ignore[reportArgumentType]


def test_the_defaults_pass_the_check():
    check(Config())


def test_metrics_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 2.0}]


# Billions of tokens, and ranks.
C4 = {"60m": (1.1, 128), "130m": (2.2, 256), "350m": (6.4, 256), "1b": (13.1, 512)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_c4_experiments(name):
    tokens, rank = C4[name]
    recipe = RECIPES[name]
    check(recipe)
    assert (recipe.preset, recipe.rank, recipe.corpus) == (name, rank, ("allenai/c4:en",))
    assert recipe.steps * 512 * 256 == pytest.approx(tokens * 1e9, rel=1e-4)
    assert (recipe.batch_size, recipe.seq_len, recipe.warmup) == (512, 256, 0.1)
    assert recipe.max_tokens == round(tokens * 1e9)


def test_options_go_before_the_recipe(monkeypatch, tmp_path):
    asked = []

    def stopped(config):
        asked.append(config)
        return Result(1, signal.SIGTERM, 1.0, 1.0, 1, 1, [], {})

    monkeypatch.setattr(pretrain, "train", stopped)
    options = ["--recipe", "130m", "--rank", "64", "--corpus", "notes", "--run-dir", str(tmp_path)]
    assert pretrain.main(options) == 128 + signal.SIGTERM
    changed = {"rank": 64, "corpus": ("notes",), "run_dir": str(tmp_path)}
    assert asked == [dataclasses.replace(RECIPES["130m"], **changed)]
