"""Every option of the benchmarks, with its default: the only place where defaults live."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from experiments.benchmarks import contenders, parameters
from experiments.trainer.config import ConfigError, choose, flag


@dataclasses.dataclass(frozen=True)
class Config:
    """Time and weigh GUM beside AdamW, Muon and GaLore."""

    studies: tuple[str, ...] = (
        "step", "compiled", "sweep", "training", "projectors", "orthogonality", "variants"
    )  # fmt: skip
    """What to run: step (seconds of an update), compiled (bytes of state and temporaries, seconds
    of compiling), sweep (rank, gamma, period), training (whole steps), projectors and orthogonality
    (quality of bases and of Newton-Schulz), variants (seconds of the frontier's methods)."""
    out: Path = Path("experiments/results/benchmarks")
    """Directory of the results; the figure is beside it, with .png at the end."""
    rank: int = 128
    """Rank of GUM and GaLore."""
    full_rank_layers: int = 2
    """Gamma: full-rank layers of each role in a period."""
    period: int = 200
    """Steps over which the cost of a refresh is spread."""
    repeats: int = 5
    """How often each step is timed; the median is kept."""
    seed: int = 0
    """Seed of parameters, gradients and tokens."""
    contenders: tuple[str, ...] = tuple(name for name in contenders.TABLE if name != "gum")
    """step: optimizers timed beside GUM."""
    svd: bool = True
    """step: also time GUM's refresh with the SVD as its projector."""

    presets: tuple[str, ...] = ("60m", "130m", "350m")
    """step and variants: presets of experiments.models.presets whose parameters are updated."""
    layouts: tuple[str, ...] = ("separate", "stacked")
    """step and compiled: layers as separate leaves, or stacked in one leaf for each role."""

    state: tuple[str, ...] = ("60m", "130m", "350m", "1b", "7b", "70b")
    """compiled: presets whose state is counted."""
    compiled: tuple[str, ...] = ("60m", "130m", "350m", "1b")
    """compiled: presets whose update is compiled, for its temporaries."""
    compiled_gum: tuple[str, ...] = ("7b",)
    """compiled: presets of which GUM's update alone is compiled."""
    depths: tuple[int, ...] = (8, 16, 32, 64)
    """compiled: numbers of layers for the growth of the program."""
    depth_preset: str = "350m"
    """compiled: preset whose layers these are."""

    sweep_preset: str = "60m"
    """sweep: preset whose parameters are updated."""
    ranks: tuple[int, ...] = (32, 64, 128, 256)
    """sweep: ranks."""
    gammas: tuple[int, ...] = (0, 1, 2, 4)
    """sweep: numbers of full-rank layers."""
    periods: tuple[int, ...] = (10, 50, 200, 1000)
    """sweep: periods."""

    training_preset: str = "60m"
    """training: preset that is trained on random tokens."""
    batch_size: int = 8
    """training: windows in one step."""
    seq_len: int = 256
    """training: tokens in one window."""
    training_steps: int = 12
    """training: steps of one process; every fourth is a refresh, the first two are not counted."""
    rounds: int = 3
    """training: processes of each optimizer."""

    projector_preset: str = "nano"
    """projectors, orthogonality: preset that is trained on text."""
    projector_steps: int = 500
    """projectors, orthogonality: steps."""
    projector_period: int = 100
    """projectors, orthogonality: steps between two refreshes, at which the bases are compared."""
    projector_rank: int = 32
    """projectors, orthogonality: rank of the bases."""
    corpus: tuple[str, ...] = ("stdlib",)
    """projectors, orthogonality: what to read, as in experiments.pretrain."""
    cache_dir: str | None = None
    """projectors, orthogonality: where tokens are kept, as in experiments.pretrain."""


_COUNTS = ("rank", "period", "repeats", "batch_size", "seq_len", "rounds")
_PROJECTOR_COUNTS = ("projector_steps", "projector_period", "projector_rank")
_PRESETS = ("presets", "state", "compiled", "compiled_gum")
_ONE_PRESET = ("depth_preset", "sweep_preset")


def check(config: Config) -> None:
    """Raises `ConfigError` naming the first field whose value cannot work."""
    known = {
        "studies": Config.studies,
        "layouts": parameters.LAYOUTS,
        "contenders": Config.contenders,
    }
    known |= dict.fromkeys(_PRESETS, parameters.SHAPES)
    for field, names in known.items():
        for value in getattr(config, field):
            choose(field, value, names)
    for field in _ONE_PRESET:
        choose(field, getattr(config, field), parameters.SHAPES)
    for field in ("training_preset", "projector_preset"):
        choose(field, getattr(config, field), parameters.TRAINED)
    for field in _COUNTS + _PROJECTOR_COUNTS:
        _demand(field, [getattr(config, field)], 1)
    for field in ("ranks", "periods", "depths"):
        _demand(field, getattr(config, field), 1)
    _demand("gammas", config.gammas, 0)
    _demand("full_rank_layers", [config.full_rank_layers], 0)
    _demand("seed", [config.seed], 0)
    _demand("training_steps", [config.training_steps], 5)  # of which one is a refresh, two count


def _demand(field: str, values: Iterable[int], least: int) -> None:
    for value in values:
        if value < least:
            raise ConfigError(f"{flag(field)} is {value}; it must be at least {least}")
