"""The optimizers of the experiments: one dataclass each, with its name, options and `build`.

Here are AdamW, Muon and the unbiased low-rank optimizers; `peers` has those of other papers. An
optimizer joins `optimizers.OPTIMIZERS`, from which command lines, studies and tests take it.
Schedule, clipping and fallback are options of the run and the same under every optimizer, so that
two runs differ in one thing. Options that several optimizers share sit in base classes:

    Optimizer > Refreshed (period, draws) > Projecting (rank) > BySvd      as published
                                                              > Switching  random bases, late
                                                              > Carrying   a choice of carries
                                                                  > Unbiased  a residual rule
    Scaled (consistent_rms) is mixed in where updates are orthogonal matrices.

The `#:` comment above a field is its help text on the command line; the first line of a class
docstring describes the optimizer there.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import optax

import gum_optax
from experiments.trainer import low_bits, rest
from experiments.trainer.directions import DIRECTIONS, as_adam
from experiments.trainer.options import (
    Check,
    Checked,
    ConfigError,
    at_least,
    not_negative,
    option,
    positive,
)
from experiments.trainer.schedules import schedule, share_of_peak
from gum_optax import projectors, residuals

if TYPE_CHECKING:
    from experiments.trainer.config import Training

Transformation = optax.GradientTransformation
Projector = Literal["subspace_iteration", "svd", "randomized_svd", "random_orthonormal"]
Momentum = Literal["float32", "int8", "int6", "int4", "int4_at_random", "rows8", "rows4"]
Restart = Literal["everything", "slots", "rotate"]

# The values of the option `restart`, as carries of the library.
CARRIES: dict[str, gum_optax.carries.Carry] = {
    "everything": gum_optax.carries.restart,
    "slots": gum_optax.carries.keep,
    "rotate": gum_optax.carries.rotate,
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    """An optimizer of the hidden matrices, with its options.

    Attributes:
      name: its name on the command line, in records and in `optimizers.OPTIMIZERS`.
    """

    name: ClassVar[str]

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        """Returns the optimizer of a whole model, fallback included, without clipping.

        Args:
          run: the options that all optimizers share.
          rate: learning rate of the hidden matrices.
          layers: number of blocks of the model, and so of matrices of one role.
        """
        raise NotImplementedError


# What optimizers share ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Refreshed(Optimizer):
    """An optimizer with a refresh: new bases, or new random draws, in every period."""

    #: Steps between two refreshes of the bases and of the draw of full-rank layers (GaLore's
    #: update_proj_gap).
    period: int = option(100, at_least(1))
    #: Seed of the optimizer's draws alone. None: the run's seed.
    draw_seed: int | None = option(None, not_negative)
    #: Form in which gradients leave the backward pass: full, or compressed (projected there), which
    #: takes less memory and, with many tokens, less time. Clipping then uses the norm of the
    #: projections.
    gradients: Literal["full", "compressed"] = "full"

    def common(self, run: "Training") -> dict[str, Any]:
        """Returns the arguments that every compression of this kind takes."""
        key = run.seed if self.draw_seed is None else self.draw_seed
        return {"period": self.period, "key": key}


@dataclasses.dataclass(frozen=True)
class Projecting(Refreshed):
    """An optimizer of gradients that are projected to low rank."""

    #: Rank of the projection.
    rank: int = option(32, at_least(1))

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"rank": self.rank}


@dataclasses.dataclass(frozen=True)
class Carrying(Projecting):
    """A low-rank optimizer of this library, with its own projector and a choice of carries."""

    #: Method that computes bases from gradients.
    projector: Projector = "subspace_iteration"
    #: Momentum that a refresh sets to zero: everything, or only the slots of full-rank
    #: layers (slots, rotate). The low-rank momentum that is kept stays as it is under slots; rotate
    #: turns it into the new basis.
    restart: Restart = "everything"
    #: Factor of a residual that is added without momentum.
    residual_scale: float = option(1.0, positive)

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {
            "projector": getattr(projectors, self.projector),
            "carry": CARRIES[self.restart],
        }


@dataclasses.dataclass(frozen=True)
class Unbiased(Carrying):
    """A low-rank optimizer with a rule for the residual, which GaLore drops."""

    #: Gamma: number of layers of each role that a period draws to train at full rank.
    full_rank_layers: int = option(2, not_negative)
    #: Rule for the residual, the part of a gradient that its basis leaves out. drop: it is lost.
    #: sampled, additive: the drawn layers keep it, in place of their projection or beside it.
    #: columns, energy, rows, sign, plain: it is added without momentum, with its columns, rows or
    #: entries normalized or as it is (plain), at the size of an orthogonal matrix; drawn layers
    #: keep it as under additive instead. energy: columns are divided by a running average of their
    #: norms, which Alice does. polar: it is orthogonalized; no layers are drawn.
    residual: Literal[
        "drop", "sampled", "additive", "columns", "energy", "polar", "rows", "sign", "plain"
    ] = "sampled"
    #: Exponent e: residual_scale is multiplied by (learning rate / peak learning rate)^e.
    residual_decay: float = option(0.0, not_negative)

    def rule(
        self,
        run: "Training",
        full_rank: int | gum_optax.samplers.Sampler,
        also: Callable[[], Transformation] | None = None,
    ) -> residuals.Residual:
        """Returns the residual rule that the options name.

        Args:
          run: for the schedule that `residual_decay` follows.
          full_rank: number of drawn layers, or a sampler of them.
          also: makes the transformation that brings a residual without momentum, of the size of
            an orthogonal matrix, to the size of the update that it joins; None: it has that size.
        """
        # 1. Rules without a direction for the layers that are not drawn.
        match self.residual:
            case "drop":
                return residuals.drop()
            case "sampled":
                return residuals.sampled(full_rank)
            case "additive":
                return residuals.sampled(full_rank, form="additive")
            case "polar":
                if full_rank or self.residual_decay or also:
                    raise ConfigError(
                        "`residual` is polar, which goes with low-rank Muon, `full_rank_layers` 0 "
                        "and `residual_decay` 0"
                    )
                return residuals.orthogonalized(self.residual_scale)
        # 2. A residual E without momentum: residual_scale * share^residual_decay * direction(E).
        #    The learning rate multiplies it later, as it does the rest of the update.
        parts = [DIRECTIONS[self.residual]()]
        if also is not None:
            parts.append(also())
        if self.residual_scale != 1:
            parts.append(optax.scale(self.residual_scale))
        if self.residual_decay:
            share = share_of_peak(run)
            parts.append(optax.scale_by_schedule(lambda s: share(s) ** self.residual_decay))
        #    A direction by itself may be one whose residual is never computed.
        direct = optax.chain(*parts) if len(parts) > 1 else parts[0]
        # 3. Undrawn layers get this update; drawn ones, if any, keep E in their slot.
        if full_rank == 0:
            return residuals.through(direct)
        return residuals.sampled(full_rank, form="additive", undrawn=direct)


@dataclasses.dataclass(frozen=True)
class Scaled(Optimizer):
    """An optimizer whose updates are scaled orthogonal matrices."""

    #: Root mean square of an update: an orthogonal m x n matrix is multiplied by this times
    #: sqrt(max(m, n)); at 0.2 updates have the size of AdamW's. None: it is multiplied by
    #: sqrt(max(1, n / m)) as in Muon, which needs a larger learning rate.
    consistent_rms: float | None = option(0.2, positive)


@dataclasses.dataclass(frozen=True)
class Gum(Unbiased, Scaled):
    """Unbiased low-rank Muon: the paper's method, and the library's subject."""

    name: ClassVar[str] = "gum"

    #: Draw of full-rank layers: exactly full_rank_layers of each role, or each layer independently
    #: with the probability that gives this number on average.
    sampler: Literal["fixed_size", "bernoulli"] = "fixed_size"
    #: Slope of the chance to be drawn over depth, between -1 and 1: at s, the first layer has 1 - s
    #: and the last one 1 + s times the mean chance.
    draw_slope: float = option(0.0, Check(lambda slope: -1 < slope < 1, "between -1 and 1"))
    #: Number of bands of neighbouring layers; each of them draws full_rank_layers of its own and
    #: may have a rank of its own.
    bands: int = option(1, at_least(1))
    #: Difference of rank between a band and the next one, with rank as the mean: positive for
    #: higher ranks in early layers.
    rank_slope: float = 0.0
    #: Storage of momentum between two steps; rows8 and rows4 are the plainest codes of 8 and 4
    #: bits, with one scale for each row.
    momentum: Momentum = "float32"
    #: Storage of bases between two steps.
    bases: Momentum = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draw_slope and self.sampler != "fixed_size":
            raise ConfigError(
                f"`draw_slope` is {self.draw_slope:g}, which needs the sampler fixed_size, "
                f"and `sampler` is {self.sampler}"
            )
        if self.rank_slope and self.bands == 1:
            raise ConfigError(
                f"`rank_slope` is {self.rank_slope:g}, which needs two or more `bands`"
            )

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        options: dict[str, Any] = {
            "residual": self.rule(run, self._full_rank(layers)),
            "storage": low_bits.STORAGES[self.momentum],
            "basis_storage": low_bits.STORAGES[self.bases],
        }
        if self.bands > 1:
            if self.bands > layers:
                raise ConfigError(f"`bands` is {self.bands}, and the model has {layers} layers")
            options["rank"] = gum_optax.rank_by_depth(self.rank, self.rank_slope)
            options["group_by"] = gum_optax.by_band(layers, self.bands)
        compression = gum_optax.LowRank(**self.common(run) | options)
        return low_rank_muon(self, run, rate, compression)

    def _full_rank(self, layers: int) -> Any:
        """Returns the number of drawn layers of each role and band, or a sampler of them."""
        # Probability gamma / (layers of a band) for each matrix: gamma draws on average.
        if self.sampler == "bernoulli":
            return gum_optax.samplers.bernoulli(self.full_rank_layers * self.bands / layers)
        if self.draw_slope:
            weights = gum_optax.samplers.by_depth(self.draw_slope)
            return gum_optax.samplers.unequal(self.full_rank_layers, weights)
        return self.full_rank_layers


@dataclasses.dataclass(frozen=True)
class RampedGum(Unbiased):
    """GUM with small steps where momentum has just restarted."""

    name: ClassVar[str] = "ramped_gum"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # A polar factor has the same size after one gradient as after many. Its factor
        # 1 - 0.95^t is the weight of the t gradients since the restart in an average of infinitely
        # many. A refresh restarts the whole inner state, and with it the count of the schedule.
        ramp = optax.scale_by_schedule(lambda count: 1 - 0.95 ** (count + 1))
        orthogonalizer = optax.chain(gum_optax.scale_by_polar(), ramp)
        rule = self.rule(run, self.full_rank_layers)
        compression = gum_optax.LowRank(residual=rule, **self.common(run))
        direction = gum_optax.scale_by_gum(compression, orthogonalizer=orthogonalizer)
        return for_matrices(run, rate, optax.chain(direction, as_adam()))


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW on all weights; the fallback may have a learning rate of its own."""

    name: ClassVar[str] = "adamw"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        plain = optax.adamw(rate, b2=run.b2, weight_decay=run.weight_decay, mask=rest.decayed)
        # If the fallback is the same AdamW, no partition is needed.
        if run.fallback_learning_rate is None and run.fallback == "adamw":
            return plain
        return optax.partition({"matrix": plain, "rest": rest.build(run)}, rest.matrix_or_rest)


