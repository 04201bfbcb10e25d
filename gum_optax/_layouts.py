"""The layout of a tree: which stacks are compressed, and the engine's steps over all of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import _codec, samplers
from gum_optax._codec import Compressed
from gum_optax._stacks import Stack, StackBy, find_stacks
from gum_optax._typing import PyTree


class Layout(NamedTuple):
    """One compressed stack: its rank r < m and its sampling."""

    stack: Stack
    rank: int
    sampling: samplers.Sampling


def find_layouts(
    tree: PyTree, rank: int, sampler: samplers.Sampler, stack_by: StackBy
) -> tuple[list[Layout], list[Stack]]:
    """Decides, from shapes alone, which stacks of a tree are compressed and which stay dense."""
    layouts, dense = [], []
    for stack in find_stacks(tree, stack_by):
        sampling = samplers.resolve(sampler, stack.count)
        if rank < stack.m and sampling.probability < 1.0:
            layouts.append(Layout(stack, rank, sampling))
        else:
            dense.append(stack)
    return layouts, dense


def compress(
    layouts: list[Layout],
    leaves: list[jax.Array] | None,
    basis: dict[str, jax.Array],
    slots: dict[str, jax.Array],
) -> Any:
    """The tree that the base sees: stack -> `Compressed`."""
    if leaves is None:
        return None
    return {
        stack.name: _codec.compress(
            stack,
            take(leaves, stack),
            basis[stack.name],
            slots.get(stack.name),
            sampling.probability,
        )
        for stack, _, sampling in layouts
    }


def expand(
    layouts: list[Layout],
    compressed: dict[str, Compressed],
    basis: dict[str, jax.Array],
    slots: dict[str, jax.Array],
    leaves: list[jax.Array],
) -> dict[int, Any]:
    """The updates of compressed leaves, by their positions."""
    expanded: dict[int, Any] = {}
    last = None
    for stack, _, _ in layouts:
        updates = _codec.expand(
            stack,
            compressed[stack.name],
            basis[stack.name],
            slots.get(stack.name),
            [leaf.dtype for leaf in take(leaves, stack)],
            last,
        )
        last = updates[-1]
        expanded |= dict(zip(stack.leaves, updates, strict=True))
    return expanded


def collect(dense: list[Stack], leaves: list[jax.Array] | None) -> Any:
    """The leaves of dense stacks, as the base sees them: as they are."""
    if leaves is None:
        return None
    return {
        stack.name: [leaf.astype(stack.compute_dtype) for leaf in take(leaves, stack)]
        for stack in dense
    }


def zeros_compressed(layouts: list[Layout], dtype: Any) -> dict[str, Compressed]:
    """What the base is initialized with: compressed zeros."""

    def zeros(stack: Stack, rank: int, slots: int) -> Compressed:
        low, full = (*stack.lead, rank, stack.n), (slots, stack.m, stack.n)
        kind = dtype or stack.dtype
        return Compressed(
            low=jnp.zeros(low, kind, device=stack.low_sharding),
            full=jnp.zeros(full, kind, device=stack.full_sharding) if slots else None,
        )

    return {stack.name: zeros(stack, r, sampling.slots) for stack, r, sampling in layouts}


def zeros_dense(dense: list[Stack], dtype: Any) -> dict[str, list[jax.Array]]:
    """What the base of dense stacks is initialized with."""
    return {
        stack.name: [
            jnp.zeros(stack.shape, dtype or stack.dtype, device=stack.sharding)
            for _ in stack.leaves
        ]
        for stack in dense
    }


def take(leaves: list[jax.Array], stack: Stack) -> list[jax.Array]:
    """The leaves of a stack."""
    return [leaves[i] for i in stack.leaves]
