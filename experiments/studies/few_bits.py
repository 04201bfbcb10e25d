"""Errors of momentum in few bits, and of NS(momentum): `python -m experiments.studies.few_bits`.

The gradients are from a run of GUM. Beside the run, every storage keeps two momenta of its own, a
full-rank one and one of the projected gradients, both rounded at every step as in training:

    M <- beta unpack(pack(M)) + G,        R <- beta unpack(pack(R)) + P'G

At some steps they are compared with momentum in float32, by the relative errors of M, of the update
NS(M), and of R and NS(R). Does 4-bit momentum need its leading subspace protected, as GRASP claims?
*protected* keeps the leading directions U of each matrix, an eighth of them, in 8 bits, and the
part outside of them in 4:

    M = U (U'M) + (M - U U'M)
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gum_optax
from experiments import reporting
from experiments.data import tokens as data
from experiments.studies import gradients
from experiments.trainer import cli, losses, low_bits, pretraining
from experiments.trainer.config import Config as Run
from gum_optax import storages

PROGRAM = "experiments.studies.few_bits"
BETA = 0.95
SHARE = 8  # one in so many directions of a matrix is protected

Rounding = Callable[[jax.Array], jax.Array]
_MEASURED = ("M", "NS(M)", "R", "NS(R)")  # as above: momenta and their polar factors


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the errors of momentum, and of its polar factor, from rounding at every step."""

    #: Steps between two measurements.
    every: int = 40
    #: Result file.
    out: Path = Path("experiments/results/studies/few_bits.json")
    #: The run, as in experiments.pretrain.
    base: Run = dataclasses.field(
        default_factory=lambda: dataclasses.replace(gradients.RUN, steps=161)
    )


def through(storage: storages.Storage) -> Rounding:
    """Returns the rounding of a storage: pack an array and unpack it, as between two steps."""

    def rounded(array: jax.Array) -> jax.Array:
        return storage.unpack(storage.pack(array), array)

    return rounded


def protected(array: jax.Array) -> jax.Array:
    """Rounds matrices ``[N, m, n]``, m <= n: leading directions to 8 bits, all others to 4."""
    # U: the leading eigenvectors of M M', which `eigh` returns last.
    count = max(1, array.shape[-2] // SHARE)
    directions = jnp.linalg.eigh(array @ array.mT)[1][..., -count:]  # [N, m, count]
    inside = directions.mT @ array  # U'M: [N, count, n]
    outside = array - directions @ inside  # M - U U'M: [N, m, n]
    return directions @ through(storages.int8())(inside) + through(storages.int4())(outside)


ROUNDINGS: dict[str, Rounding] = {
    "float32": lambda array: array,
    "int8": through(storages.int8()),
    "int4": through(storages.int4()),
    "int4, protected": protected,
    "rows of 4 bits": through(low_bits.STORAGES["rows4"]),
}


def main(arguments: Sequence[str]) -> int:
    """Trains and measures, prints a table, writes results; returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    rows = []
    for row in measured(config):
        rows.append(row)
        print(f"step {row['step']}", file=sys.stderr, flush=True)
        reporting.write(config.out, config, rows=rows)
    last = rows[-1]
    reporting.table(
        f"Relative errors at step {last['step']}, mean over all matrices",
        ("storage", *_MEASURED),
        (
            (name, *(last["errors"][name][each] for each in _MEASURED))
            for name in ROUNDINGS
            if name != "float32"
        ),
    )
    print(f"\nresults: {config.out}")
    return 0


def measured(config: Config) -> Iterator[dict[str, Any]]:
    """Trains, and yields the step and its errors every `every` steps."""
    run = config.base
    arch, tokens = pretraining.prepare(run)
    batches = data.training_batches(tokens, arch.seq_len, run.batch_size, run.seed)
    static, state, step = pretraining.start(run, arch)
    gradient = jax.jit(jax.grad(losses.mean(partial(losses.of_windows, static))))
    momenta: Any = None
    for number in range(run.steps):
        batch = next(batches)
        # 1. The gradient before the step, then the step of the run itself.
        wide = gradients.by_kind(gradient(state.params, batch))
        state, _ = step(state, batch)
        # 2. The state after the step holds the bases that it used, which a refresh has renewed. R
        # starts anew with them.
        bases = gradients.bases(gradients.low_rank_state(state.opt_state))
        found = {
            "full": _float32(wide),
            "low": _float32({k: bases[k].swapaxes(-1, -2) @ wide[k] for k in bases}),
        }
        # 3. One step of every storage's momenta, from the same gradients.
        if momenta is None:
            momenta = {name: jax.tree.map(jnp.zeros_like, found) for name in ROUNDINGS}
        momenta = _next(momenta, found, number % gradients.period(run) == 0)
        if number % config.every == 0 and number:
            yield {"step": number, "errors": jax.tree.map(float, _errors(momenta))}


def _float32(tree: gradients.ByKind) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in tree.items()}


@jax.jit
def _next(momenta: Any, found: Any, refresh: Any) -> Any:
    """Updates every momentum; the result is compared before it is packed, as updates use it."""

    def one(name: str, part: str, old: jax.Array, gradient: jax.Array) -> jax.Array:
        # M <- beta unpack(pack(M)) + G; R forgets its past at a refresh.
        kept = BETA * ROUNDINGS[name](old)
        return gradient + (jnp.where(refresh, 0, kept) if part == "low" else kept)

    return {
        name: {
            part: jax.tree.map(partial(one, name, part), momenta[name][part], found[part])
            for part in found
        }
        for name in momenta
    }


@jax.jit
def _errors(momenta: Any) -> dict[str, dict[str, jax.Array]]:
    """Returns by storage the relative errors of M, NS(M), R and NS(R)."""

    def relative(some: jax.Array, exact: jax.Array) -> jax.Array:
        norm = partial(jnp.linalg.norm, axis=(-2, -1))  # [N, m, n] -> [N]
        return norm(some - exact) / norm(exact)

    def mean(function: Callable[..., jax.Array], some: Any, exact: Any) -> jax.Array:
        # Over all matrices alike, so kinds with more matrices count more.
        pairs = zip(jax.tree.leaves(some), jax.tree.leaves(exact), strict=True)
        return jnp.concatenate([relative(function(a), function(b)) for a, b in pairs]).mean()

    polar = gum_optax.newton_schulz
    exact = momenta["float32"]
    return {
        name: {
            "M": mean(lambda x: x, each["full"], exact["full"]),
            "NS(M)": mean(polar, each["full"], exact["full"]),
            "R": mean(lambda x: x, each["low"], exact["low"]),
            "NS(R)": mean(polar, each["low"], exact["low"]),
        }
        for name, each in momenta.items()
    }


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
