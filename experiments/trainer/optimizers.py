"""The optimizers of the experiments: a table from a name to a function of the configuration.

All of them share the schedule, the clipping and, for whatever is no hidden matrix, the same
fallback, so that runs differ in one thing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax
from experiments.trainer import low_bits
from experiments.trainer.config import Training, choose
from gum_optax import fallbacks

Optimizer = optax.GradientTransformation


def schedule(config: Training, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up to the peak learning rate, then cosine decay."""
    peak = config.learning_rate if peak is None else peak
    share = share_of_peak(config)
    return lambda step: peak * share(step)


def share_of_peak(config: Training) -> optax.Schedule:
    """The learning rate as a share of its peak: the same for all rates of a run."""
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=1 / (warmup + 1),
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.final_learning_rate,
    )


def gum(
    config: Training,
    rate: optax.Schedule,
    full_rank: int | gum_optax.samplers.Sampler | None = None,
) -> Optimizer:
    """Unbiased low-rank Muon: the paper's method, and the library's subject."""
    compression = gum_optax.LowRank(
        residual=_residual(config, config.full_rank_layers if full_rank is None else full_rank),
        projector=_projector(config, "subspace_iteration"),
        carry=CARRIES[config.restart],
        storage=low_bits.STORAGES[config.momentum],
        **_common(config),
    )
    return _low_rank_muon(config, rate, compression)


def joint_muon(config: Training, rate: optax.Schedule) -> Optimizer:
    """Muon on low-rank momentum and, outside of its bases, the gradient of this step alone.

    The two are orthogonalized together, so a step costs as much as full-rank Muon's.
    """
    compression = gum_optax.LowRank(
        residual=gum_optax.residuals.through(optax.scale(config.residual_scale)),
        projector=_projector(config, "subspace_iteration"),
        carry=CARRIES[config.restart],
        **_common(config),
    )
    momentum = gum_optax.low_rank(optax.trace(0.95), compression)
    return gum_optax.for_matrices(
        optax.chain(momentum, gum_optax.scale_by_polar(), _as_adam()),
        rate,
        weight_decay=config.weight_decay,
        fallback=_fallback(config),
    )


def galore_muon(config: Training, rate: optax.Schedule) -> Optimizer:
    """Biased low-rank Muon: no layer is ever full-rank."""
    # The moments of GaLore's Adam continue over a refresh; this one's momentum restarts, as GUM's.
    compression = gum_optax.galore(
        projector=_projector(config, "svd"), carry=gum_optax.carries.restart, **_common(config)
    )
    return _low_rank_muon(config, rate, compression)


def golore_muon(config: Training, rate: optax.Schedule) -> Optimizer:
    """Biased low-rank Muon that turns to random projections late in the run."""
    compression = gum_optax.golore(
        switch_step=_switch_step(config), carry=gum_optax.carries.restart, **_common(config)
    )
    return _low_rank_muon(config, rate, compression)


def galore(config: Training, rate: optax.Schedule) -> Optimizer:
    """Adam on projected gradients, biased."""
    compression = gum_optax.galore(projector=_projector(config, "svd"), **_common(config))
    return _low_rank_adamw(config, rate, compression)


def golore(config: Training, rate: optax.Schedule) -> Optimizer:
    """GaLore that turns to random projections late in the run."""
    compression = gum_optax.golore(switch_step=_switch_step(config), **_common(config))
    return _low_rank_adamw(config, rate, compression)


def unbiased_adamw(config: Training, rate: optax.Schedule) -> Optimizer:
    """Adam on unbiased compressed gradients."""
    # An entry of Adam's update is about 0.2; an orthogonal matrix's are smaller by sqrt(n).
    compression = gum_optax.LowRank(
        residual=_residual(config, config.full_rank_layers, _as_adam),
        projector=_projector(config, "subspace_iteration"),
        carry=CARRIES[config.restart],
        **_common(config),
    )
    return _low_rank_adamw(config, rate, compression)


