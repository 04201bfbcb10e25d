"""Checks that a checkpoint fits the run that resumes from it: a wrong one never passes silently.

Orbax silently converts restored arrays to the dtype that is asked for, and does not notice a
flipped bit. Each checkpoint therefore carries a description of its run and checksums of its arrays:

- a description of another run, state version or shape raises `ConfigError`: the user has to choose;
- damage raises `ValueError`, to which `checkpoints` adds the name of the last good checkpoint.
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

# The key of the state's version in a description. Version 2 called it a layout, and its checkpoints
# are recognized by this key.
STATE_VERSION = "state_layout"

SEALED = "sealed"
"""Key in descriptions of checkpoints whose files have a seal; older ones have neither."""

# Key of the checksum of the description itself.
_SEAL = "seal"

# Packages on which numbers, or the reading of a checkpoint, depend.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
_PACKAGES += ("transformers", "reasoning-gym")


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that a run's numbers depend on."""
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed | {"gum_optax": gum_optax.__version__, "python": platform.python_version()}


def describe(config: Training, state: Any) -> dict:
    """Returns the description in a checkpoint of `state`: run, versions, checksums and its seal."""
    description = {
        STATE_VERSION: gum_optax.STATE_VERSION,
        "config": record(config),
        "versions": versions(),
        "checksums": checksums(state),
        SEALED: True,
    }
    return description | {_SEAL: _seal(description)}


def _seal(description: dict) -> int:
    """Returns the CRC-32 of a description without its seal, the same before and after JSON."""
    rest = {name: value for name, value in description.items() if name != _SEAL}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def check_same_run(old: dict, config: Training) -> None:
    """Raises `ConfigError` unless `old`, the record of a configuration, is of the same run."""
    if field := first_difference(old, config):
        raise ConfigError(
            f"`resume`: `{field}` is {record(config)[field]}, but this run began with "
            f"{in_record(old, config)[field]}; give the same value, or choose another `run_dir`"
        )


def check_description(description: dict, config: Training) -> None:
    """Checks the description of a checkpoint against this run and this version of the library.

    Raises:
      ConfigError: the checkpoint is of another run, or of another version of the state.
      ValueError: the description is damaged: its checksum differs.
    """
    # Descriptions of older checkpoints have no checksum of their own, and pass.
    if description.get(_SEAL, _seal(description)) != _seal(description):
        raise ValueError("its description differs from the saved one")
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
    # Path -> "dtype[shape]" on both sides. Paths of this run come first in the search for a
    # difference.
    there, here = _arrays(stored), _arrays(wanted)
    for path in [*here, *there]:
        if there.get(path) != here.get(path):
            raise ConfigError(
                f"`resume`: `{path}` is {there.get(path, 'missing')} in the checkpoint and "
                f"{here.get(path, 'missing')} in this run: it is of another model, optimizer or "
                "library version"
            )


def check_content(description: dict, state: Any) -> None:
    """Raises `ValueError` unless the restored arrays have the checksums of the saved ones."""
    if checksums(state) != description["checksums"]:
        raise ValueError("its arrays differ from the saved ones")


def other_versions(description: dict) -> str | None:
    """Returns a line about packages that changed since a checkpoint was written, if any did."""
    old, new = description["versions"], versions()
    changed = [
        f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]
    ]
    if not changed:
        return None
    return f"versions since the checkpoint: {', '.join(changed)}; losses may differ by rounding"


def checksums(state: Any) -> list[int]:
    """Returns one number in [0, 2^32) per array, the same however the array is sharded."""
    return [int(np.asarray(_checksum(leaf))) for leaf in jax.tree.leaves(state)]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Returns ``sum_i w_i bits_i mod 2^32`` over all entries i, with odd weights ``w_i``.

    Integer sums do not depend on their order, so the checksum does not depend on the sharding. An
    odd weight is invertible modulo 2^32: a single changed entry, of at most 32 bits as all entries
    of a state, always changes the sum. The weights differ along each axis, so that entries in
    another order change it too, but for coincidences.
    """
    # 1. Bits of each entry, as unsigned integers of its width.
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    unsigned = f"uint{8 * array.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(array, unsigned) if floating else array
    # 2. w_i = 1 + sum_a f_a i_a, with even factors: odd for every index.
    weights = jnp.ones(array.shape, jnp.uint32)
    for axis, factor in zip(range(array.ndim), (2, 514, 131_074, 33_554_434, 6, 10), strict=False):
        weights += factor * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # 3. Overflow wraps: arithmetic modulo 2^32.
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def _arrays(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of each leaf, in words, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
