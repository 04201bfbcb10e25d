"""Adam on low-rank gradients: GaLore, GoLore, and the unbiased one."""

from typing import Any

import jax
import optax

from gum_optax import _checks, projectors, restarts, samplers
from gum_optax._injection import injectable
from gum_optax._low_rank import low_rank
from gum_optax._optimizer import Mask, optimizer, sampled
from gum_optax._stacks import StackBy, by_role
from gum_optax._typing import DimensionNumbers, Key, Projector, ScalarOrSchedule


@injectable("learning_rate", "weight_decay", "scale")
def galore(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    inner: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    projector: Projector | projectors.switch = projectors.svd,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on projected gradients. Biased: what the projection drops is lost.

    Matrices are projected on their short side, as in the paper; moments go on over a refresh.

    Args:
      learning_rate: a number, or a schedule of the step count.
      rank: r, an int >= 1.
      period: steps between refreshes of the bases, an int >= 1.
      inner: the base, by default ``optax.scale_by_adam()``.
      scale: multiplies the updates of matrices (GaLore's alpha).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      weight_decay_mask: a tree, prefix tree or callable; True where weight decay applies.
      weight_dimension_numbers: as for `gum`.
      fallback: the optimizer of everything else, by default ``optax.adamw(learning_rate,
        weight_decay=0)``.
      projector: how a basis comes from a gradient, see `projectors`.
      momentum_dtype: dtype of the moments, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``, see `by_role`.
      key: an int seed or a threefry key, for random projectors.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.galore(1e-3, rank=64, scale=0.25)

    References:
      Zhao et al., GaLore, arXiv 2403.03507.
    """
    _checks.hyperparameter("scale", scale)
    direction = low_rank(
        optax.scale_by_adam() if inner is None else inner,
        rank=rank,
        period=period,
        projector=projector,
        sampler=samplers.none,
        restart=False,
        momentum_dtype=momentum_dtype,
        stack_by=stack_by,
        key=key,
    )
    return optimizer(
        optax.chain(direction, optax.scale(scale)),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        weight_dimension_numbers,
        fallback,
    )


@injectable("learning_rate", "weight_decay", "scale")
def golore(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    switch_step: int,
    before: Projector = projectors.svd,
    after: Projector = projectors.random_orthonormal,
    inner: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore that turns to random subspaces late, where noise rules the gradient.

    Args:
      learning_rate: a number, or a schedule of the step count.
      rank: r, an int >= 1.
      period: steps between refreshes of the bases, an int >= 1.
      switch_step: refreshes at this step and later use ``after``, an int >= 0.
      before: the projector of the first phase.
      after: the projector of the second phase.
      inner: the base, by default ``optax.scale_by_adam()``.
      scale: multiplies the updates of matrices.
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      weight_decay_mask: a tree, prefix tree or callable; True where weight decay applies.
      weight_dimension_numbers: as for `gum`.
      fallback: the optimizer of everything else, as for `galore`.
      momentum_dtype: dtype of the moments, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``, see `by_role`.
      key: an int seed or a threefry key.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.golore(1e-3, rank=64, switch_step=5000)

    References:
      He et al., GoLore, arXiv 2410.11289.
    """
    return galore(
        learning_rate,
        rank,
        period,
        inner=inner,
        scale=scale,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        fallback=fallback,
        projector=projectors.switch(
            before, after, _checks.non_negative_int("switch_step", switch_step)
        ),
        momentum_dtype=momentum_dtype,
        stack_by=stack_by,
        key=key,
    )


@injectable("learning_rate", "b1", "b2", "eps", "weight_decay")
def unbiased_adamw(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    full_rank_layers: int = 2,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 1e-4,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    projector: Projector | projectors.switch = projectors.subspace_iteration,
    sampler: samplers.Sampler | None = None,
    restart: bool | restarts.Restart = True,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """Unbiased low-rank AdamW: the paper's debiasing with Adam as the base.

    Args:
      learning_rate: a number, or a schedule of the step count.
      rank: r, see `scale_by_gum`.
      period: K, see `scale_by_gum`.
      full_rank_layers: gamma, see `scale_by_gum`.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay, of the matrices and of the default fallback.
      weight_decay_mask: a tree, prefix tree or callable; True where weight decay applies.
      weight_dimension_numbers: as for `gum`.
      fallback: the optimizer of everything else, by default ``optax.adamw`` with these arguments.
      projector: how a basis comes from a gradient, see `projectors`.
      sampler: overrides ``full_rank_layers``, see `samplers`.
      restart: whether moments restart at each refresh, or a function, see `restarts`.
      momentum_dtype: dtype of the moments, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``, see `by_role`.
      key: an int seed or a threefry key.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.unbiased_adamw(1e-3, rank=64)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("b2", b2, below=1.0)
    _checks.hyperparameter("eps", eps)
    if fallback is None:
        fallback = optax.adamw(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask
        )

    direction = sampled(
        optax.scale_by_adam,
        {"b1": b1, "b2": b2, "eps": eps},
        full_rank_layers,
        sampler,
        rank=rank,
        period=period,
        projector=projector,
        restart=restart,
        momentum_dtype=momentum_dtype,
        stack_by=stack_by,
        key=key,
    )
    return optimizer(
        direction,
        learning_rate,
        weight_decay,
        weight_decay_mask,
        weight_dimension_numbers,
        fallback,
    )
