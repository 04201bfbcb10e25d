"""The optimizers of the experiments: one dataclass each, with its options and `build`.

An optimizer joins `OPTIMIZERS` by one entry, from which command lines, studies and tests take it.
All of them share the schedule, the clipping and, for whatever is no hidden matrix, the same
fallback; these are options of the run, so that runs differ in one thing.
"""

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import optax
import tyro

import gum_optax
from experiments.trainer import low_bits, rest
from experiments.trainer.directions import DIRECTIONS, as_adam
from experiments.trainer.options import (
    Checked,
    ConfigError,
    at_least,
    choose,
    not_negative,
    option,
    positive,
    share,
)
from experiments.trainer.schedules import schedule, share_of_peak
from gum_optax import projectors, residuals

if TYPE_CHECKING:
    from experiments.trainer.config import Training

Transformation = optax.GradientTransformation
Projector = Literal["subspace_iteration", "svd", "randomized_svd", "random_orthonormal"]
Momentum = Literal["float32", "int8", "int4", "rows8", "rows4"]
Restart = Literal["everything", "slots", "rotate"]

CARRIES: dict[str, gum_optax.carries.Carry] = {
    "everything": gum_optax.carries.restart,
    "slots": gum_optax.carries.keep,
    "rotate": gum_optax.carries.rotate,
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    """How the hidden matrices are trained."""

    @property
    def name(self) -> str:
        """Its name in `OPTIMIZERS`, on the command line and in records."""
        return next(name for name, each in OPTIMIZERS.items() if type(each) is type(self))

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        """The optimizer of a run on `layers` blocks, without clipping."""
        raise NotImplementedError


# What optimizers share ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Refreshed(Optimizer):
    """An optimizer whose random numbers are drawn anew in every period."""

    period: int = option(100, at_least(1))
    """Steps between two refreshes of the projection, and of the draw of full-rank layers."""
    draw_seed: int | None = option(None, not_negative)
    """Seed of the optimizer's draws alone. None: that of the run."""
    gradients: Literal["full", "compressed"] = "full"
    """How gradients leave the backward pass: whole, or already projected, which takes less memory
    and, with many tokens, less time. The norm that is clipped is then that of the projections."""

    def common(self, run: "Training") -> dict[str, Any]:
        """What every compression is given."""
        key = run.seed if self.draw_seed is None else self.draw_seed
        return {"period": self.period, "key": key}


@dataclasses.dataclass(frozen=True)
class Projecting(Refreshed):
    """An optimizer of gradients that are projected to low rank."""

    rank: int = option(32, at_least(1))
    """Rank of the projection."""

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"rank": self.rank}


@dataclasses.dataclass(frozen=True)
class BySvd(Projecting):
    """A low-rank optimizer as published, with exact singular subspaces."""

    projector: Projector = "svd"
    """How bases come from gradients."""

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"projector": getattr(projectors, self.projector)}


@dataclasses.dataclass(frozen=True)
class Carrying(Projecting):
    """A low-rank optimizer of this library: its own projector, and a choice at refreshes."""

    projector: Projector = "subspace_iteration"
    """How bases come from gradients."""
    restart: Restart = "everything"
    """What restarts at a refresh: slots carries low-rank momentum over as it is, rotate turns it
    into the new basis."""
    residual_scale: float = option(1.0, positive)
    """Factor of a residual that is added without momentum."""

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {
            "projector": getattr(projectors, self.projector),
            "carry": CARRIES[self.restart],
        }


@dataclasses.dataclass(frozen=True)
class Unbiased(Carrying):
    """A low-rank optimizer that does something about the residual."""

    full_rank_layers: int = option(2, not_negative)
    """Gamma: layers of each role drawn in a period, whose residual is kept at full rank."""
    residual: Literal["drop", "sampled", "additive", "columns", "rows", "sign", "plain"] = "sampled"
    """What becomes of the part of a gradient that its basis leaves out. It is dropped; or
    full_rank_layers keep it (sampled instead of their projection, additive beside it); or it is
    added without momentum, its columns, rows, signs or the whole (plain) brought to the size of an
    orthogonal matrix, and full_rank_layers keep it beside that."""
    residual_decay: float = option(0.0, not_negative)
    """Power of the learning rate, as a share of its peak, by which residual_scale shrinks too."""

    def rule(
        self,
        run: "Training",
        full_rank: int | gum_optax.samplers.Sampler,
        also: Callable[[], Transformation] = optax.identity,
    ) -> residuals.Residual:
        """The rule for the residual; `also` brings one without momentum to its update's size."""
        match self.residual:
            case "drop":
                return residuals.drop()
            case "sampled":
                return residuals.sampled(full_rank)
            case "additive":
                return residuals.sampled(full_rank, form="additive")
        direct = optax.chain(DIRECTIONS[self.residual](), also(), optax.scale(self.residual_scale))
        if self.residual_decay:
            share = share_of_peak(run)
            power = optax.scale_by_schedule(lambda step: share(step) ** self.residual_decay)
            direct = optax.chain(direct, power)
        if full_rank == 0:
            return residuals.through(direct)
        return residuals.sampled(full_rank, form="additive", undrawn=direct)