@dataclasses.dataclass(frozen=True)
class Muon(Scaled):
    """Full-rank Muon on the hidden matrices."""

    name: ClassVar[str] = "muon"

    #: Storage of momentum between two steps.
    momentum: Momentum = "float32"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # optax's Muon is the independent baseline. It stores momentum in float32 and trains all
        # other leaves by Adam; any other choice takes the library's.
        if (self.momentum, run.fallback) != ("float32", "adamw"):
            return gum_optax.muon(
                rate,
                low_bits.STORAGES[self.momentum],
                consistent_rms=self.consistent_rms,
                weight_decay=run.weight_decay,
                fallback=rest.build(run),
            )
        return optax.contrib.muon(
            rate,
            nesterov=False,
            weight_decay=run.weight_decay,
            consistent_rms=self.consistent_rms,
            muon_weight_dimension_numbers=gum_optax.dimension_numbers.default,
            adam_b2=run.b2,
            adam_weight_decay=run.weight_decay,
            adam_learning_rate=schedule(run, run.fallback_learning_rate),
        )


@dataclasses.dataclass(frozen=True)
class UnbiasedAdamW(Unbiased):
    """Adam on unbiased compressed gradients."""

    name: ClassVar[str] = "unbiased_adamw"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # Entries of Adam's update are about 0.2; those of an orthogonal matrix about 1 / sqrt(n).
        rule = self.rule(run, self.full_rank_layers, as_adam)
        return low_rank_adamw(run, rate, gum_optax.LowRank(residual=rule, **self.common(run)))


