"""Ranks that depend on depth: groups cut into bands of layers, with one rank each.

A group has one rank, so that the matrices of one role are first divided into *bands*, each of
neighbouring layers.

Tests: tests/library/test_inclusion.py.
"""

import re
from collections.abc import Callable
from typing import Any

from gum_optax import _checks
from gum_optax._groups import Group, GroupBy, by_role


def by_band(layers: int, bands: int = 4) -> GroupBy:
    """Groups matrices by role and by depth: ``LowRank(group_by=by_band(...))``.

    The first number in a leaf's path is the number of its layer. Leaves without one, such as stacks
    of all layers, are grouped by role alone.

    Args:
      layers: the number of layers.
      bands: how many groups each role has, at most ``layers``.

    Returns:
      A ``group_by``, with roles such as ``layers/*/q@1/4``: the band counts from 0.

    Raises:
      TypeError, ValueError: if an argument is no int >= 1, or ``bands`` exceeds ``layers``.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import by_band
      >>> by_band(8, 4)("layers/3/q", jnp.zeros((4, 4)))
      'layers/*/q@1/4'
    """
    layers, bands = _checks.positive_int("layers", layers), _checks.positive_int("bands", bands)
    if bands > layers:
        raise ValueError(f"`bands` must be at most `layers`, {layers}, got {bands}.")

    def name(path: str, leaf: Any) -> str:
        found = re.search(r"\d+", path)
        role = by_role(path, leaf)
        if found is None:
            return role
        layer = min(int(found.group()), layers - 1)
        return f"{role}@{layer * bands // layers}/{bands}"

    return name


def rank_by_depth(mean: int, slope: float) -> Callable[[Group], int]:
    """Ranks in an arithmetic progression over bands: ``LowRank(rank=rank_by_depth(...))``.

    Band i of b has rank ``mean + slope (b - 1) / 2 - slope i``, rounded: a positive slope gives the
    first layers more. The mean over all bands is ``mean`` up to rounding; at slope 0 all have it.

    Args:
      mean: the mean rank, an int >= 1, and that of groups without bands.
      slope: how much less each band has than the one before it.

    Returns:
      A ``rank`` for `LowRank`, to be used with `by_band`. Ranks are at least 1.

    Raises:
      TypeError, ValueError: if ``mean`` is no int >= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> compression = gum_optax.LowRank(
      ...     rank=gum_optax.rank_by_depth(32, 2.0), group_by=gum_optax.by_band(8, 8))
      >>> params = {"layers": [{"w": jnp.zeros((64, 64))} for _ in range(8)]}
      >>> [group.rank for group in compression.groups(params)]
      [39, 37, 35, 33, 31, 29, 27, 25]

    References:
      The one-parameter family is ATP's, arXiv 2502.14770, for the sparsity of pruned layers. Its
      theory is about errors in forward passes and does not carry over to gradients.
    """
    mean = _checks.positive_int("mean", mean)

    def rank(group: Group) -> int:
        found = re.search(r"@(\d+)/(\d+)", group.role)
        if found is None:
            return mean
        band, bands = map(int, found.groups())
        return max(1, round(mean + slope * (bands - 1) / 2 - slope * band))

    return rank
