"""What one process measures on whatever device it finds, for `experiments.accelerator`.

`python -m experiments.benchmarks.device KIND JSON` runs the job KIND with the options that the JSON
object holds, and prints what it found, with a description of the device, as the last line. Each job
has a process of its own: the peak of memory is then its own, and a crash ends no other job.
"""

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments import reporting
from experiments.benchmarks import contenders, parameters, training
from experiments.benchmarks.step import jitted
from experiments.trainer import loop, optimizers, pretraining
from experiments.trainer.config import Config, change
from experiments.trainer.optimizers import Gum

_STEPS = 5  # of the comparison with the CPU: with a period of 3, two refreshes among them
_PERIOD = 2  # of timed updates: every even step is a refresh, every odd one plain


def correctness(optimizer: str, layers: int = 4, rank: int = 16, seed: int = 0) -> dict[str, Any]:
    """How far an optimizer's updates on this device are from those on the CPU.

    Both take the same five gradients, over two refreshes. The distance is |U - U'| / |U'| of the
    last updates, the largest over the leaves.
    """
    chosen = optimizers.named(optimizer, Gum(rank=rank, period=3))
    tx = optimizers.build(Config(optimizer=chosen, steps=100, seed=seed), layers)
    tree = parameters.depth(layers, "nano")
    generator = np.random.default_rng(seed)

    def draw() -> Any:
        return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tree)

    params, gradients = draw(), [draw() for _ in range(_STEPS)]

    def updates_on(device: Any) -> Any:
        with jax.default_device(device):
            held = jax.device_put(params, device)
            state, update = jax.jit(tx.init)(held), jax.jit(tx.update)
            updates: Any = None
            for each in gradients:
                updates, state = update(jax.device_put(each, device), state, held)
            return jax.device_get(updates)

    ours, theirs = updates_on(jax.devices()[0]), updates_on(jax.devices("cpu")[0])
    apart = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)), ours, theirs
    )
    return {"relative_difference": max(jax.tree.leaves(apart))}


def update(
    contender: str,
    preset: str,
    rank: int,
    full_rank_layers: int,
    period: int,
    repeats: int,
    seconds: float = 30.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds and bytes of a contender's update of a preset's parameters.

    Args:
      contender: a name in `contenders.TABLE` or `contenders.VARIANTS`.
      preset: whose parameters are updated.
      rank: of the projection.
      full_rank_layers: gamma.
      period: steps over which the cost of a refresh is spread.
      repeats: how often a plain step and a refresh are timed, at most.
      seconds: after which no further repetition begins.
      seed: of parameters and gradients.
    """
    tx = _contender(contender, rank, full_rank_layers)
    tree = parameters.separate(preset)
    random = jax.jit(functools.partial(_random, tree))
    params, gradients = random(jax.random.key(seed)), random(jax.random.key(seed + 1))
    state = jax.jit(tx.init)(params)
    held = parameters.size(state)
    began = time.perf_counter()
    step = jitted(tx).lower(params, state, gradients).compile()
    compiling = time.perf_counter() - began

    def timed() -> float:
        nonlocal params, state
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, gradients))
        return time.perf_counter() - start

    # The first two set up what later steps find; then refreshes and plain steps alternate.
    for _ in range(_PERIOD):
        timed()
    refresh, plain, begun = [], [], time.perf_counter()
    while len(plain) < repeats and (not plain or time.perf_counter() - begun < seconds):
        refresh.append(timed())
        plain.append(timed())
    ordinary, renewed = statistics.median(plain), statistics.median(refresh)
    return {
        "plain_seconds": ordinary,
        "refresh_seconds": renewed,
        "amortized_seconds": ordinary + (renewed - ordinary) / period,
        "repeats": len(plain),
        "compile_seconds": compiling,
        "parameter_bytes": parameters.size(tree),
        "state_bytes": held,
        "program_bytes": training.program_bytes(step),
        "peak_bytes": loop.device_peak(),
    }


def step(optimizer: str, preset: str, batch_size: int, rank: int, steps: int) -> dict[str, Any]:
    """What whole training steps on random tokens cost, as `experiments.benchmarks` counts them."""
    worker = training.Worker(
        optimizer=optimizer, preset=preset, batch_size=batch_size, rank=rank, steps=steps
    )
    return training.measure(worker)


def pretrain(
    options: dict[str, Any],
    preset: str,
    batch_size: int,
    rank: int,
    steps: int,
    dtype: str,
    corpus: Sequence[str],
    cache_dir: str | None,
) -> dict[str, Any]:
    """Pretrains a preset on text for so many steps; returns the curve of its validation loss."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Config(optimizer=Gum(rank=rank, period=200), fallback_learning_rate=3e-3)
        config = change(
            base, **options, preset=preset, batch_size=batch_size, steps=steps, dtype=dtype,
            corpus=tuple(corpus), cache_dir=cache_dir, run_dir=f"{scratch}/run",
            validate_every=max(steps // 5, 1), validation_batches=8, checkpoint_every=steps,
            tokenizer_chars=5_000_000,
        )  # fmt: skip
        result = pretraining.train(config, show=False)
    return {
        "validation_loss": result.validation_loss,
        "curve": [
            [record["step"], record["validation_loss"]]
            for record in result.metrics
            if "validation_loss" in record
        ],
        "seconds_per_step": result.seconds_per_step,
        "state_bytes": result.state_bytes,
        "peak_bytes": result.peak_bytes,
    }


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "correctness": correctness,
    "update": update,
    "step": step,
    "pretrain": pretrain,
}


def main(kind: str, options: str) -> None:
    """Runs a job and prints what it found."""
    found = JOBS[kind](**json.loads(options))
    print(json.dumps({"found": found, "device": reporting.device()}))


def _contender(name: str, rank: int, full_rank_layers: int) -> optax.GradientTransformation:
    if name in contenders.VARIANTS:
        return contenders.VARIANTS[name](rank, full_rank_layers, _PERIOD)
    tx = contenders.TABLE[name](rank, full_rank_layers, _PERIOD, "separate")
    assert tx is not None  # every contender takes separate leaves
    return tx


def _random(tree: Any, key: jax.Array) -> Any:
    """Gaussian arrays, made on the device: from the host, a billion of them take a minute."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return structure.unflatten(drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
