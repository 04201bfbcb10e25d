"""Many small steps under jit, watched for what grows: `python -m experiments.reliability.soak`."""

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments import reporting
from experiments.trainer import cli

PROGRAM = "experiments.reliability.soak"


@dataclasses.dataclass(frozen=True)
class Config:
    """Take many steps of a small regression with GUM, and watch memory, compilations and NaN."""

    steps: int = 20_000
    """Steps."""
    period: int = 20
    """Steps between refreshes: few, so that there are many refreshes."""
    rank: int = 4
    """Rank of the projection."""
    samples: int = 100
    """How often the process's memory is read."""
    out: Path = Path("experiments/results/soak.json")
    """Result file."""


def main(arguments: Sequence[str]) -> int:
    """Prints and writes what was seen; exit code 1 if something grew or broke."""
    config = cli.parse(Config, PROGRAM, arguments)
    result = reporting.write(config.out, config, **soak(config))
    print(
        f"{config.steps} steps in {result['seconds']} s: {result['compilations']} compilation, "
        f"state bytes {result['state bytes']}, {result['steps not finite']} steps not finite, "
        f"resident memory {result['kilobytes per 1000 steps']:+.1f} kB per 1000 steps"
    )
    return 0 if is_steady(result) else 1


def soak(config: Config) -> dict:
    """Takes the steps; returns what was counted and measured."""
    loss = partial(_loss, target=_parameters(seed=1))
    compression = gum_optax.LowRank(
        config.rank, config.period, residual=gum_optax.residuals.sampled(1)
    )
    optimizer = gum_optax.gum(0.01, compression)
    params = _parameters(seed=0)
    state = optimizer.init(params)

    traces = []

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, seed):
        traces.append(seed)
        value, gradients = jax.value_and_grad(loss)(params, jax.random.key(seed))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    began, every = time.perf_counter(), max(config.steps // config.samples, 1)
    sizes, memory, losses, broken = set(), [], [], 0
    for number in range(config.steps):
        params, state, value = step(params, state, np.uint32(number))
        if (number + 1) % every == 0:
            losses.append(float(value))
            broken += not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
            sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            memory.append((number + 1, resident_kilobytes(), len(jax.live_arrays())))
    return {
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
    """Squared distance to a target, with gradient noise."""

    def distance(leaf: jax.Array, goal: jax.Array) -> jax.Array:
        noise = 0.1 * jax.random.normal(key, leaf.shape)
        return jnp.sum((leaf - goal + noise) ** 2)

    return sum(jax.tree.leaves(jax.tree.map(distance, params, target)), jnp.zeros(()))


def _slope(memory: list[tuple[int, int, int]]) -> float:
    """Kilobytes per step, fitted to the second half: the first fills pools and caches."""
    steps, kilobytes, _ = np.array(memory[len(memory) // 2 :]).T
    return float(np.polyfit(steps, kilobytes, 1)[0])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
