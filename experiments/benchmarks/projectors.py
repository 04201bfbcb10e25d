"""How much of the gradient GUM's bases catch during a real run.

Each refresh starts from the basis of the one before, so what the projector does is seen only along
a run: at each refresh the energy that the new basis catches is divided by that of the best subspace
of the same rank.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import gum_optax
from experiments import data, model, record, tables, train
from experiments.benchmarks.settings import Config
from experiments.config import Config as Run

Captured = dict[str, np.ndarray]


def run(config: Config) -> None:
    """Trains, writes `projectors.json`, prints a table."""
    found = dict(refreshes(config))
    rows = [
        {"step": step, "matrix": _kind(name)} | _summary(values)
        for step, stacks in found.items()
        for name, values in stacks.items()
    ]
    together = [
        {"step": step} | _summary(np.concatenate(list(stacks.values())))
        for step, stacks in found.items()
    ]
    record.write(config.out / "projectors.json", config, by_step=together, by_matrix=rows)
    tables.show(
        "Captured energy over that of the best subspace",
        ("step", "least", "median", "matrices"),
        ((row["step"], row["min"], row["median"], row["matrices"]) for row in together),
    )


def refreshes(config: Config) -> Iterator[tuple[int, Captured]]:
    """Trains; yields the step and, by stack, each matrix's share at every refresh."""
    preset: Any = config.projector_preset
    settings = Run(
        preset=preset, optimizer="gum", steps=config.projector_steps, seed=config.seed,
        period=config.projector_period, rank=config.projector_rank,
        full_rank_layers=config.full_rank_layers, corpus=config.corpus, cache_dir=config.cache_dir,
    )  # fmt: skip
    arch = model.architecture(settings)
    tokens = data.prepare(settings, arch.vocab_size)
    batches = data.training_batches(tokens, arch.seq_len, settings.batch_size, settings.seed)
    static, state, step = train.start(settings, arch)
    gradient = jax.jit(jax.grad(partial(model.loss, static)))
    for number in range(settings.steps + 1):
        batch = next(batches)
        due = number % settings.period == 0
        grads = gradient(state.params, batch) if due else None
        state, _ = step(state, batch)
        if due:
            yield number, captured(grads, bases(state.opt_state))


def captured(grads: Any, bases: dict[str, jax.Array]) -> Captured:
    """By stack, ||P'G||^2 of each matrix over that of the best subspace of its rank."""
    matrices: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matrices.setdefault(gum_optax.by_role(name, leaf), []).append(leaf)
    return {
        name: np.array([share(G, P) for G, P in zip(matrices[name], basis, strict=True)])
        for name, basis in bases.items()
    }


def share(gradient: Any, basis: Any) -> float:
    """||P'G||^2 over the sum of the largest eigenvalues of G G', in float64."""
    G, P = np.asarray(gradient, np.float64), np.asarray(basis, np.float64)
    G = G.T if G.shape[0] > G.shape[1] else G
    best = np.linalg.eigvalsh(G @ G.T)[-P.shape[1] :].sum()
    return float(np.sum((P.T @ G) ** 2) / best)


def bases(opt_state: Any) -> dict[str, jax.Array]:
    """The bases in the state of `gum`, by stack."""
    parts = jax.tree.leaves(opt_state, is_leaf=_is_engine)
    (engine,) = filter(_is_engine, parts)
    return engine.basis


def _is_engine(part: Any) -> bool:
    return isinstance(part, gum_optax.LowRankState)


def _summary(values: np.ndarray) -> dict[str, Any]:
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "matrices": len(values),
    }


def _kind(stack: str) -> str:
    """The kind of a stack's matrices: q, k, v, o, gate, up or down."""
    kind = re.fullmatch(r".*/(\w+)/kernel", stack)
    return kind.group(1) if kind else stack
