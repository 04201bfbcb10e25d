"""The measurements of one process, on any device, for `experiments.accelerator`.

`python -m experiments.benchmarks.device KIND JSON` runs the job KIND with the options in the JSON
object, and prints its results with a description of the device as the last line. Each job has a
process of its own, so that the peak of memory is its own and a crash does not end other jobs.
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
from experiments.trainer.methods import Gum

_STEPS = 5  # steps of the comparison with the CPU; at a period of 3, steps 0 and 3 are refreshes
_PERIOD = 2  # period of timed updates: even steps are refreshes, odd ones plain


def correctness(optimizer: str, layers: int = 4, rank: int = 16, seed: int = 0) -> dict[str, Any]:
    """Compares an optimizer's updates on this device with the same updates on the CPU.

    Both devices take the same five gradients, over two refreshes.

    Args:
      optimizer: its name in `experiments.trainer.optimizers`.
      layers: the number of layers of nano's parameters.
      rank: of the projection.
      seed: of parameters, gradients and draws.

    Returns:
      ``relative_difference``: ``|U - U'| / |U'|`` of the last updates, U' on the CPU, the maximum
      over leaves.
    """
    chosen = optimizers.named(optimizer, Gum(rank=rank, period=3))
    tx = optimizers.build(Config(optimizer=chosen, steps=100, seed=seed), layers)
    tree = parameters.depth(layers, "nano")
    generator = np.random.default_rng(seed)

    # 1. Parameters and gradients are made on the host, the same bits for both devices.
    def draw() -> Any:
        return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tree)

    params, gradients = draw(), [draw() for _ in range(_STEPS)]

    # 2. All steps on one device.
    def updates_on(device: Any) -> Any:
        with jax.default_device(device):
            held = jax.device_put(params, device)
            state, update = jax.jit(tx.init)(held), jax.jit(tx.update)
            updates: Any = None
            for each in gradients:
                updates, state = update(jax.device_put(each, device), state, held)
            return jax.device_get(updates)

    # 3. Compare leaf by leaf. The floor of the norm is for updates that are zero on both.
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
    """Measures seconds and bytes of a contender's update of a preset's parameters.

    Args:
      contender: a name in `contenders.TABLE` or `contenders.VARIANTS`.
      preset: whose parameters are updated.
      rank: of the projection.
      full_rank_layers: gamma.
      period: steps over which the cost of a refresh is spread.
      repeats: the maximum number of timed plain steps and refreshes.
      seconds: after which no further repetition begins.
      seed: of parameters and gradients.

    Returns:
      Medians in seconds, and sizes in bytes; ``program_bytes`` by XLA, ``peak_bytes`` by the
      device.
    """
    tx = _contender(contender, rank, full_rank_layers)
    tree = parameters.separate(preset)
    # 1. Parameters, gradients, state and the compiled step.
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

    # 2. Two steps to warm up, one of each kind. Then refreshes and plain steps alternate.
    for _ in range(_PERIOD):
        timed()
    refresh, plain, begun = [], [], time.perf_counter()
    while len(plain) < repeats and (not plain or time.perf_counter() - begun < seconds):
        refresh.append(timed())
        plain.append(timed())
    # 3. One step in `period` is a refresh: mean = plain + (refresh - plain) / period.
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
    """Measures whole training steps on random tokens, as `experiments.benchmarks.training` does."""
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
    """Pretrains a preset on text; returns its curve of validation losses, seconds and bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Config(optimizer=Gum(rank=rank, period=200), fallback_learning_rate=3e-3)
        # Five validations along the run, one checkpoint at its end.
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
    """Runs the job `kind` with options in JSON, and prints its results in JSON."""
    found = JOBS[kind](**json.loads(options))
    print(json.dumps({"found": found, "device": reporting.device()}))


def _contender(name: str, rank: int, full_rank_layers: int) -> optax.GradientTransformation:
    # A name may be in either table; the methods of the frontier take separate leaves only.
    if name in contenders.VARIANTS:
        return contenders.VARIANTS[name](rank, full_rank_layers, _PERIOD)
    tx = contenders.TABLE[name](rank, full_rank_layers, _PERIOD, "separate")
    assert tx is not None  # every contender takes separate leaves
    return tx


def _random(tree: Any, key: jax.Array) -> Any:
    """Draws Gaussian arrays on the device: a billion numbers from the host take a minute."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return structure.unflatten(drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
