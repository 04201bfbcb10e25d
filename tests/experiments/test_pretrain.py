"""The training program from the command line: interrupted, killed, resumed, mistyped."""

import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import experiments
from experiments import pretrain
from experiments.reliability import kills
from experiments.trainer import metrics, optimizers, pretraining, schedules
from experiments.trainer.config import Config, change, first_difference, from_record, record
from experiments.trainer.loop import Result
from experiments.trainer.methods import Gum
from experiments.trainer.options import ConfigError
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
    assert "layers.*.attn.q.kernel" in out  # the memory plan
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


@pytest.mark.slow
def test_compressed_gradients_train_as_full_ones_do(text, tmp_path):
    """In two parts of a batch, over three periods; without clipping, which sees another norm."""
    losses = {}
    for gradients in ("full", "compressed"):
        more = {"steps": 12, "period": 4, "accumulate": 2, "clip_norm": 0.0, "gradients": gradients}
        given = options(text, tmp_path / gradients, "gum", **more)
        # A refresh sees the first part alone, so bases differ unless they are independent of it.
        given |= {"projector": "random_orthonormal", "corpus": (str(text),)}
        given |= {name: str(given[name]) for name in ("cache_dir", "run_dir")}
        result = pretraining.train(change(Config(), **given), show=False)
        losses[gradients] = [record["loss"] for record in result.metrics if "loss" in record]
    assert len(losses["full"]) == 12
    # Newton-Schulz magnifies rounding; the largest difference measured is 2e-5.
    np.testing.assert_allclose(losses["compressed"], losses["full"], atol=5e-4)
    assert losses["full"][-1] < losses["full"][0] - 0.1


@pytest.mark.slow
def test_a_run_on_compressed_gradients_resumes_exactly(text, tmp_path):
    more = {"gradients": "compressed"}
    whole = start(text, tmp_path / "whole", "gum", **more)
    broken = start(text, tmp_path / "broken", "gum", **more)
    interrupt(broken, tmp_path / "broken", signal.SIGTERM, after=13)
    resumed = kills.finish(start(text, tmp_path / "broken", "gum", resume=True, **more))
    assert (resumed[0], kills.finish(whole)[0]) == (0, 0)
    assert kills.sequence(tmp_path / "broken") == kills.sequence(tmp_path / "whole")


MISTAKES = {
    "share": (["--warmup", "1.5"], "`warmup` is 1.5; it must be between 0 and 1"),
    "file": (["--corpus", "nowhere.txt"], "`corpus`: there is no file or directory nowhere.txt"),
    "tokenizer": (["--tokenizer", "no.json"], "`tokenizer`: there is no file no.json"),
    "nothing to resume": (["--resume"], "has no checkpoint; start without `resume`"),
}


