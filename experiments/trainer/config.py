"""Options of a training run with their defaults, and their form in records.

Defaults live here and in the dataclasses of optimizers, nowhere else. The `#:` comment above
a field is its help text on the command line.

A *record* is the JSON form of options, flat: an optimizer's options stand beside those of the run.
Result files and checkpoints keep records. Old records remain readable: options that they lack have
their defaults (`in_record`).
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from experiments.models.presets import PRESETS
from experiments.trainer import optimizers, rest
from experiments.trainer.methods import Gum, Optimizer
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
# The models of `recipes`, which imports this module and so cannot be imported here.
Recipe = Literal["60m", "130m", "350m", "1b"]
# A type checker takes no literal from a table; tyro does, and lists its entries in the help.
if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[tuple(PRESETS)]


@dataclasses.dataclass(frozen=True)
class Training(Checked):
    """Options that pretraining and fine-tuning share."""

    #: Directory of this run: config.json, metrics.jsonl, checkpoints, TensorBoard, loss.png.
    run_dir: str = "runs/pretrain"
    #: Continue from the last checkpoint in run_dir, with the numbers of an uninterrupted run.
    resume: bool = False
    #: Seed of the data order and of all random draws: first weights, examples, layers.
    seed: int = option(0, not_negative)

    # The computation of gradients.

    #: Data type of the forward and backward pass; bfloat16 suits GPUs and TPUs.
    dtype: Literal["float32", "bfloat16"] = "float32"
    #: Data type of stored weights. bfloat16 halves their memory; stochastic rounding then keeps
    #: small updates from being lost, and the optimizer works in float32. With int8, weights have
    #: values of 8-bit codes, also by stochastic rounding, but their memory is that of float32: an
    #: experiment about the loss.
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    #: Recompute the activations of each block in the backward pass instead of storing them.
    remat: bool = False
    #: Number of parts of a batch (micro-batches) to compute gradients of in turn and sum.
    accumulate: int = option(1, at_least(1))

    # Steps and their optimizer.

    #: Optimizer steps in the whole run.
    steps: int = option(600, at_least(1))
    #: Windows in one step, over all devices.
    batch_size: int = option(8, at_least(1))
    #: Optimizer of the hidden matrices.
    optimizer: Annotated[Optimizer, tyro.conf.arg(constructor_factory=optimizers.subcommands)] = GUM
    #: Peak learning rate; for nano about 1e-2 with gum and muon, 1e-3 with adamw.
    learning_rate: float = option(1e-2, positive)
    #: Peak learning rate of the fallback. None: learning_rate.
    fallback_learning_rate: float | None = option(None, positive)
    #: Optimizer of embedding, head and norms, under every optimizer of the hidden matrices: AdamW,
    #: AdamW with 8-bit state, Adafactor's second moment without or with momentum in 8 bits, or
    #: SCALE's rule.
    fallback: rest.Name = "adamw"
    #: Share of the steps over which the learning rate rises linearly to its peak.
    warmup: float = option(0.1, share)
    #: Learning rate at the end of the cosine decay, as a share of the peak.
    final_learning_rate: float = option(0.1, share)
    #: Decoupled weight decay of matrices and embeddings.
    weight_decay: float = option(0.0, not_negative)
    #: Global norm to which larger gradients are scaled down. 0: no clipping.
    clip_norm: float = option(1.0, not_negative)
    #: Decay rate of Adam's second moment, wherever Adam is used.
    b2: float = option(0.95, decay)

    # Validation, checkpoints and metrics.

    #: Steps between two validations; the last step is always validated.
    validate_every: int = option(100, at_least(1))
    #: Batches of held-out windows in one validation, at most.
    validation_batches: int = option(20, at_least(1))
    #: Steps between two checkpoints. SIGINT (Ctrl-C), SIGTERM (kill) and the last step save one
    #: too.
    checkpoint_every: int = option(100, at_least(1))
    #: Minutes after the last checkpoint at which a run in one process saves another one.
    checkpoint_minutes: float = option(5.0, positive)
    #: Number of newest checkpoints to keep.
    keep_checkpoints: int = option(2, at_least(1))
    #: Steps between two writes of metrics; the loss of every step is recorded.
    log_every: int = option(10, at_least(1))

    # Devices.

    #: Number of devices along the axes data (divides batches), fsdp (batches and weights) and
    #: tensor (weights), such as fsdp=4,tensor=2; an axis that is left out is 1. None: one device.
    mesh: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"`accumulate` is {self.accumulate}; it must be a divisor of `batch_size`, "
                f"{self.batch_size}"
            )

    @property
    def stored(self) -> str:
        """The data type of the arrays of weights; values of 8-bit codes are stored in float32."""
        return "float32" if self.weights == "int8" else self.weights


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Pretrain a LLaMA with GUM or another optimizer, on one device or on many."""

    #: Defaults for all other options from GaLore's C4 experiments with this model; options given
    #: beside it override them.
    recipe: Recipe | None = None
    #: Size of the model: tiny (for tests), nano (for CPUs), deep (nano with twice the blocks), or
    #: GaLore's 60m, 130m, 350m, 1b.
    preset: Preset = "nano"
    #: Vocabulary size of a tokenizer that is trained here. None: the preset's.
    vocab_size: int | None = option(None, at_least(1))
    #: Tokens in one training window. None: the preset's.
    seq_len: int | None = option(None, at_least(1))

    #: Text to train on: stdlib (the source of Python's standard library), local
    #: text, .jsonl, .parquet or .arrow files or directories of them, or a Hugging Face data set
    #: such as allenai/c4:en, which is streamed.
    corpus: tuple[str, ...] = ("stdlib",)
    #: Column with the text in .jsonl, .parquet, .arrow and Hugging Face data.
    text_field: str = "text"
    #: A tokenizer.json to load. None: train a byte-level BPE on the training documents.
    tokenizer: str | None = None
    #: Characters of training text to train the tokenizer on, at most.
    tokenizer_chars: int = option(20_000_000, at_least(1))
    #: Training tokens to take from the corpus, at most; a longer run repeats them.
    max_tokens: int = option(100_000_000, at_least(1))
    #: Share of the documents to hold out for validation, chosen by a hash of their text.
    validation_fraction: float = option(0.05, proper_share)
    #: Directory of tokenizers and token files. None: $XDG_CACHE_HOME/gum_optax
    #: or ~/.cache/gum_optax.
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus:
            raise ConfigError("`corpus` must name at least one file, directory or data set")


