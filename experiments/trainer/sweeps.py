"""Sets of training runs and their result file: missing runs are trained, finished ones are kept.

An *entry* of a result file is one finished run: its description (configuration, data, versions),
its losses, seconds and bytes. The file is rewritten after each run, one entry a line. A run that
was stopped resumes from its last checkpoint, so that a study may be stopped at any time and
continued by the same command. Several runs may train at a time, each on cores of its own.

How a run passes through this module: `complete` finds the configurations without an entry, `_run`
hands them to this process or to several, `_entry` trains and makes the entry.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from experiments.trainer import checkpoints
from experiments.trainer.config import FREE_ON_RESUME, Training, in_record, record
from experiments.trainer.config import Sitting as Sitting
from experiments.trainer.files import write_whole
from experiments.trainer.loop import Result
from experiments.trainer.metrics import metrics_path
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import train

Entry = dict[str, Any]
_Run = TypeVar("_Run", bound=Training)
# `(config, show=...) -> (result, further fields of the entry)`: trains with a configuration. It is
# a function of a module, since other processes get it by its name.
Trainer = Callable[..., tuple[Result, dict[str, Any]]]


class Stopped(KeyboardInterrupt):
    """A signal ended a run, so the set is incomplete."""

    code = 130  # of the command, as shells report SIGINT


class OutOfTime(Stopped):
    """The time given to a set is up; its runs are saved, and the same command resumes them."""

    code = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


def deadline_in(minutes: float | None) -> float | None:
    """Returns the time in so many minutes, in seconds since the epoch; None: no deadline."""
    return None if minutes is None else time.time() + 60 * minutes


def pretrain(config: Any, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Pretrains, with no further fields of the entry."""
    return train(config, show=show), {}


def runner(
    sitting: Sitting, out: Path, trainer: Trainer = pretrain
) -> Callable[[Sequence[Training]], list[Entry]]:
    """Returns `complete` with the options of one sitting, whose time begins now."""
    deadline = deadline_in(sitting.budget_minutes)
    return partial(complete, out=out, jobs=sitting.jobs, trainer=trainer, deadline=deadline)


def complete(
    configs: Sequence[Training],
    out: Path,
    *,
    jobs: int = 1,
    trainer: Trainer = pretrain,
    deadline: float | None = None,
) -> list[Entry]:
    """Trains with every configuration that `out` does not hold yet; returns all their entries.

    Args:
      configs: the configurations, all of one kind; equal ones are run once.
      out: the JSON file to read, and to rewrite after each run. Entries of other configurations
        stay in it.
      jobs: number of runs that train at a time, each with a line that shows its progress.
      trainer: trains with one configuration.
      deadline: the time at which runs are saved, after their current step; see `deadline_in`.

    Raises:
      Stopped: a run was stopped by a signal; finished ones are in `out`.
      OutOfTime: the deadline has passed; finished runs are in `out`.
    """
    entries, left = missing(configs, out)
    done = 0
    try:
        for entry in _run(left, jobs, trainer, deadline):
            # Written after each run: a kill loses no finished one.
            entries.append(entry)
            write(out, entries)
            done += 1
            tqdm.write(f"[{done} of {len(left)}] {summary(entry)}", file=sys.stdout)
            sys.stdout.flush()
    except OutOfTime:
        raise OutOfTime(
            f"the time is up: {done} of {len(left)} runs are done, and those that were training "
            "are saved; the same command continues"
        ) from None
    return select(entries, configs)


def missing(configs: Sequence[_Run], out: Path) -> tuple[list[Entry], list[_Run]]:
    """Returns the entries of a result file, if it exists, and the configurations that it lacks."""
    entries: list[Entry] = json.loads(out.read_text()) if out.exists() else []
    return entries, [
        config
        for config in dict.fromkeys(configs)
        if not any(is_of(entry, config) for entry in entries)
    ]


def select(entries: Sequence[Entry], configs: Sequence[Training]) -> list[Entry]:
    """Returns the entry of each configuration, the newest if there are several.

    Raises:
      ConfigError: a configuration has no entry.
    """

    def newest(config: Training) -> Entry:
        for entry in reversed(entries):
            if is_of(entry, config):
                return entry
        raise ConfigError(
            f"`out`: the result file has no run of {config.optimizer.name} with seed "
            f"{config.seed}, learning rate {config.learning_rate:g} and {config.steps} steps"
        )

    return [newest(config) for config in configs]


