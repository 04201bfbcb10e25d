"""One run in several processes: joining, taking turns, and agreeing on the step to stop at.

All of it also works in a run of one process.
"""

import contextlib
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.trainer.config import Launch
from experiments.trainer.options import ConfigError

T = TypeVar("T")

_LONGEST_TURN_MS = 24 * 3600 * 1000  # a day


def join(launch: Launch) -> None:
    """Joins the other processes, if there are any. Call it before JAX touches a device.

    Raises:
      ConfigError: JAX detects no cluster, and `launch` does not describe one.
    """
    if launch == Launch():
        return
    try:
        jax.distributed.initialize(
            launch.coordinator_address, launch.num_processes, launch.process_id
        )
    except ValueError as error:
        raise ConfigError(
            f"`distributed`: {' '.join(str(error).split())} Where JAX detects no cluster, give "
            "`coordinator_address`, `num_processes` and `process_id`"
        ) from error


def is_first() -> bool:
    """Whether this process is the first, which writes and prints for all."""
    return jax.process_index() == 0


def in_turn(action: Callable[[], T]) -> T:
    """Calls `action` in the first process, then in all others, and returns its result.

    The others then find on disk the files that the first one made, such as tokens or a download.

    Raises:
      ConfigError: in every process, if `action` raised it in one. Otherwise those without an error
        would wait forever for the one that has left.
    """
    results: list[T] = []
    failure = None
    wait = ocp.multihost.get_barrier_sync_fn()  # device collectives would time out too soon
    # Two turns. Every process goes through both, waits at their ends, and learns of failures.
    for mine in (is_first(), not is_first()):
        if mine:
            try:
                results.append(action())
            except ConfigError as error:
                failure = error
        wait(key="turn", timeout_ms=_LONGEST_TURN_MS)
        if multihost_utils.process_allgather(np.asarray(failure is not None)).any():
            raise failure or ConfigError("another process failed; its message says why")
    return results[0]


def check_equal(what: str, text: str) -> None:
    """Raises `ConfigError` unless `text` is the same in all processes; `what` names it."""
    # Checksums are numbers, which can be gathered; their range is 0 if all are equal.
    if np.ptp(multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))):
        raise ConfigError(f"{what} differs between processes")


def gather(tree: Any) -> Any:
    """Returns the arrays of a tree, unsharded, in every process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


class Stop:
    """The request to stop a run.

    In one process, SIGINT or SIGTERM sets it. In several, JAX's preemption service spreads a
    SIGTERM that any process gets, and chooses the step after which all of them stop.

    Attributes:
      signal: number of the signal that ends the run; None as long as it goes on.
    """

    signal: int | None = None

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. All processes must call it at every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


@contextlib.contextmanager
def signals(step: int) -> Iterator[Stop]:
    """Lets SIGINT and SIGTERM end the run after the current step; a second SIGINT interrupts it.

    Args:
      step: steps done so far. The service stops after the step that follows the last one reported
        to it. Without this report, a resumed run that is stopped while its first step compiles
        would get a step long past.

    Yields:
      The `Stop` that the signals set.
    """
    stop, handlers = Stop(), {}
    stop.reached(step)

    # 1. One process: a handler sets the signal, which the loop sees after the current step.
    def note(number: int, _frame) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    # 2. Several: SIGTERM belongs to the preemption service, so SIGINT is passed on as SIGTERM. The
    #    next SIGINT has Python's own handler and interrupts.
    def pass_on(_number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    # 3. Python allows handlers in the main thread only; a run in another thread has none.
    if threading.current_thread() is threading.main_thread():
        alone = {signal.SIGINT: note, signal.SIGTERM: note}
        handlers = alone if jax.process_count() == 1 else {signal.SIGINT: pass_on}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
