"""The table of optimizers, and the way from options to the optimizer of a run.

Each optimizer is a dataclass of `methods` or `peers`; an entry in `OPTIMIZERS` gives it to command
lines, studies and tests.
"""

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax
import tyro

import gum_optax
from experiments.trainer import methods, peers, rounding
from experiments.trainer.methods import Gum, Optimizer, Transformation
from experiments.trainer.options import ConfigError, choose
from experiments.trainer.schedules import schedule

if TYPE_CHECKING:
    from experiments.trainer.config import Training

# In this order help texts list them.
OPTIMIZERS: dict[str, Optimizer] = {
    each.name: each
    for each in (
        Gum(),
        methods.AdamW(),
        methods.Muon(),
        peers.GaLore(),
        peers.GaLoreMuon(),
        peers.GoLore(),
        peers.GoLoreMuon(),
        methods.UnbiasedAdamW(),
        peers.Scale(),
        peers.Rmnp(),
        peers.NorMuon(),
        peers.Mud(),
        peers.Fira(),
        peers.Frugal(),
        peers.Apollo(),
        peers.ApolloMini(),
        peers.LDAdam(),
        peers.SubTrack(),
        peers.Swan(),
        peers.Racs(),
        peers.AdamMini(),
        peers.AdaLomo(),
        peers.MoFaSGD(),
        methods.JointMuon(),
        methods.RampedGum(),
    )
}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(OPTIMIZERS)]


def named(name: str, like: Optimizer | None = None) -> Optimizer:
    """Returns the optimizer of a name, with the options of `like` where it has the same ones.

    Only options that differ from the defaults of `like`'s own optimizer are taken over: the default
    of one optimizer says nothing about another.

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
    """Returns the same optimizer with other options.

    Raises:
      ConfigError: it has no such option.
    """
    own = {field.name for field in dataclasses.fields(optimizer)}
    if unknown := options.keys() - own:
        raise ConfigError(f"`{min(unknown)}` is no option of the optimizer {optimizer.name}")
    return dataclasses.replace(optimizer, **options)


def _given(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the options whose values differ from the defaults."""
    default = OPTIMIZERS[optimizer.name]
    names = (field.name for field in dataclasses.fields(optimizer))
    values = {name: getattr(optimizer, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


# The optimizer that `subcommands` takes defaults from. tyro calls `subcommands` without arguments
# while it parses, so the optimizer cannot be passed in.
_like: contextvars.ContextVar[Optimizer | None] = contextvars.ContextVar("like", default=None)


@contextlib.contextmanager
def defaults_like(optimizer: Optimizer) -> Iterator[None]:
    """A context in which command lines give all optimizers the options of `optimizer`."""
    before = _like.set(optimizer)
    try:
        yield
    finally:
        _like.reset(before)


def subcommands(like: Optimizer | None = None) -> Any:
    """Returns the union of all optimizers for tyro: on the command line `optimizer:adamw`."""
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
    """Returns the optimizer of a run: clipping, the run's optimizer and, last, rounding.

    Args:
      run: the options.
      layers: number of blocks of the model.
    """
    clip = optax.clip_by_global_norm(run.clip_norm) if run.clip_norm else optax.identity()
    optimizer = optax.chain(clip, run.optimizer.build(run, schedule(run), layers))
    # Outermost, as nothing may change the updates after it: they make the rounded sum exact.
    if run.weights == "bfloat16":
        return gum_optax.stochastic_rounding(optimizer, run.seed)
    if run.weights == "int8":
        return rounding.in_few_bits(optimizer, jax.random.key(run.seed))
    return optimizer