def identity(config: Training) -> dict[str, Any]:
    """Returns the options that determine a run's numbers, in the form that JSON gives back."""
    # These two may change when a run resumes, but they decide the losses that an entry holds.
    free = FREE_ON_RESUME - {"validation_batches", "validate_every"}
    return {name: value for name, value in record(config).items() if name not in free}


def is_of(entry: Entry, config: Training) -> bool:
    """Whether an entry, perhaps from an older version, belongs to a configuration."""
    old = entry["config"]
    if (old["optimizer"], old["seed"]) != (config.optimizer.name, config.seed):
        return False  # a cheap test that tells most entries apart
    # Options that are newer than the entry have their defaults in it.
    wanted, then = identity(config), in_record(old, config)
    return all(then[name] == value for name, value in wanted.items())


def in_own_directory(config: _Run) -> _Run:
    """Returns the same run of a set, in a directory of its own under its `run_dir`."""
    # The same for the same numbers, so that a resumed set finds the checkpoints of a stopped run.
    digest = hashlib.blake2b(_key(identity(config)).encode(), digest_size=4).hexdigest()
    name = f"{config.optimizer.name}-{config.learning_rate:g}-{config.seed}-{digest}"
    return dataclasses.replace(config, run_dir=f"{config.run_dir}/{name}")


def summary(entry: Entry) -> str:
    """Returns one line about a finished run."""
    config = entry["config"]
    return (
        f"{config['optimizer']}, learning rate {config['learning_rate']:g}, seed {config['seed']}: "
        f"validation loss {entry['validation_loss']:.4f}, {entry['seconds_per_step']:.3f} s a step"
    )


def _run(
    configs: list[Training], jobs: int, trainer: Trainer, deadline: float | None
) -> Iterator[Entry]:
    """Yields entries in the order in which runs end."""
    # 1. One after the other, in this process.
    if jobs == 1 or len(configs) < 2:
        for config in configs:
            yield _entry(config, trainer, deadline, show=True)
        return
    # 2. Several at a time: a process for each job, which takes its share of the cores from a queue.
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    cores: Any = context.Queue()
    for share in _shares(sorted(os.sched_getaffinity(0)), jobs):
        cores.put(share)
    # 3. Hand out entries as runs end. If one was stopped, runs that have not begun are cancelled,
    #    those that train come to their end, and the set is then reported as stopped.
    stopped: Stopped | None = None
    with (
        concurrent.futures.ProcessPoolExecutor(jobs, context, _use_cores, (cores,)) as pool,
        contextlib.closing(Progress(configs)) as progress,
    ):
        running = {pool.submit(_entry, config, trainer, deadline) for config in configs}
        try:
            while running:
                ended, running = concurrent.futures.wait(
                    running, progress.seconds, concurrent.futures.FIRST_COMPLETED
                )
                if not ended:
                    progress.show()
                for future in ended:
                    try:
                        yield future.result()
                    except Stopped as stop:  # runs that end at the same time still have entries
                        stopped = stop
                        running = {other for other in running if not other.cancel()}
        except BaseException:
            # Ctrl-C in a terminal reaches all processes; a signal to this one reaches no other.
            # They save on SIGTERM.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if stopped:
        raise stopped


class Progress:
    """Shows a line for each run that is training: steps, loss, tokens per second, time left.

    The lines come from the metrics files that the runs write. If stderr is not a terminal, a line
    is printed every five minutes.
    """

    def __init__(self, configs: Sequence[Training]):
        self._terminal = sys.stderr.isatty()
        self.seconds = 2.0 if self._terminal else 300.0
        self._configs = configs
        self._bars: dict[str, tqdm] = {}

    def show(self) -> None:
        """Reads the files and redraws the lines."""
        for config in self._configs:
            bar = self._bars.get(config.run_dir)
            timed = [r for r in _tail(metrics_path(config)) if "seconds" in r]
            if not timed:
                if bar is not None:  # the run has ended, and its directory is gone
                    self._bars.pop(config.run_dir).close()
                continue
            if not self._terminal:
                name, step = Path(config.run_dir).name, timed[-1]["step"]
                print(f"  {name}: step {step}/{config.steps}, {_speed(config, timed)}", flush=True)
                continue
            if bar is None:
                bar = self._bars[config.run_dir] = tqdm(
                    desc=Path(config.run_dir).name, total=config.steps, file=sys.stderr,
                    initial=timed[-1]["step"], leave=False,
                    bar_format="{desc} |{bar:16}| {n_fmt}/{total_fmt}{postfix}",
                )  # fmt: skip
            bar.n = timed[-1]["step"]
            bar.set_postfix_str(_speed(config, timed), refresh=True)

    def close(self) -> None:
        """Removes the lines."""
        for bar in self._bars.values():
            bar.close()


