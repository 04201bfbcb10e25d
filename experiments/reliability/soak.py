"""Many small steps under jit, watched for what grows: `python -m experiments.reliability.soak`.

Each of a few optimizers, which have all residual rules, carries, storages and fallbacks among them,
takes its share of the steps; the last one's gradients are compressed in the backward pass.
"""

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments import reporting
from experiments.trainer import cli
from gum_optax import LowRank, backward, carries, fallbacks, projectors, residuals, storages

PROGRAM = "experiments.reliability.soak"


@dataclasses.dataclass(frozen=True)
class Config:
    """Take many steps of a small model, and watch memory, compilations and NaN."""

    steps: int = 90_000
    """Steps, of all optimizers together."""
    period: int = 20
    """Steps between refreshes: few, so that there are many refreshes."""
    rank: int = 4
    """Rank of the projection."""
    samples: int = 50
    """How often the process's memory is read, for each optimizer."""
    out: Path = Path("experiments/results/soak.json")
    """Result file."""


def optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """By name, what is watched; every residual rule, carry, storage and fallback is in one."""

    def part(**parts: Any) -> LowRank:
        return LowRank(config.rank, config.period, **parts)

    def lean(compression: LowRank, fallback: fallbacks.Fallback) -> optax.GradientTransformation:
        return gum_optax.gum(0.01, compression, fallback=fallback)

    columns = gum_optax.normalize_columns()
    galore = partial(gum_optax.galore, config.rank, config.period)
    return {
        "gum": gum_optax.gum(0.01, part(residual=residuals.sampled(1))),
        "additive, undrawn through columns, in 8 bits": lean(
            part(
                residual=residuals.sampled(1, form="additive", undrawn=columns),
                carry=carries.keep,
                storage=storages.int8(16),
            ),
            fallbacks.adamw(storage=storages.int8(16)),
        ),
        "feedback, rotated, in bfloat16": lean(
            part(
                residual=residuals.feedback(0.5),
                carry=carries.rotate,
                storage=storages.cast("bfloat16"),
            ),
            fallbacks.columns(),
        ),
        "fira, in 4 bits": gum_optax.adamw(
            0.01,
            gum_optax.fira(
                config.rank,
                config.period,
                storage=storages.by_path(
                    lambda path: (
                        storages.int8(16) if storages.field("nu")(path) else storages.int4(8)
                    )
                ),
            ),
            fallback=fallbacks.factored(0.9),
        ),
        "a moving subspace, moments carried": gum_optax.adamw(
            0.01, galore(projector=projectors.grassmann(), carry=carries.projection_aware())
        ),
        "apollo, quantized as a whole": gum_optax.quantized(
            gum_optax.adamw(0.01, gum_optax.apollo(config.rank, config.period)), smallest=0
        ),
        "muon in 8 bits": gum_optax.muon(0.01, storages.int8(16), fallback=fallbacks.factored()),
        "gum, weights in bfloat16, rounded at random": gum_optax.stochastic_rounding(
            gum_optax.gum(0.01, part(residual=residuals.sampled(1)))
        ),
        COMPRESSED: gum_optax.gum(
            0.01, part(residual=residuals.sampled(1), storage=storages.int8(16))
        ),
    }


COMPRESSED = "gum on compressed gradients, in 8 bits"


def main(arguments: Sequence[str]) -> int:
    """Prints and writes what was seen; exit code 1 if something grew or broke."""
    config = cli.parse(Config, PROGRAM, arguments)
    runs = {name: soak(config, name) for name in optimizers(config)}
    reporting.write(config.out, config, steady=all(map(is_steady, runs.values())), runs=runs)
    for name, result in runs.items():
        print(
            f"{name}: {result['steps']} steps in {result['seconds']} s, "
            f"{result['compilations']} compilation, state bytes {result['state bytes']}, "
            f"{result['steps not finite']} steps not finite, "
            f"resident memory {result['kilobytes per 1000 steps']:+.1f} kB per 1000 steps"
        )
    return 0 if all(map(is_steady, runs.values())) else 1


