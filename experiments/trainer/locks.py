"""Locks between processes, which the system takes from one that is killed."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.trainer import processes
from experiments.trainer.config import Training
from experiments.trainer.options import ConfigError, make_directory, one_line


class LockedError(Exception):
    """Another process has the lock; the text tells which."""


@contextlib.contextmanager
def held(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock that a file stands for, and removes the file at the end.

    Args:
      path: the file; its directory is there.
      wait: whether to wait while another process has the lock.

    Raises:
      LockedError: another process has it, and `wait` is false.
      OSError: the file cannot be written.
    """
    file = _acquire(path, wait)
    try:
        yield
    finally:
        # Removed while it is locked: whoever waits for this file sees that it is gone.
        path.unlink(missing_ok=True)
        os.close(file)


@contextlib.contextmanager
def of_run(config: Training) -> Iterator[None]:
    """Holds the directory of a run, which the first of its processes does for all.

    Raises:
      ConfigError: another run is in it, or it cannot be written.
    """
    directory = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        # Called last, after the lock's file is gone; it fails unless the run could not start.
        stack.callback(_remove_empty, directory)

        def acquire() -> None:
            if not processes.is_first():
                return
            make_directory("run_dir", directory)
            try:
                stack.enter_context(held(directory / "lock", wait=False))
            except LockedError as error:
                raise ConfigError(
                    f"`run_dir`: {error} is training in {config.run_dir}; wait for its end, or "
                    "choose another directory"
                ) from error
            except OSError as error:
                raise ConfigError(
                    f"`run_dir`: cannot write {directory}: {error.strerror}"
                ) from error

        processes.in_turn(acquire)
        yield


def _remove_empty(directory: Path) -> None:
    if processes.is_first():
        with contextlib.suppress(OSError):
            directory.rmdir()


def _acquire(path: Path, wait: bool) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, path, wait)
            # Another process may have removed the file between opening and locking it.
            if _is(file, path):
                _sign(file, path)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        holder = one_line(os.pread(file, 200, 0).decode("utf-8", "replace"))
        raise LockedError(holder or "another process") from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            raise
        print(f"{path}: no locks on this file system: start one run at a time", file=sys.stderr)


def _sign(file: int, path: Path) -> None:
    """Writes who holds a lock; where there is no room for it, nothing is left of the lock."""
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
