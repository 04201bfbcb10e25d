"""A refresh: bases of a new period from the gradients of its first step, and new draws.

Random numbers are a function of the seed, the period and the group's role, so that they are equal
on every host, under every sharding and after every resume.

Tests: tests/library/test_low_rank.py, tests/library/test_unbiased.py for the draws.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax import _codec, _mesh, projectors, residuals
from gum_optax._groups import Group


def new_period(
    groups: Sequence[Group],
    gradients: dict[str, Sequence[jax.Array]],
    *,
    key: jax.Array,
    period: jax.Array,
    projector: projectors.Projector,
    rule: residuals.Residual,
    old: dict[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the bases of a period, and the matrices that its slots serve.

    Args:
      groups: the compressed groups.
      gradients: by group, the leaves from which bases are made.
      key: the seed of all periods, ``uint32[2]``.
      period: the number of the period, an int32 scalar.
      projector: the projector of this step.
      rule: the residual rule, which draws.
      old: by group, the bases of the last period, ``[*lead, m, r]``.

    Returns:
      Bases like ``old``, and ``int32[slots]`` for each group that has slots.
    """
    slots, basis_keys = draw(groups, key, period, rule)
    basis = {}
    for alike in _alike(groups, old):
        basis |= _new_bases(alike, gradients, projector, basis_keys, old)
    return basis, slots


def draw(
    groups: Sequence[Group], key: jax.Array, period: jax.Array, rule: residuals.Residual
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Draws all random numbers of a period.

    Returns:
      Two dicts by group: the matrices that its slots serve, ``int32[slots]``, and a typed key for
      each of its N matrices, for the projector. Groups without slots have no entry in the first, so
      that no array is empty.
    """
    slots, keys = {}, {}
    for group in groups:
        own = _period_key(key, period, group.role)
        # The draw uses the key itself and the bases a key folded from it. So the two are
        # independent, on which the unbiasedness of the estimate rests.
        # Each matrix has a key, so that random bases of equal gradients differ.
        keys[group.name] = jax.random.split(jax.random.fold_in(own, 1), group.count)
        if rule.slots(group):
            slots[group.name] = rule.draw(group, own)
    return slots, keys


def _alike(groups: Sequence[Group], basis: dict[str, jax.Array]) -> list[list[Group]]:
    """Collects groups of equal shape, rank and dtype, for which one loop can make all bases.

    The projector takes most of the compile time, and the seven roles of a transformer have two or
    three shapes. On a mesh roles have different shardings, so each group has a loop of its own.
    """
    found: dict[Any, list[Group]] = {}
    for group in groups:
        shape = (group.m, group.n, group.rank, group.compute_dtype)
        apart = group.name if _mesh.on_mesh(basis[group.name]) else None
        found.setdefault((shape, apart), []).append(group)
    return list(found.values())


def _period_key(key: jax.Array, period: jax.Array, role: str) -> jax.Array:
    """Returns the key of one group in one period, a function of seed, period and role alone.

    Layers that are separate leaves have a number in their path (``layers/*/q``), stacked layers do
    not (``layers/q``). Both name the same matrices, so both get the same draws.
    """
    name = role.replace("*/", "")
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    typed = jax.random.fold_in(typed, period)
    return jax.random.fold_in(typed, np.uint32(crc32(name.encode())))


def _new_bases(
    groups: Sequence[Group],
    gradients: dict[str, Sequence[jax.Array]],
    projector: projectors.Projector,
    keys: dict[str, jax.Array],
    previous: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Makes one basis after the other, so that one matrix has temporaries at a time."""
    # 1. The input of the loop: for each group a function from an index to a gradient [m, n].
    old = [previous[group.name] for group in groups]  # [*lead, m, r] each
    dtype, shape = old[0].dtype, old[0].shape[-2:]
    takes = [_codec.matrix_at(group, gradients[group.name], dtype) for group in groups]

    def one(argument: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        group_number, index, matrix_key, previous_basis = argument
        gradient = jax.lax.switch(group_number, takes, index)  # [m, n]
        basis = projector(matrix_key, gradient, groups[0].rank, previous_basis)
        if getattr(basis, "shape", None) != shape:
            raise ValueError(
                f"`projector` returned {basis} for group `{groups[0].name}`; expected an "
                f"orthonormal basis of shape {shape}, that is [m, r]."
            )
        return basis.astype(dtype)

    # 2. A loop over the matrices of all groups: (number of the group, index in it, key, old basis).
    counts = [group.count for group in groups]
    bases = jax.lax.map(
        one,
        (
            np.repeat(np.arange(len(groups), dtype=np.int32), counts),
            np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
            _joined([keys[group.name] for group in groups]),
            _joined([part.reshape(-1, *shape) for part in old]),
        ),
    )  # [matrices of all groups, m, r]
    # 3. Back to one array [*lead, m, r] for each group.
    ends = np.cumsum(counts)
    return {
        group.name: bases[end - group.count : end].reshape(part.shape)
        for group, end, part in zip(groups, ends.tolist(), old, strict=True)
    }


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
