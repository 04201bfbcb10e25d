"""Pretraining in several processes on one machine: the numbers of one process, also after kills."""

import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.models import presets
from experiments.models.weights import load as pretrained
from experiments.reliability import kills
from experiments.trainer import checkpoints, cli, finetuning
from experiments.trainer.config import Config
from experiments.trainer.pretraining import train
from tests.experiments import test_finetune
from tests.helpers import MOSTLY_UNCOMPRESSED
from tests.watched_pretrain import SMALL, Watched

pytestmark = [pytest.mark.slow, MOSTLY_UNCOMPRESSED]

DEVICES, STEPS, EVERY = 8, 12, 6
OPTIONS = {
    "preset": "tiny", "steps": STEPS, "batch_size": 8, "rank": 16, "period": 4, "log_every": 1,
    "learning_rate": 3e-3, "validation_fraction": 0.2,
    "checkpoint_every": EVERY, "keep_checkpoints": 9, "validate_every": 6, "validation_batches": 1,
    "mesh": "data=2,fsdp=2,tensor=2",
}  # fmt: skip
PATIENCE = 300  # seconds

# A job of two takes forty seconds of two cores. By `make test`, test_processes.py holds updates to
# the same law in real processes, and test_mesh.py whole training steps on a mesh.

# Processes add up what devices contribute in another order (float32); Newton-Schulz amplifies that
# where a gradient is nearly singular, and where neighbouring singular values are close, rounding
# decides which directions a basis keeps. Measured on this text of random words: 4.3e-5 on one
# machine (1.3e-5 with bases by Householder reflections), 9e-8 on another; 5e-4 on a text that
# repeats itself.
ROUNDING = 1e-4