def soak(config: Config, name: str = "gum") -> dict:
    """Takes one optimizer's share of the steps; returns what was counted and measured."""
    known = optimizers(config)
    steps = -(-config.steps // len(known))
    rounded = "bfloat16, rounded" in name
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if rounded else leaf, _parameters(0)
    )
    loss = partial(_loss, target=_parameters(seed=1))
    optimizer = known[name]
    params, state = model, optimizer.init(model)
    gradients_of = _gradients_of(loss, optimizer, name == COMPRESSED)

    traces = []

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, seed):
        traces.append(seed)
        value, gradients, state = gradients_of(params, state, jax.random.key(seed))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    began, every = time.perf_counter(), max(steps // config.samples, 1)
    sizes, memory, losses, broken = set(), [], [], 0
    for number in range(steps):
        params, state, value = step(params, state, np.uint32(number))
        if (number + 1) % every == 0:
            losses.append(float(value))
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
            broken += not all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves)
            sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            del leaves
            memory.append((number + 1, resident_kilobytes(), len(jax.live_arrays())))
    return {
        "steps": steps,
        "refreshes": -(-steps // config.period),
        "seconds": round(time.perf_counter() - began, 1),
        "compilations": len(traces),
        "state bytes": sorted(sizes),
        "steps not finite": broken,
        "loss, first and last sample": [losses[0], losses[-1]],
        "live arrays": sorted({arrays for *_, arrays in memory}),
        "resident kilobytes, first and last sample": [memory[0][1], memory[-1][1]],
        "kilobytes per 1000 steps": round(1000 * _slope(memory), 3),
        "peak resident kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _gradients_of(
    loss: Callable, optimizer: optax.GradientTransformation, compressed: bool
) -> Callable:
    """``(params, state, key) -> (value, gradients, state)``, in either way."""

    def plain(params, state, key):
        return *jax.value_and_grad(loss)(params, key), state

    def in_the_backward_pass(params, state, key):
        state = backward.refresh(loss, optimizer)(params, state, key)
        return *backward.value_and_grad(loss, optimizer)(params, state, key), state

    return in_the_backward_pass if compressed else plain


def is_steady(result: dict) -> bool:
    """Whether nothing grew, was compiled again or stopped being finite."""
    once = result["compilations"] == len(result["state bytes"]) == len(result["live arrays"]) == 1
    # Allocators give and take pages; a leak of one small array a step would be 100 kB or more.
    return once and not result["steps not finite"] and result["kilobytes per 1000 steps"] < 50


def resident_kilobytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _parameters(seed: int) -> dict:
    """Separate layers, stacked layers, and leaves of the fallback."""
    keys = jax.random.split(jax.random.key(seed), 6)
    layers = [{"w": jax.random.normal(key, (16, 24)) / 4} for key in keys[:4]]
    return {
        "layers": layers,
        "single": jax.random.normal(keys[4], (24, 16)) / 4,
        "embedding": jax.random.normal(keys[5], (8, 16)) / 4,
        "scale": jnp.full(16, 1 + seed, jnp.float32),
    }


def _loss(params: dict, key: jax.Array, target: dict) -> jax.Array:
    """Squared distance to a target, in products with random inputs and as it is.

    So that the gradients of matrices are those of dense products, with noise.
    """

    def distance(leaf: jax.Array, goal: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.sum((leaf - goal) ** 2)
        x = jax.random.normal(key, (16, leaf.shape[0]), leaf.dtype)
        return jnp.mean((x @ leaf - x @ goal.astype(leaf.dtype)) ** 2) * leaf.shape[1]

    parts = jax.tree.leaves(jax.tree.map(distance, params, target))
    return sum((part.astype(jnp.float32) for part in parts), jnp.zeros(()))


def _slope(memory: list[tuple[int, int, int]]) -> float:
    """Kilobytes per step, fitted to the second half: the first fills pools and caches."""
    steps, kilobytes, _ = np.array(memory[len(memory) // 2 :]).T
    return float(np.polyfit(steps, kilobytes, 1)[0])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
