"""Every option of a training run, with its default: the only place where defaults live."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

Optimizer = Literal[
    "gum", "adamw", "muon", "galore", "galore_muon", "golore", "golore_muon", "unbiased_adamw",
    "scale", "fira", "frugal", "apollo", "apollo_mini", "joint_muon",
]  # fmt: skip
# Without projections, or with a rule that reads gradients before they are projected.
NOT_COMPRESSED: tuple[Optimizer, ...] = ("adamw", "muon", "scale", "joint_muon")
Residual = Literal["drop", "sampled", "additive", "columns", "rows", "sign", "plain"]
Projector = Literal["subspace_iteration", "svd", "randomized_svd", "random_orthonormal"]
Preset = Literal["tiny", "nano", "deep", "60m", "130m", "350m", "1b"]
Recipe = Literal["60m", "130m", "350m", "1b"]


class ConfigError(ValueError):
    """A mistake of the person who started the run; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What every training run has, whatever it trains on."""

    run_dir: str = "runs/pretrain"
    """Directory of this run: config.json, metrics.jsonl, checkpoints, TensorBoard, loss.png."""
    resume: bool = False
    """Continue from the last checkpoint in --run-dir, with the numbers of an unbroken run."""
    seed: int = 0
    """Seed of the order of the data and of all that is drawn: first weights, examples, layers."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward and backward pass; bfloat16 suits a GPU."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type that weights are kept in. bfloat16 halves them; updates are then rounded to a neighbour
    at random, so that small ones are not lost, and the optimizer works in float32."""
    remat: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    gradients: Literal["full", "compressed"] = "full"
    """How gradients leave the backward pass: whole, or already projected, which takes less memory
    and, for many tokens, less time. --clip-norm then measures what is left of them."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed one after the other, and summed."""

    steps: int = 600
    """Optimizer steps in the whole run."""
    batch_size: int = 8
    """Windows in one step."""
    optimizer: Optimizer = "gum"
    """Which optimizer: gum, adamw, muon (full rank), galore, galore_muon (biased low rank), golore,
    golore_muon (biased, random projections late in the run), unbiased_adamw, scale (columns of
    gradients are normalized, no state), fira, frugal, apollo, apollo_mini, joint_muon (momentum in
    the bases and the gradient outside of them, orthogonalized together)."""
    learning_rate: float = 1e-2
    """Peak learning rate; on nano about 1e-2 suits gum and muon, 1e-3 adamw."""
    fallback_learning_rate: float | None = None
    """Peak learning rate of --fallback, under every optimizer. None: --learning-rate."""
    fallback: Literal["adamw", "adamw8", "factored", "factored_momentum", "columns"] = "adamw"
    """What trains embedding, head and norms, which are no hidden matrices: AdamW, AdamW in 8 bits,
    Adafactor's second moment without or with momentum in 8 bits, or SCALE's rule."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate: float = 0.1
    """Learning rate at the end of the cosine decay, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    clip_norm: float = 1.0
    """Global gradient norm to which larger gradients are scaled down. 0: no clipping."""
    b2: float = 0.95
    """Decay of Adam's second moment, wherever Adam is used."""
    rank: int = 32
    """Rank of the projection, of every optimizer that projects but apollo_mini."""
    period: int = 100
    """Steps between two refreshes of the projection, and of the draw of full-rank layers."""
    full_rank_layers: int = 2
    """Gamma: layers of each role drawn in a period, whose residual is kept at full rank (gum,
    unbiased_adamw)."""
    residual: Residual = "sampled"
    """gum, unbiased_adamw: what becomes of the part of a gradient that its basis leaves out. It is
    dropped; or --full-rank-layers keep it (sampled instead of their projection, additive beside
    it); or it is added without momentum, its columns, rows, signs or the whole (plain) brought to
    the size of an orthogonal matrix, and --full-rank-layers keep it beside that."""
    residual_scale: float = 1.0
    """Factor of a residual that is added without momentum."""
    residual_decay: float = 0.0
    """Power of the learning rate, as a share of its peak, by which that factor shrinks as well."""
    momentum: Literal["float32", "int8", "int4", "rows8", "rows4"] = "float32"
    """gum, muon: how momentum rests between two steps; rows8 and rows4 are the plainest codes of 8
    and 4 bits, with one scale for each row."""
    projector: Projector | None = None
    """How bases come from gradients (gum, unbiased_adamw, joint_muon, galore, galore_muon, fira,
    frugal). None: the first three use subspace_iteration, the others svd."""
    sampler: Literal["fixed_size", "bernoulli"] = "fixed_size"
    """gum: draws --full-rank-layers of each role, or each layer by itself, as many on average."""
    restart: Literal["everything", "slots", "rotate"] = "everything"
    """gum, unbiased_adamw: what restarts at a refresh. slots carries low-rank momentum over as it
    is, rotate turns it into the new basis."""
    draw_seed: int | None = None
    """Seed of the optimizer's draws alone. None: --seed."""
    consistent_rms: float | None = 0.2
    """Muon-like updates are scaled by this times sqrt(max(m, n)), so that their size is AdamW's.
    None: by sqrt(max(1, n / m)) as in Muon, which wants a larger learning rate."""
    golore_switch: float = 0.5
    """Share of the steps after which golore and golore_muon project at random instead of by SVD."""

    validate_every: int = 100
    """Steps between two validation losses; the last step is always validated."""
    validation_batches: int = 20
    """Batches of held-out windows in one validation loss, at most."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; Ctrl-C, kill and the last step save one too."""
    keep_checkpoints: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between two writes of metrics; every step's loss is recorded."""

    mesh: str | None = None
    """Devices along the axes data (batches), fsdp (batches and weights) and tensor (weights), such
    as fsdp=4,tensor=2; an axis left out is 1. None: one device."""


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Pretrain a LLaMA with GUM or another optimizer, on one device or on many."""

    recipe: Recipe | None = None
    """Defaults of all other options as in GaLore's C4 experiments with this model; what is given
    beside it goes before."""
    preset: Preset = "nano"
    """Size of the model: tiny (tests), nano (a CPU), deep (nano with twice the blocks), or GaLore's
    60m, 130m, 350m, 1b."""
    vocab_size: int | None = None
    """Tokens in the vocabulary, when the tokenizer is trained here. None: the preset's."""
    seq_len: int | None = None
    """Tokens in one training window. None: the preset's."""

    corpus: tuple[str, ...] = ("stdlib",)
    """What to read: stdlib (Python's own library), local text, .jsonl, .parquet or .arrow files or
    directories of them, or a Hugging Face data set such as allenai/c4:en, streamed."""
    text_field: str = "text"
    """Column that holds the text in .jsonl, .parquet, .arrow and Hugging Face data."""
    tokenizer: str | None = None
    """A tokenizer.json to load. None: train a byte-level BPE on the training documents."""
    tokenizer_chars: int = 20_000_000
    """Characters of training text that the tokenizer is trained on, at most."""
    max_tokens: int = 100_000_000
    """Training tokens to take from the corpus, at most; a run that needs more repeats them."""
    validation_fraction: float = 0.05
    """Share of the documents held out for validation, chosen by a hash of their text."""
    cache_dir: str | None = None
    """Where tokenizers and token files are kept. None: $XDG_CACHE_HOME/gum_optax or
    ~/.cache/gum_optax."""


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
    | {"checkpoint_every", "keep_checkpoints", "mesh", "recipe"}
    | {"export", "eval_batch_size", "shown", "baseline"}
)