def muon(config: Training, rate: optax.Schedule) -> Optimizer:
    """Full-rank Muon on the hidden matrices."""
    if (config.momentum, config.fallback) != ("float32", "adamw"):
        return gum_optax.muon(
            rate,
            low_bits.STORAGES[config.momentum],
            consistent_rms=config.consistent_rms,
            weight_decay=config.weight_decay,
            fallback=_fallback(config),
        )
    return optax.contrib.muon(
        rate,
        nesterov=False,
        weight_decay=config.weight_decay,
        consistent_rms=config.consistent_rms,
        muon_weight_dimension_numbers=gum_optax.dimension_numbers.default,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        adam_learning_rate=schedule(config, config.fallback_learning_rate),
    )


def adamw(config: Training, rate: optax.Schedule) -> Optimizer:
    """AdamW on everything; hidden matrices and the rest may have learning rates of their own."""
    plain = optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed)
    if config.fallback_learning_rate is None and config.fallback == "adamw":
        return plain
    return optax.partition({"matrix": plain, "rest": _fallback(config)}, matrix_or_rest)


def scale(config: Training, rate: optax.Schedule) -> Optimizer:
    """SCALE on the hidden matrices: columns of the gradient are normalized, and nothing is kept.

    Its head, which SCALE gives momentum, has AdamW here as under every other optimizer.
    """
    return gum_optax.for_matrices(
        gum_optax.normalize_columns(),
        rate,
        weight_decay=config.weight_decay,
        fallback=_fallback(config),
    )


def fira(config: Training, rate: optax.Schedule) -> Optimizer:
    """GaLore, and the residual at the gain of its Adam."""
    compression = gum_optax.fira(projector=_projector(config, "svd"), **_common(config))
    return _low_rank_adamw(config, rate, compression)


def frugal(config: Training, rate: optax.Schedule) -> Optimizer:
    """GaLore, and the signs of the residual."""
    compression = gum_optax.frugal(projector=_projector(config, "svd"), **_common(config))
    return _low_rank_adamw(config, rate, compression)


def apollo(config: Training, rate: optax.Schedule) -> Optimizer:
    """Gradients whose columns have the gain of an Adam on random projections."""
    return _low_rank_adamw(config, rate, gum_optax.apollo(**_common(config)))


def apollo_mini(config: Training, rate: optax.Schedule) -> Optimizer:
    """Gradients with the gain of an Adam on one random direction."""
    common = _common(config)
    del common["rank"]
    return _low_rank_adamw(config, rate, gum_optax.apollo_mini(**common))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "gum": gum,
    "adamw": adamw,
    "muon": muon,
    "galore": galore,
    "galore_muon": galore_muon,
    "golore": golore,
    "golore_muon": golore_muon,
    "unbiased_adamw": unbiased_adamw,
    "scale": scale,
    "fira": fira,
    "frugal": frugal,
    "apollo": apollo,
    "apollo_mini": apollo_mini,
    "joint_muon": joint_muon,
}

# Nothing is projected: rank and period do nothing.
FULL_RANK = frozenset({"adamw", "muon", "scale"})

# What `--restart` says happens at a refresh.
CARRIES: dict[str, gum_optax.carries.Carry] = {
    "everything": gum_optax.carries.restart,
    "slots": gum_optax.carries.keep,
    "rotate": gum_optax.carries.rotate,
}


def build(config: Training, layers: int) -> Optimizer:
    """The optimizer of a run on `layers` blocks: clipping, then the one that `config` names."""
    make = OPTIMIZERS[choose("optimizer", config.optimizer, OPTIMIZERS)]
    if config.sampler == "bernoulli":
        sampler = gum_optax.samplers.bernoulli(config.full_rank_layers / layers)
        make = partial(make, full_rank=sampler)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    optimizer = optax.chain(clip, make(config, schedule(config)))
    if config.weights == "bfloat16":
        return gum_optax.stochastic_rounding(optimizer, config.seed)
    return optimizer


def _low_rank_muon(
    config: Training, rate: optax.Schedule, compression: gum_optax.LowRank
) -> Optimizer:
    return gum_optax.gum(
        rate,
        compression,
        consistent_rms=config.consistent_rms,
        weight_decay=config.weight_decay,
        fallback=_fallback(config),
    )


