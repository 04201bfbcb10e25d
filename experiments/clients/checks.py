"""What the clients' scripts share: trees as letters, and one printed line for each check."""

import os
import re
from typing import Any

# Before JAX starts: meshes need several devices.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax import dimension_numbers
from gum_optax._paths import leaves_with_names


def check(what: str, holds: Any, detail: Any = "") -> None:
    """Prints one line, and ends the program where the check fails."""
    print(f"{'ok  ' if holds else 'FAIL'} {what} {detail}".rstrip(), flush=True)
    if not holds:
        raise SystemExit(1)


def letters(params: Any, numbers: Any) -> dict[str, str]:
    """Role -> a letter for each axis: ``i`` input side, ``o`` output, ``b`` batch; or ""."""
    found = {}
    resolved = dimension_numbers.resolve(params, numbers)
    for (path, leaf), number in zip(leaves_with_names(params), resolved, strict=True):
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
    """Bytes that the arrays of a tree occupy on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "sharding") and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