# Checked wherever a configuration has them.
_COUNTS = ("vocab_size", "seq_len", "tokenizer_chars", "max_tokens", "steps", "batch_size")
_COUNTS += ("accumulate", "train_examples", "eval_examples", "eval_batch_size")
_PERIODS = ("period", "log_every", "validate_every", "checkpoint_every")
_AMOUNTS = ("rank", "validation_batches", "keep_checkpoints")
_RATES = ("learning_rate", "fallback_learning_rate", "consistent_rms", "residual_scale")
_PENALTIES = ("seed", "draw_seed", "full_rank_layers", "weight_decay", "clip_norm", "shown")
_PENALTIES += ("residual_decay",)
_SHARES = ("warmup", "final_learning_rate", "golore_switch")
# Variants of some optimizers, and those that have them.
_OURS = ("gum", "unbiased_adamw", "joint_muon")
_USERS = {
    "projector": (*_OURS, "galore", "galore_muon", "fira", "frugal"),
    "sampler": ("gum",),
    "restart": _OURS,
    "residual": ("gum", "unbiased_adamw"),
    "residual_scale": _OURS,
    "residual_decay": ("gum", "unbiased_adamw"),
    "momentum": ("gum", "muon"),
}


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def choose(field: str, value: str, names: Iterable[str]) -> str:
    """Returns `value` if it is one of `names`; raises `ConfigError` with a suggestion if not."""
    names = list(names)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    raise ConfigError(f"{flag(field)}: there is no {value!r}; {hint}")


def make_directory(field: str, path: Path) -> None:
    """Makes a directory with its parents; raises `ConfigError` if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag(field)}: cannot make {path}: {error.strerror}") from error


def check(config: Training) -> None:
    """Raises `ConfigError` naming the first field whose value cannot work."""

    def demand(fields: Iterable[str], holds: Callable[[Any], bool], reason: str) -> None:
        for field in fields:
            value = getattr(config, field, None)
            if value is not None and not holds(value):
                raise ConfigError(f"{flag(field)} is {value}; it must be {reason}")

    demand(_COUNTS + _PERIODS + _AMOUNTS, lambda value: value >= 1, "at least 1")
    demand(_RATES, lambda value: 0 < value < float("inf"), "positive and finite")
    demand(_PENALTIES, lambda value: 0 <= value < float("inf"), "zero or more, and finite")
    demand(_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1")
    demand(("validation_fraction",), lambda value: 0 < value < 1, "above 0 and below 1")
    demand(("b2",), lambda value: 0 <= value < 1, "at least 0 and below 1")
    for field, users in _USERS.items():
        unset = getattr(config, field) == getattr(Training, field)
        if not unset and config.optimizer not in users:
            raise ConfigError(f"{flag(field)} has no effect on {config.optimizer}")
    if config.gradients == "compressed" and config.optimizer in NOT_COMPRESSED:
        raise ConfigError(
            f"{flag('gradients')} is compressed; {config.optimizer} needs whole gradients"
        )
    demand(("corpus",), lambda value: len(value) > 0, "at least one file, directory or data set")
    divides = f"a divisor of --batch-size, {config.batch_size}"
    demand(("accumulate",), lambda value: config.batch_size % value == 0, divides)


def first_difference(old: dict, config: Training) -> str | None:
    """The first field, not free on resume, whose value in `old` differs from `config`'s."""
    new = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = (k for k in new if k not in FREE_ON_RESUME and old.get(k, new[k]) != new[k])
    return next(changed, None)
