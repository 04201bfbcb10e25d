"""Kills training many times and compares the results: `python -m experiments.reliability.kills`.

Every other kill falls while a checkpoint is being written. A second run is never killed and keeps
all of its checkpoints. After each kill, the newest complete checkpoint of the killed run must have
the metrics, parameters, optimizer state and data position of the other run at that step, bit for
bit. Each resume must continue from that checkpoint, and the final states must be equal as well.
"""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import reporting
from experiments.trainer import cli
from experiments.trainer.cli import flag
from experiments.trainer.metrics import read_metrics
from experiments.trainer.optimizers import OPTIMIZERS
from experiments.trainer.options import Checked, at_least, option

PROGRAM = "experiments.reliability.kills"
ROOT = Path(__file__).parents[2]
# Options of a run of seconds. Runs with equal options share compiled programs through a cache.
SMALL: dict[str, Any] = {
    "preset": "tiny", "steps": 60, "batch_size": 4, "rank": 8, "period": 7, "log_every": 1,
    "checkpoint_every": 10, "validate_every": 25, "validation_batches": 2,
}  # fmt: skip
_PATIENCE = 240  # seconds until a process that does not end, or a moment that never comes, fails


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Kill training at random moments and compare it with an uninterrupted run."""

    #: Number of kills; every other one falls while a checkpoint is written.
    kills: int = option(20, at_least(1))
    #: Steps of the run.
    steps: int = option(400, at_least(1))
    #: Steps between two checkpoints.
    checkpoint_every: int = option(4, at_least(1))
    #: Optimizer, by its name in experiments.trainer.optimizers.
    optimizer: str = "gum"
    #: Seed of the moments at which the run is killed.
    seed: int = 0
    #: Result file.
    out: Path = Path("experiments/results/kills.json")


def write_corpus(directory: Path) -> Path:
    """Writes a small corpus, which takes no time to tokenize; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(f"document {i}\n" + f"{i * i} is {i} * {i}\n" * 40)
    return directory


def command(options: dict[str, Any]) -> list[str]:
    """Returns the command line of a training run; an option that is True has no value.

    Options of other optimizers, which this run's optimizer does not have, are left out.
    """
    name = options.get("optimizer", "gum")
    has = {key: {field.name for field in dataclasses.fields(o)} for key, o in OPTIMIZERS.items()}
    words = [sys.executable, "-m", "experiments.pretrain", f"optimizer:{name}"]
    for key, value in options.items():
        if key in has[name]:
            key = f"optimizer.{key}"
        elif key == "optimizer" or any(key in each for each in has.values()):
            continue
        words += [flag(key)] if value is True else [flag(key), str(value)]
    return words


def start(options: dict[str, Any], compiled: Path) -> subprocess.Popen:
    """Starts a training run, whose compiled programs are cached in `compiled` for the next."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(options), cwd=ROOT, env=os.environ | environment, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process to end; returns its exit code, stdout and stderr."""
    out, error = process.communicate(timeout=_PATIENCE)
    return process.returncode, out, error


def interrupt(
    process: subprocess.Popen, number: int, when: Callable[[], Any]
) -> tuple[int, str, str]:
    """Sends signal `number` as soon as `when()` holds, then waits for the process to end.

    Returns:
      Exit code, stdout and stderr.

    Raises:
      RuntimeError: the run ended before that moment, or it never came.
    """
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        # Polled every millisecond: writing a checkpoint takes only a few of them.
        if when():
            process.send_signal(number)
            return finish(process)
        time.sleep(0.001)
    process.kill()
    raise RuntimeError(f"the moment to interrupt the run never came: {finish(process)}")


def steps_done(run_dir: Path) -> int:
    """Returns the last step in the metrics, or 0."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def being_written(run_dir: Path) -> list[Path]:
    """Returns the checkpoints that are not complete."""
    # Orbax writes into a directory of this name and renames it at the end.
    return list((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def newest_complete(run_dir: Path) -> int:
    """Returns the step of the newest complete checkpoint, or 0."""
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def sequence(run_dir: Path, last: float = math.inf) -> list[dict]:
    """Returns the metrics up to step `last`, in order, without wall-clock times."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["step"] <= last]
    # Times are of several steps together, in the record of the last. A kill falls between them.
    timing = ("seconds", "tokens")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


