"""MaxText: its matrices by their use, by this library's rules and by MaxText's own; training.

MaxText has its dependencies in extras, one for each kind of accelerator, of gigabytes; pip installs
none of them by default. The checks passed on Python 3.12 and a CPU with the versions in
`maxtext.txt`, installed without dependencies, and the small packages that their imports then
lacked:

    python3.12 -m pip install --no-deps -r experiments/clients/maxtext.txt
    PYTHONPATH=. python3.12 -m experiments.clients.maxtext
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from typing import Any

import jax
import jax.experimental.xla_metadata as xla_metadata
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from experiments.clients.checks import check, letters

if not hasattr(xla_metadata, "must_fuse_call"):
    # A TPU kernel, which does not run here, imports this function of a newer JAX.
    setattr(xla_metadata, "must_fuse_call", lambda function, **options: function)  # noqa: B010

import maxtext
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils, muon_utils, sharding

import gum_optax
from gum_optax import dimension_numbers

CONFIG = {
    "run_name": "client",
    "enable_checkpointing": False,
    "base_emb_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "base_num_decoder_layers": 4,
    "head_dim": 16,
    "vocab_size": 320,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "attention": "dot_product",
    "dtype": "float32",
    "weight_dtype": "float32",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
}
# Experts by dense products, without kernels for accelerators.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "sparse_matmul": False, "megablox": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama, scanned": {"decoder_block": "llama2"},
    "Llama": {"decoder_block": "llama2", "scan_layers": False},
    "Gemma 2, scanned": {"decoder_block": "gemma2"},
    "Mixtral, scanned": {"decoder_block": "mixtral", **EXPERTS},
}


def configuration(options: dict[str, Any]) -> Any:
    """Returns MaxText's configuration of a tiny model."""
    # MaxText reads a command line: a program's name, a YAML file and options.
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    return pyconfig.initialize(["", base, *(f"{k}={v}" for k, v in (CONFIG | options).items())])


def compare(name: str, options: dict[str, Any]) -> None:
    """Checks one model, from its shapes alone."""
    # 1. The model on its mesh, as shapes.
    config = configuration(options)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(config.logical_axis_rules):
        model = nnx.eval_shape(
            lambda: model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
        )
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        tokens = jax.ShapeDtypeStruct((4, config.max_target_length), jnp.int32)

        def forward(params: Any, rest: Any, tokens: Any, positions: Any, segments: Any) -> Any:
            model = nnx.merge(graph, params, rest)
            return model(tokens, positions, segments, enable_dropout=False)

        # 2. Matrices inferred from the forward pass, and MaxText's own numbers for Muon, of which
        #    a state is made.
        numbers = dimension_numbers.infer(forward, params, rest, tokens, tokens, tokens)
        own = muon_utils.get_muon_weight_dimension_numbers(model, config)
        tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=8), weight_dimension_numbers=own)
        state = jax.eval_shape(tx.init, params)
    # 3. The rules must agree with the inferred matrices. MaxText's own may differ, which is shown.
    found = letters(params, numbers)
    matrices = {path: axes for path, axes in found.items() if axes}
    check(f"{name}: matrices by their use", len(matrices) >= 6, matrices)
    check(f"{name}: `maxtext` agrees", letters(params, dimension_numbers.maxtext) == found)
    check(f"{name}: `flax` agrees", letters(params, dimension_numbers.flax) == found)
    theirs = letters(params, own)
    others = {path: axes for path, axes in theirs.items() if axes != found[path]}
    print(f"     {name}: MaxText's own numbers differ for {others or 'none'}", flush=True)
    check(f"{name}: a state of MaxText's own numbers", jax.tree.leaves(state))


def train(name: str, options: dict[str, Any]) -> None:
    """Creates and trains a model on four devices, sharded as MaxText reads its metadata."""
    # 1. Model and optimizer.
    config = configuration(options)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    compression = gum_optax.LowRank(rank=8, period=3)
    tx = gum_optax.gum(
        3e-3, compression, weight_dimension_numbers=dimension_numbers.maxtext, consistent_rms=0.2
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 320, (4, config.max_target_length)))
    positions = jnp.broadcast_to(jnp.arange(config.max_target_length), tokens.shape)

    def create() -> Any:
        model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
        return nnx.state((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def loss(model: Any) -> jax.Array:
        logits = model(tokens, positions, jnp.ones_like(tokens), enable_dropout=False)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    with jax.set_mesh(mesh), nn.logical_axis_rules(config.logical_axis_rules):
        # 2. Created on the mesh, with the shardings that MaxText reads from the metadata of
        #    parameters and state.
        shardings = sharding.nnx_construct_named_sharding(nnx.eval_shape(create), mesh)
        state = jax.jit(create, out_shardings=shardings)()
        graph = nnx.graphdef(
            nnx.eval_shape(
                lambda: (
                    model := model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0)),
                    nnx.Optimizer(model, tx, wrt=nnx.Param),
                )
            )
        )
        model, optimizer = nnx.merge(graph, state)
        # 3. The state must have the shardings that `state_shardings` derives from the parameters',
        #    but for the last axis of projected momentum: it is also cut along the axis of the rows,
        #    which metadata cannot say.
        params = nnx.state(nnx.eval_shape(lambda: nnx.merge(graph, state)[0]), nnx.Param)
        expected = gum_optax.state_shardings(
            tx, params, nnx.as_pure(sharding.nnx_construct_named_sharding(params, mesh))
        )
        low_rank = jax.tree.leaves(optax.tree.get(nnx.as_pure(nnx.state(optimizer)), "inner"))
        wanted = jax.tree.leaves(optax.tree.get(nnx.as_pure(expected), "inner"))
        for x, where in zip(low_rank, wanted, strict=True):
            own, finest = x.sharding.shard_shape(x.shape), where.shard_shape(x.shape)
            exact = slice(-1) if x.shape[-2] == compression.rank else slice(None)
            check(f"{name}: {x.shape} is sharded", own[exact] == finest[exact], own)

        # 4. Training, on one batch.
        @nnx.jit
        def step(model: Any, optimizer: Any) -> jax.Array:
            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        values = [float(step(model, optimizer)) for _ in range(12)]
    check(f"{name}: it learns", values[-1] < values[0], f"{values[0]:.2f} to {values[-1]:.2f}")


def main() -> None:
    """Runs all checks."""
    for name, options in MODELS.items():
        compare(name, options)
    train("Llama, scanned", MODELS["Llama, scanned"])


if __name__ == "__main__":
    main()
