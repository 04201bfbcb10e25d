"""GUM in Flax NNX: `python -m experiments.examples.flax_nnx`.

A byte model learns its own source text.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gum_optax
from experiments.trainer import cli

PROGRAM = "experiments.examples.flax_nnx"
CONTEXT, BYTES, WIDTH, LAYERS = 16, 256, 64, 6


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a byte model on a source file with GUM."""

    #: Steps of training.
    steps: int = 150


class Model(nnx.Module):
    """The next byte from the last ones."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, 8, rngs=rngs)
        self.read = nnx.Linear(8 * CONTEXT, WIDTH, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, BYTES, rngs=rngs)

    def __call__(self, context: jax.Array) -> jax.Array:
        x = self.read(self.embed(context).reshape(len(context), -1))
        for layer in self.layers:
            x = x + nnx.gelu(layer(x))
        return self.head(x)


@nnx.jit
def train_step(
    model: Model, optimizer: nnx.Optimizer, context: jax.Array, target: jax.Array
) -> jax.Array:
    """One step; model and optimizer are updated in place."""

    def mean_loss(model: Model) -> jax.Array:
        return cross_entropy(model(context), target)

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean nats per byte."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def batches(steps: int, size: int = 64) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Contexts ``[size, CONTEXT]`` and the bytes that follow, drawn from this file."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        starts = rng.integers(len(text) - CONTEXT, size=size)
        windows = text[starts[:, None] + np.arange(CONTEXT + 1)]
        yield jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])


def train(steps: int) -> list[float]:
    """The loss of each step."""
    model = Model(nnx.Rngs(0))
    tx = gum_optax.gum(0.01, gum_optax.LowRank(rank=8, period=50))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return [float(train_step(model, optimizer, *batch)) for batch in batches(steps)]


def report(losses: Sequence[float]) -> None:
    """Prints some of the losses."""
    for step in sorted({*range(0, len(losses), 25), len(losses) - 1}):
        print(f"step {step + 1:4}  loss {losses[step]:.3f}")


def main(arguments: Sequence[str]) -> int:
    """Trains and prints."""
    report(train(cli.parse(Config, PROGRAM, arguments).steps))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
