"""Keras 3 on JAX: a training loop around its stateless calls, with a list of nameless variables.

The package's docstring gives the commands.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os

from experiments.clients.checks import check

# Keras reads its backend when it is imported.
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import gum_optax
from gum_optax import dimension_numbers

VOCABULARY, WIDTH, TOKENS = 40, 16, 8


def model() -> keras.Model:
    """Returns a small transformer built from Keras' own layers."""
    tokens = keras.Input((TOKENS,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for _ in range(3):
        x = x + keras.layers.MultiHeadAttention(4, 4)(keras.layers.LayerNormalization()(x), x)
        x = x + keras.layers.Dense(WIDTH)(keras.layers.Dense(32, activation="relu")(x))
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))


def main() -> None:
    """Infers the matrices, trains, and writes the weights back into the model."""
    # 1. The variables as lists of arrays, and the matrices among them, inferred from their use:
    #    without names no convention could find them.
    keras.utils.set_random_seed(0)
    net = model()
    trainable = [variable.value for variable in net.trainable_variables]
    fixed = [variable.value for variable in net.non_trainable_variables]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16, TOKENS)).astype(np.int32)

    def apply(trainable: list[jax.Array], tokens: jax.Array) -> jax.Array:
        return net.stateless_call(trainable, fixed, tokens)[0]

    numbers = dimension_numbers.infer(apply, trainable, tokens)
    names = [variable.path for variable in net.trainable_variables]
    kernels = [
        name.endswith("kernel") and value.ndim > 1
        for name, value in zip(names, trainable, strict=True)
    ]
    kernels[-2] = False  # the head, [width, vocabulary], before its bias
    check("Keras: every hidden kernel is a matrix", [n is not None for n in numbers] == kernels)

    # 2. Training, on one batch.
    compression = gum_optax.LowRank(rank=4, period=20)
    tx = gum_optax.gum(3e-3, compression, consistent_rms=0.2, weight_dimension_numbers=numbers)

    def loss(trainable: list[jax.Array]) -> jax.Array:
        logits = apply(trainable, jnp.asarray(tokens))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    @jax.jit
    def step(trainable: list[jax.Array], state: optax.OptState) -> tuple:
        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, values = tx.init(trainable), []
    for _ in range(100):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
    check("Keras: it learns", values[-1] < 0.5 * values[0], f"{values[0]:.2f} to {values[-1]:.2f}")

    # 3. The weights, back in the model, which must predict the batch.
    for variable, value in zip(net.trainable_variables, trainable, strict=True):
        variable.assign(value)
    predicted = keras.ops.argmax(net(tokens), -1)
    check("Keras: weights go back into the model", float(np.mean(predicted == tokens)) > 0.5)


if __name__ == "__main__":
    main()
