"""The parameters of the benchmarks: LLaMAs as shapes, and random arrays of these shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import llama, presets
from experiments.models.llama import Params
from experiments.models.presets import Architecture

TRAINED = presets.PRESETS
# Also models that are never allocated, only counted or compiled.
SHAPES = TRAINED | {
    "7b": Architecture(4096, 11008, 32, 32, 32, vocab_size=32_000, seq_len=2048),
    "70b": Architecture(8192, 28672, 80, 64, 8, vocab_size=32_000, seq_len=4096),
}


def separate(name: str) -> Params:
    """Returns a preset's parameters as shapes; each layer has leaves of its own."""
    return _shapes(SHAPES[name])


def stacked(name: str) -> Params:
    """Returns the same parameters with all layers of a role in one leaf ``[L, ...]``."""
    return stack(separate(name))


LAYOUTS = {"separate": separate, "stacked": stacked}


def depth(layers: int, preset: str = "350m") -> Params:
    """Returns separate parameters of a preset's widths with another number of layers."""
    return _shapes(dataclasses.replace(SHAPES[preset], layers=layers))


def stack(tree: Params) -> Params:
    """Stacks separate layers into one leaf ``[L, ...]`` for each role."""
    layers = list(tree["layers"].values())

    def together(leaf: jax.ShapeDtypeStruct, *_: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype)

    return tree | {"layers": jax.tree.map(together, *layers)}


def random(tree: Params, seed: int) -> Params:
    """Draws float32 arrays of Gaussian numbers in the shapes of `tree`, on the host."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape, np.float32)), tree
    )


def size(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(shape: Architecture) -> Params:
    # Nothing is allocated: a 70b model is traced like any other.
    return jax.eval_shape(lambda: llama.create(shape)[1])