def _tail(path: Path, size: int = 4096) -> list[dict]:
    """Returns the records in the last `size` bytes of a metrics file; none if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - size, 0))
            lines = file.read().decode().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        # The first line may be cut at its start, and the last one not yet written to its end.
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _speed(config: Training, timed: list[dict]) -> str:
    """Returns the loss and, from the last records, tokens per second and the time left.

    Rates are differences between two records, and the first one is written after compilation: they
    do not include it.
    """
    text = f"loss {timed[-1]['loss']:.3f}"
    steps = timed[-1]["step"] - timed[0]["step"]
    seconds = timed[-1]["seconds"] - timed[0]["seconds"]
    if steps <= 0 or seconds <= 0:
        return text
    left = (config.steps - timed[-1]["step"]) * seconds / steps
    tokens = timed[-1]["tokens"] - timed[0]["tokens"]
    return f"{text}, {tokens / seconds:,.0f} tokens/s, {tqdm.format_interval(left)} left"


def _shares(cores: list[int], jobs: int) -> list[list[int]]:
    """Returns one group of cores for each job, disjoint unless there are fewer cores than jobs."""
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


_SAVING = 600  # seconds: far more than the current step and a checkpoint take
_idle = threading.Event()  # whether this process trains nothing
_idle.set()


def _use_cores(cores: Any) -> None:
    """Pins this process to cores of its own, and ends it if its parent dies.

    It is called before JAX starts its threads, which inherit the cores. A process whose parent was
    killed would go on writing to a directory that another run resumes; it saves its run instead,
    and ends.

    Args:
      cores: a queue with one list of cores for each process.
    """
    os.sched_setaffinity(0, cores.get())
    parent = os.getppid()

    def watch() -> None:
        # An orphan gets another parent.
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        _idle.wait(_SAVING)
        os._exit(1)  # the pool's worker would wait for another run forever

    threading.Thread(target=watch, daemon=True).start()


def _entry(
    config: Training, trainer: Trainer, deadline: float | None = None, show: bool = False
) -> Entry:
    """Trains from the last checkpoint, if there is one, and returns the entry of the run."""
    if show:
        named = config.optimizer.name
        print(f"\n== {named}, learning rate {config.learning_rate:g}, seed {config.seed}")
    # 1. Resume, or start in an empty directory: a run killed before its first checkpoint leaves
    #    metrics that are made again.
    saved = checkpoints.newest(config) is not None
    if not saved:
        shutil.rmtree(config.run_dir, ignore_errors=True)
    # 2. Train.
    _idle.clear()
    try:
        with _until(deadline):
            result, more = trainer(dataclasses.replace(config, resume=saved), show=show)
    finally:
        _idle.set()
    if result.stopped_by:
        raise OutOfTime if is_over(deadline) else Stopped
    # 3. Make the entry. The directory with its checkpoints is no longer needed.
    described = json.loads((Path(config.run_dir) / "config.json").read_text())
    held_out = [record for record in result.metrics if "validation_loss" in record]
    shutil.rmtree(config.run_dir)
    return described | {
        "config": identity(config),
        "validation_loss": result.validation_loss,
        "curve": [[record["step"], record["validation_loss"]] for record in held_out],
        "seconds_per_step": result.seconds_per_step,
        "state_bytes": result.state_bytes,
        "parameters": result.parameters,
        "peak_bytes": result.peak_bytes,
        **more,
    }


def is_over(deadline: float | None) -> bool:
    """Whether a deadline has passed; None is no deadline."""
    return deadline is not None and time.time() >= deadline


@contextlib.contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """A context that, at the deadline, ends the training in it with a checkpoint, as SIGTERM does.

    Raises:
      OutOfTime: the deadline has passed already.
    """
    if deadline is None:
        yield
        return
    if is_over(deadline):
        raise OutOfTime

    def ignore(*_: Any) -> None:
        """Handles SIGTERM outside of the training loop, which has a handler of its own."""

    # 1. An alarm raises SIGTERM in this process.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, ignore),
        signal.SIGALRM: signal.signal(
            signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM)
        ),
    }
    # 2. The alarm repeats every five seconds: the first one may come before the loop has begun.
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.time(), 1e-3), 5.0)
    try:
        yield
    finally:
        # 3. The timer goes first, so that no alarm meets the old handlers.
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Writes a result file, one entry a line, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
