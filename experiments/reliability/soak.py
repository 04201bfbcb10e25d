"""Many small steps under jit, watched for leaks: `python -m experiments.reliability.soak`.

A few optimizers, which together use all residual rules, carries, storages and fallbacks, take equal
shares of the steps. The gradients of the last one are compressed in the backward pass. Memory, the
state, compilations and NaN are watched.
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

    #: Steps of all optimizers together.
    steps: int = 90_000
    #: Steps between refreshes; few, so that there are many refreshes.
    period: int = 20
    #: Rank of the projection.
    rank: int = 4
    #: Number of times that memory is read and arrays are checked, for each optimizer.
    samples: int = 50
    #: Result file.
    out: Path = Path("experiments/results/soak.json")


def optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers by name; each residual rule, carry, storage and fallback is in one."""

    def part(**parts: Any) -> LowRank:
        return LowRank(config.rank, config.period, **parts)

    def lean(compression: LowRank, fallback: fallbacks.Fallback) -> optax.GradientTransformation:
        return gum_optax.gum(0.01, compression, fallback=fallback)

    columns = gum_optax.normalize_columns()
    galore = partial(gum_optax.galore, config.rank, config.period)
    return {
        # Blocks of 16 numbers in 8 bits, of 8 in 4: these small matrices have several of them.
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
        # First moments in 4 bits, second moments ("nu") in 8.
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
        # `smallest=0`: without it, arrays as small as these would stay in float32.
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
    """Runs all optimizers; prints and writes the results. Returns 1 if any is not steady."""
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
    """Takes one optimizer's share of the steps; returns counts and measurements.

    Args:
      config: the options.
      name: of the optimizer, a key of `optimizers`.
    """
    # 1. The model, its loss and the optimizer.
    known = optimizers(config)
    steps = -(-config.steps // len(known))
    # The optimizer that rounds weights at random has weights in bfloat16, all others in float32.
    rounded = "bfloat16, rounded" in name
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if rounded else leaf, _parameters(0)
    )
    loss = partial(_loss, target=_parameters(seed=1))
    optimizer = known[name]
    params, state = model, optimizer.init(model)
    gradients_of = _gradients_of(loss, optimizer, name == COMPRESSED)

    # 2. The step. Python runs its body only when it is traced, so the list counts compilations.
    traces = []

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, seed):
        traces.append(seed)
        value, gradients, state = gradients_of(params, state, jax.random.key(seed))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    # 3. The steps, and samples between them.
    began, every = time.perf_counter(), max(steps // config.samples, 1)
    sizes, memory, losses, broken = set(), [], [], 0
    for number in range(steps):
        params, state, value = step(params, state, np.uint32(number))
        if (number + 1) % every == 0:
            losses.append(float(value))
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
            broken += not all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves)
            sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            del leaves  # copies on the host must not count as memory of the process
            memory.append((number + 1, resident_kilobytes(), len(jax.live_arrays())))
    # 4. The results; sets have one element if nothing changed between samples.
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
    """Returns a function ``(params, state, key) -> (value, gradients, state)``.

    Gradients are full or compressed in the backward pass, which refreshes the bases before.
    """

    def plain(params, state, key):
        return *jax.value_and_grad(loss)(params, key), state

    def in_the_backward_pass(params, state, key):
        state = backward.refresh(loss, optimizer)(params, state, key)
        return *backward.value_and_grad(loss, optimizer)(params, state, key), state

    return in_the_backward_pass if compressed else plain


def is_steady(result: dict) -> bool:
    """Returns whether nothing grew, was compiled again or stopped being finite."""
    # One compilation, one size of the state, one number of live arrays.
    once = result["compilations"] == len(result["state bytes"]) == len(result["live arrays"]) == 1
    # The allocator's pages come and go: 50 kB per 1000 steps are allowed. A leak of one small array
    # in each step would be 100 kB or more.
    return once and not result["steps not finite"] and result["kilobytes per 1000 steps"] < 50


def resident_kilobytes() -> int:
    """Returns the resident memory of this process, in units of 1024 bytes."""
    # The second number of proc(5)'s statm: resident pages.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _parameters(seed: int) -> dict:
    """Draws a small model: four equal layers, a tall matrix, an embedding and a scale."""
    keys = jax.random.split(jax.random.key(seed), 6)
    layers = [{"w": jax.random.normal(key, (16, 24)) / 4} for key in keys[:4]]
    return {
        "layers": layers,
        "single": jax.random.normal(keys[4], (24, 16)) / 4,
        "embedding": jax.random.normal(keys[5], (8, 16)) / 4,
        "scale": jnp.full(16, 1 + seed, jnp.float32),
    }


def _loss(params: dict, key: jax.Array, target: dict) -> jax.Array:
    """Returns the squared distance of a model to a target.

    Matrices are compared in products with random inputs, so that their gradients come from dense
    products, with noise, as in a network. Vectors are compared directly.
    """

    def distance(leaf: jax.Array, goal: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.sum((leaf - goal) ** 2)
        # E |x W - x T|^2 over 16 inputs: the squared distance, with noise of the batch.
        x = jax.random.normal(key, (16, leaf.shape[0]), leaf.dtype)
        return jnp.mean((x @ leaf - x @ goal.astype(leaf.dtype)) ** 2) * leaf.shape[1]

    parts = jax.tree.leaves(jax.tree.map(distance, params, target))
    return sum((part.astype(jnp.float32) for part in parts), jnp.zeros(()))


def _slope(memory: list[tuple[int, int, int]]) -> float:
    """Fits kilobytes per step to the second half of samples; the first fills pools and caches."""
    steps, kilobytes, _ = np.array(memory[len(memory) // 2 :]).T
    return float(np.polyfit(steps, kilobytes, 1)[0])


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
