"""GUM: Muon on unbiased low-rank gradients."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, projectors, restarts, samplers
from gum_optax._injection import injectable
from gum_optax._optimizer import Mask, optimizer, sampled
from gum_optax._polar import MUON_COEFFICIENTS, scale_by_polar
from gum_optax._stacks import StackBy, by_role
from gum_optax._typing import DimensionNumbers, Key, Projector, ScalarOrSchedule


@injectable("beta", "eps")
def scale_by_gum(
    rank: int = 128,
    period: int = 200,
    full_rank_layers: int = 2,
    *,
    beta: float | jax.Array = 0.95,
    nesterov: bool = False,
    ns_coeffs: Sequence[Any] = MUON_COEFFICIENTS,
    ns_steps: int = 5,
    eps: float | jax.Array = 1e-8,
    projector: Projector | projectors.switch = projectors.subspace_iteration,
    sampler: samplers.Sampler | None = None,
    restart: bool | restarts.Restart = True,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by GUM: low-rank Muon made unbiased by layer sampling.

    Every ``period`` steps each matrix G (m x n, m <= n) gets a basis P of its top-r left subspace,
    ``full_rank_layers`` of the N matrices of each stack are drawn, and momentum restarts at zero.
    With ``q = full_rank_layers / N``, at every step

    .. math::
        R \leftarrow \beta R + P^\top G / (1 - q), \quad U = P \,\text{NS}(R)
        \qquad\text{(low-rank matrices)}

        R \leftarrow \beta R + (G - P P^\top G) / q, \quad U = \text{NS}(R)
        \qquad\text{(full-rank matrices)}

    where NS is Muon's Newton-Schulz iteration. The gradient estimate that momentum sees is
    unbiased. NS removes scale, so within one branch 1/q and 1/(1-q) do not change a direction.

    Every leaf is taken as matrices (its last two axes); `gum` chooses leaves.

    Args:
      rank: r, an int >= 1. Stacks with m <= rank are dense: plain Muon.
      period: K, steps between refreshes, an int >= 1.
      full_rank_layers: gamma, matrices per stack that are full-rank in a period, an int >= 0,
        clipped to N // 2; a single matrix is dense. The state holds gamma dense slots per stack.
      beta: momentum decay, in [0, 1).
      nesterov: whether to use Nesterov momentum.
      ns_coeffs: Newton-Schulz coefficients, see `newton_schulz`.
      ns_steps: number of Newton-Schulz steps, an int >= 1.
      eps: added to the norm before Newton-Schulz.
      projector: how a basis comes from a gradient, see `projectors`.
      sampler: overrides ``full_rank_layers``, see `samplers`; `samplers.none` gives GaLore-Muon.
      restart: whether momentum restarts at each refresh, or a function, see `restarts`.
      momentum_dtype: dtype of the momentum, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``, see `by_role`.
      key: an int seed or a threefry key.

    Returns:
      An ``optax.GradientTransformationExtraArgs``: directions without learning rate, sign or shape
      scaling, in the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     gum_optax.scale_by_gum(rank=4, period=100),
      ...     optax.scale_by_learning_rate(0.02))
      >>> params = [jnp.ones((16, 32)) for _ in range(8)]
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates[0].shape
      (16, 32)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
    """
    _checks.hyperparameter("beta", beta, below=1.0)

    def base(beta: float | jax.Array, eps: float | jax.Array) -> optax.GradientTransformation:
        momentum = optax.trace(decay=beta, nesterov=nesterov)
        return optax.chain(momentum, scale_by_polar(ns_coeffs, ns_steps, eps))

    return sampled(
        base,
        {"beta": beta, "eps": eps},
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


@injectable("learning_rate", "beta", "eps", "weight_decay", "consistent_rms")
def gum(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    full_rank_layers: int = 2,
    *,
    beta: float | jax.Array = 0.95,
    nesterov: bool = False,
    ns_coeffs: Sequence[Any] = MUON_COEFFICIENTS,
    ns_steps: int = 5,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    consistent_rms: float | jax.Array | None = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    projector: Projector | projectors.switch = projectors.subspace_iteration,
    sampler: samplers.Sampler | None = None,
    restart: bool | restarts.Restart = True,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GUM: GaLore Unbiased with Muon, in place of ``optax.contrib.muon``.

    Matrices get `scale_by_gum`, Muon's shape scaling, decoupled weight decay and the learning rate;
    everything else goes to ``fallback``. By default the matrices are the 2-D leaves that are not
    embeddings, heads, position tables or stacks of vectors (`dimension_numbers.default`); leaves
    with three or more axes go to the fallback with a warning at ``init``, unless
    ``weight_dimension_numbers`` says what they are.

    Args:
      learning_rate: a number, or a schedule of the step count.
      rank: r, see `scale_by_gum`.
      period: K, see `scale_by_gum`.
      full_rank_layers: gamma, see `scale_by_gum`.
      beta: momentum decay, in [0, 1).
      nesterov: whether to use Nesterov momentum.
      ns_coeffs: Newton-Schulz coefficients.
      ns_steps: number of Newton-Schulz steps.
      eps: added to the norm before Newton-Schulz.
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      weight_decay_mask: a tree, prefix tree or callable; True where weight decay applies.
      consistent_rms: if given, updates are scaled by ``consistent_rms * sqrt(max(fan_in,
        fan_out))`` (0.2 matches AdamW's RMS, arXiv 2502.16982); by default by ``sqrt(max(1, fan_out
        / fan_in))``.
      weight_dimension_numbers: ``optax.contrib.MuonDimensionNumbers`` for the parameters, a tree or
        prefix tree of them (None: fallback), or a callable that gives one; axes in neither list are
        batch. See `dimension_numbers` for ready callables.
      fallback: the optimizer of everything else, by default ``optax.adamw(learning_rate,
        weight_decay=0)``.
      projector: how a basis comes from a gradient, see `projectors`.
      sampler: overrides ``full_rank_layers``, see `samplers`.
      restart: whether momentum restarts at each refresh, or a function, see `restarts`.
      momentum_dtype: dtype of the momentum, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``, see `by_role`.
      key: an int seed or a threefry key.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> params = {"layers": [{"w": jnp.eye(16, 32), "b": jnp.zeros(32)} for _ in range(4)]}
      >>> tx = gum_optax.gum(learning_rate=0.02, rank=4, period=100)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    if consistent_rms is not None:
        _checks.hyperparameter("consistent_rms", consistent_rms)
    direction = scale_by_gum(
        rank,
        period,
        full_rank_layers,
        beta=beta,
        nesterov=nesterov,
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        eps=eps,
        projector=projector,
        sampler=sampler,
        restart=restart,
        momentum_dtype=momentum_dtype,
        stack_by=stack_by,
        key=key,
    )
    return optimizer(
        optax.chain(direction, _scale_by_shape(consistent_rms)),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        weight_dimension_numbers,
        fallback,
    )


def _scale_by_shape(
    consistent_rms: float | jax.Array | None,
) -> optax.GradientTransformation:
    """Muon's shape scaling of matrices ``[..., fan_in, fan_out]``.

    References:
      ``sqrt(max(1, fan_out / fan_in))``: Jordan et al., Muon. ``consistent_rms * sqrt(max(fan_in,
      fan_out))``: Liu et al., arXiv 2502.16982.
    """

    def scale(update: jax.Array) -> jax.Array:
        if update.size == 0:
            return update
        fan_in, fan_out = update.shape[-2:]
        if consistent_rms is None:
            factor = jnp.sqrt(max(1.0, fan_out / fan_in))
        else:
            factor = jnp.sqrt(float(max(fan_in, fan_out))) * consistent_rms
        return (factor * update).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))
