"""Locks between processes, which the system releases when their process is killed.

A lock is a file under `flock`. The file alone means nothing: a kill leaves it behind, but not the
lock on it. Its content names the holder, for the message to others.
"""

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
    """Another process holds the lock; the text names it."""


@contextlib.contextmanager
def held(path: Path, *, wait: bool) -> Iterator[None]:
    """A context that holds the lock on a file, and removes the file at its end.

    Args:
      path: the file; its directory must exist.
      wait: whether to wait while another process holds the lock.

    Raises:
      LockedError: another process holds it, and `wait` is false.
      OSError: the file cannot be written.
    """
    file = _acquire(path, wait)
    try:
        yield
    finally:
        # Removed while still locked: a process that waits for this file then sees that it is gone.
        path.unlink(missing_ok=True)
        os.close(file)


@contextlib.contextmanager
def of_run(config: Training) -> Iterator[None]:
    """A context that locks the directory of a run; the first process does so for all.

    Raises:
      ConfigError: another run trains in the directory, or it cannot be written.
    """
    directory = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        # Called last, after the lock's file is gone. A run that could not start leaves no
        # directory.
        stack.callback(_remove_empty, directory)

        def acquire() -> None:
            if not processes.is_first():
                return
            make_directory("run_dir", directory)
            try:
                stack.enter_context(held(directory / "lock", wait=False))
            except LockedError as error:
                raise ConfigError(
                    f"`run_dir`: {error} is training in {config.run_dir}; wait until it ends, or "
                    "choose another directory"
                ) from error
            except OSError as error:
                raise ConfigError(
                    f"`run_dir`: cannot write {directory}: {error.strerror}"
                ) from error

        # An error of the first process is raised in all of them.
        processes.in_turn(acquire)
        yield


def _remove_empty(directory: Path) -> None:
    """Removes a directory if it is empty: `rmdir` fails for any other."""
    if processes.is_first():
        with contextlib.suppress(OSError):
            directory.rmdir()


def _acquire(path: Path, wait: bool) -> int:
    """Returns the descriptor of the locked file, which must stay open while the lock is held."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, path, wait)
            # A holder removes the file before it releases the lock. If that happened after `open`,
            # this lock is on a file without a name, which excludes nobody: start again.
            if _is(file, path):
                _sign(file, path)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path, wait: bool) -> None:
    """Locks an open file; on file systems without locks, warns and goes on without one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        holder = one_line(os.pread(file, 200, 0).decode("utf-8", "replace"))
        raise LockedError(holder or "another process") from error
    except OSError as error:
        # The errors of file systems without `flock`, such as some network file systems.
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            raise
        print(f"{path}: no locks on this file system: start one run at a time", file=sys.stderr)


def _sign(file: int, path: Path) -> None:
    """Writes the holder into the file; if there is no room for it, removes the file."""
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