@dataclasses.dataclass(frozen=True)
class Sitting(Checked):
    """Options of all studies for running a set of runs, in one or several sittings."""

    #: Runs to train at a time, each on its share of the cores.
    jobs: int = option(2, at_least(1))
    #: Minutes after which to save the runs and stop with exit code 75; the same command continues.
    #: None: no limit.
    budget_minutes: float | None = option(None, positive)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the processes of one run find each other; JAX detects what is not given."""

    #: Run as one of several processes: of a SLURM or Open MPI job, a TPU pod, a Kubernetes job, or
    #: as the next three options describe.
    distributed: bool = False
    #: host:port at which the first process listens.
    coordinator_address: str | None = None
    #: Number of processes.
    num_processes: int | None = None
    #: Index of this process, from 0.
    process_id: int | None = None


# Options that may differ between the run that wrote a checkpoint and the one that resumes it: none
# of them changes a training loss, except that a mesh sums in another order. The last row are those
# of fine-tuning.
FREE_ON_RESUME = frozenset(
    {"run_dir", "resume", "cache_dir", "log_every", "validate_every", "validation_batches"}
    | {"checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "mesh", "recipe"}
    | {"export", "eval_batch_size", "shown", "baseline"}
)


def change(config: T, **options: Any) -> T:
    """Returns the configuration with other options, of the run or of its optimizer.

    Args:
      config: the configuration.
      **options: new values by name. `optimizer` is the name of an optimizer, which takes over the
        options that the present one was given, where it has the same ones.

    Raises:
      ConfigError: an option belongs neither to the run nor to the optimizer, or has a value that
        cannot work.
    """
    own = {field.name for field in dataclasses.fields(config)}
    # The optimizer first: the other options may belong to the new one.
    optimizer = config.optimizer
    if name := options.pop("optimizer", None):
        optimizer = optimizers.named(name, like=optimizer)
    inner = {name: value for name, value in options.items() if name not in own}
    outer = {name: value for name, value in options.items() if name in own}
    return dataclasses.replace(config, optimizer=optimizers.replace(optimizer, **inner), **outer)


def record(options: Any) -> Any:
    """Returns the record of options, as result files and checkpoints keep it: JSON.

    An optimizer becomes its name with its options beside it: `{"optimizer": "gum", "rank": 32,
    ...}`. This is the form from before optimizers had options of their own, so that old records
    remain readable.
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
    """The record of each field; `dataclasses.asdict` would recurse past `record`."""
    fields = dataclasses.fields(options)
    return {field.name: record(getattr(options, field.name)) for field in fields}


def in_record(old: dict[str, Any], config: Training) -> dict[str, Any]:
    """Returns the values in a record, perhaps an old one, of the options that `config` has.

    Options newer than the record have their defaults. Options that the optimizer of `config` does
    not have are left out: they belong to another optimizer and had no effect.
    """
    default = record(change(type(config)(), optimizer=config.optimizer.name))
    # In old records None stands for the optimizer's default projector.
    known = {name: value for name, value in old.items() if (name, value) != ("projector", None)}
    return {name: known.get(name, value) for name, value in default.items()}


def from_record(kind: type[T], old: dict[str, Any]) -> T:
    """Returns the configuration of class `kind` that a record describes."""
    default = change(kind(), optimizer=old["optimizer"])
    kept = in_record(old, default)
    # JSON has lists for tuples, which configurations need in order to be hashable.
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    return change(default, **kept)


def first_difference(old: dict, config: Training) -> str | None:
    """Returns the first option not in FREE_ON_RESUME that differs between `old` and `config`."""
    new, then = record(config), in_record(old, config)
    changed = (k for k in new if k not in FREE_ON_RESUME and then[k] != new[k])
    return next(changed, None)
