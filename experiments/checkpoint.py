"""A run directory: what may be resumed, and the checkpoints to resume from."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.config import Config, ConfigError, first_difference, flag, make_directory

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class Checkpoints:
    """Saves and restores training state and the position in the data, together.

    Saving is synchronous: the training step donates its buffers, so a copy in the background
    could read memory that the next step already writes.
    """

    def __init__(self, config: Config):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_checkpoints, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(_directory(config).absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict) -> None:
        """Writes a checkpoint, which appears under its name only when complete."""
        if self.latest() == step:
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        self._manager.save(step, args=arguments)

    def restore(self, step: int, state: Any) -> tuple[Any, dict]:
        """The training state (of the structure of `state`) and data position saved at `step`."""
        shapes = jax.tree.map(_shape, state)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=arguments)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for the manager's threads."""
        self._manager.close()


def check_run_directory(config: Config) -> None:
    """Raises `ConfigError` if this run may not start, or not resume, in its directory."""
    saved = any(path.name.isdigit() for path in _directory(config).glob("*"))
    if saved and not config.resume:
        raise ConfigError(
            f"--run-dir: {config.run_dir} already has checkpoints; add --resume to continue it, "
            "or choose another directory"
        )
    if config.resume and not saved:
        raise ConfigError(f"--resume: {config.run_dir} has no checkpoint; start without --resume")
    if config.resume:
        _check_same_run(config)


def check_same_data(config: Config, digest: str) -> None:
    """Raises `ConfigError` if the run began on other tokens than the ones prepared now."""
    if _load(config)["data_digest"] != digest:
        raise ConfigError(
            f"--resume: the text of {' '.join(config.corpus)} has changed since this run began"
        )


def describe(config: Config, digest: str) -> dict:
    """What identifies a run: its configuration, its data, the versions and the machine."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "config": dataclasses.asdict(config),
        "data_digest": digest,
        "versions": versions | {"python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def write_description(config: Config, digest: str) -> None:
    """Writes `config.json` into the run directory, which is made if needed."""
    make_directory("run_dir", Path(config.run_dir))
    text = json.dumps(describe(config, digest), indent=2)
    _description(config).write_text(text + "\n")


def _check_same_run(config: Config) -> None:
    old = _load(config)["config"]
    if field := first_difference(old, config):
        raise ConfigError(
            f"--resume: {flag(field)} is {getattr(config, field)}, but this run began with "
            f"{old[field]}; give the same value, or choose another --run-dir"
        )


def _load(config: Config) -> dict:
    try:
        return json.loads(_description(config).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: cannot read {_description(config)}: {error}") from error


def _directory(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _description(config: Config) -> Path:
    return Path(config.run_dir) / "config.json"


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