@dataclasses.dataclass(frozen=True)
class JointMuon(Carrying):
    """Muon on the sum of low-rank momentum and the residual of the current step.

    The two are orthogonalized together, so a step costs as much as full-rank Muon's.
    """

    name: ClassVar[str] = "joint_muon"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # polar(P M + residual_scale * (G - P P'G)), with momentum M of P'G at Muon's decay of 0.95.
        rule = residuals.through(optax.scale(self.residual_scale))
        compression = gum_optax.LowRank(residual=rule, **self.common(run))
        momentum = gum_optax.low_rank(optax.trace(0.95), compression)
        direction = optax.chain(momentum, gum_optax.scale_by_polar(), as_adam())
        return for_matrices(run, rate, direction)


# Recipes of the library with the options of a run: Muon, Adam or any direction of a matrix, and the
# fallback for all other weights.


def low_rank_muon(
    scaled: Scaled, run: "Training", rate: optax.Schedule, compression: gum_optax.LowRank
) -> Transformation:
    # The compression makes the difference between GUM, GaLore-Muon and GoLore-Muon.
    return gum_optax.gum(
        rate,
        compression,
        consistent_rms=scaled.consistent_rms,
        weight_decay=run.weight_decay,
        fallback=rest.build(run),
    )


def low_rank_adamw(
    run: "Training", rate: optax.Schedule, compression: gum_optax.LowRank
) -> Transformation:
    return gum_optax.adamw(
        rate,
        compression,
        b2=run.b2,
        weight_decay=run.weight_decay,
        fallback=rest.build(run),
    )


def for_matrices(
    run: "Training", rate: optax.Schedule, direction: Transformation
) -> Transformation:
    return gum_optax.for_matrices(
        direction, rate, weight_decay=run.weight_decay, fallback=rest.build(run)
    )