def _low_rank_adamw(
    config: Training, rate: optax.Schedule, compression: gum_optax.LowRank
) -> Optimizer:
    return gum_optax.adamw(
        rate,
        compression,
        b2=config.b2,
        weight_decay=config.weight_decay,
        fallback=_fallback(config),
    )


def _residual(
    config: Training,
    full_rank: int | gum_optax.samplers.Sampler,
    also: Callable[[], Optimizer] = optax.identity,
) -> gum_optax.residuals.Residual:
    """What `--residual` names; `also` brings a residual without momentum to its update's size."""
    residuals = gum_optax.residuals
    match config.residual:
        case "drop":
            return residuals.drop()
        case "sampled":
            return residuals.sampled(full_rank)
        case "additive":
            return residuals.sampled(full_rank, form="additive")
    direct = optax.chain(DIRECTIONS[config.residual](), also(), optax.scale(config.residual_scale))
    if config.residual_decay:
        share = share_of_peak(config)
        power = optax.scale_by_schedule(lambda step: share(step) ** config.residual_decay)
        direct = optax.chain(direct, power)
    if full_rank == 0:
        return residuals.through(direct)
    return residuals.sampled(full_rank, form="additive", undrawn=direct)


def _sized(direction: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """A direction of residuals E [..., m, n], brought to the norm of m - r orthonormal rows.

    That is the size that `gum_optax.normalize_columns` gives them: |E|_F = sqrt(m - r).
    """

    def one(residual: jax.Array, projected: jax.Array) -> jax.Array:
        m, r = residual.shape[-2], projected.shape[-2]
        found = direction(residual)
        norm = jnp.linalg.norm(found, axis=(-2, -1), keepdims=True)
        return (m - r) ** 0.5 * found / jnp.maximum(norm, jnp.finfo(found.dtype).tiny)

    def update(
        updates: Any, state: Any, params: Any = None, *, projected: Any = None, **_: Any
    ) -> Any:
        del params
        return jax.tree.map(one, updates, projected), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _unit_rows(residual: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(residual, axis=-1, keepdims=True)
    return residual / jnp.maximum(norms, jnp.finfo(residual.dtype).tiny)


# How a residual without momentum is normalized, by the name that `--residual` has for it.
DIRECTIONS: dict[str, Callable[[], Optimizer]] = {
    "columns": gum_optax.normalize_columns,
    "rows": lambda: _sized(_unit_rows),
    "sign": lambda: _sized(jnp.sign),
    "plain": lambda: _sized(lambda residual: residual),
}


def _as_adam() -> Optimizer:
    """Brings an orthogonal matrix [..., m, n] to the size of Adam's update (2502.16982)."""

    def one(update: jax.Array) -> jax.Array:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def _common(config: Training) -> dict[str, Any]:
    """What every compression is given."""
    return {
        "rank": config.rank,
        "period": config.period,
        "key": config.seed if config.draw_seed is None else config.draw_seed,
    }


def _projector(config: Training, own: str) -> gum_optax.projectors.Projector:
    return getattr(gum_optax.projectors, config.projector or own)


def _switch_step(config: Training) -> int:
    return round(config.golore_switch * config.steps)


# What trains embedding, head and norms, by the name that `--fallback` has for it.
FALLBACKS: dict[str, Callable[[Training], gum_optax.Fallback]] = {
    "adamw": lambda config: fallbacks.adamw(b2=config.b2),
    "adamw8": lambda config: fallbacks.adamw(b2=config.b2, storage=gum_optax.storages.int8()),
    "factored": lambda config: fallbacks.factored(),
    "factored_momentum": lambda config: fallbacks.factored(0.9),
    "columns": lambda config: fallbacks.columns(),
}


def _fallback(config: Training) -> Optimizer:
    rate = schedule(config, config.fallback_learning_rate)
    return FALLBACKS[config.fallback](config).make(rate, config.weight_decay, _decayed)


def matrix_or_rest(params: optax.Params) -> optax.Params:
    """A tree like `params`: "matrix" for hidden matrices, "rest" for what the fallback gets."""
    numbers = gum_optax.dimension_numbers.default(params)
    return jax.tree.map(lambda _, number: "rest" if number is None else "matrix", params, numbers)


def _decayed(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
