"""Metrics of a run: metrics.jsonl, TensorBoard events, a progress bar and lines of text.

A *record* is a line of metrics.jsonl, a JSON object with `step` and either `loss` and `grad_norm`
or `validation_loss`. The last record of each write also has `seconds`, the training time of the run
so far, and `tokens`, the tokens read so far.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from experiments.trainer.config import Training
from experiments.trainer.files import parse_json, write_whole
from experiments.trainer.options import ConfigError

_events: Any = event_pb2  # generated code, with names that a type checker does not see
_BAR = "{desc} |{bar:24}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed}, {remaining} left]"


class Report:
    """Collects metrics on the device and writes them every `log_every` steps.

    Reading a metric waits for the device, so nothing is read between two writes, except after the
    first step, which compiles. Rates and `seconds_per_step` cover the steps after it, without
    validation and checkpoints. A run of a single step counts that one.

    Args:
      config: the run.
      start: steps done before this process started.
      tokens_per_step: tokens in a batch of all processes.
      show: whether to print, and to draw the progress bar on a terminal.
    """

    def __init__(self, config: Training, *, start: int, tokens_per_step: int, show: bool):
        self._config, self._tokens, self._show = config, tokens_per_step, show
        self._path = metrics_path(config)
        self._elapsed = _keep_until(self._path, start)
        self._board = Board(Path(config.run_dir) / "tensorboard", start)
        self._bar = tqdm(
            desc=config.optimizer.name, total=config.steps, initial=start, bar_format=_BAR,
            disable=None if show else True, file=sys.stderr,
        )  # fmt: skip
        # Records to write, and the metrics of steps still on the device.
        self._lines: list[str] = []
        self._pending: list[tuple[int, Any]] = []
        # (steps, seconds) of each write, without the step that compiled; then the time at which
        # that step ended, until a write has used it.
        self._timed: list[tuple[int, float]] = []
        self._compiled_at: float | None = None
        # Whether no step has run yet; seconds with compilation, for a run of a single step.
        self._first, self._whole = True, float("nan")
        self._loss = float("nan")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last write from the seconds per step."""
        self._mark = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar."""
        if self._show:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, scalars that are still on the device."""
        self._pending.append((step, metrics))
        if self._first:
            jax.block_until_ready(metrics)
            self._compiled_at, self._first = time.perf_counter(), False
        if step % self._config.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the metrics of all steps so far."""
        if not self._pending:
            return
        # 1. Read. This waits for the device, so the clock is read after it.
        records = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        now = time.perf_counter()
        self._elapsed += now - self._mark
        # 2. Steps and seconds of this write.
        timed = len(records), now - self._mark
        if self._compiled_at is not None:
            # The first write of a process: count the steps after the one that compiled.
            timed = len(records) - 1, now - self._compiled_at
            self._whole, self._compiled_at = self._elapsed, None
        self._timed.append(timed)
        # 3. One record for each step; the last one also has the totals.
        for step, metrics in records[:-1]:
            self._note(step, metrics)
        step, metrics = records[-1]
        self._note(step, metrics, seconds=round(self._elapsed, 3), tokens=step * self._tokens)
        self._loss = float(records[-1][1]["loss"])
        self._progress(len(records), *timed)
        self._pending.clear()
        self._write()
        self.restart_clock()

    def validation(self, step: int, loss: float) -> None:
        """Records a validation loss in nats per token and prints a line.

        Call `flush` before the loss is computed, or its time counts as time of steps.
        """
        self._note(step, {"validation_loss": loss})
        self._write()
        line = (
            f"  step {step:>5}/{self._config.steps}  loss {self._loss:.4f}  "
            f"validation loss {loss:.4f}"
        )
        if any(steps for steps, _ in self._timed):
            line += f"  {self._tokens / max(self.seconds_per_step, 1e-9):,.0f} tokens/s"
        self.say(line)
        self.restart_clock()

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a step; NaN before the first write."""
        if not self._timed:
            return float("nan")
        steps = sum(count for count, _ in self._timed)
        return sum(seconds for _, seconds in self._timed) / steps if steps else self._whole

    def close(self) -> None:
        """Writes the remaining metrics and closes the files."""
        self.flush()
        self._bar.close()
        self._board.close()

    def _note(self, step: int, metrics: dict[str, Any], **more: float) -> None:
        """Adds a record; `more` goes into the file but not to TensorBoard."""
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._lines.append(json.dumps({"step": step} | values | more) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _write(self) -> None:
        """Appends the records to the file, and waits until they are on the disk."""
        with open(self._path, "a") as file:
            file.writelines(self._lines)
            file.flush()
            os.fsync(file.fileno())
        self._lines.clear()
        self._board.flush()

    def _progress(self, steps: int, timed: int, seconds: float) -> None:
        rate = f", {timed * self._tokens / seconds:,.0f} tokens/s" if timed else ""
        self._bar.set_postfix_str(f"loss {self._loss:.3f}{rate}", refresh=False)
        self._bar.update(steps)


class Board:
    """TensorBoard events, written by the calling thread.

    `tensorboardX.SummaryWriter` writes them in a thread; on a full disk that thread dies, and the
    run then waits for it forever.
    """

    def __init__(self, directory: Path, start: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        # After a resume, TensorBoard then drops the events of later steps, which the interrupted
        # run wrote and this one writes again.
        if start:
            self._add(start + 1, session_log=_events.SessionLog(status=_events.SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, summary=summary.scalar(name, value))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(_events.Event(wall_time=time.time(), step=step, **content))


class Silence:
    """The report of every process but the first: it does nothing."""

    seconds_per_step = float("nan")

    def __init__(self, *_args: Any, **_options: Any):
        pass

    def _nothing(self, *_args: Any) -> None:
        pass

    say = step = flush = validation = restart_clock = close = _nothing


def metrics_path(config: Training) -> Path:
    """Returns the path of a run's metrics file: one JSON object a line."""
    return Path(config.run_dir) / "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """Returns the records of a metrics file up to the first damaged line, if there is one."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        # A line cut short by a crash is no JSON; a damaged one may be JSON of another kind.
        try:
            record = parse_json(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def _keep_until(path: Path, step: int) -> float:
    """Drops the records after `step`, which the run makes again; returns its seconds so far.

    Raises:
      ConfigError: a line before the last is no record, so that all records after it would be lost.
    """
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    if len(read := read_metrics(path)) < len(lines) - 1:
        raise ConfigError(
            f"`run_dir`: line {len(read) + 1} of {path} is damaged; restore the file, or remove "
            "the line"
        )
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return max((record.get("seconds", 0.0) for record in kept), default=0.0)
