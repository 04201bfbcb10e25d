"""The optimizers of the experiments: a table from a name to a function of the configuration.

All of them share the schedule, the clipping and, for whatever is no hidden matrix, the same AdamW,
so that runs differ in one thing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

import gum_optax
from experiments import precision
from experiments.config import Training, choose

Optimizer = optax.GradientTransformation


def schedule(config: Training, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up to the peak learning rate, then cosine decay."""
    peak = peak or config.learning_rate
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=peak * config.final_learning_rate,
    )


def gum(
    config: Training,
    rate: optax.Schedule,
    full_rank: int | gum_optax.samplers.Sampler | None = None,
) -> Optimizer:
    """Unbiased low-rank Muon: the paper's method, and the library's subject."""
    compression = gum_optax.LowRank(
        residual=gum_optax.residuals.sampled(
            config.full_rank_layers if full_rank is None else full_rank
        ),
        projector=_projector(config, "subspace_iteration"),
        carry=CARRIES[config.restart],
        **_common(config),
    )
    return _low_rank_muon(config, rate, compression)


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
    compression = gum_optax.LowRank(
        residual=gum_optax.residuals.sampled(config.full_rank_layers),
        projector=_projector(config, "subspace_iteration"),
        **_common(config),
    )
    return _low_rank_adamw(config, rate, compression)


def muon(config: Training, rate: optax.Schedule) -> Optimizer:
    """Full-rank Muon on the hidden matrices, AdamW on the rest."""
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
    plain = _plain_adamw(config, rate)
    if config.fallback_learning_rate is None:
        return plain
    return optax.partition({"matrix": plain, "rest": _fallback(config)}, _matrix_or_rest)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "gum": gum,
    "adamw": adamw,
    "muon": muon,
    "galore": galore,
    "galore_muon": galore_muon,
    "golore": golore,
    "golore_muon": golore_muon,
    "unbiased_adamw": unbiased_adamw,
}

FULL_RANK = frozenset({"adamw", "muon"})  # nothing is projected; rank and period do nothing

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
        return precision.stochastic_rounding(optimizer, config.seed)
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


def _fallback(config: Training) -> Optimizer:
    return _plain_adamw(config, schedule(config, config.fallback_learning_rate))


def _plain_adamw(config: Training, rate: optax.Schedule) -> Optimizer:
    return optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed)


def _matrix_or_rest(params: optax.Params) -> optax.Params:
    numbers = gum_optax.dimension_numbers.default(params)
    return jax.tree.map(lambda _, number: "rest" if number is None else "matrix", params, numbers)


def _decayed(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
