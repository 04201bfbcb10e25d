"""Checkpoints and caches under faults: kills, full disks, other runs, damaged files."""

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import gum_optax
from experiments.data import tokens
from experiments.reliability import kills
from experiments.trainer import compatibility, locks
from experiments.trainer.checkpoints import Checkpoints, StorageError, check_run_directory
from experiments.trainer.config import Config, change
from experiments.trainer.methods import Gum
from experiments.trainer.metrics import Report
from experiments.trainer.options import ConfigError

# What Orbax gave up goes on failing for a while after an error, in its threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """`Checkpoints` silences its threads after an error, for good."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    kills.write_corpus(directory / "corpus")
    return directory


def options(base: Path, name: str, **more: Any) -> dict[str, Any]:
    places = {"corpus": base / "corpus", "cache_dir": base / "cache", "run_dir": base / name}
    return kills.SMALL | places | {"optimizer": "gum"} | more


def wait_until(process: Any, holds: Callable[[], bool]) -> None:
    while process.poll() is None and not holds():
        time.sleep(0.001)
    assert process.poll() is None, kills.finish(process)


def start(base: Path, name: str, **more: Any):
    return kills.start(options(base, name, **more), Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


# Whole runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_through_a_full_disk_and_a_kill_while_writing(base):
    """Its end is that of a run left alone, to the bit; what was torn is never loaded."""
    run_dir = base / "broken"
    process = start(base, "broken")
    wait_until(process, lambda: kills.steps_done(run_dir) > 0)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    code, _, error = kills.finish(process)
    assert (code, error.count("\n")) == (2, 1), error
    assert "cannot write checkpoint 10 to" in error
    assert error.endswith("File too large; there is no checkpoint yet\n")
    with pytest.raises(ConfigError, match="has no checkpoint; start without `resume`"):
        check_run_directory(Config(run_dir=str(run_dir), resume=True))

    def later_one_is_being_written():
        return kills.newest_complete(run_dir) and kills.being_written(run_dir)

    process = start(base, "broken")
    code, *_ = kills.interrupt(process, signal.SIGKILL, later_one_is_being_written)
    assert code == -signal.SIGKILL
    assert kills.being_written(run_dir), "the kill came after the writing"
    lost = kills.steps_done(run_dir) - kills.newest_complete(run_dir)
    assert 0 < lost <= kills.SMALL["checkpoint_every"]

    resumed, whole = start(base, "broken", resume=True), start(base, "whole")
    for code, _, error in map(kills.finish, (resumed, whole)):
        assert (code, error) == (0, "")
    assert not kills.being_written(run_dir), "what was torn is cleared away"
    assert kills.differences(base / "whole", run_dir, kills.SMALL["steps"]) == []


# Other runs ---------------------------------------------------------------------------------------


# Made by NumPy, which compiles nothing.
STATE = jax.device_put(
    {
        "basis": {"layers.*.w": np.arange(24, dtype=np.float32).reshape(2, 4, 3)},
        "count": np.int32(7),
        "key": np.array([0, 7], np.uint32),
        "momentum": np.linspace(0, 1, 2048).astype(jnp.bfloat16).reshape(32, 64),
    }
)


@contextlib.contextmanager
def checkpoints(directory: Path, **changes: Any):
    config = Config(run_dir=str(directory), optimizer=Gum(rank=8))
    opened = Checkpoints(change(config, **changes))
    with contextlib.closing(opened):
        yield opened


@pytest.fixture
def written(tmp_path):
    """A run directory with two checkpoints."""
    with checkpoints(tmp_path) as opened:
        for step in (1, 2):
            opened.save(step, STATE, {"position": step})
    return tmp_path


def restore(directory: Path, state: Any = STATE, step: int = 2, **changes: Any) -> Any:
    with checkpoints(directory, **changes) as opened:
        return opened.restore(step, state)


def test_a_checkpoint_restores_to_the_bit(written):
    state, position = restore(written)
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        leaf.dtype for leaf in jax.tree.leaves(STATE)
    }
    assert position == {"position": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "`rank` is 4, but this run began with 8"),
        ({"seed": 1}, "`seed` is 1, but this run began with 0"),
        ({"preset": "60m"}, "`preset` is 60m, but this run began with nano"),
        ({"optimizer": "adamw"}, "`optimizer` is adamw, but this run began with gum"),
    ],
)
def test_a_checkpoint_put_into_another_run_is_refused(written, changes, message):
    """Also where its shapes fit, as after another seed."""
    with pytest.raises(ConfigError, match=message):
        restore(written, **changes)
    restore(written, steps=Config().steps, checkpoint_every=3)