@dataclasses.dataclass(frozen=True)
class Scaled(Optimizer):
    """An optimizer whose updates are orthogonal matrices, brought to a size."""

    consistent_rms: float | None = option(0.2, positive)
    """Updates are scaled by this times sqrt(max(m, n)), so that their size is AdamW's. None: by
    sqrt(max(1, n / m)) as in Muon, which wants a larger learning rate."""


@dataclasses.dataclass(frozen=True)
class Switching(Projecting):
    """A low-rank optimizer that turns to random projections late in the run."""

    golore_switch: float = option(0.5, share)
    """Share of the steps after which it projects at random instead of by SVD."""

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"switch_step": round(self.golore_switch * run.steps)}


# The optimizers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gum(Unbiased, Scaled):
    """Unbiased low-rank Muon: the paper's method, and the library's subject."""

    sampler: Literal["fixed_size", "bernoulli"] = "fixed_size"
    """Draws full_rank_layers of each role, or each layer by itself, as many on average."""
    momentum: Momentum = "float32"
    """How momentum rests between two steps; rows8 and rows4 are the plainest codes of 8 and 4 bits,
    with one scale for each row."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        full_rank: Any = self.full_rank_layers
        if self.sampler == "bernoulli":
            full_rank = gum_optax.samplers.bernoulli(full_rank / layers)
        compression = gum_optax.LowRank(
            residual=self.rule(run, full_rank),
            storage=low_bits.STORAGES[self.momentum],
            **self.common(run),
        )
        return _low_rank_muon(self, run, rate, compression)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW on everything; hidden matrices and the rest may have learning rates of their own."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        plain = optax.adamw(rate, b2=run.b2, weight_decay=run.weight_decay, mask=rest.decayed)
        if run.fallback_learning_rate is None and run.fallback == "adamw":
            return plain
        return optax.partition({"matrix": plain, "rest": rest.build(run)}, rest.matrix_or_rest)


@dataclasses.dataclass(frozen=True)
class Muon(Scaled):
    """Full-rank Muon on the hidden matrices."""

    momentum: Momentum = "float32"
    """How momentum rests between two steps."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
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
class GaLore(BySvd):
    """Adam on projected gradients, biased."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.galore(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class GaLoreMuon(BySvd, Scaled):
    """Biased low-rank Muon: no layer is ever full-rank."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # The moments of GaLore's Adam continue over a refresh; this momentum restarts, as GUM's.
        compression = gum_optax.galore(carry=gum_optax.carries.restart, **self.common(run))
        return _low_rank_muon(self, run, rate, compression)


@dataclasses.dataclass(frozen=True)
class GoLore(Switching):
    """GaLore that turns to random projections late in the run."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.golore(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class GoLoreMuon(Switching, Scaled):
    """Biased low-rank Muon that turns to random projections late in the run."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        compression = gum_optax.golore(carry=gum_optax.carries.restart, **self.common(run))
        return _low_rank_muon(self, run, rate, compression)


