"""Recipes: optimizers by name.

An optimizer takes a compression, so that every pair of the two is one call:

- ``gum(0.02, LowRank())`` is GUM, ``gum(0.02, galore())`` is GaLore-Muon;
- ``adamw(1e-3, LowRank())`` is unbiased AdamW, ``adamw(1e-3, galore())`` is GaLore;
- ``muon(0.02)`` compresses no gradients but quantizes its momentum;
- ``swan(0.02)`` has no momentum.

Each recipe is a direction for matrices, which `for_matrices` completes to an optimizer.

Tests: tests/library/test_recipes.py.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _mesh, _packing, fallbacks, storages
from gum_optax import dimension_numbers as dims
from gum_optax._codec import Compressed, Frame, drawn_bases
from gum_optax._columns import standardize_columns
from gum_optax._compression import LowRank
from gum_optax._low_rank import low_rank
from gum_optax._matrices import for_matrices
from gum_optax._orthogonal import scale_by_polar
from gum_optax._quantized import quantized
from gum_optax._rates import Mask, Number, ScalarOrSchedule
from gum_optax.fallbacks import Fallback

_POLAR = scale_by_polar()


def scale_by_gum(
    compression: LowRank = LowRank(),
    *,
    beta: Number = 0.95,
    nesterov: bool = False,
    orthogonalizer: optax.GradientTransformation = _POLAR,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by GUM: low-rank Muon, made unbiased by layer sampling.

    Every ``period`` steps each matrix G (m x n, m <= n) gets a basis P of its top-r left subspace,
    gamma of the N matrices of each group are drawn, and momentum restarts at zero. With
    ``q = gamma / N``, at every step

    .. math::
        R \leftarrow \beta R + P^\top G / (1 - q), \quad U = P \,\text{NS}(R)
        \qquad\text{(undrawn matrices)}

        R \leftarrow \beta R + (G - P P^\top G) / q, \quad U = \text{NS}(R)
        \qquad\text{(drawn matrices)}

    where NS is Muon's Newton-Schulz iteration. The gradient estimate that momentum sees is
    unbiased; the update, after NS, is not. NS is invariant to scale, so the factors 1/q and
    1/(1-q) do not change the direction of a matrix within a period.

    The last two axes of every leaf are a matrix; `gum` selects the leaves.

    Args:
      compression: rank, period, number of drawn layers and other options, see `LowRank`.
      beta: momentum decay, in [0, 1).
      nesterov: whether to use Nesterov momentum.
      orthogonalizer: the transformation after momentum, by default `scale_by_polar()`. Where the
        compression has a ``storage`` that rounds, it is passed ``outside``, the bases of drawn
        matrices, as `scale_by_polar` describes; one that ignores it leaves the rounding errors of
        momentum inside these bases in the update.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its updates are directions without learning
      rate, sign or shape scaling, in the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     gum_optax.scale_by_gum(gum_optax.LowRank(rank=4, period=100)),
      ...     optax.scale_by_learning_rate(0.02))
      >>> params = [jnp.ones((16, 32)) for _ in range(8)]
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> updates[0].shape
      (16, 32)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
    """
    _compression(compression)
    _checks.hyperparameter("beta", beta, below=1.0)
    _checks.transformation("orthogonalizer", orthogonalizer)

    # The inner transformation is Muon's direction: R <- beta R + G, U = NS(R).
    def muon(beta: Number) -> optax.GradientTransformation:
        return optax.chain(optax.trace(decay=beta, nesterov=nesterov), orthogonalizer)

    # The momentum of a slot is a sum of residuals of one basis, so P'M = 0, and so is P'NS(M). A
    # storage's rounding errors have a part inside the basis, and Newton-Schulz lifts that to the
    # size of all other directions, since nothing larger is there: with momentum in 8 bits, a fifth
    # of the squared norm of an update would be noise. So F = NS(M) becomes F - P P'F.
    if _packing.rounds(compression.storage):
        rule = compression.residual._replace(extra_args=_bases_of_slots)
        compression = dataclasses.replace(compression, residual=rule)
    # `beta` may be traced, as under `optax.inject_hyperparams`, so it is handed over.
    return _mesh.handing_over(partial(low_rank, compression=compression), muon, beta=beta)


def _bases_of_slots(frames: dict[str, Frame]) -> dict[str, Any]:
    """Returns the argument ``outside`` of `scale_by_polar`: bases where updates are of slots."""

    def of_group(frame: Frame) -> Any:
        return Compressed(None, None if frame.slots is None else drawn_bases(frame))  # pyright: ignore[reportArgumentType]

    return {"outside": {name: of_group(frame) for name, frame in frames.items()}}


