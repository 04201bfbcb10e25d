"""`LowRank`: how the gradients of weight matrices are compressed, as one value.

Tests: tests/library/test_groups.py, tests/library/test_bad_input.py.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from gum_optax import _checks, carries, projectors, residuals, storages
from gum_optax._groups import Group, GroupBy, by_role, find_groups
from gum_optax._paths import PyTree

Key: TypeAlias = int | jax.Array
"""A seed, or a threefry key (typed, or raw ``uint32[2]``)."""


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A compression: how the gradients of matrices become low-rank.

    The options of every compressed optimizer are described here, and only here.

    Attributes:
      rank: r, an int >= 1, or a function of a `Group` that returns one: ``lambda group: group.m //
        4``. A group with rank >= m is uncompressed.
      period: K, the number of steps between two refreshes of bases and draws, an int >= 1 (GaLore's
        ``update_proj_gap``). Step 0 is a refresh.
      residual: the rule for the part of a gradient outside its basis, see `residuals`.
      projector: the function that makes a basis from a gradient, see `projectors`.
      carry: the function that makes the inner state of a new period from the old one, see
        `carries`.
      storage: the form of the inner state between steps, see `storages`.
      basis_storage: the form of bases between steps, see `storages`. The step of a refresh packs
        its bases and computes with what it unpacks, so that a basis is the same in its whole
        period. Estimates that are unbiased stay so, since ``E = G - P P'G`` makes up for any P.
        Columns are orthonormal up to the error of the storage: singular values of P are within
        0.5 % of one in `storages.int8`, and within 6 % in `storages.int4`.
      group_by: ``(path, leaf) -> role``. Matrices of one role form a group, among which layers are
        sampled; `by_role`, `by_shape` or your own function.
      key: an int seed or a threefry key. The draw of a period depends only on this key, the number
        of the period and the group's role: it is equal on every host, under every sharding and
        after every resume, as long as the flag ``jax_threefry_partitionable`` stays the same, which
        changes all random bits of JAX.

    Raises:
      TypeError, ValueError: if an option is malformed.

    Example:
      >>> import gum_optax
      >>> compression = gum_optax.LowRank(rank=64, period=100)
      >>> muon, adam = gum_optax.gum(0.02, compression), gum_optax.adamw(1e-3, compression)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802, for the defaults.
    """

    rank: int | Callable[[Group], int] = 128
    period: int = 200
    residual: residuals.Residual = residuals.sampled(2)
    projector: projectors.Projector | projectors.switch = projectors.subspace_iteration
    carry: carries.Carry = carries.restart
    storage: storages.Storage = storages.plain()
    basis_storage: storages.Storage = storages.plain()
    group_by: GroupBy = by_role
    key: Key = 0

    def __post_init__(self) -> None:
        """Checks every option, so that errors come from this call and not from ``init``."""
        if not callable(self.rank):
            _checks.positive_int("rank", self.rank)
        _checks.positive_int("period", self.period)
        _checks.instance("residual", self.residual, residuals.Residual, "of `gum_optax.residuals`")
        projectors.check(self.projector)
        _checks.function("carry", self.carry, "(fresh, old, previous_basis, basis) -> state")
        for name in ("storage", "basis_storage"):
            value = getattr(self, name)
            _checks.instance(name, value, storages.Storage, "of `gum_optax.storages`")
        if self.basis_storage.key is not None:
            raise ValueError(
                "`basis_storage` must not round `at_random`: bases are packed once in a period, "
                "so there is no mean over steps that it would keep."
            )
        _checks.function("group_by", self.group_by, "(path, leaf) -> role")
        _checks.key("key", self.key)

    def groups(self, tree: PyTree) -> list[Group]:
        """Returns the groups of a tree, each with its rank and, if uncompressed, the reason.

        Args:
          tree: arrays or ``jax.ShapeDtypeStruct``; the last two axes are a matrix, others batch.

        Returns:
          A list of `Group`.

        Raises:
          TypeError, ValueError: if a leaf is no real floating-point matrix, or if ``rank`` or
            ``group_by`` returns something malformed.
        """
        return [self._decide(group) for group in find_groups(tree, self.group_by)]

    def _decide(self, group: Group) -> Group:
        rank = self.rank(group) if callable(self.rank) else self.rank
        # The result of a rank function is only known here, so that the error names the group, too.
        rank = _checks.positive_int(f"rank` of the group `{group.name}", rank)
        why = f"rank {rank} >= {group.m}" if rank >= group.m else self.residual.uncompressed(group)
        return dataclasses.replace(group, rank=rank, uncompressed=why)


def period_of(compression: LowRank, count: jax.Array) -> jax.Array:
    """Returns the number of the period of a step, from the number of steps before it."""
    return jax.lax.div(count, jnp.asarray(compression.period, count.dtype))
