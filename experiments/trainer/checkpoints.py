"""Checkpoints of a run: writing, sealing, restoring, and the checks of a run directory.

A run directory holds config.json (the *description* of the run) and `checkpoints`, with one
directory for each saved step. A checkpoint has the training state, the position in the data and a
description of its own. Its *seal* holds a hash of each of its files, so that a flipped bit anywhere
is noticed; its arrays have checksums besides (`compatibility.checksums`).

Orbax writes a checkpoint under a temporary name and renames it. A kill can therefore leave no
incomplete checkpoint, but it can leave a complete one without a seal: the file `unsealed` names the
step that is being written, so that `restore` accepts this one and seals it.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import gum_optax
from experiments.trainer import compatibility, processes, seals
from experiments.trainer.config import Training, record
from experiments.trainer.files import check_regular, parse_json, read_text, write_whole
from experiments.trainer.options import ConfigError, make_directory

# By default, devices that hold the same array each write a slice of it, and each slicing compiles a
# program: half of the time to save a small model. One device writes an array below a megabyte.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)

# The seal hashes files up to 64 MiB and notes only the size of larger ones: those hold arrays,
# which have checksums of their own.
_HASHED = 64 * 2**20


class StorageError(ConfigError):
    """Writing failed; the text is one line that names the last good checkpoint."""


class Checkpoints:
    """Saves and restores the training state together with the position in the data.

    Saving is synchronous: the training step donates its buffers, so a copy in the background
    could read memory that the next step already writes.

    Args:
      config: the run; its `run_dir` and `keep_checkpoints` are used here.
    """

    def __init__(self, config: Training):
        self._config, self._directory = config, _directory(config).absolute()
        self._note = self._directory.with_name("unsealed")
        # Registered here rather than at the first save: a new process restores before it saves.
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ARRAYS))
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
        }

        def manager(lightweight: bool) -> ocp.CheckpointManager:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_checkpoints,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                lightweight_initialize=lightweight,
            )
            return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

        try:
            with _told_once():
                for step in _complete(config):
                    self._check_regular(step)  # Orbax would read a pipe forever
                self._manager = manager(lightweight=False)
        except Exception:  # of many types, from JSON or Orbax
            # The metadata of some checkpoint are damaged. A lightweight manager does not read them
            # now, and `restore` then refuses that checkpoint by name. It is no default: without
            # the times of older checkpoints, Orbax fails to save for a preemption.
            self._manager = manager(lightweight=True)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict) -> None:
        """Writes a checkpoint, which appears under its name only when complete.

        Args:
          step: steps done.
          state: the training state, a tree of arrays.
          data: the position in the data, as JSON.

        Raises:
          StorageError: it could not be written; earlier checkpoints are untouched.
        """
        if self.latest() == step:
            return
        # 1. Describe the state; this reads every array once, for its checksum.
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data)
        )
        description = compatibility.describe(self._config, state)
        # 2. Write it. The note comes first and goes with the seal: after a kill it tells a
        #    checkpoint that has no seal yet from one that has lost its seal.
        try:
            with _told_once():
                self._note_unsealed(step)
                self._manager.save(step, args=arguments, custom_metadata=description)
                self._seal(step)
        except Exception as error:  # from the file system, TensorStore or Orbax
            raise StorageError(
                f"`run_dir`: cannot write checkpoint {step} to {self._directory}: "
                f"{_reason(error)}; {last_good(self._config)}"
            ) from error

    def restore(self, step: int, state: Any) -> tuple[Any, dict]:
        """Returns the training state and the data position saved at `step`.

        Args:
          step: one of the saved steps.
          state: a tree with the shapes, dtypes and shardings to restore to. Its buffers may be
            deleted.

        Raises:
          ConfigError: the checkpoint is of another run, or damaged.
        """
        # 1. Shapes, dtypes and shardings come from `state`: this run may have another mesh than the
        #    one that saved.
        shapes = jax.tree.map(_shape, state)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
            ),
            data=ocp.args.JsonRestore(),
        )
        # 2. Checks in order of cost: files, description, shapes, and the contents of arrays last,
        #    once they are read.
        with self._damage_named(step):
            self._check_files(step)
            description = self.description(step)
            compatibility.check_description(description, self._config)
            compatibility.check_arrays(self._manager.item_metadata(step)["state"].tree, shapes)
            restored = self._manager.restore(step, args=arguments)
            compatibility.check_content(description, restored["state"])
        # 3. If a kill left it unsealed, seal it now: arrays and description have just been checked.
        if self._unsealed() == step:
            self._seal(step)
        return restored["state"], restored["data"]

    def description(self, step: int) -> dict:
        """Returns the description in a checkpoint, see `compatibility.describe`."""
        description: Any = self._manager.metadata(step).custom_metadata
        if not description:
            raise ValueError("it has no description of its run")
        return description

    def _note_unsealed(self, step: int) -> None:
        """Notes that the checkpoint of this step may be complete before it has a seal."""
        if processes.is_first():
            write_whole(self._note, str(step))

    def _seal(self, step: int) -> None:
        """Writes the seal of a checkpoint, once all processes have written their files."""
        if processes.is_first():
            seals.write(self._directory / str(step), _HASHED)
            self._note.unlink(missing_ok=True)

    def _unsealed(self) -> int | None:
        """Returns the step of the checkpoint that a kill may have left without a seal, if any."""
        try:
            return int(read_text(self._note))
        except (OSError, ValueError):
            return None

    def _check_files(self, step: int) -> None:
        """Raises `ValueError` if a file of a checkpoint differs from its seal."""
        directory = self._directory / str(step)
        if (fault := seals.fault(directory, _HASHED)) is None:
            return
        if seals.exists(directory):
            raise ValueError(fault)
        # Two kinds of checkpoints rightly have no seal: those of older versions, and one whose run
        # was killed between writing and sealing. Their arrays are checked by checksums in any case,
        # so that here only pipes and devices, which have no end, are kept from being read.
        self._check_regular(step)
        # Any other checkpoint had a seal and has lost it.
        if self._unsealed() != step and self.description(step).get(compatibility.SEALED):
            raise ValueError(fault)

    def _check_regular(self, step: int) -> None:
        """Raises `OSError` if something in a checkpoint is neither a file nor a directory."""
        for file in (self._directory / str(step)).rglob("*"):
            if not file.is_dir():
                check_regular(file)

    def _is_good(self, step: int) -> bool:
        """Whether the files of a checkpoint pass their checks; its arrays are not read."""
        try:
            with _told_once():
                self._check_files(step)
        except Exception:  # of many types, from JSON, TensorStore or Orbax
            return False
        return True

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        """Turns any error in reading a checkpoint into a `ConfigError` that names a remedy."""
        try:
            with _told_once():
                yield
        except ConfigError:
            raise
        except Exception as error:  # of many types, from JSON, TensorStore or Orbax
            # The remedy: remove this checkpoint and those that lie between it and the last good
            # one, so that the latest one, from which a run resumes, is good.
            earlier = sorted(other for other in self._manager.all_steps() if other < step)
            good = next(filter(self._is_good, reversed(earlier)), None)
            instead = "there is no good earlier one"
            if good is not None:
                later = [str(other) for other in earlier if other > good]
                named = f"it and {', '.join(later)}" if later else "it"
                instead = (
                    f"the last good checkpoint is step {good}; remove {named} to continue from "
                    f"step {good}"
                )
            raise ConfigError(
                f"`resume`: the checkpoint {self._directory / str(step)} is damaged: "
                f"{_reason(error)}; {instead}"
            ) from error

    def close(self) -> None:
        """Waits for the threads of Orbax's manager, and closes it."""
        self._manager.close()