class Job:
    """The processes of a run; as under `srun --kill-on-bad-exit`, when one dies all are ended."""

    def __init__(
        self, count: int, options: dict[str, Any], program: str = "tests.watched_pretrain"
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.run_dir: Path = options["run_dir"]
        self.run_dir.mkdir(exist_ok=True)
        self.processes = []
        for i in range(count):
            launch = {"coordinator_address": address, "num_processes": count, "process_id": i}
            words = kills.command(options | launch)[3:]
            with open(self.run_dir / f"output{i}.txt", "w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", program, *words],
                    cwd=kills.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
            self.processes.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def output(self, i: int = 0) -> str:
        return (self.run_dir / f"output{i}.txt").read_text()

    def codes(self) -> list[int]:
        """Waits for the end; the exit codes."""
        self.until(lambda: all(process.poll() is not None for process in self.processes))
        return [process.returncode for process in self.processes]

    def until(self, happened: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            failed = [p for p in self.processes if p.poll() not in (None, 0, 128 + signal.SIGTERM)]
            assert not failed and time.monotonic() < deadline, self.output()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    (directory / "corpus").mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefghijklmnop"], size=5)) for _ in range(300)]
    for i in range(60):
        (directory / "corpus" / f"{i:02}.txt").write_text(" ".join(rng.choice(words, size=150)))
    return directory


def options(base: Path, name: str, **more: Any) -> dict[str, Any]:
    places = {"corpus": base / "corpus", "cache_dir": base / "cache", "run_dir": base / name}
    return OPTIONS | places | more


def here(settings: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Trains in this process, which has as many devices."""
    patch.setitem(presets.PRESETS, "tiny", SMALL)
    patch.setattr(checkpoints, "Checkpoints", Watched)
    train(cli.parse(Config, "test", kills.command(settings)[3:]), show=False)


@pytest.fixture(scope="module")
def one_process(base):
    """The run that the others are compared with, on a mesh of the same shape.

    Its step is that of `test_mesh.py`, which has often compiled it by the time a job is done.
    """
    with pytest.MonkeyPatch.context() as patch:
        here(options(base, "one"), patch)
    return base / "one"


@pytest.fixture(scope="module")
def two_processes(base):
    with Job(2, options(base, "two")) as job:
        assert job.codes() == [0, 0], job.output()
    return base / "two"


@pytest.fixture(scope="module")
def four_processes(base):
    with Job(4, options(base, "four")) as job:
        assert job.codes() == [0, 0, 0, 0], job.output()
    return base / "four"


def values(run_dir: Path, name: str) -> dict[int, float]:
    return {r["step"]: r[name] for r in kills.sequence(run_dir) if name in r}


def assert_same_losses(run_dir: Path, expected: Path) -> None:
    for name in ("loss", "validation_loss"):
        got, want = values(run_dir, name), values(expected, name)
        assert got.keys() == want.keys()
        np.testing.assert_allclose([got[s] for s in want], [*want.values()], rtol=ROUNDING)


def views(run_dir: Path, step: int) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(run_dir.glob(f"step{step}-process*.npz"))]


@pytest.mark.parametrize("count", ["two", "four"])
def test_several_processes_have_the_losses_of_one(count, request):
    run_dir = request.getfixturevalue(f"{count}_processes")
    one_process = request.getfixturevalue("one_process")
    assert_same_losses(run_dir, one_process)
    assert values(one_process, "loss")[STEPS] < values(one_process, "loss")[1] - 0.3


@pytest.mark.parametrize(("count", "number"), [("two", 2), ("four", 4)])
def test_all_processes_draw_the_same(count, number, one_process, request):
    run_dir = request.getfixturevalue(f"{count}_processes")
    draws = []
    for step in range(EVERY, STEPS + 1, EVERY):
        (alone,), seen = views(one_process, step), views(run_dir, step)
        assert len(seen) == number
        for name in alone:
            copies = np.stack([view[name] for view in seen])
            whole = np.nanmax(copies, axis=0)
            np.testing.assert_array_equal(copies, np.where(np.isnan(copies), np.nan, whole))
            if not name.startswith("basis"):
                np.testing.assert_array_equal(copies[0], alone[name])
        draws.append([alone[name].tolist() for name in alone if name.startswith("slots")])
    assert len(draws[0]) == 2 and draws.count(draws[0]) < len(draws)


def test_only_the_first_process_writes_and_prints(two_processes):
    names = {path.name for path in two_processes.iterdir()}
    assert {"config.json", "metrics.jsonl", "loss.png", "tensorboard"} <= names
    first, second = ((two_processes / f"output{i}.txt").read_text() for i in range(2))
    assert "mesh data=2, fsdp=2, tensor=2; 2 process(es)" in first
    assert "validation loss" in first
    # Gloo's own lines come from several threads, and are sometimes mixed up.
    for word in ("mesh", "parameters", "tokens", "loss", "step", "curve", "%|"):
        assert word not in second
    assert len(list((two_processes / "tensorboard").iterdir())) == 1


def test_a_killed_job_goes_on_and_what_it_saved_suits_one_process(base, one_process, two_processes):
    """`kill -9` of one process, then SIGTERM to one: the job goes on, and at last on one device."""
    rng = random.Random(0)
    run_dir, moment = base / "killed", rng.randrange(EVERY, STEPS - 1)
    with Job(2, options(base, "killed")) as job:
        job.until(lambda: kills.newest_complete(run_dir) and kills.steps_done(run_dir) >= moment)
        job.processes[rng.randrange(2)].kill()
    assert EVERY <= kills.newest_complete(run_dir) < STEPS

    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_ino
    with Job(2, options(base, "killed", resume=True)) as job:
        job.until(lambda: metrics.stat().st_ino != before)  # it begins; the first step compiles
        job.processes[1].terminate()
        assert job.codes() == [128 + signal.SIGTERM] * 2, job.output()
        assert "stopped by SIGTERM after step" in job.output()
    stopped = kills.newest_complete(run_dir)
    assert stopped == kills.steps_done(run_dir) < STEPS
    unbroken = kills.sequence(two_processes)
    assert kills.sequence(run_dir) == [r for r in unbroken if r["step"] <= stopped]

    alone = options(base, "killed", resume=True)
    del alone["mesh"]
    with pytest.MonkeyPatch.context() as patch:
        here(alone, patch)
    assert_same_losses(run_dir, two_processes)


TUNING = {
    "steps": 6, "batch_size": 8, "accumulate": 2, "seq_len": 64, "train_examples": 100,
    "eval_examples": 6, "eval_batch_size": 4, "rank": 4, "period": 3, "learning_rate": 3e-3,
    "validate_every": 3, "validation_batches": 1, "log_every": 1, "mesh": OPTIONS["mesh"],
}  # fmt: skip


def tuning(base: Path, name: str, **more: Any) -> dict[str, Any]:
    model_dir, sums = base / "model", base / "sums.jsonl"
    if not model_dir.exists():
        test_finetune.write_model(model_dir)
        test_finetune.write_sums(sums)
    places = {"model": model_dir, "task": sums, "run_dir": base / name}
    return TUNING | places | {"export": base / f"{name}-model"} | more


def test_fine_tuning_in_two_processes_is_that_of_one(base):
    """Weights are placed, answers generated and the result exported by both together."""
    alone = tuning(base, "tuned-alone")
    words = kills.command(alone)[3:]
    outcome = finetuning.finetune(cli.parse(finetuning.Config, "test", words), show=False)
    together = tuning(base, "tuned-together")
    with Job(2, together, "experiments.finetune") as job:
        assert job.codes() == [0, 0], job.output()
    assert "right after:" in job.output(0) and "right after:" not in job.output(1)
    losses, expected = (
        [r["loss"] for r in kills.sequence(options["run_dir"]) if "loss" in r]
        for options in (together, alone)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    exported = pretrained.load(str(together["export"]))
    for mine, theirs in zip(
        jax.tree.leaves(exported.params), jax.tree.leaves(outcome.result.params), strict=True
    ):
        # An update is at most a few learning rates; float32 rounding, amplified, is far below.
        np.testing.assert_allclose(mine, theirs, atol=3e-4)


def test_weights_in_bfloat16_on_a_mesh_resume_bit_for_bit(base, monkeypatch):
    """Rounded at random, accumulated in parts, stopped after step 4 and exported."""
    more = {"weights": "bfloat16", "checkpoint_every": 4}
    whole, broken = (tuning(base, name, **more) for name in ("rounded", "rounded-broken"))
    config = cli.parse(finetuning.Config, "test", kills.command(whole)[3:])
    finetuning.finetune(config, show=False)
    config = cli.parse(finetuning.Config, "test", kills.command(broken)[3:])
    step = finetuning.loop.Report.step

    def stop_after_four(self: Any, number: int, metrics: Any) -> None:
        step(self, number, metrics)
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(finetuning.loop.Report, "step", stop_after_four)
    assert finetuning.finetune(config, show=False).after is None
    monkeypatch.undo()
    finetuning.finetune(dataclasses.replace(config, resume=True), show=False)
    assert kills.differences(whole["run_dir"], broken["run_dir"], TUNING["steps"]) == []
    one, other = (pretrained.load(str(o["export"]), dtype="bfloat16") for o in (whole, broken))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
