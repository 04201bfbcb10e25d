"""Sets of training runs and their result file: what is missing is run, what is there is kept.

The file is rewritten after each run, one entry a line, and a run that was stopped goes on from its
last checkpoint: a study may be stopped at any time, and continued by the same command. Several runs
may train at a time, each on cores of its own.
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
from experiments.trainer.pretraining import train

Entry = dict[str, Any]
_Run = TypeVar("_Run", bound=Training)
# Runs a configuration, `(config, show=...)`; returns the result, and what else the entry keeps.
# Defined in a module, for other processes.
Trainer = Callable[..., tuple[Result, dict[str, Any]]]


class Stopped(KeyboardInterrupt):
    """A run was ended by a signal, so the set is not complete."""

    code = 130


class OutOfTime(Stopped):
    """The time that a set was given is up; its runs are saved, and go on by the same command."""

    code = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


def deadline_in(minutes: float | None) -> float | None:
    """The time in so many minutes; None: never."""
    return None if minutes is None else time.time() + 60 * minutes


def pretrain(config: Any, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Pretrains; an entry keeps losses, seconds and bytes."""
    return train(config, show=show), {}


def runner(
    sitting: Sitting, out: Path, trainer: Trainer = pretrain
) -> Callable[[Sequence[Training]], list[Entry]]:
    """`complete` for the sets of one sitting, whose time begins now."""
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
    """Trains with every configuration that `out` does not hold yet; returns the entries of all.

    Args:
      configs: the configurations, all of one kind; equal ones are run once.
      out: the JSON file to read, and to rewrite after each run. Other entries stay in it.
      jobs: how many runs train at a time, each with a line that shows its progress.
      trainer: runs a configuration.
      deadline: the time at which runs are saved, after their current step; see `deadline_in`.

    Raises:
      Stopped: a run was stopped by a signal; finished ones are in `out`.
      OutOfTime: the deadline has passed; finished runs are in `out`.
    """
    entries, left = missing(configs, out)
    done = 0
    try:
        for entry in _run(left, jobs, trainer, deadline):
            entries.append(entry)
            write(out, entries)
            done += 1
            tqdm.write(f"[{done} of {len(left)}] {summary(entry)}", file=sys.stdout)
            sys.stdout.flush()
    except OutOfTime:
        raise OutOfTime(
            f"the time is up: {done} of {len(left)} runs are done, those that were training are "
            "saved; the same command goes on"
        ) from None
    return select(entries, configs)


def missing(configs: Sequence[_Run], out: Path) -> tuple[list[Entry], list[_Run]]:
    """The entries of a result file, if it is there, and the configurations that it lacks."""
    entries: list[Entry] = json.loads(out.read_text()) if out.exists() else []
    return entries, [
        config
        for config in dict.fromkeys(configs)
        if not any(_is_of(entry, config) for entry in entries)
    ]


def select(entries: Sequence[Entry], configs: Sequence[Training]) -> list[Entry]:
    """The entry of each configuration."""
    return [next(e for e in reversed(entries) if _is_of(e, config)) for config in configs]


def identity(config: Training) -> dict[str, Any]:
    """The options that decide a run's numbers, as JSON would give them back."""
    free = FREE_ON_RESUME - {"validation_batches", "validate_every"}
    return {name: value for name, value in record(config).items() if name not in free}


def _is_of(entry: Entry, config: Training) -> bool:
    """Whether an entry, perhaps an old one, is that of a configuration."""
    old = entry["config"]
    if (old["optimizer"], old["seed"]) != (config.optimizer.name, config.seed):
        return False  # most are told apart by these, without looking at all options
    wanted, then = identity(config), in_record(old, config)
    return all(then[name] == value for name, value in wanted.items())


def directory(base: str, config: Training) -> str:
    """A directory for one run of a set, under `base`."""
    digest = hashlib.blake2b(_key(identity(config)).encode(), digest_size=4).hexdigest()
    return f"{base}/{config.optimizer.name}-{config.learning_rate:g}-{config.seed}-{digest}"


