"""Compressions named after their papers: what each method makes of bases, residuals and moments.

Each is a `LowRank` with other defaults, for every optimizer: ``adamw(1e-3, galore())`` is GaLore,
``gum(0.02, galore())`` GaLore-Muon.

Tests: tests/library/test_recipes.py, tests/library/test_gains.py.
"""

from typing import Any

import optax

from gum_optax import _checks, carries, projectors, residuals
from gum_optax._gains import scale_by_gain
from gum_optax._low_rank import LowRank


def galore(rank: Any = 128, period: int = 200, **parts: Any) -> LowRank:
    """The compression of GaLore: exact singular subspaces, the residual is dropped. Biased.

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
    """The compression of GoLore: GaLore's, then random subspaces, where noise rules the gradient.

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
    # GaLore, with a schedule of projectors in place of one.
    step = _checks.non_negative_int("switch_step", switch_step)
    return galore(rank, period, projector=projectors.switch(before, after, step), **parts)


def fira(
    rank: Any = 128, period: int = 200, *, growth_limit: float | None = 1.01, **parts: Any
) -> LowRank:
    """The compression of Fira: GaLore's, and the residual beside it, at the optimizer's gain.

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
    residual = residuals.through(scale_by_gain(growth_limit=growth_limit))
    return galore(rank, period, **{"residual": residual} | parts)


def frugal(rank: Any = 128, period: int = 200, *, scale: float = 1.0, **parts: Any) -> LowRank:
    """The compression of FRUGAL: GaLore's, and the signs of the residual beside it.

    Moments restart at a refresh, as in its code.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      scale: the size of an entry of the residual's update, > 0: 1 for pretraining, 0.1 for
        fine-tuning.
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
    signs = residuals.through(optax.chain(optax.scale_by_sign(), optax.scale(scale)))
    return galore(rank, period, **{"residual": signs, "carry": carries.restart} | parts)


def apollo(
    rank: Any = 128, period: int = 200, *, growth_limit: float | None = 1.01, **parts: Any
) -> LowRank:
    """The compression of APOLLO: gradients scaled column by column, at the gain of a projection.

    Bases are random and orthonormal. APOLLO's are Gaussian, with gains smaller by ``sqrt(r / m)``;
    with these, a column's update has about the norm of Adam's at any rank.

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
    """The compression of APOLLO-Mini: rank one, and one gain for the whole matrix.

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
    own = {
        "residual": residuals.guided(gain),
        "projector": projectors.random_orthonormal,
        "carry": carries.keep,
    }
    return LowRank(rank, period, **own | parts)
