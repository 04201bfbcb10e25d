"""The scanned LLaMA against the LLaMA with a list of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import llama, scanned
from experiments.models.presets import PRESETS
from experiments.trainer import losses

# Compiles two models, with their gradients.
pytestmark = pytest.mark.slow

ARCH = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks of queries and of tokens."""
    monkeypatch.setattr(scanned, "QUERIES", 8)
    monkeypatch.setattr(scanned, "TOKENS", 16)


def test_loss_and_gradients_are_those_of_the_list_of_blocks():
    static, params = llama.create(ARCH)
    drawn = np.random.default_rng(0).integers(0, ARCH.vocab_size, (2, ARCH.seq_len + 1))
    windows = jnp.asarray(drawn, jnp.int32)
    expected = jax.value_and_grad(losses.mean(lambda p, w: losses.of_windows(static, p, w)))
    layers = [params["layers"][i] for i in range(ARCH.layers)]
    stacked = params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    described, shapes = scanned.describe(ARCH, "float32")
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: scanned.loss(described, p, windows)))

    (value, gradients), (other, others) = (
        value_and_grad(stacked),
        jax.jit(expected)(params, windows),
    )
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    others = others | {
        "layers": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(others["layers"][i] for i in range(ARCH.layers))
        )
    }

    def compare(a, b):
        # Float32 sums in another order: 5e-7 of the largest entry was measured.
        np.testing.assert_allclose(a, b, atol=5e-6 * float(np.abs(b).max()), rtol=0)

    jax.tree.map(compare, gradients, others)
