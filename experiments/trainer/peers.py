"""Methods to compare with, as their papers publish them where the library can.

These are optimizers of the experiments, as in `methods`: GaLore and its descendants, Muon without
Newton-Schulz, and optimizers with little or no state. Deviations from the papers are in
docs/methods.md.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import optax

import gum_optax
from experiments.trainer import low_bits
from experiments.trainer.directions import as_adam, equal_outputs
from experiments.trainer.methods import (
    Momentum,
    Optimizer,
    Projecting,
    Projector,
    Refreshed,
    Scaled,
    Transformation,
    for_matrices,
    low_rank_adamw,
    low_rank_muon,
)
from experiments.trainer.options import ConfigError, at_least, option, share
from gum_optax import projectors, residuals

if TYPE_CHECKING:
    from experiments.trainer.config import Training


# Low rank -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BySvd(Projecting):
    """A low-rank optimizer as published, with bases from an exact SVD."""

    #: Method that computes bases from gradients.
    projector: Projector = "svd"

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"projector": getattr(projectors, self.projector)}


@dataclasses.dataclass(frozen=True)
class Switching(Projecting):
    """A low-rank optimizer that switches to random projections late in the run."""

    #: Share of the steps after which bases are random instead of from an SVD.
    golore_switch: float = option(0.5, share)

    def common(self, run: "Training") -> dict[str, Any]:
        return super().common(run) | {"switch_step": round(self.golore_switch * run.steps)}


# The optimizers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GaLore(BySvd):
    """Adam on gradients projected to low rank; biased."""

    name: ClassVar[str] = "galore"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.galore(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class GaLoreMuon(BySvd, Scaled):
    """Low-rank Muon without full-rank layers; biased."""

    name: ClassVar[str] = "galore_muon"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # GaLore's Adam keeps its moments over a refresh. Momentum restarts here, as GUM's does.
        compression = gum_optax.galore(carry=gum_optax.carries.restart, **self.common(run))
        return low_rank_muon(self, run, rate, compression)


@dataclasses.dataclass(frozen=True)
class GoLore(Switching):
    """GaLore that switches to random projections late in the run."""

    name: ClassVar[str] = "golore"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.golore(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class GoLoreMuon(Switching, Scaled):
    """Low-rank Muon that switches to random projections late in the run; biased."""

    name: ClassVar[str] = "golore_muon"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # Momentum restarts at a refresh, as in `GaLoreMuon`.
        compression = gum_optax.golore(carry=gum_optax.carries.restart, **self.common(run))
        return low_rank_muon(self, run, rate, compression)


@dataclasses.dataclass(frozen=True)
class Fira(BySvd):
    """GaLore plus the residual, scaled by the gain of GaLore's Adam."""

    name: ClassVar[str] = "fira"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.fira(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class Frugal(BySvd):
    """GaLore plus the signs of the residual."""

    name: ClassVar[str] = "frugal"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.frugal(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class Apollo(Projecting):
    """Gradients with each column scaled by the gain of an Adam on random projections."""

    name: ClassVar[str] = "apollo"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.apollo(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class ApolloMini(Refreshed):
    """Gradients scaled by the gain of an Adam on one random direction."""

    name: ClassVar[str] = "apollo_mini"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return low_rank_adamw(run, rate, gum_optax.apollo_mini(**self.common(run)))


@dataclasses.dataclass(frozen=True)
class LDAdam(Projecting):
    """GaLore with a new basis in each period, error feedback and moments carried over."""

    name: ClassVar[str] = "ldadam"

    #: Steps between two refreshes; the paper has one.
    period: int = option(1, at_least(1))

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        compression = gum_optax.LowRank(
            residual=residuals.feedback(),
            carry=gum_optax.carries.projection_aware(b2=run.b2),
            **self.common(run),
        )
        return low_rank_adamw(run, rate, compression)


@dataclasses.dataclass(frozen=True)
class SubTrack(Projecting):
    """GaLore with bases that move along geodesics, and Fira's residual (SubTrack++)."""

    name: ClassVar[str] = "subtrack"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        compression = gum_optax.LowRank(
            projector=projectors.grassmann(),
            carry=gum_optax.carries.projection_aware(b2=run.b2),
            residual=residuals.through(gum_optax.scale_by_gain()),
            **self.common(run),
        )
        return low_rank_adamw(run, rate, compression)


# Full rank ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale(Optimizer):
    """SCALE on the hidden matrices: gradients with normalized columns, and no state.

    SCALE trains the head with momentum. Here the run's fallback trains it, as under every other
    optimizer.
    """

    name: ClassVar[str] = "scale"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return for_matrices(run, rate, gum_optax.normalize_columns())


@dataclasses.dataclass(frozen=True)
class WithMomentum(Optimizer):
    """An optimizer of full-rank momentum."""

    #: Storage of momentum between two steps.
    momentum: Momentum = "float32"

    def trace(self, decay: float = 0.95) -> Transformation:
        """Returns Muon's momentum, packed between steps: M <- decay M + G."""
        return gum_optax.quantized(optax.trace(decay), low_bits.STORAGES[self.momentum])


@dataclasses.dataclass(frozen=True)
class Rmnp(WithMomentum):
    """Momentum with normalized columns, which is Muon without Newton-Schulz (RMNP).

    Entries have a root mean square of 0.2 in each column, the size of AdamW's updates.
    """

    name: ClassVar[str] = "rmnp"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # U_j = 0.2 M_j / rms(M_j)   (Deng et al., arXiv 2603.20527)
        direction = optax.chain(self.trace(), gum_optax.normalize_columns(), optax.scale(0.2))
        return for_matrices(run, rate, direction)


@dataclasses.dataclass(frozen=True)
class NorMuon(WithMomentum):
    """Muon with updates of one size for all outputs (NorMuon)."""

    name: ClassVar[str] = "normuon"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # O = NS(M),  U = O / sqrt(average of O^2 over inputs and steps)
        direction = optax.chain(self.trace(), gum_optax.scale_by_polar(), equal_outputs(run.b2))
        return for_matrices(run, rate, direction)


@dataclasses.dataclass(frozen=True)
class Mud(WithMomentum):
    """Momentum with decorrelated rows, a cheaper Muon (MUD)."""

    name: ClassVar[str] = "mud"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        direction = optax.chain(self.trace(), gum_optax.scale_by_decorrelation(), as_adam())
        return for_matrices(run, rate, direction)


@dataclasses.dataclass(frozen=True)
class Swan(WithMomentum):
    """The polar factor of gradients with standardized columns, and no state (SWAN)."""

    name: ClassVar[str] = "swan"

    #: Decay of momentum that takes the gradients' place; at 0 there is none.
    decay: float = option(0.0, share)
    #: What is done to columns: standardized (mean 0 and one size), normalized (one size), as_is.
    columns: Literal["standardized", "normalized", "as_is"] = "standardized"
    #: What follows: polar (Newton-Schulz) or decorrelation (a triangular solve, as in MUD).
    orthogonalizer: Literal["polar", "decorrelation"] = "polar"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum != "float32" and not self.decay:
            raise ConfigError(
                f"`momentum` is {self.momentum}, and there is none to store: `decay` is 0"
            )

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        treat = {
            "standardized": gum_optax.standardize_columns,
            "normalized": gum_optax.normalize_columns,
            "as_is": optax.identity,
        }
        whiten = {
            "polar": gum_optax.scale_by_polar,
            "decorrelation": gum_optax.scale_by_decorrelation,
        }
        direction = optax.chain(
            self.trace(self.decay) if self.decay else optax.identity(),
            treat[self.columns](),
            whiten[self.orthogonalizer](),
            as_adam(),
        )
        return for_matrices(run, rate, direction)


@dataclasses.dataclass(frozen=True)
class Racs(Optimizer):
    """Gradients divided by second moments of rows and columns (RACS)."""

    name: ClassVar[str] = "racs"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        direction = optax.chain(gum_optax.scale_by_racs(), optax.scale(0.2))
        return for_matrices(run, rate, direction)


@dataclasses.dataclass(frozen=True)
class AdamMini(Optimizer):
    """Adam with one second moment for each output."""

    name: ClassVar[str] = "adam_mini"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        return for_matrices(run, rate, gum_optax.scale_by_adam_mini(b2=run.b2))


@dataclasses.dataclass(frozen=True)
class AdaLomo(Optimizer):
    """A factored second moment without momentum, and steps relative to the weights."""

    name: ClassVar[str] = "adalomo"

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        # `adalomo` is a whole optimizer, with the sign of a step; the rate comes from the run.
        return for_matrices(run, rate, optax.chain(gum_optax.adalomo(1.0), optax.scale(-1.0)))


@dataclasses.dataclass(frozen=True)
class MoFaSGD(Optimizer):
    """The polar factor of momentum that is kept as a product of low rank."""

    name: ClassVar[str] = "mofasgd"

    #: Rank of the momentum.
    rank: int = option(32, at_least(1))

    def build(self, run: "Training", rate: optax.Schedule, layers: int) -> Transformation:
        direction = optax.chain(gum_optax.scale_by_factored_momentum(self.rank), as_adam())
        return for_matrices(run, rate, direction)