def gum(
    learning_rate: ScalarOrSchedule,
    compression: LowRank = LowRank(),
    *,
    beta: Number = 0.95,
    nesterov: bool = False,
    orthogonalizer: optax.GradientTransformation = _POLAR,
    consistent_rms: Number | None = None,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: dims.DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | Fallback | None = None,
    fallback_learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GUM, GaLore Unbiased with Muon: a replacement for ``optax.contrib.muon``.

    Matrices get `scale_by_gum`, Muon's shape scaling, decoupled weight decay and the learning rate;
    everything else gets the fallback, see `for_matrices`. With ``galore()`` as compression this is
    GaLore-Muon.

    Args:
      learning_rate: a number, or a schedule of the step count.
      compression: rank, period, number of drawn layers and other options, see `LowRank`.
      beta: as for `scale_by_gum`.
      nesterov: as for `scale_by_gum`.
      orthogonalizer: as for `scale_by_gum`.
      consistent_rms: if given, updates are scaled by ``consistent_rms * sqrt(max(fan_in,
        fan_out))``, where 0.2 matches the root mean square of AdamW's updates (arXiv 2502.16982);
        by default by ``sqrt(max(1, fan_out / fan_in))``.
      weight_decay: as for `for_matrices`.
      weight_decay_mask: as for `for_matrices`.
      weight_dimension_numbers: as for `for_matrices`.
      fallback: as for `for_matrices`.
      fallback_learning_rate: as for `for_matrices`.

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
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=4), fallback_learning_rate=1e-2)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """
    # Checked here, since a function of the update would raise at the first step only.
    _consistent_rms(consistent_rms)
    # Low-rank Muon, then Muon's factor for the shape of each matrix.
    direction = scale_by_gum(
        compression, beta=beta, nesterov=nesterov, orthogonalizer=orthogonalizer
    )
    return for_matrices(
        optax.chain(direction, _scale_by_shape(consistent_rms)),
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        fallback=fallback,
        fallback_learning_rate=fallback_learning_rate,
    )


def muon(
    learning_rate: ScalarOrSchedule,
    storage: storages.Storage = storages.int8(block=None),
    *,
    beta: Number = 0.95,
    nesterov: bool = False,
    orthogonalizer: optax.GradientTransformation = _POLAR,
    consistent_rms: Number | None = None,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: dims.DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | Fallback | None = None,
    fallback_learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon at full rank with momentum in 8 bits: a replacement for ``optax.contrib.muon``.

    Matrices get momentum that is packed between steps, Newton-Schulz, Muon's shape scaling,
    decoupled weight decay and the learning rate; everything else gets the fallback, see
    `for_matrices`:

    .. math::
        M \leftarrow \beta \hat M + G, \quad U = \text{NS}(M), \quad
        \hat M = \text{unpack}(\text{pack}(M))

    Momentum in 8 bits takes an eighth of the bytes of AdamW's moments. Relative errors of small
    entries do not grow in a polar factor, unlike in Adam's quotients.

    Args:
      learning_rate: a number, or a schedule of the step count.
      storage: how momentum is packed between steps, see `storages` and `quantized`.
      beta: as for `scale_by_gum`.
      nesterov: as for `scale_by_gum`.
      orthogonalizer: as for `scale_by_gum`.
      consistent_rms: as for `gum`.
      weight_decay: as for `for_matrices`.
      weight_decay_mask: as for `for_matrices`.
      weight_dimension_numbers: as for `for_matrices`.
      fallback: as for `for_matrices`.
      fallback_learning_rate: as for `for_matrices`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      With AdamW in 8 bits for embedding, head and norms:

      >>> import gum_optax
      >>> from gum_optax import fallbacks, storages
      >>> tx = gum_optax.muon(
      ...     0.02, weight_decay=0.1,
      ...     fallback=fallbacks.adamw(storage=storages.float8()), fallback_learning_rate=1e-3)

    References:
      Gupta et al., 8-bit Muon, arXiv 2509.23106; Jordan et al., Muon,
      https://kellerjordan.github.io/posts/muon/
    """
    _checks.hyperparameter("beta", beta, below=1.0)
    _checks.transformation("orthogonalizer", orthogonalizer)
    _consistent_rms(consistent_rms)
    # M <- beta M + G with M packed between steps, then NS, then the factor of the shape.
    direction = optax.chain(
        quantized(optax.trace(decay=beta, nesterov=nesterov), storage),
        orthogonalizer,
        _scale_by_shape(consistent_rms),
    )
    return for_matrices(
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        fallback=fallback,
        fallback_learning_rate=fallback_learning_rate,
    )


