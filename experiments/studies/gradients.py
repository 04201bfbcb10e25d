"""Gradients along a real run of GUM, with the bases on which it projects them.

All arrays are float64 NumPy, by kind of matrix (q, k, v, o, gate, up, down): an array `[N, m, n]`
holds the gradients of one kind in all N layers, transposed where needed so that m <= n.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import gum_optax
from experiments.data import tokens as data
from experiments.trainer import losses, pretraining
from experiments.trainer.config import Config
from experiments.trainer.methods import Gum, Refreshed
from experiments.trainer.options import ConfigError

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
# Embedding and head have a learning rate of their own: GUM's best one in the demo's section of
# LOG.md.
RUN = Config(optimizer=Gum(period=200), learning_rate=3e-3, fallback_learning_rate=1e-2)

ByKind = dict[str, np.ndarray]


class Moment(NamedTuple):
    """One step of a run.

    Attributes:
      step: its number, from 0.
      gradients: ``[N, m, n]``, of the step's own batch.
      bases: ``[N, m, r]``, used at this step, after its refresh if it has one.
      slots: ``[gamma, m, n]``, the momentum of the full-rank layers.
      others: gradients ``[N, m, n]`` of further batches at the same weights.
    """

    step: int
    gradients: ByKind
    bases: ByKind
    slots: ByKind
    others: list[ByKind]


def along(config: Config, steps: Collection[int], others: int = 0) -> Iterator[Moment]:
    """Trains with GUM and yields the moments at `steps`.

    Args:
      config: the run.
      steps: the numbers of the steps to yield; training ends at the last.
      others: how many further batches each moment has.
    """
    arch, tokens = pretraining.prepare(config)
    # The further batches are from the same text, in the order of another seed.
    batches, further = (
        data.training_batches(tokens, arch.seq_len, config.batch_size, seed)
        for seed in (config.seed, config.seed + 1)
    )
    static, state, step = pretraining.start(config, arch)
    gradient = jax.jit(jax.grad(losses.mean(partial(losses.of_windows, static))))
    for number in range(max(steps) + 1):
        batch = next(batches)
        wanted = [batch, *itertools.islice(further, others)] if number in steps else []
        # Gradients are taken at the weights before the step, bases from the state after it: a
        # refresh renews them before the step projects on them.
        found = [by_kind(gradient(state.params, each)) for each in wanted]
        state, _ = step(state, batch)
        if number in steps:
            low_rank = low_rank_state(state.opt_state)
            yield Moment(number, found[0], bases(low_rank), slots(low_rank), found[1:])


def period(run: Config) -> int:
    """Returns the number of steps between two refreshes of a run.

    Raises:
      ConfigError: its optimizer has no bases to refresh.
    """
    if not isinstance(run.optimizer, Refreshed):
        raise ConfigError(
            f"`optimizer` is {run.optimizer.name}, which has no bases to refresh; choose one that "
            "has, such as gum"
        )
    return run.optimizer.period


def since_refresh(config: Config, offsets: Sequence[int]) -> list[int]:
    """Returns the steps that are `offsets` after each refresh of a run, in order.

    Raises:
      ConfigError: a step would be in the next period, or the first is not the refresh.
    """
    refreshes = range(0, config.steps, period(config))
    if list(offsets) != sorted({0, *offsets}) or offsets[-1] >= period(config):
        raise ConfigError(
            f"`offsets` are {' '.join(map(str, offsets))}; they must start at 0, rise and stay "
            f"below the period of {period(config)}"
        )
    if refreshes[-1] + offsets[-1] >= config.steps:
        raise ConfigError(
            f"`steps` is {config.steps}, which ends before the last of `offsets` in the last "
            "period; a multiple of the period has them all"
        )
    return [refresh + offset for refresh in refreshes for offset in offsets]


def by_kind(grads: Any) -> ByKind:
    """Stacks the hidden matrices of a tree of a model's structure: by kind, ``[N, m, n]``."""
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = kind(jax.tree_util.keystr(path, simple=True, separator="/"))
        if name in KINDS:
            # Leaves come in the order of the layers.
            found.setdefault(name, []).append(wide(leaf))
    return {name: np.stack(matrices) for name, matrices in found.items()}


def bases(state: gum_optax.LowRankState) -> ByKind:
    """Returns the bases ``[N, m, r]`` in GUM's state, by kind."""
    return {kind(name): np.asarray(basis, np.float64) for name, basis in state.basis.items()}


def slots(state: gum_optax.LowRankState) -> ByKind:
    """Returns the momenta ``[gamma, m, n]`` of the slots in GUM's state; without slots, none."""
    momentum = optax.tree.get(state.inner, "trace")  # optax's name for momentum
    found = {kind(name): momentum[name].residual for name in state.slots}
    return {name: np.asarray(momenta, np.float64) for name, momenta in found.items()}


def best_bases(gradients: np.ndarray, rank: int) -> np.ndarray:
    """Returns the bases ``[..., m, r]`` of the smallest residual: leading left singular vectors."""
    return np.linalg.svd(gradients, full_matrices=False)[0][..., :rank]


def residual(gradients: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """Returns ``G - P P'G``, from gradients ``[..., m, n]`` and bases ``[..., m, r]``."""
    return gradients - bases @ (bases.mT @ gradients)


def squares(matrices: np.ndarray) -> np.ndarray:
    """Returns the squared Frobenius norm of each matrix: ``[..., m, n]`` to ``[...]``."""
    return np.sum(matrices**2, axis=(-2, -1))


def wide(matrix: Any) -> np.ndarray:
    """Returns the matrix in float64, transposed if it has more rows than columns."""
    matrix = np.asarray(matrix, np.float64)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def kind(path: str) -> str:
    """Returns the kind of a matrix (q, k, v, o, gate, up, down) from its path or group name."""
    # Paths join with slashes, group names with dots; both end with the kind and "kernel".
    found = re.fullmatch(r".*[/.](\w+)[/.]kernel", path)
    return found.group(1) if found else path


def low_rank_state(opt_state: Any) -> gum_optax.LowRankState:
    """Returns the one `LowRankState` within an optimizer state."""
    parts = jax.tree.leaves(opt_state, is_leaf=_is_low_rank)
    (state,) = filter(_is_low_rank, parts)
    return state


def _is_low_rank(part: Any) -> bool:
    return isinstance(part, gum_optax.LowRankState)
