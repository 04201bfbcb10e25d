"""GUM in Flax Linen: `python -m experiments.examples.flax_linen`.

The model of `flax_nnx`, with its layers in a scan: one leaf ``[LAYERS, in, out]`` for all kernels.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.training.train_state import TrainState

import gum_optax
from experiments.examples.flax_nnx import (
    BYTES,
    CONTEXT,
    LAYERS,
    WIDTH,
    Config,
    batches,
    cross_entropy,
    report,
)
from experiments.trainer import cli
from gum_optax import dimension_numbers

PROGRAM = "experiments.examples.flax_linen"


class Layer(nn.Module):
    """One residual layer, in the signature that `nn.scan` expects: (carry, input) to the same."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.gelu(nn.Dense(WIDTH)(x)), None


class Model(nn.Module):
    """Predicts the next byte from the last `CONTEXT` bytes: int32 ``[b, CONTEXT]`` to logits."""

    @nn.compact
    def __call__(self, context: jax.Array) -> jax.Array:
        x = nn.Embed(BYTES, 8, name="embed")(context).reshape(len(context), -1)  # [b, 8 CONTEXT]
        x = nn.Dense(WIDTH, name="read")(x)  # [b, WIDTH]
        # Parameters are stacked along axis 0, each layer with random numbers of its own.
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(BYTES, name="head")(x)


@jax.jit
def train_step(
    state: TrainState, context: jax.Array, target: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Takes one step; returns the new state and the loss in nats per byte."""

    def mean_loss(params: dict) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, context), target)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


def train(steps: int) -> list[float]:
    """Trains for `steps` steps; returns the loss of each."""
    # 1. Parameters, from an example of the inputs.
    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    # 2. GUM. `scanned_layers` reads a leaf [LAYERS, in, out] as LAYERS matrices.
    tx = gum_optax.gum(
        0.01,
        gum_optax.LowRank(rank=8, period=50),
        weight_dimension_numbers=dimension_numbers.scanned_layers,
    )
    # 3. The usual loop of Linen.
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses = []
    for batch in batches(steps):
        state, loss = train_step(state, *batch)
        losses.append(float(loss))
    return losses


def main(arguments: Sequence[str]) -> int:
    """Trains and prints losses; returns the exit code."""
    report(train(cli.parse(Config, PROGRAM, arguments).steps))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
