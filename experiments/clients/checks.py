"""Helpers of the clients: trees as letters, and one printed line for each check."""

import os
import re
from typing import Any

# Must be set before JAX starts: meshes need several devices, here four virtual ones.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax import dimension_numbers
from gum_optax._paths import leaves_with_names


def check(what: str, holds: Any, detail: Any = "") -> None:
    """Prints one line for a check; ends the program with exit code 1 if it fails."""
    print(f"{'ok  ' if holds else 'FAIL'} {what} {detail}".rstrip(), flush=True)
    if not holds:
        raise SystemExit(1)


def letters(params: Any, numbers: Any) -> dict[str, str]:
    """Describes the axes of each role of parameters by letters.

    Args:
      params: the parameters or their shapes.
      numbers: a tree of dimension numbers, a rule, or None for the default rule.

    Returns:
      Role -> a letter for each axis, ``i`` for input, ``o`` for output, ``b`` for batch; or "" if
      it is no matrix.
    """
    found = {}
    resolved = dimension_numbers.resolve(params, numbers)
    for (path, leaf), number in zip(leaves_with_names(params), resolved, strict=True):
        # Layers differ in numbers alone and share a role.
        role = re.sub(r"\d+", "*", path)
        found[role] = ""
        if number is not None:
            _, inputs, outputs = dimension_numbers.axes(leaf.shape, number)
            found[role] = "".join(
                "i" if axis in inputs else "o" if axis in outputs else "b"
                for axis in range(len(leaf.shape))
            )
    return found


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that the arrays of a tree occupy on one device."""
    # Typed keys have no item size; they are left out.
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "sharding") and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