@dataclasses.dataclass(frozen=True)
class UnbiasedAdamW(Unbiased):
    """Adam on unbiased compressed gradients."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # An entry of Adam's update is about 0.2; an orthogonal matrix's are smaller by sqrt(n).
        rule = self.rule(run, self.full_rank_layers, as_adam)
        return _low_rank_adamw(run, rate, gum_optax.LowRank(residual=rule, **self.common(run)))


@dataclasses.dataclass(frozen=True)
class Scale(Optimizer):
    """SCALE on the hidden matrices: columns of the gradient are normalized, and nothing is kept.

    Its head, which SCALE gives momentum, has AdamW here as under every other optimizer.
    """

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _for_matrices(run, rate, gum_optax.normalize_columns())


@dataclasses.dataclass(frozen=True)
class Fira(BySvd):
    """GaLore, and the residual at the gain of its Adam."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.fira(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class Frugal(BySvd):
    """GaLore, and the signs of the residual."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.frugal(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class Apollo(Projecting):
    """Gradients whose columns have the gain of an Adam on random projections."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.apollo(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class ApolloMini(Refreshed):
    """Gradients with the gain of an Adam on one random direction."""

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return _low_rank_adamw(run, rate, gum_optax.apollo_mini(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class JointMuon(Carrying):
    """Muon on momentum in the bases and, outside of them, the gradient of this step alone.

    The two are orthogonalized together, so a step costs as much as full-rank Muon's.
    """

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        rule = residuals.through(optax.scale(self.residual_scale))
        compression = gum_optax.LowRank(residual=rule, **self.common(run))
        momentum = gum_optax.low_rank(optax.trace(0.95), compression)
        direction = optax.chain(momentum, gum_optax.scale_by_polar(), as_adam())
        return _for_matrices(run, rate, direction)


OPTIMIZERS: dict[str, Optimizer] = {
    "gum": Gum(),
    "adamw": AdamW(),
    "muon": Muon(),
    "galore": GaLore(),
    "galore_muon": GaLoreMuon(),
    "golore": GoLore(),
    "golore_muon": GoLoreMuon(),
    "unbiased_adamw": UnbiasedAdamW(),
    "scale": Scale(),
    "fira": Fira(),
    "frugal": Frugal(),
    "apollo": Apollo(),
    "apollo_mini": ApolloMini(),
    "joint_muon": JointMuon(),
}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(OPTIMIZERS)]


# From options to an optimizer ---------------------------------------------------------------------


def named(name: str, like: Optimizer | None = None) -> Optimizer:
    """The optimizer of a name, with what was given to `like` wherever it has the same option.

    Raises:
      ConfigError: there is no such optimizer.
    """
    default = OPTIMIZERS[choose("optimizer", name, OPTIMIZERS)]
    if like is None or type(like) is type(default):
        return like or default
    own = {field.name for field in dataclasses.fields(default)}
    given = {name: value for name, value in _given(like).items() if name in own}
    return dataclasses.replace(default, **given)


def replace(optimizer: Optimizer, **options: Any) -> Optimizer:
    """The same optimizer with other options.

    Raises:
      ConfigError: it has no such option.
    """
    own = {field.name for field in dataclasses.fields(optimizer)}
    if unknown := options.keys() - own:
        raise ConfigError(f"`{min(unknown)}` is no option of the optimizer {optimizer.name}")
    return dataclasses.replace(optimizer, **options)


def _given(optimizer: Optimizer) -> dict[str, Any]:
    """The options whose values are not the defaults."""
    default = OPTIMIZERS[optimizer.name]
    names = (field.name for field in dataclasses.fields(optimizer))
    values = {name: getattr(optimizer, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


_like: contextvars.ContextVar[Optimizer | None] = contextvars.ContextVar("like", default=None)


@contextlib.contextmanager
def defaults_like(optimizer: Optimizer) -> Iterator[None]:
    """Within it, command lines offer all optimizers with the options that `optimizer` was given."""
    before = _like.set(optimizer)
    try:
        yield
    finally:
        _like.reset(before)


def subcommands(like: Optimizer | None = None) -> Any:
    """The union of all optimizers, as a command line offers them: `optimizer:adamw`."""
    chosen = _like.get() or like
    return tyro.extras.subcommand_type_from_defaults(
        {name: named(name, chosen) for name in OPTIMIZERS},
        descriptions={
            name: (inspect.getdoc(type(each)) or "").splitlines()[0]
            for name, each in OPTIMIZERS.items()
        },
        prefix_names=True,
    )


def build(run: "Training", layers: int) -> Transformation:
    """The optimizer of a run on `layers` blocks: clipping, then the run's own, then rounding."""
    clip = optax.clip_by_global_norm(run.clip_norm) if run.clip_norm else optax.identity()
    optimizer = optax.chain(clip, run.optimizer.build(run, schedule(run), layers))
    if run.weights == "bfloat16":
        return gum_optax.stochastic_rounding(optimizer, run.seed)
    return optimizer


def _low_rank_muon(
    scaled: Scaled, run: "Training", rate: optax.Schedule, compression: gum_optax.LowRank
) -> Transformation:
    return gum_optax.gum(
        rate,
        compression,
        consistent_rms=scaled.consistent_rms,
        weight_decay=run.weight_decay,
        fallback=rest.build(run),
    )


def _low_rank_adamw(
    run: "Training", rate: optax.Schedule, compression: gum_optax.LowRank
) -> Transformation:
    return gum_optax.adamw(
        rate,
        compression,
        b2=run.b2,
        weight_decay=run.weight_decay,
        fallback=rest.build(run),
    )


def _for_matrices(
    run: "Training", rate: optax.Schedule, direction: Transformation
) -> Transformation:
    return gum_optax.for_matrices(
        direction, rate, weight_decay=run.weight_decay, fallback=rest.build(run)
    )
