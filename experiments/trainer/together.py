"""Trains several runs in one program, vectorized over them: for small models on accelerators.

A small model leaves an accelerator idle: most of a step is the launch of a thousand small kernels.
Runs that differ only in numbers (learning rates, seed, size of the residual) or in their corpus
have one program, which `jax.vmap` maps over them. Each run has the losses it has alone, up to
rounding.

A *program* is such a set of runs. A *chunk* is the steps between two validations, one
`jax.lax.scan`. A *source* is a corpus in the order of a seed: runs with the same source share its
batches.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import tokens
from experiments.models import llama, presets
from experiments.trainer import checkpoints, loop, losses, optimizers, sweeps
from experiments.trainer.config import Config, change
from experiments.trainer.loop import State
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import prepare

# Options that may differ between the runs of a program, beside those that never change a loss.
NUMBERS = ("learning_rate", "fallback_learning_rate", "residual_scale", "seed", "corpus")

# From the last weights of a run to further fields of its entry.
Measure = Callable[[llama.Params], dict[str, Any]]


def complete(
    configs: Sequence[Config],
    out: Path,
    deadline: float | None = None,
    measure: Measure | None = None,
) -> list[sweeps.Entry]:
    """Trains with every configuration that `out` does not hold yet, like `sweeps.complete`.

    The file is rewritten after each program. A program that was stopped resumes from its last
    checkpoint.

    Args:
      configs: the configurations, in any order.
      out: the JSON file to read and to rewrite. Entries of other configurations stay in it.
      deadline: the time at which a program is saved, after its next validation.
      measure: makes further fields of an entry from the last weights of its run.

    Raises:
      OutOfTime: the deadline has passed; finished programs are in `out`.
    """
    entries, missing = sweeps.missing(configs, out)
    for program in programs(missing):
        for entry in train(program, deadline, measure):
            entries.append(entry)
            print(sweeps.summary(entry), flush=True)
        sweeps.write(out, entries)
    return sweeps.select(entries, configs)


def train(
    configs: Sequence[Config], deadline: float | None = None, measure: Measure | None = None
) -> list[sweeps.Entry]:
    """Trains with all configurations in one program; returns their entries for a result file.

    After a validation, a checkpoint is saved if the last one is `checkpoint_minutes` old.

    Args:
      configs: the configurations.
      deadline: the time at which to save and stop.
      measure: as in `complete`.

    Raises:
      ConfigError: the configurations differ in other options than `NUMBERS`, or an option cannot
        work.
      OutOfTime: the deadline has passed; the program is saved.
    """
    # 1. Check that one program serves all runs.
    first = configs[0]
    for config in configs:
        if _program(config) != _program(first):
            raise ConfigError(f"runs of one program may differ in {', '.join(NUMBERS)} alone")
    if first.mesh or first.weights != "float32" or first.accumulate > 1:
        raise ConfigError("`mesh`, `weights`, `accumulate`: not supported for runs of one program")
    # 2. Data, model and state. Every array of the state has a leading axis over runs, except counts
    #    of steps (see `_start`).
    arch, texts = _read(configs)
    static = jax.eval_shape(lambda: llama.create(arch, dtype=first.dtype, remat=first.remat))[0]
    loss = partial(losses.of_windows, static)
    state, steps = _start(configs, arch, loss)
    held_out = _held_out(first, arch, texts)  # [corpora, batches, windows, L + 1]
    corpus = np.asarray([list(texts).index(config.corpus) for config in configs])  # [runs]
    evaluate = jax.jit(lambda params: _validation(loss, params, held_out, corpus))

    # 3. Resume. A checkpoint also holds the validation curves and timings so far, as the entries
    #    are made from them at the end.
    home = _home(configs)
    saver, saved, done, positions = checkpoints.Checkpoints(home), time.monotonic(), 0, None
    curves: list[list] = [[] for _ in configs]
    seconds: list[float] = []  # per step, for each chunk but the first, which compiles
    if step := saver.latest():
        state, kept = saver.restore(step, state)
        done, positions, curves, seconds = step, kept["positions"], kept["curves"], kept["seconds"]
    # 4. Train chunk by chunk, and validate after each.
    compiled = False
    chunks = _chunks(configs, arch, texts, done, positions)
    for done, (windows, which), positions in _ahead(chunks):
        begin = time.perf_counter()
        state, trained = steps(state, windows, which)
        jax.block_until_ready(trained)
        took = (time.perf_counter() - begin) / len(windows)
        # A program of a single chunk has no other timing than that with compilation.
        if compiled or (done == first.steps and not seconds):
            seconds.append(took)
        compiled = True
        values = np.asarray(evaluate(state.params), np.float64)
        for curve, value in zip(curves, values, strict=True):
            curve.append([done, float(value)])
        print(
            f"{first.optimizer.name} x {len(configs)}: step {done}/{first.steps}, validation loss "
            f"{np.min(values):.3f} to {np.max(values):.3f}, {1e3 * took:.2f} ms a step",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        # A finished program is not saved: its entries are written next.
        over = sweeps.is_over(deadline)
        late = time.monotonic() - saved > 60 * first.checkpoint_minutes
        if (over or late) and done < first.steps:
            kept = {"positions": positions, "curves": curves, "seconds": seconds}
            saver.save(done, state, kept)
            saved = time.monotonic()
            if over:
                saver.close()
                raise sweeps.OutOfTime(
                    f"the time is up: step {done} is saved; the same command continues"
                )
    saver.close()
    shutil.rmtree(home.run_dir, ignore_errors=True)
    # 5. The entries. Bytes and numbers of weights are of one run, from shapes without the axis over
    #    runs.
    alone = jax.eval_shape(lambda state: jax.tree.map(lambda leaf: leaf[0], state.params), state)
    opt_state = jax.eval_shape(optimizers.build(first, arch.layers).init, alone)
    last = jax.device_get(state.params)
    measured = [
        measure(jax.tree.map(lambda leaf, i=i: leaf[i], last)) if measure else {}
        for i in range(len(configs))
    ]
    return [
        checkpoints.describe(config, texts[config.corpus].digest)
        | {
            "config": sweeps.identity(config),
            "validation_loss": curve[-1][1],
            "curve": curve,
            # Seconds of the whole program: a run has none of its own.
            "seconds_per_step": float(np.median(seconds)),
            "together": len(configs),
            "state_bytes": loop.state_bytes(opt_state),
            "parameters": llama.parameter_count(alone),
            "peak_bytes": loop.device_peak(),
        }
        | more
        for config, curve, more in zip(configs, curves, measured, strict=True)
    ]


def programs(configs: Sequence[Config]) -> list[list[Config]]:
    """Returns the configurations grouped by program, in the order of their first ones."""
    found: dict[str, list[Config]] = {}
    for config in configs:
        found.setdefault(_program(config), []).append(config)
    return list(found.values())


def _program(config: Config) -> str:
    """Returns the options that are equal in all runs of a program, as JSON."""
    same = {k: v for k, v in sweeps.identity(config).items() if k not in NUMBERS}
    return json.dumps(same, sort_keys=True)


def _home(configs: Sequence[Config]) -> Config:
    """Returns the first configuration with a directory for the checkpoints of this program."""
    # Its name depends on all configurations: with other runs the state has other shapes.
    every = json.dumps([sweeps.identity(config) for config in configs])
    digest = hashlib.blake2b(every.encode(), digest_size=4).hexdigest()
    directory = f"{configs[0].run_dir}-together-{digest}"
    return dataclasses.replace(configs[0], run_dir=directory, keep_checkpoints=1)


def _read(
    configs: Sequence[Config],
) -> tuple[presets.Architecture, dict[tuple[str, ...], tokens.Data]]:
    """Returns the shape of the model and the tokens of each corpus."""
    by_corpus = {config.corpus: prepare(config) for config in configs}
    shapes = {arch for arch, _ in by_corpus.values()}
    if len(shapes) > 1:
        sizes = sorted(arch.vocab_size for arch in shapes)
        raise ConfigError(f"`corpus`: the vocabularies have different sizes, {sizes}")
    return shapes.pop(), {corpus: tokens for corpus, (_, tokens) in by_corpus.items()}


def _start(configs: Sequence[Config], arch: presets.Architecture, loss: losses.Loss) -> tuple:
    """Returns the first state of all runs and the compiled steps of a chunk.

    The latter is `(state, windows, which) -> (state, losses)` with windows
    `int32[steps, sources, B, L + 1]`, `which` `int32[runs]`, the source of each run, and losses
    `[steps, runs]`.
    """
    # 1. Numbers that differ, as float32 arrays [runs]: traced, so that runs share a program.
    first = configs[0]
    numbers = {
        "learning_rate": [c.learning_rate for c in configs],
        "fallback_learning_rate": [
            c.learning_rate if c.fallback_learning_rate is None else c.fallback_learning_rate
            for c in configs
        ],
    }
    if hasattr(first.optimizer, "residual_scale"):
        numbers["residual_scale"] = [_of_optimizer(c, "residual_scale") for c in configs]
    numbers = {name: jnp.asarray(each, jnp.float32) for name, each in numbers.items()}
    drawing = hasattr(first.optimizer, "draw_seed")

    # 2. One run, with its numbers as scalars: the first state, and a step.
    def optimizer(numbers: dict[str, jax.Array], key: Any) -> optax.GradientTransformation:
        changed: Any = numbers | ({"draw_seed": key} if drawing else {})
        return optimizers.build(change(first, **changed), arch.layers)

    def init(numbers: dict[str, jax.Array], seed: Any, draws: jax.Array) -> State:
        params = llama.create(arch, dtype=first.dtype, seed=seed, remat=first.remat)[1]
        return State(params, optimizer(numbers, jax.random.key(draws)).init(params))

    gradients = jax.value_and_grad(losses.mean(loss))

    def step(numbers: dict[str, jax.Array], state: State, batch: jax.Array) -> tuple:
        value, grads = gradients(state.params, batch)
        # The state has the key of its draws, so the optimizer's own plays no part.
        updates, opt_state = optimizer(numbers, 0).update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt_state), value

    # 3. Map both over the runs.
    seeds = np.asarray([c.seed for c in configs])
    given = [_of_optimizer(c, "draw_seed") for c in configs]
    draws = [c.seed if seed is None else seed for c, seed in zip(configs, given, strict=True)]
    draws = np.asarray(draws)
    one = jax.eval_shape(init, jax.tree.map(lambda n: n[0], numbers), seeds[0], draws[0])
    # Counts of steps are equal in all runs and stay scalars. A condition on them, such as whether a
    # refresh is due, is then a branch; mapped over runs it would be a select that computes both.
    axes = jax.tree.map(_axis, one)
    state = jax.jit(jax.vmap(init, out_axes=axes))(numbers, seeds, draws)
    every = jax.vmap(step, in_axes=(0, axes, 0), out_axes=(axes, 0))

    # 4. Scan over the steps of a chunk.
    def chunk(state: State, windows: jax.Array, which: jax.Array) -> tuple[State, jax.Array]:
        # batch [sources, B, L + 1] -> batch[which] [runs, B, L + 1]
        return jax.lax.scan(
            lambda state, batch: every(numbers, state, batch[which]), state, windows
        )

    return state, jax.jit(chunk, donate_argnums=0)


def _of_optimizer(config: Config, name: str) -> Any:
    """Returns an option of the optimizer; None if it has no option of this name."""
    return getattr(config.optimizer, name, None)


def _axis(leaf: jax.ShapeDtypeStruct) -> int | None:
    """The axis over runs of a leaf of the state: none for a count of steps, an integer scalar."""
    return None if leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer) else 0


def _chunks(
    configs: Sequence[Config],
    arch: presets.Architecture,
    texts: dict[tuple[str, ...], tokens.Data],
    done: int = 0,
    positions: list[Any] | None = None,
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray], list[Any]]]:
    """Yields `(done, (windows, which), positions)` for each chunk.

    Args:
      configs: the configurations.
      arch: the shape of the model, for the length of windows.
      texts: the tokens of each corpus.
      done: steps done before the first chunk.
      positions: the positions of the sources after `done` steps. None: at their start.

    Yields:
      done: steps done after the chunk.
      windows: `int32[steps, sources, B, L + 1]`.
      which: `int[runs]`, the source of each run.
      positions: the positions of the sources after the chunk, from which another call goes on.
    """
    first = configs[0]
    sources = list(dict.fromkeys((c.corpus, c.seed) for c in configs))
    which = np.asarray([sources.index((c.corpus, c.seed)) for c in configs])
    streams = [
        tokens.training_batches(texts[corpus], arch.seq_len, first.batch_size, seed)
        for corpus, seed in sources
    ]
    for stream, position in zip(streams, positions or (), strict=positions is not None):
        stream.set_state(position)
    while done < first.steps:
        size = min(first.validate_every, first.steps - done)
        windows = np.stack([[next(stream) for stream in streams] for _ in range(size)])
        done += size
        yield done, (windows, which), [stream.get_state() for stream in streams]


def _ahead(chunks: Iterator[Any]) -> Iterator[Any]:
    """Yields the same chunks, each prepared in a thread while the one before is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


def _held_out(
    config: Config, arch: presets.Architecture, texts: dict[tuple[str, ...], tokens.Data]
) -> np.ndarray:
    """Returns held-out batches `int32[corpora, batches, B, L + 1]`, equally many of each corpus."""
    limit = config.validation_batches
    found = [
        tokens.validation_batches(text, arch.seq_len, config.batch_size, limit)
        for text in texts.values()
    ]
    return np.stack([each[: min(map(len, found))] for each in found])


def _validation(
    loss: losses.Loss, params: llama.Params, held_out: np.ndarray, corpus: np.ndarray
) -> jax.Array:
    """Returns the validation loss of each run, `float32[runs]`.

    Args:
      loss: from weights and a batch to a sum and a count.
      params: the weights, with a leading axis over runs.
      held_out: batches, `int32[corpora, batches, B, L + 1]`.
      corpus: the corpus of each run, `int[runs]`.
    """

    def one(params: llama.Params, batches: jax.Array) -> jax.Array:
        totals, counts = jax.lax.map(partial(loss, params), batches)
        return totals.sum() / counts.sum()

    return jax.vmap(one)(params, jnp.asarray(held_out)[corpus])
