"""Ranks that depend on depth: groups cut into bands of layers, with one rank each.

A group has one rank. For ranks by depth, the matrices of one role are therefore divided into
*bands* of neighbouring layers, and each band is a group: ``by_band`` divides, ``rank_by_depth``
gives the ranks.

Tests: tests/library/test_inclusion.py.
"""

import re
from collections.abc import Callable
from typing import Any

from gum_optax import _checks
from gum_optax._groups import Group, GroupBy, by_role


def by_band(layers: int, bands: int = 4) -> GroupBy:
    """Groups matrices by role and by depth: ``LowRank(group_by=by_band(...))``.

    The first number in a leaf's path is taken for the number of its layer. Leaves without a number,
    such as stacks of all layers, are grouped by role alone.

    Args:
      layers: the number of layers, an int >= 1.
      bands: the number of groups of each role, an int from 1 to ``layers``.

    Returns:
      A function for ``LowRank.group_by``. Its roles have the band, counted from 0, and the number
      of bands: ``layers/*/q@1/4``.

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
        # Layers beyond the stated number, such as an extra final one, join the last band.
        layer = min(int(found.group()), layers - 1)
        # The suffix is how `rank_by_depth` finds the band: a group knows its role, not its layers.
        return f"{role}@{layer * bands // layers}/{bands}"

    return name


def rank_by_depth(mean: int, slope: float) -> Callable[[Group], int]:
    """Sets ranks in an arithmetic progression over bands: ``LowRank(rank=rank_by_depth(...))``.

    Band i of b has rank ``mean + slope (b - 1) / 2 - slope i``, rounded: a positive slope gives the
    first layers higher ranks. The mean over all bands is ``mean`` up to rounding.

    Args:
      mean: the mean rank, an int >= 1, which is also the rank of groups without bands.
      slope: the difference of rank between a band and the next, any real number.

    Returns:
      A function for ``LowRank.rank``, to be used with `by_band`. Ranks are at least 1.

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
        # The progression is centred, so that its mean is `mean` whatever the slope. A steep slope
        # would take the last bands below rank 1.
        return max(1, round(mean + slope * (bands - 1) / 2 - slope * band))

    return rank
