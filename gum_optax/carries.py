"""Carries: functions that decide what the inner state keeps at a refresh.

A carry is a function ``(fresh, old, previous_basis, basis) -> state``:

- ``fresh``: the initial inner state, as ``init`` makes it;
- ``old``: the inner state before the refresh;
- ``previous_basis``, ``basis``: the bases before and after it, group -> ``[*lead, m, r]``; zero
  before the first refresh.

States of slots (`Compressed.residual`) must come from ``fresh``, since slots serve other matrices
from then on. Any function of this signature can be passed as ``LowRank(carry=...)``.

The carries of this module find the state of a group by its place. The inner transformation runs on
a dict of groups, so a state with the structure of its gradients contains such dicts, for example
``mu`` and ``nu`` of Adam. A state with another structure, as from ``optax.flatten``, mixes the
momentum of slots with the momentum of other matrices. Then only `restart` is correct, and the other
carries raise an error.

Tests: tests/library/test_carries.py.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks
from gum_optax._codec import Compressed
from gum_optax._numerics import matmul_highest
from gum_optax._paths import PyTree

Bases: TypeAlias = dict[str, jax.Array]
"""Group -> ``[*lead, m, r]``."""

Carry: TypeAlias = Callable[[PyTree, PyTree, Bases, Bases], PyTree]
"""``(fresh, old, previous_basis, basis) -> state``."""


def restart(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    """Restarts the whole inner state at every refresh: the rule of GUM's paper, and the default.

    Args:
      fresh: the initial inner state.
      old: unused.
      previous_basis: unused.
      basis: unused.

    Returns:
      ``fresh``.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, gum_optax.LowRank(carry=gum_optax.carries.restart))

    References:
      Pan et al., arXiv 2510.17802.
    """
    del old, previous_basis, basis
    return fresh


def keep(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    """Restarts slots and keeps low-rank state unchanged, now in the new basis, as GaLore does.

    A step count that all matrices share, such as Adam's, continues, so that restarted slots get no
    bias correction.

    Args:
      fresh: the initial inner state.
      old: the inner state before the refresh.
      previous_basis: unused.
      basis: the bases by group, for their names.

    Returns:
      ``old``, with the ``residual`` of ``fresh`` in every `Compressed`.

    Raises:
      ValueError: if there are slots and the state does not keep the structure of the gradients.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, gum_optax.LowRank(carry=gum_optax.carries.keep))

    References:
      Zhao et al., GaLore, arXiv 2403.03507.
    """
    del previous_basis
    return _each_group("keep", lambda name, low: low, fresh, old, basis)


def rotate(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    r"""Restarts slots and rotates low-rank momentum into the new basis.

    .. math:: R \leftarrow P_\text{new}^\top P_\text{old} R

    The part of the momentum outside the new basis is lost. The rule suits momentum, which is linear
    in the gradients. It takes ``r^2 (m + n)`` multiplications per matrix at every step, since
    `low_rank` selects between old and carried state entry by entry.

    Args:
      fresh: the initial inner state.
      old: the inner state before the refresh.
      previous_basis: by group, ``[*lead, m, r]``; zero before the first refresh.
      basis: by group, ``[*lead, m, r]``.

    Returns:
      The state, in the dtypes of ``old``.

    Raises:
      ValueError: if the state has a second moment (``nu``), since squares do not rotate; or if it
        does not keep the structure of the gradients.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, gum_optax.LowRank(carry=gum_optax.carries.rotate))

    References:
      Robert et al., LDAdam, arXiv 2410.16103, for the first moment.
    """

    def carried(name: str, low: jax.Array) -> jax.Array:
        # [*lead, m, r_new]' [*lead, m, r_old] -> [*lead, r_new, r_old]
        rotation = matmul_highest(basis[name].mT, previous_basis[name])
        if low.shape[:-1] != (*rotation.shape[:-2], rotation.shape[-1]):
            raise ValueError(
                f"`carry=carries.rotate` needs states [*lead, r, n] for group `{name}` with bases "
                f"{basis[name].shape}, and `inner` keeps one of shape {low.shape}; use "
                "`carries.restart` or `carries.keep`."
            )
        return jnp.matmul(rotation, low.astype(rotation.dtype)).astype(low.dtype)

    # Squares of rotated values are no rotation of squares.
    _refuse_second_moments(old)
    return _each_group("rotate", carried, fresh, old, basis)


def projection_aware(b1: float = 0.9, b2: float = 0.999) -> Carry:
    r"""Carries the moments of Adam into the new basis: LDAdam's rule.

    The first moment rotates. The second is estimated as the rotation of a variance, as if the
    coordinates were uncorrelated. With ``C = P_new' P_old``, and hats for bias-corrected moments
    after t steps,

    .. math::
        m \leftarrow C m, \qquad
        \hat v \leftarrow \left| C^{\circ 2} (\hat v - \hat m^{\circ 2})
            + (C \hat m)^{\circ 2} \right|

    Slots restart, as with `keep`. For a signed permutation C this is exact.

    Args:
      b1: decay of the first moment, as in the inner Adam, in [0, 1).
      b2: decay of the second moment, as in the inner Adam, in [0, 1).

    Returns:
      A carry. It raises a ValueError, at ``init`` of the optimizer, if the inner state has no
      ``optax.ScaleByAdamState``.

    Raises:
      TypeError, ValueError: if ``b1`` or ``b2`` is not a number in [0, 1).

    Example:
      >>> import gum_optax
      >>> carry = gum_optax.carries.projection_aware(b2=0.99)
      >>> tx = gum_optax.adamw(1e-3, gum_optax.galore(rank=64, carry=carry), b2=0.99)

    References:
      Robert et al., LDAdam, arXiv 2410.16103, algorithm 1.
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("b2", b2, below=1.0)

    def carry(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
        def of_adam(state: Any) -> Any:
            if not _is_adam(state):
                return state
            t = jnp.maximum(state.count, 1)  # At t = 0 both moments are 0, and 1 - b^t is, too.
            mu, nu = dict(state.mu), dict(state.nu)
            for name in basis:
                # A wrapper such as `optax.masked` may have put something else in place of a group.
                if not isinstance(mu.get(name), Compressed):
                    continue
                C = matmul_highest(basis[name].mT, previous_basis[name])  # [*lead, r, r]
                # 1 - b^t, the factors of the biased moments.
                debias1, debias2 = (1 - b ** t.astype(C.dtype) for b in (b1, b2))
                m = mu[name].low.astype(C.dtype) / debias1  # [*lead, r, n]
                v = nu[name].low.astype(C.dtype) / debias2
                rotated = matmul_highest(C, m)
                v = jnp.abs(matmul_highest(C**2, v - m**2) + rotated**2)
                mu[name] = _with_low(mu[name], rotated * debias1)
                nu[name] = _with_low(nu[name], v * debias2)
            return state._replace(mu=mu, nu=nu)

        nodes = jax.tree.leaves(old, is_leaf=_is_adam)
        if basis and not any(map(_is_adam, nodes)):
            raise ValueError(
                "`carry=carries.projection_aware` carries the moments `mu` and `nu` of Adam, and "
                "the state of `inner` has none; use `carries.rotate` for momentum, or "
                "`carries.restart`."
            )
        # Slots restart, and whatever else there is continues.
        kept = _each_group("projection_aware", lambda name, low: low, fresh, old, basis)
        return jax.tree.map(of_adam, kept, is_leaf=_is_adam)

    return carry


def _is_adam(node: Any) -> bool:
    # By type, not by fields: AMSGrad's third moment would stay behind in the old basis.
    return isinstance(node, optax.ScaleByAdamState)


def _with_low(old: Compressed, low: jax.Array) -> Compressed:
    return Compressed(low.astype(old.low.dtype), old.residual)


def _each_group(
    carry: str,
    low_of: Callable[[str, jax.Array], jax.Array],
    fresh: PyTree,
    old: PyTree,
    basis: Bases,
) -> PyTree:
    """Returns ``old`` with low-rank states changed by group, and with the slots of ``fresh``.

    Args:
      carry: the name of the carry, for errors.
      low_of: ``(group, low) -> low``, the change of a low-rank state ``[*lead, r, n]``.
      fresh: the initial inner state.
      old: the inner state before the refresh.
      basis: by group, the new bases, for their names.
    """

    def is_compressed(node: Any) -> bool:
        return isinstance(node, Compressed)

    def is_by_group(node: Any) -> bool:
        if not isinstance(node, dict) or not basis or node.keys() != basis.keys():
            return False
        # The dict of labels of `optax.partition` may have the names of groups, too. Its values are
        # whole states, in which the dicts of groups lie deeper.
        return any(map(is_compressed, node.values())) or not any(
            map(is_compressed, jax.tree.leaves(node, is_leaf=is_compressed))
        )

    def of_group(name: str, new: Any, kept: Any) -> Any:
        # A wrapper such as `optax.masked` may have put something else in place of a group.
        if not is_compressed(kept):
            return kept
        return Compressed(low_of(name, kept.low), new.residual)

    def merge(path: Any, new: Any, kept: Any) -> Any:
        if is_by_group(kept):
            return {name: of_group(name, new[name], kept[name]) for name in kept}
        # Scalars such as step counts belong to all groups. The owner of any other array is unknown.
        if basis and jnp.ndim(kept) and jnp.issubdtype(jnp.result_type(kept), jnp.inexact):
            raise ValueError(
                f"`carry=carries.{carry}` needs an `inner` whose state keeps the structure of its "
                "gradients, to tell slots, which serve other matrices after a refresh, from "
                f"low-rank states; `state{jax.tree_util.keystr(path)}` is one array of shape "
                f"{jnp.shape(kept)} for all groups. Use `carries.restart`."
            )
        return kept

    return jax.tree_util.tree_map_with_path(merge, fresh, old, is_leaf=is_by_group)


def _refuse_second_moments(state: PyTree) -> None:
    """Raises if a state has compressed second moments, which optax calls ``nu``."""

    def is_compressed(node: Any) -> bool:
        return isinstance(node, Compressed)

    for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_compressed)[0]:
        if is_compressed(leaf) and any(getattr(key, "name", None) == "nu" for key in path):
            raise ValueError(
                "`carry=carries.rotate` cannot carry the second moment "
                f"`state{jax.tree_util.keystr(path)}` of `inner` into another basis; use "
                "`carries.restart` or `carries.keep`."
            )