OTHER_STATES = {
    "dtype": (
        {"momentum": np.asarray(STATE["momentum"], np.float32)},
        r"bfloat16\[32, 64\] .* float32",
    ),
    "shape": (
        {"basis": {"layers.*.w": np.zeros((2, 4, 2), np.float32)}},
        r"float32\[2, 4, 3\] .*\[2, 4, 2\]",
    ),
    "more": ({"extra": np.zeros(3, np.float32)}, r"`extra` is missing in the checkpoint"),
    "renamed": (
        {"basis": {"other": np.zeros((2, 4, 3), np.float32)}},
        "`basis/other` is missing in the che",
    ),
}


@pytest.mark.parametrize("other", OTHER_STATES)
def test_a_checkpoint_of_other_arrays_is_refused(written, other):
    """Orbax alone would convert another dtype without a word."""
    changes, message = OTHER_STATES[other]
    with pytest.raises(ConfigError, match=message) as caught:
        restore(written, STATE | jax.device_put(changes))
    assert "\n" not in str(caught.value)


def test_a_leaf_that_is_gone_is_noticed(written):
    with pytest.raises(ConfigError, match=r"`key` is uint32.* and missing in this run"):
        restore(written, {name: leaf for name, leaf in STATE.items() if name != "key"})


def test_another_state_version_is_refused(written, monkeypatch):
    monkeypatch.setattr(gum_optax, "STATE_VERSION", gum_optax.STATE_VERSION + 1)
    with pytest.raises(ConfigError, match=r"state of version 6, .* reads version 7"):
        restore(written)


def test_a_checkpoint_of_version_two_is_sent_to_the_gum_optax_that_wrote_it(tmp_path, monkeypatch):
    """Its description called the version a layout; the refusal comes before any array is read."""
    old = compatibility.versions() | {"gum_optax": "0.0.9"}
    with monkeypatch.context() as patch:
        patch.setattr(gum_optax, "STATE_VERSION", 2)
        patch.setattr(compatibility, "versions", lambda: old)
        with checkpoints(tmp_path) as opened:
            opened.save(2, {"dense": jnp.zeros(3)}, {})
            assert opened.description(2)["state_layout"] == 2
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path)
    assert str(caught.value) == (
        "`resume`: the checkpoint has an optimizer state of version 2, and this gum_optax reads "
        "version 6; continue the run with the gum_optax that wrote it, 0.0.9"
    )


def test_other_versions_are_named(written, monkeypatch):
    with checkpoints(written) as opened:
        description = opened.description(2)
        assert compatibility.other_versions(description) is None
        newer = compatibility.versions() | {"jax": "99"}
        monkeypatch.setattr(compatibility, "versions", lambda: newer)
        assert "-> 99; losses may" in str(compatibility.other_versions(description))


# Damage -------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, os.remove], ids=["cut", "flipped", "gone"])
def test_a_checkpoint_with_one_damaged_file_is_refused(written, damage):
    """Every file in turn, the seal too. Orbax does not see a bit that flips in an array."""
    files = [file for file in (written / "checkpoints" / "2").rglob("*") if file.is_file()]
    with checkpoints(written) as opened:
        for file in files:
            content = file.read_bytes()
            damage(file)
            with pytest.raises(ConfigError, match="is damaged") as caught:
                opened.restore(2, STATE)
            assert "the last good checkpoint is step 1; remove it to con" in str(caught.value)
            assert "\n" not in str(caught.value)
            file.write_bytes(content)
    restore(written)


def test_a_damaged_position_of_the_data_is_refused(written):
    """Any number is JSON: nothing but the seal tells that it is another one."""
    position = written / "checkpoints" / "2" / "data" / "metadata"
    position.write_text('{"position": 3}')
    with pytest.raises(ConfigError, match="data/metadata is not as it was written; the last good"):
        restore(written)


