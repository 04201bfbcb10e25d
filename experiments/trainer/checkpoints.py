"""A run directory: what may be resumed, and the checkpoints to resume from."""

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

# Devices that hold the same array would each write a part of it, and each cut compiles a program,
# which is half of the time to save a small model. One device writes what is below a megabyte.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)

# Larger files have only their size in the seal of a checkpoint: they hold arrays, which have
# checksums of their own.
_HASHED = 64 * 2**20


class StorageError(ConfigError):
    """The disk failed the run; its text is one line that names the last good checkpoint."""


class Checkpoints:
    """Saves and restores training state and the position in the data, together.

    Saving is synchronous: the training step donates its buffers, so a copy in the background
    could read memory that the next step already writes.
    """

    def __init__(self, config: Training):
        self._config, self._directory = config, _directory(config).absolute()
        self._note = self._directory.with_name("unsealed")
        # Known from the start, so that a new process can look into an old checkpoint.
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
            # The metadata of a checkpoint are damaged. Unread, they are refused where the
            # checkpoint is restored, with its name. Only then: without their times, Orbax fails
            # where it saves for a preemption.
            self._manager = manager(lightweight=True)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict) -> None:
        """Writes a checkpoint, which appears under its name only when complete.

        Raises:
          StorageError: it could not be written; earlier ones are as they were.
        """
        if self.latest() == step:
            return
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data)
        )
        description = compatibility.describe(self._config, state)
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
        """The training state (of the structure of `state`) and data position saved at `step`.

        Raises:
          ConfigError: the checkpoint is of another run, or damaged.
        """
        shapes = jax.tree.map(_shape, state)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
            ),
            data=ocp.args.JsonRestore(),
        )
        with self._damage_named(step):
            self._check_files(step)
            description = self.description(step)
            compatibility.check_description(description, self._config)
            compatibility.check_arrays(self._manager.item_metadata(step)["state"].tree, shapes)
            restored = self._manager.restore(step, args=arguments)
            compatibility.check_content(description, restored["state"])
        if self._unsealed() == step:
            self._seal(step)
        return restored["state"], restored["data"]

    def description(self, step: int) -> dict:
        """What a checkpoint says about itself, see `compatibility.describe`."""
        description: Any = self._manager.metadata(step).custom_metadata
        if not description:
            raise ValueError("it does not say what run it is of")
        return description

    def _note_unsealed(self, step: int) -> None:
        """Notes that a checkpoint of this step is complete before its files have a seal."""
        if processes.is_first():
            write_whole(self._note, str(step))

    def _seal(self, step: int) -> None:
        """Notes the hashes of a checkpoint's files, once all processes have written theirs."""
        if processes.is_first():
            seals.write(self._directory / str(step), _HASHED)
            self._note.unlink(missing_ok=True)

    def _unsealed(self) -> int | None:
        """The step of a checkpoint that a kill may have left without a seal."""
        try:
            return int(read_text(self._note))
        except (OSError, ValueError):
            return None

    def _check_files(self, step: int) -> None:
        """Raises `ValueError` unless the files of a checkpoint are those that were written."""
        directory = self._directory / str(step)
        if (fault := seals.fault(directory, _HASHED)) is None:
            return
        if seals.exists(directory):
            raise ValueError(fault)
        # Older checkpoints have no seal, and neither has one after whose writing the run was
        # killed at once. The checksums of their arrays are checked in any case.
        self._check_regular(step)
        if self._unsealed() != step and self.description(step).get(compatibility.SEALED):
            raise ValueError(fault)

    def _check_regular(self, step: int) -> None:
        """Raises `OSError` if something in a checkpoint is neither a file nor a directory."""
        for file in (self._directory / str(step)).rglob("*"):
            if not file.is_dir():
                check_regular(file)

    def _is_good(self, step: int) -> bool:
        """Whether nothing is seen at the files of a checkpoint."""
        try:
            with _told_once():
                self._check_files(step)
        except Exception:  # of many types, from JSON, TensorStore or Orbax
            return False
        return True

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        try:
            with _told_once():
                yield
        except ConfigError:
            raise
        except Exception as error:  # of many types, from JSON, TensorStore or Orbax
            earlier = sorted(other for other in self._manager.all_steps() if other < step)
            good = next(filter(self._is_good, reversed(earlier)), None)
            instead = "there is no earlier one that is good"
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
        """Waits for the manager's threads."""
        self._manager.close()


def check_run_directory(config: Training) -> None:
    """Raises `ConfigError` if this run may not start, or not resume, in its directory."""
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
    """Raises `ConfigError` if the run began on other tokens than the ones prepared now."""
    if _load(config)["data_digest"] != digest:
        raise ConfigError(f"`resume`: {what} has changed since this run began")


def describe(config: Training, digest: str) -> dict:
    """What identifies a run: its configuration, its data, the versions and the machine."""
    return {
        "config": record(config),
        "data_digest": digest,
        compatibility.STATE_VERSION: gum_optax.STATE_VERSION,
        "versions": compatibility.versions(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def write_description(config: Training, digest: str) -> None:
    """Writes `config.json` into the run directory, which is made if needed."""
    make_directory("run_dir", Path(config.run_dir))
    text = json.dumps(describe(config, digest), indent=2)
    _description(config).write_text(text + "\n")


def newest(config: Training) -> int | None:
    """The step of the newest complete checkpoint, without opening it; None if there is none."""
    return max(_complete(config), default=None)


def last_good(config: Training) -> str:
    """A phrase that names the newest complete checkpoint."""
    step = newest(config)
    return (
        "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
    )


@contextlib.contextmanager
def storage_faults(config: Training) -> Iterator[None]:
    """Turns an `OSError` of a run, such as that of a full disk, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"`run_dir`: cannot write {error.filename or config.run_dir}: {_reason(error)}; "
            f"{last_good(config)}"
        ) from error


def _complete(config: Training) -> list[int]:
    """The steps of complete checkpoints: only these have a bare number for a name."""
    return [int(path.name) for path in _directory(config).glob("*") if path.name.isdigit()]


def _reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    system = re.search(r"os_error_code='(\d+)'", text)  # in TensorStore's long messages
    return os.strerror(int(system[1])) if system else text[:200] or type(error).__name__


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Keeps Orbax's threads and tasks from reporting an error that is raised here too.

    After an error they stay silent: what they gave up goes on failing for a while.
    """
    before = logging.root.manager.disable, threading.excepthook, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    logging.root.manager.disable, threading.excepthook, sys.unraisablehook = before


def _load(config: Training) -> dict:
    """What a run was when it began."""
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
