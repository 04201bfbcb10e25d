"""Compressions named after their papers: each chooses bases, a residual rule and a carry.

Each is a `LowRank` with other defaults, for every optimizer: ``adamw(1e-3, galore())`` is GaLore,
``gum(0.02, galore())`` is GaLore-Muon.

Tests: tests/library/test_recipes.py, tests/library/test_gains.py.
"""

from typing import Any

import optax

from gum_optax import _checks, carries, projectors, residuals
from gum_optax._compression import LowRank
from gum_optax._gains import scale_by_gain


def galore(rank: Any = 128, period: int = 200, **parts: Any) -> LowRank:
    """The compression of GaLore: exact singular subspaces, without residuals. It is biased.

    Moments continue over a refresh. Matrices are projected on their short side, as in the paper.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`; GaLore's ``update_proj_gap``.
      **parts: any other option of `LowRank`, for example a faster ``projector``.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` does.

    Example:
      >>> import gum_optax
      >>> galore = gum_optax.adamw(1e-3, gum_optax.galore(rank=64))
      >>> galore_muon = gum_optax.gum(0.02, gum_optax.galore(rank=64))

    References:
      Zhao et al., GaLore, arXiv 2403.03507.
    """
    # Options in `parts` take the place of the paper's.
    own = {"residual": residuals.drop(), "projector": projectors.svd, "carry": carries.keep}
    return LowRank(rank, period, **own | parts)


def golore(
    rank: Any = 128,
    period: int = 200,
    *,
    switch_step: int,
    before: projectors.Projector = projectors.svd,
    after: projectors.Projector = projectors.random_orthonormal,
    **parts: Any,
) -> LowRank:
    """The compression of GoLore: GaLore at first, then random subspaces when noise dominates.

    Once noise dominates the gradient, as late in training, its singular subspaces follow the noise.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      switch_step: refreshes at this step and later use ``after``, an int >= 0.
      before: the projector of the first phase.
      after: the projector of the second phase.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` does.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.adamw(1e-3, gum_optax.golore(rank=64, switch_step=5000))

    References:
      He et al., GoLore, arXiv 2410.11289.
    """
    # GaLore with a schedule of projectors.
    step = _checks.non_negative_int("switch_step", switch_step)
    return galore(rank, period, projector=projectors.switch(before, after, step), **parts)


def fira(
    rank: Any = 128, period: int = 200, *, growth_limit: float | None = 1.01, **parts: Any
) -> LowRank:
    """The compression of Fira: GaLore plus the residual, scaled by the optimizer's gain.

    The gain of a column is the ratio of the norms of its projected update and projected gradient,
    see `scale_by_gain`.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      growth_limit: as for `scale_by_gain`.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` and `scale_by_gain` do.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.adamw(1e-3, gum_optax.fira(rank=64))

    References:
      Chen et al., Fira, arXiv 2410.01623. Its factor alpha on the whole update is a learning rate.
    """
    # "residual" can be given in `parts` as well, which then decides.
    residual = residuals.through(scale_by_gain(growth_limit=growth_limit))
    return galore(rank, period, **{"residual": residual} | parts)


def frugal(rank: Any = 128, period: int = 200, *, scale: float = 1.0, **parts: Any) -> LowRank:
    """The compression of FRUGAL: GaLore plus the signs of the residual.

    Moments restart at a refresh, as in the authors' code.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      scale: the absolute value of each entry of the residual's update before the learning rate,
        > 0; the authors use 1 for pretraining and 0.1 for fine-tuning.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` does, and if ``scale`` is not a positive number.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.adamw(1e-3, gum_optax.frugal(rank=64))

    References:
      Zmushko et al., FRUGAL, arXiv 2411.07837, with its projections by SVD.
    """
    _checks.hyperparameter("scale", scale)
    # U = P D + scale sign(E)
    signs = residuals.through(optax.chain(optax.scale_by_sign(), optax.scale(scale)))
    return galore(rank, period, **{"residual": signs, "carry": carries.restart} | parts)


def apollo(
    rank: Any = 128, period: int = 200, *, growth_limit: float | None = 1.01, **parts: Any
) -> LowRank:
    """The compression of APOLLO: whole gradients, each column scaled by the gain of a projection.

    Bases are random and orthonormal here. The Gaussian bases of the paper give gains smaller by
    ``sqrt(r / m)``; with orthonormal bases, a column's update has about the norm of Adam's update
    at any rank.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      growth_limit: as for `scale_by_gain`.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` and `scale_by_gain` do.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.adamw(1e-3, gum_optax.apollo(rank=64))

    References:
      Zhu et al., APOLLO, arXiv 2412.05270.
    """
    return _guided(rank, period, scale_by_gain(growth_limit=growth_limit), parts)


def apollo_mini(period: int = 200, *, growth_limit: float | None = 1.01, **parts: Any) -> LowRank:
    """The compression of APOLLO-Mini: rank one and a single gain for each matrix.

    Args:
      period: as for `LowRank`.
      growth_limit: as for `scale_by_gain`.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` and `scale_by_gain` do.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.adamw(1e-3, gum_optax.apollo_mini())

    References:
      Zhu et al., APOLLO, arXiv 2412.05270.
    """
    return _guided(1, period, scale_by_gain("matrix", growth_limit=growth_limit), parts)


def _guided(
    rank: Any, period: int, gain: optax.GradientTransformation, parts: dict[str, Any]
) -> LowRank:
    """Returns the compression that updates by whole gradients, scaled by a gain."""
    # U = gain(R, D) G, where D is Adam's update of R: only the norms of D and R matter.
    own = {
        "residual": residuals.guided(gain),
        "projector": projectors.random_orthonormal,
        "carry": carries.keep,
    }
    return LowRank(rank, period, **own | parts)
