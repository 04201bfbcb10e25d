"""Sets of training runs and their result file: what is missing is run, what is there is kept.

The file is rewritten after each run, one entry a line, so a study may be stopped at any time and
goes on by the same command. Several runs may train at a time, each on cores of its own.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config import FREE_ON_RESUME, Training
from experiments.loop import Result
from experiments.train import train

Entry = dict[str, Any]
# Runs a configuration, `(config, show=...)`; returns the result, and what else the entry keeps.
# Defined in a module, for other processes.
Trainer = Callable[..., tuple[Result, dict[str, Any]]]


class Stopped(KeyboardInterrupt):
    """A run was ended by a signal, so the set is not complete."""


def pretrain(config: Any, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Pretrains; an entry keeps losses, seconds and bytes."""
    return train(config, show=show), {}


def complete(
    configs: Sequence[Training], out: Path, *, jobs: int = 1, trainer: Trainer = pretrain
) -> list[Entry]:
    """Trains with every configuration that `out` does not hold yet; returns the entries of all.

    Args:
      configs: the configurations, all of one kind; equal ones are run once.
      out: the JSON file to read, and to rewrite after each run. Other entries stay in it.
      jobs: how many runs train at a time; with one, it shows its progress.
      trainer: runs a configuration.

    Raises:
      Stopped: a run was stopped by a signal; finished ones are in `out`.
    """
    entries: list[Entry] = json.loads(out.read_text()) if out.exists() else []
    default = identity(type(configs[0])())  # of options that are newer than an entry
    known = [default | entry["config"] for entry in entries]
    missing = [c for c in dict.fromkeys(configs) if identity(c) not in known]
    for number, entry in enumerate(_run(missing, jobs, trainer), 1):
        entries.append(entry)
        _write(out, entries)
        print(f"[{number} of {len(missing)}] {summary(entry)}", flush=True)
    by_identity = {_key(default | entry["config"]): entry for entry in entries}
    return [by_identity[_key(identity(config))] for config in configs]


def identity(config: Training) -> dict[str, Any]:
    """The options that decide a run's numbers, as JSON would give them back."""
    fields = dataclasses.asdict(config).items()
    free = FREE_ON_RESUME - {"validation_batches", "validate_every"}
    return json.loads(json.dumps({name: value for name, value in fields if name not in free}))


def directory(base: str, config: Training) -> str:
    """A directory for one run of a set, under `base`."""
    digest = hashlib.blake2b(_key(identity(config)).encode(), digest_size=4).hexdigest()
    return f"{base}/{config.optimizer}-{config.learning_rate:g}-{config.seed}-{digest}"


def summary(entry: Entry) -> str:
    """One line about a finished run."""
    config = entry["config"]
    return (
        f"{config['optimizer']}, learning rate {config['learning_rate']:g}, seed {config['seed']}: "
        f"validation loss {entry['validation_loss']:.4f}, {entry['seconds_per_step']:.3f} s a step"
    )


def _run(configs: list[Training], jobs: int, trainer: Trainer) -> Iterator[Entry]:
    """Entries in the order in which runs end."""
    if jobs == 1 or len(configs) < 2:
        for config in configs:
            yield _entry(config, trainer, show=True)
        return
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    cores: Any = context.Queue()
    for share in _shares(sorted(os.sched_getaffinity(0)), jobs):
        cores.put(share)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _use_cores, (cores,)) as pool:
        futures = [pool.submit(_entry, config, trainer) for config in configs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _shares(cores: list[int], jobs: int) -> list[list[int]]:
    """As many disjoint groups of cores as jobs; with fewer cores than jobs, they share."""
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def _use_cores(cores: Any) -> None:
    """Keeps this process, before JAX starts its threads, on cores of its own."""
    os.sched_setaffinity(0, cores.get())


def _entry(config: Training, trainer: Trainer, show: bool = False) -> Entry:
    """Trains; what the result file keeps of the run."""
    if show:
        print(
            f"\n== {config.optimizer}, learning rate {config.learning_rate:g}, seed {config.seed}"
        )
    shutil.rmtree(config.run_dir, ignore_errors=True)
    result, more = trainer(config, show=show)
    if result.stopped_by:
        raise Stopped
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


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def _write(path: Path, entries: list[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".scratch")
    scratch.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    os.replace(scratch, path)