MISTYPED = {
    "option": (["--stepz", "3"], "--stepz, 3 .* Perhaps you meant: --steps INT"),
    "not a number": (["--optimizer.rank", "many"], "--optimizer.rank: .*'many'"),
    "value": (["--optimizer.rank", "0"], "`rank` is 0; it must be at least 1"),
    "ranks of one band": (["--optimizer.rank-slope", "2"], "`rank_slope` is 2, which needs two or"),
    "slope of independent draws": (
        ["--optimizer.draw-slope", "0.5", "--optimizer.sampler", "bernoulli"],
        "`draw_slope` is 0.5, which needs the sampler fixed_size, and `sampler` is bernoulli",
    ),
    "preset": (["--preset", "60"], "invalid choice '60' for argument '--preset'"),
    "optimizer": (["optimizer:gun"], "optimizer:gun .*Available subcommands: optimizer:gum,"),
    "option of another": (
        ["optimizer:adamw", "--optimizer.rank", "3"],
        "misplaced options: --optimizer.rank .* in python optimizer:apollo --help",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTYPED.values(), ids=MISTYPED)
def test_what_is_mistyped_is_explained_and_exit_code_two(arguments, message, monkeypatch, capfd):
    with pytest.raises(SystemExit, match="2"):
        run_main(arguments, monkeypatch)
    out, error = capfd.readouterr()
    # In a box, which is as wide as the terminal.
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", error).split())
    assert re.search(message, text), text
    assert not out


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
        ([], "already has checkpoints; add `resume`"),
        (["--resume", "--seed", "1"], "`seed` is 1, but this run began with 0"),
        (["--resume", "--optimizer.rank", "4"], "`rank` is 4, but this run began with 16"),
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


def test_a_run_directory_is_for_one_optimizer(unbroken, text, monkeypatch, capfd):
    assert run_main(command(text, unbroken[0], "galore", "--resume")[3:], monkeypatch) == 2
    assert "`optimizer` is galore, but this run began with gum" in capfd.readouterr().err


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
    monkeypatch.setenv("COLUMNS", "500")  # so that every text is on one line
    with pytest.raises(SystemExit, match="0"):
        run_main(["--help"], monkeypatch)
    text = capfd.readouterr().out
    for field in [*dataclasses.fields(Config), *dataclasses.fields(Gum)]:
        within = "optimizer." if field in dataclasses.fields(Gum) else ""
        if field.name != "optimizer":
            assert f"--{within}{field.name}".replace("_", "-") in text
    assert all(f"optimizer:{name}".replace("_", "-") in text for name in optimizers.OPTIMIZERS)
    assert (
        "Optimizer of embedding, head and norms, under every optimizer of the hidden matrices: "
        "AdamW, AdamW with 8-bit state, Adafactor's second moment without or with momentum in "
        "8 bits, or SCALE's rule. (default: adamw)"
    ) in text


def test_help_texts_are_paragraphs():
    """Tyro keeps a line break before anything but a letter."""
    broken = []
    for file in Path(pretraining.__file__).parents[1].rglob("*.py"):
        stripped = [line.strip() for line in file.read_text().splitlines()]
        broken += [
            (file.name, line)
            for before, line in itertools.pairwise(stripped)
            if before.startswith("#: ") and line.startswith("#: ") and not line[3].isalpha()
        ]
    assert broken == []


def run_main(arguments, monkeypatch):
    """The program in this process: the exit code."""
    from experiments import pretrain
    from experiments.trainer import cli

    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    return cli.run(pretrain.main, pretrain.PROGRAM)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_record_says_all_of_an_optimizer_and_only_that(name):
    config = change(Config(corpus=("a", "b"), seed=3), optimizer=name)
    kept = json.loads(json.dumps(record(config)))
    assert kept["optimizer"] == name
    assert ("rank" in kept) == hasattr(config.optimizer, "rank")
    assert from_record(Config, kept) == config


def test_a_record_from_before_optimizers_had_their_own_options():
    old = json.loads(json.dumps(record(Config()))) | {"golore_switch": 0.5, "projector": None}
    assert first_difference(old, Config()) is None
    adamw = change(Config(), optimizer="adamw")
    assert first_difference(old | {"optimizer": "adamw", "rank": 7}, adamw) is None
    assert first_difference(old | {"rank": 7}, Config()) == "rank"
    assert from_record(Config, old | {"rank": 7}).optimizer == Gum(rank=7)
    # GaLore's own projector is the SVD, and the name of the default's was kept where it was given.
    galore = change(Config(), optimizer="galore")
    assert first_difference(old | {"optimizer": "galore"}, galore) is None
    given = old | {"optimizer": "galore", "projector": "subspace_iteration"}
    assert first_difference(given, galore) == "projector"


def test_another_optimizer_keeps_what_was_given_to_both():
    given = Config(optimizer=Gum(rank=8, residual="columns"))
    galore: Any = change(given, optimizer="galore").optimizer
    assert (galore.rank, galore.period, galore.projector) == (8, 100, "svd")
    with pytest.raises(ConfigError, match="`rank` is no option of the optimizer adamw"):
        change(given, optimizer="adamw", rank=4)


def test_options_are_checked_where_they_are_made():
    with pytest.raises(ConfigError, match="`corpus` must name at least one"):
        Config(corpus=())
    with pytest.raises(ConfigError, match="`steps` is 0; it must be at least 1"):
        Config(steps=0)


def test_the_schedule_warms_up_and_decays():
    rate = schedules.schedule(Config(steps=100, learning_rate=1.0, warmup=0.1))
    values = np.asarray(jax.jit(jax.vmap(rate))(np.arange(100)))
    assert 0 < values[0] < values[5] < values[10]
    assert values.max() == values[10] == 1.0
    assert np.all(np.diff(values[10:]) < 0)
    assert 0.1 <= values[99] < 0.11


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ConfigError, match="did you mean 'gum'"):
        change(Config(), optimizer="gun")


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
    assert (recipe.preset, recipe.corpus) == (name, ("allenai/c4:en",))
    assert recipe.optimizer == Gum(rank=rank, period=200)
    assert recipe.steps * 512 * 256 == pytest.approx(tokens * 1e9, rel=1e-4)
    assert (recipe.batch_size, recipe.seq_len, recipe.warmup) == (512, 256, 0.1)
    assert recipe.max_tokens == round(tokens * 1e9)


def test_options_go_before_the_recipe(monkeypatch, tmp_path):
    asked = []

    def stopped(config):
        asked.append(config)
        return Result(1, signal.SIGTERM, 1.0, 1.0, 1, 1, [], {})

    monkeypatch.setattr(pretraining, "train", stopped)
    options = ["--recipe", "130m", "--corpus", "notes", "--run-dir", str(tmp_path)]
    assert pretrain.main([*options, "--optimizer.rank", "64"]) == 128 + signal.SIGTERM
    changed = {"rank": 64, "corpus": ("notes",), "run_dir": str(tmp_path)}
    assert asked == [change(RECIPES["130m"], **changed)]
    # Other optimizers have the recipe's rank and period as well.
    galore: Any = pretrain.parse([*options, "optimizer:galore"]).config.optimizer
    assert (galore.name, galore.rank, galore.period) == ("galore", 256, 200)


def test_commands_start_again_with_huge_pages_and_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *parts: started.append(parts))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.pretrain", "--steps", "3"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    experiments._with_huge_pages()  # imported by a test
    monkeypatch.setattr(sys, "argv", ["-m", "--steps", "3"])
    assert not started
    experiments._with_huge_pages()
    [(program, arguments, environment)] = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == ["-m", "experiments.pretrain", "--steps", "3"]
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    experiments._with_huge_pages()
    assert len(started) == 1
