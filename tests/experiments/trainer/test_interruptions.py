"""Whole runs against signals, a second run in their directory, and disks that are full.

Each test starts the training program from the command line. Disks are small file systems in memory,
which only root can mount.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data import tokens
from experiments.models.weights import load as pretrained
from experiments.reliability import kills, material
from experiments.trainer.config import Config
from experiments.trainer.options import ConfigError

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return kills.write_corpus(tmp_path_factory.mktemp("interruptions") / "corpus")


@pytest.fixture(scope="module")
def base(corpus):
    """A directory with a corpus, and a run that was left alone and kept all its checkpoints."""
    directory = corpus.parent
    code, _, error = kills.finish(start(directory, directory / "whole", keep_checkpoints=STEPS))
    assert (code, error) == (0, "")
    return directory


def start(base: Path, run_dir: Path, **more: Any) -> subprocess.Popen:
    """A run of twelve steps with a checkpoint after each."""
    places = {"corpus": base / "corpus", "cache_dir": base / "cache", "run_dir": run_dir}
    steps = {"steps": STEPS, "checkpoint_every": 1, "validate_every": 6, "optimizer": "gum"}
    compiled = more.pop("compiled", base / "compiled")
    return kills.start(kills.SMALL | places | steps | more, compiled)


def ends_as_the_whole_one(base: Path, run_dir: Path) -> bool:
    """Whether a run, resumed, has the arrays, metrics and data of the one that was left alone."""
    code, _, error = kills.finish(start(base, run_dir, resume=True))
    assert (code, error) == (0, "")
    return kills.differences(base / "whole", run_dir, STEPS) == []


def test_sigterm_while_the_first_step_compiles_saves_that_step(base, tmp_path):
    run_dir = tmp_path / "run"
    process = start(base, run_dir, compiled=tmp_path / "nothing compiled")
    # The report is opened just before the first step; its metrics come after that.
    code, out, _ = kills.interrupt(process, signal.SIGTERM, (run_dir / "tensorboard").exists)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 1, which is saved" in out
    assert kills.newest_complete(run_dir) == 1
    assert kills.differences(base / "whole", run_dir, 1) == []
    assert ends_as_the_whole_one(base, run_dir)


def test_sigterm_while_a_checkpoint_is_written_lets_it_be_finished(base, tmp_path):
    run_dir = tmp_path / "run"

    def third_is_being_written():
        return kills.newest_complete(run_dir) >= 2 and kills.being_written(run_dir)

    code, *_ = kills.interrupt(start(base, run_dir), signal.SIGTERM, third_is_being_written)
    assert code == 128 + signal.SIGTERM
    step = kills.newest_complete(run_dir)
    assert step >= 3 and not kills.being_written(run_dir)
    assert kills.differences(base / "whole", run_dir, step) == []
    assert ends_as_the_whole_one(base, run_dir)


def test_a_second_run_in_the_directory_refuses_until_the_first_is_killed(base, tmp_path):
    run_dir = tmp_path / "run"
    first = start(base, run_dir, steps=100_000)
    try:
        while not kills.newest_complete(run_dir):
            assert first.poll() is None, kills.finish(first)
        code, _, error = kills.finish(start(base, run_dir, resume=True))
        assert (code, error.count("\n")) == (2, 1), error
        assert f"process {first.pid} on " in error and "is training in" in error
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    # The number of steps shapes the schedule, so the run goes on with its own.
    process = start(base, run_dir, steps=100_000, resume=True)
    newest = kills.newest_complete(run_dir)
    code, *_ = kills.interrupt(
        process, signal.SIGTERM, lambda: kills.newest_complete(run_dir) > newest
    )
    assert code == 128 + signal.SIGTERM


_PREPARE = """
import sys
from pathlib import Path
from experiments.data import tokens
from experiments.trainer.config import Config
corpus, cache = sys.argv[1:]
data = tokens.prepare(Config(corpus=(corpus,), cache_dir=cache or None), 300)
print(data.digest, data.directory)
"""


def prepare(corpus: Path, cache: str, **environment: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", _PREPARE, str(corpus), cache]
    return subprocess.Popen(command, cwd=kills.ROOT, env=inherited | environment, **pipes)


def test_jobs_that_need_the_same_tokens_make_them_once(corpus, tmp_path):
    home = {"HOME": str(tmp_path)}
    jobs = [prepare(corpus, str(tmp_path / "cache"), **home) for _ in range(4)]
    told = [kills.finish(job) for job in jobs]
    assert {(code, error) for code, _, error in told} == {(0, "")}
    assert len({out for _, out, _ in told}) == 1
    (made,) = (tmp_path / "cache").iterdir()
    assert told[0][1].split()[1] == str(made)


def test_without_home_the_system_knows_the_home_directory(corpus, tmp_path):
    code, out, error = kills.finish(prepare(corpus, str(tmp_path / "cache")))
    assert (code, error) == (0, "")
    assert str(tmp_path / "cache") in out


# Disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A small file system at a place."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Leaves so many bytes on a disk."""
    free = os.statvfs(place)
    with open(place / "ballast", "wb") as ballast:
        ballast.write(b"\0" * max(free.f_bavail * free.f_bsize - left, 0))