def check_run_directory(config: Training) -> None:
    """Raises `ConfigError` if this run must not start, or cannot resume, in its directory."""
    saved = _complete(config)
    if saved and not config.resume:
        raise ConfigError(
            f"`run_dir`: {config.run_dir} already has checkpoints; add `resume` to continue it, "
            "or choose another directory"
        )
    if config.resume and not saved:
        raise ConfigError(f"`resume`: {config.run_dir} has no checkpoint; start without `resume`")
    if config.resume:
        compatibility.check_same_run(_load(config)["config"], config)


def check_same_data(config: Training, digest: str, what: str) -> None:
    """Raises `ConfigError` if the run began on data with another digest; `what` names the data."""
    if _load(config)["data_digest"] != digest:
        raise ConfigError(f"`resume`: {what} has changed since this run began")


def describe(config: Training, digest: str) -> dict:
    """Returns the description of a run: configuration, data, versions and machine."""
    return {
        "config": record(config),
        "data_digest": digest,
        compatibility.STATE_VERSION: gum_optax.STATE_VERSION,
        "versions": compatibility.versions(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def write_description(config: Training, digest: str) -> None:
    """Writes config.json, the description, into the run directory, which is made if needed."""
    make_directory("run_dir", Path(config.run_dir))
    text = json.dumps(describe(config, digest), indent=2)
    _description(config).write_text(text + "\n")


def newest(config: Training) -> int | None:
    """Returns the step of the newest complete checkpoint, unopened; None if there is none."""
    return max(_complete(config), default=None)


def last_good(config: Training) -> str:
    """Returns a phrase for error messages that names the newest complete checkpoint."""
    step = newest(config)
    return (
        "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
    )


@contextlib.contextmanager
def storage_faults(config: Training) -> Iterator[None]:
    """Turns an `OSError` of a run, as on a full disk, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"`run_dir`: cannot write {error.filename or config.run_dir}: {_reason(error)}; "
            f"{last_good(config)}"
        ) from error


def _complete(config: Training) -> list[int]:
    """Returns the steps of complete checkpoints: only these have a bare number for a name."""
    return [int(path.name) for path in _directory(config).glob("*") if path.name.isdigit()]


def _reason(error: Exception) -> str:
    """Returns the cause of an error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    system = re.search(r"os_error_code='(\d+)'", text)  # in TensorStore's long messages
    return os.strerror(int(system[1])) if system else text[:200] or type(error).__name__


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Keeps Orbax's threads and tasks from printing an error that is raised here too.

    After an error they stay silent, as threads that are still at work go on failing for a while:
    the restoring line is not in a `finally`.
    """
    before = logging.root.manager.disable, threading.excepthook, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    logging.root.manager.disable, threading.excepthook, sys.unraisablehook = before


def _load(config: Training) -> dict:
    """Reads config.json, the description of a run when it began."""
    try:
        content = parse_json(read_text(_description(config)))
        if not isinstance(content, dict) or not {"config", "data_digest"} <= content.keys():
            raise ValueError("it does not describe a run")
        return content
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`resume`: cannot read {_description(config)}: {_reason(error)}"
        ) from error


def _directory(config: Training) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _description(config: Training) -> Path:
    return Path(config.run_dir) / "config.json"


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