def test_the_last_good_checkpoint_is_one_that_is_good(written):
    with checkpoints(written, keep_checkpoints=3) as opened:
        opened.save(3, STATE, {})
        for step in (2, 3):
            flip(written / "checkpoints" / str(step) / "data" / "metadata")
        with pytest.raises(ConfigError) as caught:
            opened.restore(3, STATE)
        assert str(caught.value).endswith(
            "the last good checkpoint is step 1; remove it and 2 to continue from step 1"
        )
        flip(written / "checkpoints" / "1" / "data" / "metadata")
        with pytest.raises(ConfigError, match="no good earlier one"):
            opened.restore(3, STATE)


def test_a_kill_between_a_checkpoint_and_its_seal_loses_nothing(written):
    """As the run noted that the checkpoint has no seal yet, it is restored, and then sealed."""
    seal = written / "checkpoints" / "2" / "seal.json"
    sealed = seal.read_text()
    seal.unlink()
    with pytest.raises(ConfigError, match=r"seal\.json: No such file"):
        restore(written)
    (written / "unsealed").write_text("2")
    restore(written)
    assert (seal.read_text(), (written / "unsealed").exists()) == (sealed, False)


def test_a_checkpoint_from_before_seals_is_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "SEALED", "another name")
    with checkpoints(tmp_path) as opened:
        opened.save(2, STATE, {"position": 2})
    monkeypatch.undo()
    (tmp_path / "checkpoints" / "2" / "seal.json").unlink()
    assert restore(tmp_path)[1] == {"position": 2}


def test_a_description_of_a_run_that_is_damaged_is_named(written):
    config = Config(run_dir=str(written), optimizer=Gum(rank=8), resume=True)
    for content in ("", "[" * 10**5, "[1]", "{}", "\xff"):
        (written / "config.json").write_text(content, "latin-1")
        with pytest.raises(ConfigError, match=r"`resume`: cannot read .*config\.json") as caught:
            check_run_directory(config)
        assert "\n" not in str(caught.value)


def test_metrics_that_are_damaged_before_their_end_are_not_dropped(tmp_path):
    config = Config(run_dir=str(tmp_path))
    file = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 6)]
    file.write_text("".join([*lines[:2], '{"step": 3, "l\n', *lines[3:]]))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"line 3 of .*metrics\.jsonl is damaged"):
        Report(config, start=5, tokens_per_step=1, show=False)
    assert file.read_bytes() == before


# Locks --------------------------------------------------------------------------------------------


def test_two_runs_in_one_directory_are_refused(tmp_path):
    """And the directory is free again after the first."""
    config = Config(run_dir=str(tmp_path / "run"))
    with locks.of_run(config):
        with pytest.raises(ConfigError) as caught, locks.of_run(config):
            pass
        assert str(caught.value) == (
            f"`run_dir`: process {os.getpid()} on {socket.gethostname()} is training in "
            f"{config.run_dir}; wait until it ends, or choose another directory"
        )
    with locks.of_run(config):
        pass
    assert not Path(config.run_dir).exists(), "a run that wrote nothing leaves nothing"


