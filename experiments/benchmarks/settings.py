"""The options of the benchmarks, and the only place of their defaults."""

import dataclasses
from pathlib import Path

from experiments.benchmarks import contenders, parameters
from experiments.trainer.options import Checked, at_least, choose, option


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Measure time and memory of GUM beside AdamW, Muon and GaLore."""

    #: Benchmarks to run: step (seconds of an update), compiled (bytes of state and temporaries,
    #: seconds of compiling), sweep (rank, gamma, period), training (whole steps), projectors and
    #: orthogonality (quality of bases and of Newton-Schulz), variants (seconds of the frontier's
    #: methods).
    studies: tuple[str, ...] = (
        "step", "compiled", "sweep", "training", "projectors", "orthogonality", "variants"
    )  # fmt: skip
    #: Directory of the results; the figure is beside it, under the same name with .png.
    out: Path = Path("experiments/results/benchmarks")
    #: Rank of GUM and GaLore.
    rank: int = option(128, at_least(1))
    #: Gamma: full-rank layers of each role in a period.
    full_rank_layers: int = option(2, at_least(0))
    #: Steps over which the cost of a refresh is spread.
    period: int = option(200, at_least(1))
    #: Timed repetitions of each step; the median is reported.
    repeats: int = option(5, at_least(1))
    #: Seed of parameters, gradients and tokens.
    seed: int = option(0, at_least(0))
    #: step: optimizers timed beside GUM.
    contenders: tuple[str, ...] = tuple(name for name in contenders.TABLE if name != "gum")
    #: step: also time GUM with the SVD as its projector.
    svd: bool = True

    # Each group below belongs to the benchmarks that its texts begin with.

    #: step and variants: presets of experiments.models.presets whose parameters are updated.
    presets: tuple[str, ...] = ("60m", "130m", "350m")
    #: step and compiled: layers as separate leaves, or stacked in one leaf for each role.
    layouts: tuple[str, ...] = ("separate", "stacked")

    #: compiled: presets whose state is counted.
    state: tuple[str, ...] = ("60m", "130m", "350m", "1b", "7b", "70b")
    #: compiled: presets whose update is compiled, for its temporaries.
    compiled: tuple[str, ...] = ("60m", "130m", "350m", "1b")
    #: compiled: presets for which only GUM's update is compiled.
    compiled_gum: tuple[str, ...] = ("7b",)
    #: compiled: numbers of layers, to measure how programs and compile times grow.
    depths: tuple[int, ...] = option((8, 16, 32, 64), at_least(1))
    #: compiled: preset whose widths these layers have.
    depth_preset: str = "350m"

    #: sweep: preset whose parameters are updated.
    sweep_preset: str = "60m"
    #: sweep: ranks.
    ranks: tuple[int, ...] = option((32, 64, 128, 256), at_least(1))
    #: sweep: numbers of full-rank layers.
    gammas: tuple[int, ...] = option((0, 1, 2, 4), at_least(0))
    #: sweep: periods.
    periods: tuple[int, ...] = option((10, 50, 200, 1000), at_least(1))

    #: training: preset that is trained on random tokens.
    training_preset: str = "60m"
    #: training: windows in one step.
    batch_size: int = option(8, at_least(1))
    #: training: tokens in one window.
    seq_len: int = option(256, at_least(1))
    #: training: steps of one process; every fourth is a refresh, the first two are not counted.
    training_steps: int = option(
        12,
        at_least(5),  # step 4 is the first refresh after the two steps that are not counted
    )
    #: training: number of processes of each optimizer.
    rounds: int = option(3, at_least(1))

    #: projectors, orthogonality: preset that is trained on text.
    projector_preset: str = "nano"
    #: projectors, orthogonality: steps.
    projector_steps: int = option(500, at_least(1))
    #: projectors, orthogonality: steps between two refreshes, at which the bases are compared.
    projector_period: int = option(100, at_least(1))
    #: projectors, orthogonality: rank of the bases.
    projector_rank: int = option(32, at_least(1))
    #: projectors, orthogonality: text to train on, as in experiments.pretrain.
    corpus: tuple[str, ...] = ("stdlib",)
    #: projectors, orthogonality: directory of cached tokens, as in experiments.pretrain.
    cache_dir: str | None = None


# Fields that hold names of presets: several, or one.
_PRESETS = ("presets", "state", "compiled", "compiled_gum")
_ONE_PRESET = ("depth_preset", "sweep_preset")


def check(config: Config) -> None:
    """Checks the names in all fields against their tables.

    Raises:
      ConfigError: naming the first field with an unknown name, and the known ones.
    """
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
    # A model that is trained must fit into memory, not only be counted.
    for field in ("training_preset", "projector_preset"):
        choose(field, getattr(config, field), parameters.TRAINED)
