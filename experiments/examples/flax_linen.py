"""GUM in Flax Linen: `python -m experiments.examples.flax_linen`.

The model of `flax_nnx`, scanned.
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
    """One residual layer, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.gelu(nn.Dense(WIDTH)(x)), None


class Model(nn.Module):
    """The next byte from the last ones; the layers' kernels are one leaf ``[LAYERS, in, out]``."""

    @nn.compact
    def __call__(self, context: jax.Array) -> jax.Array:
        x = nn.Embed(BYTES, 8, name="embed")(context).reshape(len(context), -1)
        x = nn.Dense(WIDTH, name="read")(x)
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(BYTES, name="head")(x)


@jax.jit
def train_step(
    state: TrainState, context: jax.Array, target: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step: the new state and the loss."""

    def mean_loss(params: dict) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, context), target)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


def train(steps: int) -> list[float]:
    """The loss of each step."""
    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    tx = gum_optax.gum(
        0.01,
        gum_optax.LowRank(rank=8, period=50),
        weight_dimension_numbers=dimension_numbers.scanned_layers,
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses = []
    for batch in batches(steps):
        state, loss = train_step(state, *batch)
        losses.append(float(loss))
    return losses


def main(arguments: Sequence[str]) -> int:
    """Trains and prints."""
    report(train(cli.parse(Config, PROGRAM, arguments).steps))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
