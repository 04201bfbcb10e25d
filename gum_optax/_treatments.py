"""The treatment of each group: the zeros of its initial state, and the reports about it.

A group is compressed, or it is *uncompressed* for a reason that is stored in it. The rows of
`memory_plan` and the warning of ``init`` are made here, next to the arrays whose bytes they count.

Tests: tests/library/test_memory.py, tests/library/test_recipes.py.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gum_optax import _ledger, _packing, residuals
from gum_optax._codec import Compressed
from gum_optax._groups import Group


def divided(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Divides groups into those that are compressed and those that are not."""
    compressed = [group for group in groups if not group.uncompressed]
    return compressed, [group for group in groups if group.uncompressed]


# The zeros of a state ------------------------------------------------------------------------


def zero_bases(groups: Sequence[Group]) -> dict[str, jax.Array]:
    """Returns the bases of compressed groups before the first refresh, zeros ``[*lead, m, r]``."""
    # `device` is a sharding or None. `init` then makes every array where it belongs.
    return {
        group.name: jnp.zeros(
            (*group.lead, group.m, group.rank), group.compute_dtype, device=group.basis_sharding
        )
        for group in divided(groups)[0]
    }


def zeros(groups: Sequence[Group], rule: residuals.Residual) -> dict[str, Compressed]:
    """Returns compressed zeros of compressed groups, from which the inner state is initialized."""

    # low [*lead, r, n]; residual [slots, m, n], or None without slots
    def of_group(group: Group) -> Compressed:
        low = (*group.lead, group.rank, group.n)
        slots = (rule.slots(group), group.m, group.n)
        return Compressed(
            low=jnp.zeros(low, group.dtype, device=group.low_sharding),
            residual=(
                jnp.zeros(slots, group.dtype, device=group.slots_sharding) if slots[0] else None
            ),
        )

    return {group.name: of_group(group) for group in groups}


def zero_leaves(groups: Sequence[Group]) -> dict[str, list[jax.Array]]:
    """Returns zeros like the leaves of uncompressed groups, for the inner state of those."""
    return {
        group.name: [
            jnp.zeros(group.shape, group.dtype, device=group.sharding) for _ in group.leaves
        ]
        for group in groups
    }


# Reports -------------------------------------------------------------------------------------


def rows(inner: Any, compression: Any, groups: Sequence[Group]) -> Iterator[_ledger.PlanRow]:
    """Yields one row for each group, with the bytes that it adds to the state of `low_rank`.

    Args:
      inner: the inner transformation.
      compression: the `LowRank`.
      groups: the groups, compressed or not.
    """
    rule = compression.residual

    # The bytes of the inner state for `tree`, without those that it has for an empty tree.
    def inner_bytes(tree: Any) -> int:
        pack = partial(_packing.pack, compression.storage)
        return _ledger.bytes_beyond(lambda t: pack(inner.init(t)), tree, {})

    def basis_bytes(group: Group) -> int:
        pack = partial(_packing.pack, compression.basis_storage)
        return _ledger.bytes_of(jax.eval_shape(lambda: pack(zero_bases([group]))))

    for group in groups:
        slots = rule.slots(group) if not group.uncompressed else 0
        # 1. Uncompressed: only the inner state. `eval_shape`, so that no zeros are allocated.
        if group.uncompressed:
            treatment, size = (
                "uncompressed",
                inner_bytes(jax.eval_shape(lambda group=group: zero_leaves([group]))),
            )
        # 2. Compressed: basis + state of the rule + int32 slots + inner state.
        else:
            residual = _ledger.bytes_at_rest(lambda group=group: rule.init(group))
            encoded = jax.eval_shape(lambda group=group: zeros([group], rule))
            treatment = "sampled" if slots else "low rank"
            size = basis_bytes(group) + residual + 4 * slots + inner_bytes(encoded)
        yield _ledger.PlanRow(
            name=group.name,
            treatment=treatment,
            why=group.uncompressed,
            count=group.count,
            shape=group.shape[-2:],
            rank=None if group.uncompressed else group.rank,
            slots=slots or None,
            bytes=size,
            adamw_bytes=2 * group.count * group.m * group.n * group.dtype.itemsize,
        )


def warn_of_uncompressed(groups: Sequence[Group]) -> None:
    """Warns once if most of the parameters of matrices are uncompressed.

    The warning names the largest of these groups with their reasons, and a remedy for the first.
    """
    uncompressed = sorted(divided(groups)[1], key=_size, reverse=True)
    share = sum(map(_size, uncompressed)) / max(1, sum(map(_size, groups)))
    if share <= 0.5:
        return
    if len(uncompressed) == len(groups):
        told = (
            f"None of {len(groups)} group(s) of matrices is compressed, so this is the inner "
            "transformation without low rank"
        )
    else:
        told = (
            f"{100 * share:.0f} % of the parameters of matrices are in groups that run through "
            "the inner transformation uncompressed"
        )
    more = f", and {len(uncompressed) - 3} more" if len(uncompressed) > 3 else ""
    # The level shows the caller of the `init` that calls this.
    warnings.warn(
        f"{told}: {'; '.join(map(_named, uncompressed[:3]))}{more}. {_advice(uncompressed[0])}, or "
        "leave compression out; `gum_optax.memory_plan(tx, params)` shows every group.",
        stacklevel=3,
    )


def _size(group: Group) -> int:
    return group.count * group.m * group.n


def _named(group: Group) -> str:
    """Describes a group, its matrices, and the reason why it is uncompressed."""
    shape = " x ".join(map(str, group.shape[-2:]))
    return f"`{group.name}`, {group.count} of {shape}: {group.uncompressed}"


def _advice(group: Group) -> str:
    """Returns the remedy for the reason why a group is uncompressed."""
    if group.m == 1:  # of rank 1 itself
        return (
            "A matrix with a side of 1 has no lower rank: send it to the fallback by "
            "`weight_dimension_numbers`"
        )
    if group.rank >= group.m:
        return f"Write for example `LowRank(rank={max(group.m // 4, 1)})`"
    # Otherwise every matrix of the group is always drawn, since there are so few.
    return (
        "Layers are sampled within a group: write `LowRank(group_by=gum_optax.by_shape)` for "
        "larger groups, or `LowRank(residual=residuals.drop())` for none"
    )
