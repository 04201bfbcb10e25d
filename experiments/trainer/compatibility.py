"""Whether a checkpoint is what the run needs that goes on from it: never silently wrong.

Orbax converts what it restores to the dtype that is asked for without a word, and does not notice
a flipped bit. So a checkpoint carries a description of its run and checksums of its arrays.
"""

import contextlib
import importlib.metadata
import json
import platform
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gum_optax
from experiments.trainer.config import Training, first_difference, in_record, record
from experiments.trainer.options import ConfigError

# The name of the state's version in the description of a checkpoint. States of version 2, which are
# recognized by it, called it a layout.
STATE_VERSION = "state_layout"

SEALED = "sealed"
"""In descriptions of checkpoints whose files have a seal; those of older ones have none."""

_SEAL = "seal"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
_PACKAGES += ("transformers", "reasoning-gym")


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on, of those that are installed."""
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed | {"gum_optax": gum_optax.__version__, "python": platform.python_version()}


def describe(config: Training, state: Any) -> dict:
    """What a checkpoint of `state` says about itself."""
    description = {
        STATE_VERSION: gum_optax.STATE_VERSION,
        "config": record(config),
        "versions": versions(),
        "checksums": checksums(state),
        SEALED: True,
    }
    return description | {_SEAL: _seal(description)}


def _seal(description: dict) -> int:
    """A checksum of all but the seal itself, the same before and after a way through JSON."""
    rest = {name: value for name, value in description.items() if name != _SEAL}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def check_same_run(old: dict, config: Training) -> None:
    """Raises `ConfigError` unless `old` is the configuration of the same run."""
    if field := first_difference(old, config):
        raise ConfigError(
            f"`resume`: `{field}` is {record(config)[field]}, but this run began with "
            f"{in_record(old, config)[field]}; give the same value, or choose another `run_dir`"
        )


def check_description(description: dict, config: Training) -> None:
    """Raises `ConfigError` unless a checkpoint is of this run, of a state version known here.

    Raises:
      ValueError: a flipped bit made it another description; older checkpoints have no seal.
    """
    if description.get(_SEAL, _seal(description)) != _seal(description):
        raise ValueError("its description is not the one that was saved")
    version, written_by = description[STATE_VERSION], description["versions"]["gum_optax"]
    if version != gum_optax.STATE_VERSION:
        raise ConfigError(
            f"`resume`: the checkpoint has an optimizer state of version {version}, and this "
            f"gum_optax reads version {gum_optax.STATE_VERSION}; continue the run with the "
            f"gum_optax that wrote it, {written_by}"
        )
    check_same_run(description["config"], config)


def check_arrays(stored: Any, wanted: Any) -> None:
    """Raises `ConfigError` unless both trees have the same paths, shapes and dtypes."""
    there, here = _arrays(stored), _arrays(wanted)
    for path in [*here, *there]:
        if there.get(path) != here.get(path):
            raise ConfigError(
                f"`resume`: `{path}` is {there.get(path, 'missing')} in the checkpoint and "
                f"{here.get(path, 'missing')} in this run: it is of another model, optimizer or "
                "library version"
            )


def check_content(description: dict, state: Any) -> None:
    """Raises `ValueError` unless the restored arrays are, bit for bit, those that were saved."""
    if checksums(state) != description["checksums"]:
        raise ValueError("its arrays are not those that were saved")


def other_versions(description: dict) -> str | None:
    """A line about packages that changed since a checkpoint was written, if any did."""
    old, new = description["versions"], versions()
    changed = [
        f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]
    ]
    if not changed:
        return None
    return f"versions since the checkpoint: {', '.join(changed)}; losses may differ by rounding"


def checksums(state: Any) -> list[int]:
    """One number per array, the same however it is sharded."""
    return [int(np.asarray(_checksum(leaf))) for leaf in jax.tree.leaves(state)]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum of all entries' bits, times odd weights that differ along each axis, modulo 2^32."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    unsigned = f"uint{8 * array.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(array, unsigned) if floating else array
    weights = jnp.ones(array.shape, jnp.uint32)
    for axis, factor in zip(range(array.ndim), (2, 514, 131_074, 33_554_434, 6, 10), strict=False):
        weights += factor * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def _arrays(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