_HOLDS = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True)"


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "lock"
    program = [sys.executable, "-I", "-c", f"{_HOLDS}; sys.stdin.read()", str(path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, **pipes) as process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        with pytest.raises(locks.LockedError), locks.held(path, wait=False):
            pass
        process.kill()
    assert path.exists()
    with locks.held(path, wait=False):
        pass
    assert not path.exists()


def test_whoever_waits_for_a_lock_gets_it_when_it_is_released(tmp_path):
    """Also where the file that it waits for is removed, and another process makes it anew."""
    order, path = [], tmp_path / "lock"

    def hold(name: int) -> None:
        with locks.held(path, wait=True):
            order.append((name, "has it"))
            time.sleep(0.01)
            order.append((name, "gives it up"))

    threads = [threading.Thread(target=hold, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [name for name, _ in order]
    assert names[::2] == names[1::2] and sorted(names[::2]) == list(range(8))


# Disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_limited_to(size: int):
    """No file grows beyond `size` bytes: what a full disk does, but for the name of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoints(written):
    with checkpoints(written) as opened:
        with files_limited_to(2048), pytest.raises(StorageError, match="File too") as caught:
            opened.save(3, STATE, {})
        assert str(caught.value).endswith("the last good checkpoint is step 2")
        assert opened.latest() == 2
    restore(written)
    with checkpoints(written) as opened:  # There is room again.
        opened.save(3, STATE, {})
    restore(written, step=3)


def test_a_directory_that_cannot_be_written_leaves_the_earlier_checkpoints(written):
    """A file is where the directory was, as when a disk is unmounted."""
    here, away = written / "checkpoints", written / "away"
    with checkpoints(written) as opened:
        here.rename(away)
        here.write_text("in the way")
        with pytest.raises(StorageError, match=r"cannot write checkpoint 3 .*: Not a directory"):
            opened.save(3, STATE, {})
        here.unlink()
        away.rename(here)
    restore(written)


def test_metrics_and_events_on_a_full_disk(tmp_path):
    """TensorBoard's own writer would wait forever here."""
    report = Report(Config(run_dir=str(tmp_path)), start=0, tokens_per_step=1, show=False)
    with files_limited_to(4096), pytest.raises(OSError, match="File too large"):
        for step in range(1, 1000):
            report.step(step, {"loss": jnp.float32(step), "grad_norm": jnp.float32(1)})
    report.close()


# Data ---------------------------------------------------------------------------------------------


def data_config(tmp_path: Path, corpus: Path) -> Config:
    return Config(corpus=(str(corpus),), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "tokenizer.json", "digest"])
def test_a_damaged_cache_is_made_again(tmp_path, name, capfd):
    config = data_config(tmp_path, kills.write_corpus(tmp_path / "corpus"))
    first = tokens.prepare(config, 300)
    train, vocabulary = np.array(first.train), first.tokenizer.to_str()
    for damage in (cut, flip, os.remove):
        damage(first.directory / name)
        again = tokens.prepare(config, 300)
        assert "were damaged and are made again" in capfd.readouterr().err
        np.testing.assert_array_equal(again.train, train)
        assert (again.tokenizer.to_str(), again.digest) == (vocabulary, first.digest)
    tokens.prepare(config, 300)
    assert capfd.readouterr().err == ""


def test_a_cache_on_a_full_disk_is_one_clear_error(tmp_path):
    config = data_config(tmp_path, kills.write_corpus(tmp_path / "corpus"))
    with (
        files_limited_to(4096),
        pytest.raises(ConfigError, match=r"`cache_dir`: cannot write .*File"),
    ):
        tokens.prepare(config, 300)
    assert list((tmp_path / "cache").iterdir()) == []
    tokens.prepare(config, 300)


def test_no_home_directory_is_one_clear_error(monkeypatch):
    """As in a container whose user has no entry among the users."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ConfigError, match="`cache_dir`: Could not determine home directory"):
        tokens.cache_directory(Config())
    assert tokens.cache_directory(Config(cache_dir="here")) == Path("here")


def test_what_a_killed_job_left_of_a_cache_is_cleared_away(tmp_path):
    config = data_config(tmp_path, kills.write_corpus(tmp_path / "corpus"))
    first = tokens.prepare(config, 300)
    flip(first.directory / "train.npy")
    (left := first.directory.with_name(f"making-{first.directory.name}-x")).mkdir()
    (left / "train.npy").write_bytes(b"half")
    assert tokens.prepare(config, 300).digest == first.digest
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.directory.name]


def write_parquet(path: Path, table: pa.Table) -> None:
    pyarrow.parquet.write_table(table, path)


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


def write_jsonl(path: Path, table: pa.Table) -> None:
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in table["text"].to_pylist()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside `datasets`, on some versions
@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_jsonl])
def test_a_corpus_cut_short_is_one_clear_error(tmp_path, write):
    kind = write.__name__.removeprefix("write_")
    file = tmp_path / f"corpus.{kind}"
    write(file, pa.table({"text": [f"{i} is a number " * 20 for i in range(100)]}))
    tokens.prepare(data_config(tmp_path, file), 300)
    cut(file)
    with pytest.raises(ConfigError, match=rf"`corpus`: cannot read .*corpus.{kind}") as caught:
        tokens.prepare(data_config(tmp_path, file), 300)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "cache")
