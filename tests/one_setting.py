"""A child of test_settings.py: the core of the library under the settings of its environment.

Prints one JSON object: for each optimizer, the draws of each step and the updates of the last one,
or the error that ended it.
"""

import json
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from gum_optax import (
    LowRank,
    LowRankState,
    backward,
    carries,
    dimension_numbers,
    fallbacks,
    residuals,
    storages,
)

STEPS, PERIOD, RANK, LAYERS = 5, 2, 2, 4
COLUMNS = gum_optax.normalize_columns()
WHOLE: dict[str, Any] = {
    "weight_decay": 0.1,
    "weight_dimension_numbers": dimension_numbers.scanned_layers,
}
MATRICES: dict[str, Any] = WHOLE | {"fallback": optax.sgd(0.1, momentum=0.9)}


def _low_rank(inner: Any, **parts: Any) -> Any:
    return gum_optax.for_matrices(
        gum_optax.low_rank(inner, LowRank(RANK, PERIOD, **parts)), 0.1, **MATRICES
    )


# Every projector, residual rule, carry, storage and fallback, and Adam only where the name says so:
# optax's refuses strict promotion, as in ``b1 ** count``.
OPTIMIZERS: dict[str, Any] = {
    "gum": gum_optax.gum(0.1, LowRank(RANK, PERIOD, residuals.sampled(1)), **MATRICES),
    "rotated": _low_rank(
        optax.trace(0.9),
        residual=residuals.sampled(2, form="additive", undrawn=COLUMNS),
        carry=carries.rotate,
        storage=storages.cast("bfloat16"),
    ),
    "feedback": _low_rank(
        optax.trace(0.9),
        residual=residuals.feedback(0.5),
        projector=gum_optax.projectors.randomized_svd,
    ),
    "through": _low_rank(
        optax.trace(0.9),
        residual=residuals.through(gum_optax.scale_by_gain()),
        projector=gum_optax.projectors.grassmann(),
        carry=carries.keep,
        storage=storages.int4(),
    ),
    "random": _low_rank(
        optax.trace(0.9),
        residual=residuals.sampled(gum_optax.samplers.bernoulli(0.5)),
        projector=gum_optax.projectors.random_orthonormal,
        storage=storages.int8(),
    ),
    "muon": gum_optax.muon(0.1, consistent_rms=0.2, fallback=fallbacks.factored(), **WHOLE),
    "rounded": gum_optax.stochastic_rounding(
        gum_optax.gum(0.1, LowRank(RANK, PERIOD), **MATRICES), key=3
    ),
    "adam": gum_optax.adamw(
        0.1,
        gum_optax.galore(RANK, PERIOD, carry=carries.projection_aware()),
        fallback=fallbacks.columns(),
        **WHOLE,
    ),
    "adam in 8 bits": gum_optax.quantized(
        gum_optax.adamw(0.1, gum_optax.apollo(RANK, PERIOD), **WHOLE), smallest=0
    ),
}


def parameters(dtype: Any = np.float32) -> Any:
    """Separate layers, a stack, and leaves of the fallback."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype) / 4

    return {
        "layers": [
            {"up": normal(6, 9), "down": normal(9, 6), "bias": normal(9)} for _ in range(LAYERS)
        ],
        "stack": normal(LAYERS, 6, 6),
        "embed": normal(12, 6),
    }


def loss(params: Any, tokens: Any) -> Any:
    x = params["embed"][tokens]
    for layer in params["layers"]:
        bias = layer["bias"].reshape(1, -1)
        x = x + jnp.tanh(x @ layer["up"] + bias) @ layer["down"]
    x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["stack"])[0]
    return jnp.sum((x @ params["embed"].T) ** 2)


def run(tx: Any, compressed: bool, dtype: Any) -> dict[str, Any]:
    """Steps of one optimizer, on gradients that are compressed in the backward pass or not."""

    def step(params: Any, state: Any, tokens: Any) -> Any:
        if compressed:
            state = backward.refresh(loss, tx)(params, state, tokens)
            _, gradients = backward.value_and_grad(loss, tx)(params, state, tokens)
        else:
            gradients = jax.grad(loss)(params, tokens)
        return tx.update(gradients, state, params)

    params, step = parameters(dtype), jax.jit(step)
    state = jax.jit(tx.init)(params)
    draws, updates = [], None
    for number in range(STEPS):
        tokens = np.random.default_rng(number).integers(0, 12, 8).astype(np.int32)
        updates, state = step(params, state, tokens)
        is_low_rank = lambda node: isinstance(node, LowRankState)  # noqa: E731
        for node in jax.tree.leaves(state, is_leaf=is_low_rank):
            if is_low_rank(node):
                draws.append({name: np.asarray(s).tolist() for name, s in node.slots.items()})
    flat = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(updates)]
    return {"draws": draws, "updates": np.concatenate(flat).tolist()}


def main(names: list[str]) -> None:
    """Runs the named optimizers, or all."""
    found: dict[str, Any] = {}
    for name in names or [*OPTIMIZERS, "compressed"]:
        dtype = jnp.bfloat16 if name == "rounded" else np.float32
        try:
            tx = OPTIMIZERS["gum" if name == "compressed" else name]
            found[name] = run(tx, name == "compressed", dtype)
        except Exception:
            found[name] = {"error": traceback.format_exc()[-2000:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