def swan(
    learning_rate: ScalarOrSchedule,
    orthogonalizer: optax.GradientTransformation = _POLAR,
    *,
    consistent_rms: Number | None = None,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: dims.DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | Fallback | None = None,
    fallback_learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SWAN: the polar factor of standardized gradients, without any state for matrices.

    Matrices get `standardize_columns`, Newton-Schulz, Muon's shape scaling, decoupled weight decay
    and the learning rate; everything else gets the fallback, see `for_matrices`:

    .. math:: U = \text{NS}\left(\frac{G - \bar G}{\operatorname{std}(G)}\right)
        \qquad\text{(by columns, the weights of one output)}

    There is no momentum to average the noise of batches, and steps of successive batches cancel in
    part. So the learning rate is far larger than Muon's: four times was best in our longest runs.

    Args:
      learning_rate: a number, or a schedule of the step count.
      orthogonalizer: the transformation after `standardize_columns`, by default
        `scale_by_polar()`; `scale_by_decorrelation` takes less time.
      consistent_rms: as for `gum`.
      weight_decay: as for `for_matrices`.
      weight_decay_mask: as for `for_matrices`.
      weight_dimension_numbers: as for `for_matrices`.
      fallback: as for `for_matrices`.
      fallback_learning_rate: as for `for_matrices`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      Hardly any state for embedding, head and norms either:

      >>> import gum_optax
      >>> from gum_optax import fallbacks
      >>> tx = gum_optax.swan(
      ...     1.2e-2, consistent_rms=0.2,
      ...     fallback=fallbacks.factored(), fallback_learning_rate=2e-3)

    References:
      Ma et al., SWAN, arXiv 2412.13148, by secondary sources.
    """
    _checks.transformation("orthogonalizer", orthogonalizer)
    _consistent_rms(consistent_rms)
    direction = optax.chain(standardize_columns(), orthogonalizer, _scale_by_shape(consistent_rms))
    return for_matrices(
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        fallback=fallback,
        fallback_learning_rate=fallback_learning_rate,
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    compression: LowRank = LowRank(),
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 1e-4,
    weight_decay_mask: Mask = None,
    weight_dimension_numbers: dims.DimensionNumbers | None = None,
    fallback: optax.GradientTransformation | Fallback | None = None,
    fallback_learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on compressed gradients: a replacement for ``optax.adamw``.

    Matrices get Adam on compressed gradients, decoupled weight decay and the learning rate;
    everything else gets the fallback, see `for_matrices`. With the default compression Adam sees
    unbiased estimates of the gradients. With ``galore()`` this is GaLore; its factor alpha on the
    updates of matrices is a separate learning rate:
    ``adamw(alpha * rate, galore(), fallback_learning_rate=rate)``.

    Args:
      learning_rate: a number, or a schedule of the step count.
      compression: rank, period, number of drawn layers and other options, see `LowRank`.
      b1: decay of the first moment, in [0, 1), also in the default fallback.
      b2: decay of the second moment, in [0, 1), also in the default fallback.
      eps: added to the root of the second moment, >= 0, also in the default fallback.
      weight_decay: as for `for_matrices`.
      weight_decay_mask: as for `for_matrices`.
      weight_dimension_numbers: as for `for_matrices`.
      fallback: as for `for_matrices`.
      fallback_learning_rate: as for `for_matrices`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is malformed, and as `low_rank` does.

    Example:
      >>> import gum_optax
      >>> unbiased = gum_optax.adamw(1e-3, gum_optax.LowRank(rank=64))
      >>> galore = gum_optax.adamw(1e-3, gum_optax.galore(rank=64))

    References:
      Zhao et al., GaLore, arXiv 2403.03507; Pan et al., arXiv 2510.17802.
    """
    _compression(compression)
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("b2", b2, below=1.0)
    _checks.hyperparameter("eps", eps)
    # The default fallback is the same AdamW on uncompressed gradients.
    if fallback is None:
        fallback = fallbacks.adamw(b1, b2, eps)
    # Hyperparameters may be traced, as under `optax.inject_hyperparams`, so they are handed over.
    direction = _mesh.handing_over(
        partial(low_rank, compression=compression), optax.scale_by_adam, b1=b1, b2=b2, eps=eps
    )
    return for_matrices(
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        fallback=fallback,
        fallback_learning_rate=fallback_learning_rate,
    )


def _compression(compression: Any) -> None:
    _checks.instance("compression", compression, LowRank, "such as `LowRank(rank=64)`")


def _consistent_rms(value: Any) -> None:
    if value is not None:
        _checks.hyperparameter("consistent_rms", value)


def _scale_by_shape(consistent_rms: Number | None) -> optax.GradientTransformation:
    """Returns Muon's shape scaling of matrices ``[..., fan_in, fan_out]``.

    References:
      ``sqrt(max(1, fan_out / fan_in))``: Jordan et al., Muon. ``consistent_rms * sqrt(max(fan_in,
      fan_out))``: Liu et al., arXiv 2502.16982.
    """

    def scale(update: jax.Array) -> jax.Array:
        # Without entries, fan_in may be zero.
        if update.size == 0:
            return update
        # A matrix maps fan_in inputs (rows) to fan_out outputs (columns).
        fan_in, fan_out = update.shape[-2:]
        if consistent_rms is None:
            factor = jnp.sqrt(max(1.0, fan_out / fan_in))
        else:
            factor = jnp.sqrt(float(max(fan_in, fan_out))) * consistent_rms
        # A traced `consistent_rms` is float32 and would promote updates in half precision.
        return (factor * update).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))
