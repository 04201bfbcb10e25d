"""Sets of training runs: missing runs are made, several at a time, and none is lost."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from experiments import tune
from experiments.reliability import kills
from experiments.studies import (
    ablations,
    finetuning,
    frontier,
    luck_of_draws,
    pretraining,
    tuning,
)
from experiments.trainer import checkpoints, loop, processes, sweeps
from experiments.trainer.config import Config, change
from experiments.trainer.methods import Gum
from experiments.trainer.metrics import metrics_path, read_metrics
from experiments.trainer.pretraining import train


def pretrain(config, *, show):
    """Keeps the mean square of the last embedding."""
    result = train(config, show=show)
    return result, {"mean_square": float((result.params["embed"]["embedding"] ** 2).mean())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    corpus = str(kills.write_corpus(home / "corpus"))
    return Config(
        preset="tiny", steps=4, batch_size=2, optimizer=Gum(rank=4, period=2), corpus=(corpus,),
        cache_dir=str(home / "cache"), validate_every=2, validation_batches=1,
    )  # fmt: skip


def configurations(base, home, **changes):
    # Of all optimizers this one compiles soonest.
    base = change(base, run_dir=str(home), optimizer="adamw", **changes)
    return [sweeps.in_own_directory(change(base, seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def completed(base, tmp_path_factory):
    """The entries of two runs at the same time, then of one here, and what that one printed."""
    home = tmp_path_factory.mktemp("completed")
    configs = configurations(base, home / "parallel")
    together = sweeps.complete(configs, home / "parallel.json", jobs=2, trainer=pretrain)
    assert not list((home / "parallel").glob("*/*")), "run directories are cleared away"

    # One is there, the other missing.
    out = home / "alone.json"
    out.write_text(json.dumps(together[:1]))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        alone = sweeps.complete([*configs, configs[0]], out)
    assert len(json.loads(out.read_text())) == 2
    return together, alone, printed.getvalue()


@pytest.mark.slow
def test_a_set_is_completed_once_whoever_runs_it(completed):
    together, alone, printed = completed
    assert [e["config"]["seed"] for e in together] == [0, 1]
    assert all(e["mean_square"] > 0 and [s for s, _ in e["curve"]] == [2, 4] for e in together)
    assert together[0]["validation_loss"] != together[1]["validation_loss"]

    # The one that was missing is run alone, and equal to the one that ran beside the other.
    assert "[1 of 1] adamw" in printed and "seed 1" in printed
    assert alone[0] == alone[2] == together[0]
    assert alone[1]["validation_loss"] == pytest.approx(together[1]["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(base, tmp_path, monkeypatch):
    """By SIGTERM after step 3, between two validations; nothing of it is lost or run again."""
    [config] = configurations(base, tmp_path / "stopped", checkpoint_every=100)[1:]
    unbroken = change(config, run_dir=str(tmp_path / "unbroken"))
    [whole] = sweeps.complete([unbroken], tmp_path / "unbroken.json")
    taken = []
    step = loop.Report.step

    def stop_after_three(self, number, metrics):
        step(self, number, metrics)
        taken.append(number)
        if taken == [1, 2, 3]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Report, "step", stop_after_three)
    out = tmp_path / "stopped.json"
    with pytest.raises(sweeps.Stopped):
        sweeps.complete([config], out)
    assert not out.exists() and checkpoints.newest(config) == 3
    [entry] = sweeps.complete([config], out)
    assert taken == [1, 2, 3, 4]
    assert entry["curve"] == whole["curve"] and entry["config"] == whole["config"]


@pytest.mark.slow
def test_runs_whose_parent_is_killed_save_and_end(base, tmp_path):
    """In real processes: each stops after its step, with a checkpoint, and waits for nothing."""
    configs = configurations(base, tmp_path, steps=100_000)
    parent = multiprocessing.get_context("spawn").Process(
        target=sweeps.complete, args=(configs, tmp_path / "out.json"), kwargs={"jobs": 2}
    )
    parent.start()
    try:
        # The workers of a pool are children of the parent, and hold the locks of their runs.
        deadline = time.monotonic() + 120
        while not all(metrics_path(config).exists() for config in configs):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = [int((Path(c.run_dir) / "lock").read_text().split()[1]) for c in configs]
    finally:
        parent.kill()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert all(checkpoints.newest(config) is not None for config in configs)


def test_a_set_stops_when_its_time_is_up(base, tmp_path, monkeypatch):
    """The signal comes again until the training loop has taken it; then nothing is started."""
    setitimer = signal.setitimer
    monkeypatch.setattr(signal, "setitimer", lambda w, first, every=0.0: setitimer(w, first, 0.1))
    with sweeps._until(time.time() + 0.05):
        time.sleep(0.2)  # a signal outside of the loop ends nothing
        with processes.signals(0) as stop:
            while not stop.signal:
                time.sleep(0.01)
    setitimer(signal.ITIMER_REAL, 0.0)
    assert stop.signal == signal.SIGTERM
    out = tmp_path / "none.json"
    with pytest.raises(sweeps.OutOfTime, match="the time is up: 0 of 2 runs are done"):
        sweeps.complete(configurations(base, tmp_path / "none"), out, deadline=time.time())
    assert not out.exists() and not (tmp_path / "none").exists()
    ends = sweeps.deadline_in(1.0)
    assert ends is not None and 50 < ends - time.time() <= 60 and sweeps.deadline_in(None) is None


def test_an_entry_from_before_an_option_has_its_default(base, tmp_path):
    config = change(base, optimizer="muon")
    options = sweeps.identity(config)
    del options["momentum"]
    out = tmp_path / "old.json"
    out.write_text(json.dumps([{"config": options, "validation_loss": 1.0}]))
    assert sweeps.complete([config], out)[0]["validation_loss"] == 1.0


def test_directories_tell_runs_apart(base):
    names = {
        sweeps.in_own_directory(change(base, **changes)).run_dir
        for changes in ({}, {"rank": 8}, {"seed": 1}, {"period": 3})
    }
    assert len(names) == 4
    grid = tune.Grid(optimizers=("gum", "adamw"), learning_rates=(0.1, 0.2), seeds=(0, 1))
    points = {(c.optimizer.name, c.learning_rate, c.seed) for c in tune.configurations(grid)}
    assert len(points) == len({c.run_dir for c in tune.configurations(grid)}) == 8


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_cores_are_shared_out(jobs):
    shares = sweeps._shares([0, 1], jobs)
    assert len(shares) == jobs and all(shares)
    assert {core for share in shares for core in share} == {0, 1}


def test_a_line_shows_what_a_run_does_now(base, tmp_path, capsys):
    """Speed by the records after the first one, whose seconds are those of compiling."""
    config = dataclasses.replace(base, steps=100, run_dir=str(tmp_path / "run"))
    waiting = dataclasses.replace(base, run_dir=str(tmp_path / "not yet"))
    Path(config.run_dir).mkdir()
    records = [
        {"step": 10, "loss": 5.0, "seconds": 30.0, "tokens": 640},
        {"step": 11, "loss": 4.5},
        {"step": 20, "loss": 4.25, "seconds": 31.0, "tokens": 1280},
    ]
    lines = [json.dumps(record) for record in records]
    metrics_path(config).write_text("\n".join([*lines, '{"step": 21, "lo']))
    sweeps.Progress([config, waiting]).show()
    assert capsys.readouterr().out == ("  run: step 20/100, loss 4.250, 640 tokens/s, 00:08 left\n")


def test_a_checkpoint_is_saved_every_few_minutes(base, tmp_path):
    config = change(base, optimizer="adamw", run_dir=str(tmp_path), checkpoint_every=1000)
    train(dataclasses.replace(config, checkpoint_minutes=1e-9, keep_checkpoints=9), show=False)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]")) == list("1234")
    records = read_metrics(metrics_path(config))
    timed = [record["step"] for record in records if "seconds" in record]
    assert timed == [1, 2, 3, 4]
    assert [record["tokens"] for record in records if "tokens" in record] == [64, 128, 192, 256]


@pytest.mark.parametrize(
    "study", [ablations, finetuning, frontier, luck_of_draws, pretraining, tune, tuning]
)
def test_every_study_can_be_done_in_several_sittings(study, tmp_path):
    """A sitting without time trains nothing, and says by its exit code that it is to go on."""
    kind = getattr(study, "Grid", None) or study.Config
    sitting = kind(budget_minutes=1e-9)
    run = sweeps.runner(sitting, tmp_path / "none.json")
    with pytest.raises(sweeps.OutOfTime) as stopped:
        run([sitting.base])
    assert stopped.value.code == 75 and not (tmp_path / "none.json").exists()