def saved(run_dir: Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """Reads the arrays, by path, and the data position of a checkpoint."""
    directory = (run_dir / "checkpoints" / str(step)).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that it restores to the stored sharding
        tree = checkpointer.restore(directory / "state")
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    return arrays, json.loads((directory / "data" / "metadata").read_text())


def differences(one: Path, other: Path, step: int) -> list[str]:
    """Names all differences between two runs at a step at which both have a checkpoint."""
    (arrays, position), (arrays2, position2) = saved(one, step), saved(other, step)
    # Compared as bytes, since NaN is unequal to itself and -0 equals 0.
    different = [
        name
        for name in arrays.keys() | arrays2.keys()
        if name not in arrays
        or name not in arrays2
        or arrays[name].tobytes() != arrays2[name].tobytes()
    ]
    different += ["metrics"] if sequence(one, step) != sequence(other, step) else []
    return different + (["data position"] if position != position2 else [])


def kill_often(
    options: dict[str, Any], run_dir: Path, whole: Path, compiled: Path, config: Config
) -> list[dict]:
    """Starts, kills and resumes a run; compares it with the run in `whole` after each kill.

    Returns:
      A record of each kill.
    """
    rng = random.Random(config.seed)
    options = options | {"run_dir": run_dir}
    kills = []
    for number in range(config.kills):
        complete, resume = newest_complete(run_dir), {"resume": True} if number else {}
        process = start(options | resume, compiled)
        # 1. The moment: while a checkpoint is written, or up to a tenth of a second after a step.
        if number % 2:
            target = complete + config.checkpoint_every * rng.randint(1, 3) - 1
            moment = lambda: steps_done(run_dir) >= target and being_written(run_dir)  # noqa: E731, B023
        else:
            target, pause = complete + rng.randint(5, 14), rng.random() / 10
            moment = lambda: steps_done(run_dir) >= target and not time.sleep(pause)  # noqa: E731, B023
        # 2. The kill, which a process cannot handle, unlike SIGTERM.
        code, _, error = interrupt(process, signal.SIGKILL, moment)
        assert code == -signal.SIGKILL, error
        # 3. The comparison, at the newest complete checkpoint.
        newest = newest_complete(run_dir)
        kills.append(
            {
                "resumed from": complete,
                "killed after step": steps_done(run_dir),
                "checkpoints torn": len(being_written(run_dir)),
                "newest complete": newest,
                # A kill before the first checkpoint leaves nothing to compare.
                "differences": differences(whole, run_dir, newest) if newest else [],
            }
        )
        print(kills[-1], flush=True)
    return kills


def main(arguments: Sequence[str]) -> int:
    """Runs both runs; prints and writes the result. Returns 1 if anything differs, else 0."""
    config = cli.parse(Config, PROGRAM, arguments)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        options = SMALL | {
            "corpus": write_corpus(base / "corpus"), "cache_dir": base / "cache",
            "optimizer": config.optimizer,
            "steps": config.steps, "checkpoint_every": config.checkpoint_every,
        }  # fmt: skip
        alone = {"run_dir": base / "whole", "keep_checkpoints": config.steps}
        # 1. The run that is not killed, first: it fills the cache of compiled programs.
        code, _, error = finish(start(options | alone, base / "compiled"))
        assert code == 0, error
        # 2. The killed run, and its last resume, which reaches the end.
        kills = kill_often(options, base / "killed", base / "whole", base / "compiled", config)
        last = start(options | {"run_dir": base / "killed", "resume": True}, base / "compiled")
        code, _, error = finish(last)
        assert code == 0, error
        # 3. The comparison of both ends.
        different = differences(base / "whole", base / "killed", config.steps)
        arrays = len(saved(base / "whole", config.steps)[0])
    lost = [kill["killed after step"] - kill["newest complete"] for kill in kills]
    results: dict[str, Any] = {
        "kills": kills,
        "kills while a checkpoint was written": sum(bool(k["checkpoints torn"]) for k in kills),
        "steps lost at most": max(lost),
        "kills after which checkpoints were compared": sum(k["newest complete"] > 0 for k in kills),
        "kills after which something differed": sum(bool(k["differences"]) for k in kills),
        "arrays compared": arrays,
        "differences": different,
        "seconds": round(time.perf_counter() - began),
    }
    reporting.write(config.out, config, **results)
    broken = results["kills after which something differed"]
    print(
        f"{len(kills)} kills, {arrays} arrays; different after {broken} of them, "
        f"and at the end: {different or 'nothing'}"
    )
    return 1 if different or broken else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