# A page is 4 KiB. At 0 nothing can be written; then the description and the metrics, the first
# events, a part of a checkpoint, and some checkpoints.
@pytest.mark.parametrize("pages", [0, 1, 2, 4, 8, 20, 60, 150])
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(
    base, tmp_path, pages
):
    with disk(tmp_path / "disk", "4m") as place:
        run_dir = place / "run"
        fill(place, pages * 4096)
        code, _, error = kills.finish(start(base, run_dir, keep_checkpoints=STEPS))
        assert (code, error.count("\n")) == (2, 1), error
        assert "No space left on device" in error and "`run_dir`" in error
        newest = kills.newest_complete(run_dir)
        assert not newest or f"the last good checkpoint is step {newest}\n" in error
        (place / "ballast").unlink()
        if newest:
            assert kills.differences(base / "whole", run_dir, newest) == []
            assert ends_as_the_whole_one(base, run_dir)
        else:
            code, _, error = kills.finish(start(base, run_dir))
            assert (code, error) == (0, "")
            assert kills.differences(base / "whole", run_dir, STEPS) == []


@pytest.mark.parametrize("pages", [0, 1, 2, 5, 9])
def test_tokens_on_a_full_disk(corpus, tmp_path, pages):
    with disk(tmp_path / "disk", "1m") as place:
        fill(place, pages * 4096)
        config = Config(corpus=(str(corpus),), cache_dir=str(place / "cache"))
        with pytest.raises(ConfigError, match=r"`cache_dir`: cannot .*No space left") as caught:
            tokens.prepare(config, 300)
        assert "\n" not in str(caught.value)
        (place / "ballast").unlink()
        assert not (place / "cache").exists() or not list((place / "cache").iterdir())
        tokens.prepare(config, 300)


def test_a_cache_that_cannot_be_written_can_be_read(corpus, tmp_path):
    with disk(tmp_path / "disk", "1m") as place:
        config = Config(corpus=(str(corpus),), cache_dir=str(place / "cache"))
        first = tokens.prepare(config, 300)
        digest, train = first.digest, np.array(first.train)
        del first
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        again = tokens.prepare(config, 300)
        assert again.digest == digest
        np.testing.assert_array_equal(again.train, train)
        with pytest.raises(ConfigError, match=r"`cache_dir`: cannot .*Read-only file system"):
            tokens.prepare(config, 290)


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_an_export_on_a_full_disk_leaves_the_model_that_was_there(tmp_path, pages):
    material.KINDS["safetensors"].make(tmp_path)
    loaded = pretrained.load(str(tmp_path))
    with disk(tmp_path / "disk", "200k") as place:
        model = place / "model"
        pretrained.save(model, loaded.params, loaded.config, loaded.tokenizer)
        before = (model / "model.safetensors").read_bytes()
        fill(place, pages * 4096)
        with pytest.raises(Exception, match="No space left"):
            pretrained.save(model, loaded.params, loaded.config, loaded.tokenizer)
        assert (model / "model.safetensors").read_bytes() == before
