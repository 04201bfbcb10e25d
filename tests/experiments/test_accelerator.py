"""The command for an accelerator: order of parts, growing files, its time limit, jobs on a CPU."""

import json
import subprocess

import jax
import pytest

from experiments import accelerator
from experiments.accelerator import Clock, Job, OutOfTime
from experiments.benchmarks import device, parameters
from experiments.reliability import kills

CPU = {"platform": "cpu"}
SMALL = [
    *("--optimizers", "adamw", "gum"),
    *("--update-presets", "tiny", "--contenders", "gum", "adamw", "Muon, 8 bits"),
    *("--rank", "8", "--repeats", "2", "--batch-size", "2", "--training-steps", "5"),
    *("--training-presets", "tiny", "--training-optimizers", "gum"),
    *("--preset", "tiny", "--runs", "GUM", "--dtype", "float32"),
]


def rows(out, part):
    return json.loads((out / f"{part}.json").read_text())["rows"]


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that are asked for, in order; each finds the same at once."""
    asked = []

    def measure(job, clock):
        clock.demand()
        asked.append(job)
        found = {"relative_difference": 1e-5, "seconds_per_step": 0.01, "device": CPU}
        return job.of | found

    monkeypatch.setattr(accelerator, "measure", measure)
    return asked


def test_parts_are_in_order_and_each_has_its_file(jobs, tmp_path, capsys):
    assert accelerator.main([*SMALL, "--steps", "7", "--out", str(tmp_path)]) == 0
    kinds = ["correctness"] * 2 + ["update"] * 3 + ["step", "pretrain"]
    assert [job.kind for job in jobs] == kinds
    assert [row["contender"] for row in rows(tmp_path, "update")] == SMALL[6:9]
    assert rows(tmp_path, "correctness")[0]["agrees"] is True
    assert jobs[-1].options["steps"] == 7
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["device"] == CPU and "device" not in written["rows"][0]
    assert "[update] preset tiny, contender gum" in capsys.readouterr().out


def test_what_is_done_when_the_time_is_up_is_kept(jobs, tmp_path, monkeypatch, capsys):
    left = iter([999.0] * 3)
    monkeypatch.setattr(Clock, "left", lambda self: next(left, 0.0))
    options = ["--parts", "correctness", "update", "--out", str(tmp_path)]
    assert accelerator.main([*SMALL, *options]) == accelerator.UNFINISHED
    assert len(rows(tmp_path, "correctness")) == 2 and len(rows(tmp_path, "update")) == 1
    assert "out of time in: update" in capsys.readouterr().out


def test_steps_of_the_comparison_fill_the_time_that_is_left(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "left", lambda self: 50.0)
    options = ["--parts", "pretraining", "--runs", "GUM", "Muon", "--out", str(tmp_path)]
    assert accelerator.main([*SMALL, *options]) == 0
    # Two runs share four fifths of 50 s, at 0.01 s a step; the tries before them have 20 steps.
    assert [job.of["run"] for job in jobs] == ["GUM", "GUM", "GUM", "Muon"]
    assert jobs[1].options["steps"] == 20
    assert 1990 <= jobs[2].options["steps"] == jobs[3].options["steps"] <= 2000


def test_a_device_that_computes_something_else_is_a_failure(tmp_path, monkeypatch):
    far = {"relative_difference": 0.5, "device": CPU}
    monkeypatch.setattr(accelerator, "measure", lambda job, clock: job.of | far)
    options = ["--parts", "correctness", "--out", str(tmp_path)]
    assert accelerator.main([*SMALL, *options]) == 1
    assert not rows(tmp_path, "correctness")[0]["agrees"]


def test_a_job_that_fails_or_takes_too_long(monkeypatch):
    def run(command, timeout, **_):
        if json.loads(command[-1])["preset"] == "1b":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nout of memory\n")

    monkeypatch.setattr(subprocess, "run", run)
    found = accelerator.measure(Job("update", {"preset": "350m"}, {"preset": "350m"}), Clock(1))
    assert found == {"preset": "350m", "error": "out of memory"}
    with pytest.raises(OutOfTime):
        accelerator.measure(Job("update", {}, {"preset": "1b"}), Clock(1))
    with pytest.raises(OutOfTime):
        accelerator.measure(Job("update", {}, {"preset": "350m"}), Clock(1e-3))


def test_on_the_cpu_updates_are_the_cpus():
    assert device.correctness("adamw", layers=1) == {"relative_difference": 0.0}


def test_an_update_is_timed_and_weighed():
    found = device.update("adamw", "tiny", 8, 1, period=10, repeats=2)
    tree = parameters.separate("tiny")
    assert found["parameter_bytes"] == parameters.size(tree)
    assert found["state_bytes"] == 2 * parameters.size(tree) + 4  # two moments and a count
    assert found["repeats"] == 2 and found["peak_bytes"] is None
    extra = (found["refresh_seconds"] - found["plain_seconds"]) / 10
    assert found["amortized_seconds"] == pytest.approx(found["plain_seconds"] + extra)


@pytest.mark.parametrize("contender", accelerator.Config.contenders)
def test_every_contender_takes_the_parameters(contender):
    tx = device._contender(contender, 8, 1)
    assert jax.eval_shape(tx.init, parameters.separate("tiny"))


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    corpus = kills.write_corpus(tmp_path / "corpus")
    options = ["--corpus", str(corpus), "--cache-dir", str(tmp_path / "cache"), "--steps", "4"]
    assert accelerator.main([*SMALL, *options, "--out", str(tmp_path / "out")]) == 0
    for part in accelerator.Config.parts:
        assert rows(tmp_path / "out", part)
    (run,) = rows(tmp_path / "out", "pretraining")
    assert len(run["curve"]) == 4 and run["curve"][-1][1] == run["validation_loss"]
