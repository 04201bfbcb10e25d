"""One run in several processes: they find each other, take turns, and agree on when to stop."""

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

_LONGEST_TURN_MS = 24 * 3600 * 1000


def join(launch: Launch) -> None:
    """Joins the other processes, if there are any; call it before anything touches a device.

    Raises:
      ConfigError: JAX detects no cluster and is not told of one.
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
    """Whether this process is the one that writes and prints for all."""
    return jax.process_index() == 0


def in_turn(action: Callable[[], T]) -> T:
    """`action()` in the first process and then in the others, which find what it left on disk.

    Raises:
      ConfigError: in every process, if it was raised in one.
    """
    results: list[T] = []
    failure = None
    wait = ocp.multihost.get_barrier_sync_fn()  # the collectives of devices time out too soon
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
    """Raises `ConfigError` if `text` is not the same in all processes."""
    if np.ptp(multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))):
        raise ConfigError(f"{what} differs between processes")


def gather(tree: Any) -> Any:
    """The arrays of a tree, whole, in every process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


class Stop:
    """The wish to stop, in `signal`: in one process by SIGINT or SIGTERM, in several agreed upon.

    JAX's preemption service spreads a SIGTERM that any process gets, and chooses the step.
    """

    signal: int | None = None

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; call it at every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


@contextlib.contextmanager
def signals(step: int) -> Iterator[Stop]:
    """Lets SIGINT and SIGTERM end the run after a step; a second SIGINT interrupts at once.

    Args:
      step: the steps done so far. The service chooses the step after the last that it heard of, and
        would choose one long gone if a resumed run were stopped while its first step compiles.
    """
    stop, handlers = Stop(), {}
    stop.reached(step)

    def note(number: int, _frame) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    def pass_on(_number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        alone = {signal.SIGINT: note, signal.SIGTERM: note}
        handlers = alone if jax.process_count() == 1 else {signal.SIGINT: pass_on}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
