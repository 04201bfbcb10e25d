"""What becomes of each group: the zeros that its state starts from, and what people are told of it.

A group is compressed, or it is *uncompressed* for a reason that it carries. The rows of
`memory_plan` and the warning of ``init`` are made here, beside the arrays whose bytes they count.

Tests: tests/library/test_memory.py, tests/library/test_recipes.py.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gum_optax import _ledger, residuals, storages
from gum_optax._codec import Compressed
from gum_optax._groups import Group


def divided(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Groups that are compressed, and groups that are not."""
    compressed = [group for group in groups if not group.uncompressed]
    return compressed, [group for group in groups if group.uncompressed]


# The zeros of a state ------------------------------------------------------------------------


def zero_basis(group: Group) -> jax.Array:
    """The basis before the first refresh, ``[*lead, m, r]``."""
    shape = (*group.lead, group.m, group.rank)
    return jnp.zeros(shape, group.compute_dtype, device=group.basis_sharding)


def zeros(groups: Sequence[Group], rule: residuals.Residual) -> dict[str, Compressed]:
    """Compressed zeros of compressed groups, on which the inner state is initialized."""

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
    """Zeros like the leaves of uncompressed groups, likewise."""
    return {
        group.name: [
            jnp.zeros(group.shape, group.dtype, device=group.sharding) for _ in group.leaves
        ]
        for group in groups
    }


# What people are told ------------------------------------------------------------------------


def rows(
    inner: Any, rule: residuals.Residual, storage: storages.Storage, groups: Sequence[Group]
) -> Iterator[_ledger.PlanRow]:
    """One row for each group, with the bytes that it adds to the state of `low_rank`."""

    def inner_bytes(tree: Any) -> int:
        # What the inner transformation keeps for `tree`, less what it keeps for nothing.
        return _ledger.bytes_beyond(lambda t: storages.pack(storage, inner.init(t)), tree, {})

    for group in groups:
        slots = rule.slots(group) if not group.uncompressed else 0
        if group.uncompressed:
            treatment, size = (
                "uncompressed",
                inner_bytes(jax.eval_shape(lambda group=group: zero_leaves([group]))),
            )
        else:
            basis = _ledger.bytes_of(jax.eval_shape(lambda group=group: zero_basis(group)))
            residual = _ledger.bytes_at_rest(lambda group=group: rule.init(group))
            encoded = jax.eval_shape(lambda group=group: zeros([group], rule))
            treatment = "sampled" if slots else "low rank"
            size = basis + residual + 4 * slots + inner_bytes(encoded)
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


def warn_if_nothing_is_compressed(groups: Sequence[Group]) -> None:
    """One warning, from the ``init`` that calls this, with an example, its reason and advice."""
    if not groups or not all(group.uncompressed for group in groups):
        return
    # The first group serves as the example; what to write depends on its reason.
    first = groups[0]
    shape = " x ".join(map(str, first.shape[-2:]))
    advice = f"Write for example `LowRank(rank={max(first.m // 4, 1)})`"
    if first.rank < first.m:
        advice = (
            "Layers are sampled within a group: write `LowRank(group_by=gum_optax.by_shape)` for "
            "larger groups, or `LowRank(residual=residuals.drop())` for none"
        )
    warnings.warn(
        f"None of {len(groups)} group(s) of matrices is compressed, so this is the inner "
        f"transformation without low rank: `{first.name}`, {first.count} of {shape}: "
        f"{first.uncompressed}. {advice}, or leave compression out; "
        "`gum_optax.memory_plan(tx, params)` shows every group.",
        stacklevel=3,
    )
