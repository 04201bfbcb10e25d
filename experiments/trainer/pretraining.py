"""Pretraining: `train(config)` prepares text and model, and hands them to the loop.

The parts are public, since studies and benchmarks put them together in other ways: `prepare` makes
the tokens, `architecture` the shape of the model, `start` the first state and the compiled step.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from experiments.data import tokens as data
from experiments.models import llama
from experiments.models.presets import PRESETS, Architecture
from experiments.trainer import checkpoints, locks, loop, losses, processes
from experiments.trainer import mesh as meshes
from experiments.trainer.config import Config
from experiments.trainer.loop import Result, State
from experiments.trainer.options import choose


def train(config: Config, *, show: bool = True) -> Result:
    """Trains from scratch or, with `config.resume`, from the last checkpoint.

    SIGINT and SIGTERM end the run after the current step, with a checkpoint.

    Args:
      config: all options of the run.
      show: whether to print a progress bar and messages.

    Raises:
      ConfigError: an option cannot work; the message is one line.
    """
    mesh = meshes.build(config.mesh)
    with meshes.use(mesh), locks.of_run(config):
        return _train(config, mesh, show)


def _train(config: Config, mesh: Mesh | None, show: bool) -> Result:
    # 1. Refuse a batch or a directory that cannot be used before any text is prepared.
    rows = meshes.rows(mesh, config.batch_size, config.accumulate)
    checkpoints.check_run_directory(config)
    # 2. Tokens, and batches of them. This process reads the rows that its devices hold.
    arch, tokens = prepare(config)
    material = loop.Material(
        batches=data.training_batches(
            tokens, arch.seq_len, config.batch_size, config.seed, rows
        ),
        held_out=data.validation_batches(
            tokens, arch.seq_len, config.batch_size, config.validation_batches, rows
        ),
        tokens=config.batch_size * arch.seq_len,
        digest=tokens.digest,
    )  # fmt: skip
    # 3. Note the run, or check the one that is resumed; then make the model and train.
    loop.begin(config, tokens.digest, f"the text of {' '.join(config.corpus)}")
    static, state, step_fn = start(config, arch, mesh)
    return loop.run(
        config,
        material,
        partial(losses.of_windows, static),
        state,
        step_fn,
        mesh=mesh,
        introduction=_introduction(config, arch, tokens, state, mesh),
        show=show,
    )


def architecture(config: Config) -> Architecture:
    """Returns the preset of `config`, with the vocabulary and window length that it gives."""
    preset = PRESETS[choose("preset", config.preset, PRESETS)]
    return dataclasses.replace(
        preset,
        vocab_size=config.vocab_size or preset.vocab_size,
        seq_len=config.seq_len or preset.seq_len,
    )


def prepare(config: Config) -> tuple[Architecture, data.Data]:
    """Returns the shape of the model and the tokens of a run.

    The vocabulary of the model is the tokenizer's, which may be smaller than was asked for if there
    is little text.
    """
    arch = architecture(config)
    tokens = processes.in_turn(lambda: data.prepare(config, arch.vocab_size))
    return dataclasses.replace(arch, vocab_size=tokens.tokenizer.get_vocab_size()), tokens


def start(
    config: Config, arch: Architecture, mesh: Mesh | None = None
) -> tuple[Any, State, Callable]:
    """Returns the static model, the first state and the compiled step.

    Args:
      config: the run.
      arch: the shape of the model, from `prepare`.
      mesh: the devices, if there are several.

    Returns:
      The static part of the model, the first state, and `(state, batch) -> (state, metrics)` for
      batches `int32[B, L + 1]`.
    """

    def create() -> tuple[Any, llama.Params]:
        static, params = llama.create(
            arch, dtype=config.dtype, seed=config.seed, remat=config.remat
        )  # fmt: skip
        cast: Any = optax.tree.cast(params, config.stored)
        return static, cast

    def place(shardings: Any) -> llama.Params:
        if shardings is None:
            return create()[1]
        # Compiled with output shardings: each device makes its part, and none holds all weights.
        return jax.jit(lambda: create()[1], out_shardings=shardings)()

    static, shapes = jax.eval_shape(create)  # no array is made
    loss = partial(losses.of_windows, static)
    return static, *loop.start(config, loss, shapes, place, mesh, arch.layers)


def _introduction(
    config: Config, arch: Architecture, tokens: data.Data, state: State, mesh: Mesh | None
) -> str:
    # A window of L + 1 tokens shares one with the next, so that it reads L new ones.
    epochs = config.steps * config.batch_size * arch.seq_len / len(tokens.train)
    return (
        f"{config.preset}: {llama.parameter_count(state.params):,} parameters, "
        f"{arch.layers} blocks of width {arch.width}, vocabulary {arch.vocab_size:,}, "
        f"windows of {arch.seq_len} tokens\n"
        f"{' '.join(config.corpus)}: {len(tokens.train):,} training tokens (this run reads them "
        f"{epochs:.2f} times), {len(tokens.validation):,} held out\n"
        f"{loop.introduction(config, state, mesh, arch.layers)}"
    )