def summary(entry: Entry) -> str:
    """One line about a finished run."""
    config = entry["config"]
    return (
        f"{config['optimizer']}, learning rate {config['learning_rate']:g}, seed {config['seed']}: "
        f"validation loss {entry['validation_loss']:.4f}, {entry['seconds_per_step']:.3f} s a step"
    )


def _run(
    configs: list[Training], jobs: int, trainer: Trainer, deadline: float | None
) -> Iterator[Entry]:
    """Entries in the order in which runs end."""
    if jobs == 1 or len(configs) < 2:
        for config in configs:
            yield _entry(config, trainer, deadline, show=True)
        return
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    cores: Any = context.Queue()
    for share in _shares(sorted(os.sched_getaffinity(0)), jobs):
        cores.put(share)
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
                    except Stopped as stop:  # others that end at the same time are still kept
                        stopped = stop
                        running = {other for other in running if not other.cancel()}
        except BaseException:
            # Ctrl-C has reached all processes of a terminal, but a signal to this one no other.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if stopped:
        raise stopped


class Progress:
    """A line for each run that is training now: steps, loss, tokens per second, time left.

    The lines are made from the files of metrics that the runs write. Where the output is no
    terminal, a line is printed every few minutes.
    """

    def __init__(self, configs: Sequence[Training]):
        self._terminal = sys.stderr.isatty()
        self.seconds = 2.0 if self._terminal else 300.0
        self._configs = configs
        self._bars: dict[str, tqdm] = {}

    def show(self) -> None:
        """Reads the files and draws the lines anew."""
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
    """The last records of a file of metrics; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - size, 0))
            lines = file.read().decode().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        # The first line may begin in the middle, the last may not be written to its end.
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _speed(config: Training, timed: list[dict]) -> str:
    """The loss and, by the last steps, tokens per second and the time that is left.

    The first of these records was written after the compilation, so that it does not count.
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
    """As many disjoint groups of cores as jobs; with fewer cores than jobs, they share."""
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


_SAVING = 600  # seconds for the steps that are under way and a checkpoint, by far enough


def _use_cores(cores: Any) -> None:
    """Keeps this process, before JAX starts its threads, on cores of its own, and ends it in time.

    A process whose parent was killed would go on writing to a directory that another run resumes;
    it saves its run instead, and ends.
    """
    os.sched_setaffinity(0, cores.get())
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SAVING)
        os._exit(1)  # it would wait for another run for ever

    threading.Thread(target=watch, daemon=True).start()


def _entry(
    config: Training, trainer: Trainer, deadline: float | None = None, show: bool = False
) -> Entry:
    """Trains, from the last checkpoint if there is one; what the result file keeps of the run."""
    if show:
        named = config.optimizer.name
        print(f"\n== {named}, learning rate {config.learning_rate:g}, seed {config.seed}")
    saved = checkpoints.newest(config) is not None
    if not saved:
        shutil.rmtree(config.run_dir, ignore_errors=True)
    with _until(deadline):
        result, more = trainer(dataclasses.replace(config, resume=saved), show=show)
    if result.stopped_by:
        raise OutOfTime if is_over(deadline) else Stopped
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
    """Whether a deadline has passed; None never does."""
    return deadline is not None and time.time() >= deadline


@contextlib.contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """Ends what runs within as SIGTERM does, after a step and with a checkpoint, at the deadline.

    Raises:
      OutOfTime: it has passed already.
    """
    if deadline is None:
        yield
        return
    if is_over(deadline):
        raise OutOfTime

    def ignore(*_: Any) -> None:
        """What SIGTERM does outside of the training loop, which has a handler of its own."""

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, ignore),
        signal.SIGALRM: signal.signal(
            signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM)
        ),
    }
    # Again every few seconds: the first signal may come before the loop has begun.
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.time(), 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Writes a result file: one entry a line, all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
