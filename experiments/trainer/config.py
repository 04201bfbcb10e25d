"""Every option of a training run, with its default: the only place where defaults live."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from experiments.models.presets import PRESETS
from experiments.trainer import optimizers, rest
from experiments.trainer.optimizers import Gum, Optimizer
from experiments.trainer.options import (
    Checked,
    ConfigError,
    at_least,
    decay,
    not_negative,
    option,
    positive,
    proper_share,
    share,
)

T = TypeVar("T", bound="Training")
GUM = Gum()
Recipe = Literal["60m", "130m", "350m", "1b"]
if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[tuple(PRESETS)]


@dataclasses.dataclass(frozen=True)
class Training(Checked):
    """What every training run has, whatever it trains on."""

    run_dir: str = "runs/pretrain"
    """Directory of this run: config.json, metrics.jsonl, checkpoints, TensorBoard, loss.png."""
    resume: bool = False
    """Continue from the last checkpoint in run_dir, with the numbers of an unbroken run."""
    seed: int = option(0, not_negative)
    """Seed of the order of the data and of all that is drawn: first weights, examples, layers."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward and backward pass; bfloat16 suits a GPU."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type that weights are kept in. bfloat16 halves them; updates are then rounded to a neighbour
    at random, so that small ones are not lost, and the optimizer works in float32."""
    remat: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    accumulate: int = option(1, at_least(1))
    """Parts of a batch whose gradients are computed one after the other, and summed."""

    steps: int = option(600, at_least(1))
    """Optimizer steps in the whole run."""
    batch_size: int = option(8, at_least(1))
    """Windows in one step."""
    optimizer: Annotated[Optimizer, tyro.conf.arg(constructor_factory=optimizers.subcommands)] = GUM
    """Which optimizer trains the hidden matrices."""
    learning_rate: float = option(1e-2, positive)
    """Peak learning rate; on nano about 1e-2 suits gum and muon, 1e-3 adamw."""
    fallback_learning_rate: float | None = option(None, positive)
    """Peak learning rate of the fallback, under every optimizer. None: learning_rate."""
    fallback: rest.Name = "adamw"
    """What trains embedding, head and norms, which are no hidden matrices: AdamW, AdamW in 8 bits,
    Adafactor's second moment without or with momentum in 8 bits, or SCALE's rule."""
    warmup: float = option(0.1, share)
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate: float = option(0.1, share)
    """Learning rate at the end of the cosine decay, as a share of the peak."""
    weight_decay: float = option(0.0, not_negative)
    """Decoupled weight decay of matrices and embeddings."""
    clip_norm: float = option(1.0, not_negative)
    """Global gradient norm to which larger gradients are scaled down. 0: no clipping."""
    b2: float = option(0.95, decay)
    """Decay of Adam's second moment, wherever Adam is used."""

    validate_every: int = option(100, at_least(1))
    """Steps between two validation losses; the last step is always validated."""
    validation_batches: int = option(20, at_least(1))
    """Batches of held-out windows in one validation loss, at most."""
    checkpoint_every: int = option(100, at_least(1))
    """Steps between two checkpoints; Ctrl-C, kill and the last step save one too."""
    checkpoint_minutes: float = option(5.0, positive)
    """Minutes after which a run in one process saves one in any case."""
    keep_checkpoints: int = option(2, at_least(1))
    """Checkpoints to keep."""
    log_every: int = option(10, at_least(1))
    """Steps between two writes of metrics; every step's loss is recorded."""

    mesh: str | None = None
    """Devices along the axes data (batches), fsdp (batches and weights) and tensor (weights), such
    as fsdp=4,tensor=2; an axis left out is 1. None: one device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"`accumulate` is {self.accumulate}; it must be a divisor of `batch_size`, "
                f"{self.batch_size}"
            )


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Pretrain a LLaMA with GUM or another optimizer, on one device or on many."""

    recipe: Recipe | None = None
    """Defaults of all other options as in GaLore's C4 experiments with this model; what is given
    beside it goes before."""
    preset: Preset = "nano"
    """Size of the model: tiny (tests), nano (a CPU), deep (nano with twice the blocks), or GaLore's
    60m, 130m, 350m, 1b."""
    vocab_size: int | None = option(None, at_least(1))
    """Tokens in the vocabulary, when the tokenizer is trained here. None: the preset's."""
    seq_len: int | None = option(None, at_least(1))
    """Tokens in one training window. None: the preset's."""

    corpus: tuple[str, ...] = ("stdlib",)
    """What to read: stdlib (Python's own library), local text, .jsonl, .parquet or .arrow files or
    directories of them, or a Hugging Face data set such as allenai/c4:en, streamed."""
    text_field: str = "text"
    """Column that holds the text in .jsonl, .parquet, .arrow and Hugging Face data."""
    tokenizer: str | None = None
    """A tokenizer.json to load. None: train a byte-level BPE on the training documents."""
    tokenizer_chars: int = option(20_000_000, at_least(1))
    """Characters of training text that the tokenizer is trained on, at most."""
    max_tokens: int = option(100_000_000, at_least(1))
    """Training tokens to take from the corpus, at most; a run that needs more repeats them."""
    validation_fraction: float = option(0.05, proper_share)
    """Share of the documents held out for validation, chosen by a hash of their text."""
    cache_dir: str | None = None
    """Where tokenizers and token files are kept. None: $XDG_CACHE_HOME/gum_optax or
    ~/.cache/gum_optax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus:
            raise ConfigError("`corpus` must name at least one file, directory or data set")


@dataclasses.dataclass(frozen=True)
class Sitting(Checked):
    """How a set of runs is worked through: options that all studies have."""

    jobs: int = option(2, at_least(1))
    """Runs that train at a time, each on its share of the cores."""
    budget_minutes: float | None = option(None, positive)
    """When to stop: runs are saved, the exit code is 75, and the same command goes on. None: at the
    end."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the processes of one run find each other; what is not given, JAX detects."""

    distributed: bool = False
    """This is one of several processes: of a SLURM or Open MPI job, a TPU pod, a Kubernetes job, or
    as the next options say."""
    coordinator_address: str | None = None
    """Host and port at which the first process listens."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""


# Options that may differ between the run that wrote a checkpoint and the one that resumes it:
# none of them changes a training loss (a mesh only rounds it otherwise).
FREE_ON_RESUME = frozenset(
    {"run_dir", "resume", "cache_dir", "log_every", "validate_every", "validation_batches"}
    | {"checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "mesh", "recipe"}
    | {"export", "eval_batch_size", "shown", "baseline"}
)


def change(config: T, **options: Any) -> T:
    """The configuration with other options, of the run or of its optimizer.

    Args:
      config: the configuration.
      **options: by their names. That of an optimizer stands for it, with what `config` has given to
        its own wherever the two have the same option.
    """
    own = {field.name for field in dataclasses.fields(config)}
    optimizer = config.optimizer
    if name := options.pop("optimizer", None):
        optimizer = optimizers.named(name, like=optimizer)
    inner = {name: value for name, value in options.items() if name not in own}
    outer = {name: value for name, value in options.items() if name in own}
    return dataclasses.replace(config, optimizer=optimizers.replace(optimizer, **inner), **outer)


def record(options: Any) -> Any:
    """Options as result files and checkpoints keep them: JSON, with those of optimizers in place.

    An optimizer is its name and, beside it, its options: `{"optimizer": "gum", "rank": 32, ...}`.
    So were all options kept before optimizers had their own, and old records remain readable.
    """
    if isinstance(options, Optimizer):
        return {"optimizer": options.name} | _fields(options)
    if dataclasses.is_dataclass(options):
        kept = _fields(options)
        optimizer = getattr(options, "optimizer", None)
        return kept | record(optimizer) if isinstance(optimizer, Optimizer) else kept
    if isinstance(options, tuple | list):
        return [record(each) for each in options]
    return str(options) if isinstance(options, Path) else options


def _fields(options: Any) -> dict[str, Any]:
    fields = dataclasses.fields(options)
    return {field.name: record(getattr(options, field.name)) for field in fields}


def in_record(old: dict[str, Any], config: Training) -> dict[str, Any]:
    """What a record, perhaps an old one, says about the options that `config` has.

    Options that are newer than it have their defaults, and options that the optimizer of `config`
    does not have are left out: under another optimizer they had no effect.
    """
    default = record(change(type(config)(), optimizer=config.optimizer.name))
    # None once stood for the projector that an optimizer has by default.
    known = {name: value for name, value in old.items() if (name, value) != ("projector", None)}
    return {name: known.get(name, value) for name, value in default.items()}


def from_record(kind: type[T], old: dict[str, Any]) -> T:
    """The configuration that a record describes."""
    default = change(kind(), optimizer=old["optimizer"])
    kept = in_record(old, default)
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    return change(default, **kept)


def first_difference(old: dict, config: Training) -> str | None:
    """The first option, not free on resume, whose value in `old` differs from `config`'s."""
    new, then = record(config), in_record(old, config)
    changed = (k for k in new if k not in FREE_ON_RESUME and then[k] != new[k])
    return next(changed, None)
