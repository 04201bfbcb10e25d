"""Pretraining on a mesh of eight devices: shardings, and the numbers of one device."""

import collections
import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments.data import tokens as data
from experiments.models import llama, presets
from experiments.trainer import checkpoints as checkpoint
from experiments.trainer import loop, optimizers, pretraining
from experiments.trainer import mesh as meshes
from experiments.trainer.config import Config
from experiments.trainer.methods import Gum
from experiments.trainer.options import ConfigError
from tests.helpers import MOSTLY_UNCOMPRESSED, low_rank_state
from tests.watched_pretrain import SMALL

pytestmark = MOSTLY_UNCOMPRESSED

STEPS, BATCH = 9, 8  # of a run of 12, whose step is that of test_multi_process.py
# All three axes at once are in `make test`; the mesh of one axis is another compilation.
MESHES = (pytest.param("fsdp=8", marks=pytest.mark.slow), "data=2,fsdp=2,tensor=2")


def config(optimizer: Any, text: str | None, **more: Any) -> Config:
    sizes = {"steps": 12, "batch_size": BATCH, "learning_rate": 3e-3}
    chosen = optimizers.named(optimizer, Gum(rank=16, period=4))
    return Config(preset="tiny", optimizer=chosen, mesh=text, **sizes, **more)


@functools.cache
def batches() -> list[np.ndarray]:
    """Windows that count upwards from random tokens, so that there is something to learn."""
    start = np.random.default_rng(0).integers(0, SMALL.vocab_size, (STEPS, BATCH, 1))
    return list(((start + np.arange(SMALL.seq_len + 1)) % SMALL.vocab_size).astype(np.int32))


class Run(NamedTuple):
    state: pretraining.State
    step: Any
    losses: list[float]
    kept: pretraining.State  # on the host, after the fifth step: a period has begun


def steps(config: Config, step: Any, state: pretraining.State, batches: list[np.ndarray]):
    mesh, losses = meshes.build(config.mesh), []
    for batch in batches:
        state, metrics = step(state, meshes.put(mesh, BATCH, batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def run(optimizer: str, text: str | None) -> Run:
    settings = config(optimizer, text)
    mesh = meshes.build(text)
    with meshes.use(mesh):
        _, state, step = pretraining.start(settings, SMALL, mesh)
        state, losses = steps(settings, step, state, batches()[:5])
        kept = jax.device_get(state)
        state, more = steps(settings, step, state, batches()[5:])
    return Run(state, step, losses + more, kept)


@pytest.mark.parametrize("text", MESHES)
def test_a_mesh_changes_no_loss(text):
    alone, spread = run("gum", None), run("gum", text)
    assert alone.losses[-1] < alone.losses[0] - 0.05
    # float32: sums are taken in another order, and the first weights are made in one compiled
    # function, which rounds them otherwise. Measured: 7e-7.
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=5e-6)


@pytest.mark.parametrize("text", MESHES)
def test_a_mesh_changes_no_draw(text):
    alone, spread = (low_rank_state(run("gum", where).state) for where in (None, text))
    jax.tree.map(np.testing.assert_array_equal, spread.slots, alone.slots)
    assert alone.slots


@pytest.mark.parametrize("text", MESHES)
def test_a_step_is_compiled_once_and_leaves_arrays_where_they_were(text):
    spread = run("gum", text)
    assert spread.step._cache_size() == 1
    jax.tree.map(same_place, spread.state, shardings("gum", text))


def shardings(optimizer: str, text: str) -> pretraining.State:
    """Where a mesh has weights and state."""
    _, shapes = jax.eval_shape(functools.partial(llama.create, SMALL))
    params = meshes.param_shardings(spread_mesh(text), shapes)
    build = optimizers.build(config(optimizer, text), SMALL.layers)
    return pretraining.State(params, gum_optax.state_shardings(build, shapes, params))


def spread_mesh(text: str) -> jax.sharding.Mesh:
    mesh = meshes.build(text)
    assert mesh is not None
    return mesh


def same_place(leaf: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


# An eighth, and with a data axis of two a quarter, but for norms, counters and, of the state's
# [r, n] and [m, r] arrays, those whose long axis is that which the mesh does not divide.
SHARES = [
    pytest.param("fsdp=8", 0.17, marks=pytest.mark.slow),
    (MESHES[-1], 0.28),
]


@pytest.mark.parametrize(("text", "share"), SHARES)
def test_a_device_holds_its_share_of_weights_and_state(text, share):
    state = run("gum", text).state
    for part in state:
        whole = loop.state_bytes(part)
        for device in jax.devices():
            here = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(part)
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            assert here <= share * whole


def test_a_checkpoint_of_one_mesh_goes_on_on_another(tmp_path):
    alone, after = run("gum", None), run("gum", MESHES[-1])
    settings = config("gum", MESHES[-1], run_dir=str(tmp_path), resume=True)
    # The state of the fifth step as the other mesh holds it, so that nothing need be trained there.
    # NumPy cuts arrays up without a program for each shape.
    before = jax.device_put(alone.kept, shardings("gum", "fsdp=8"))
    checkpoints = checkpoint.Checkpoints(settings)
    checkpoints.save(5, before, {"next_index": 5})
    state, position = checkpoints.restore(5, after.state)
    checkpoints.close()
    jax.tree.map(lambda leaf, like: same_place(leaf, like.sharding), state, after.state)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    assert position == {"next_index": 5}
    with meshes.use(spread_mesh(MESHES[-1])):
        _, losses = steps(settings, after.step, state, batches()[5:])
    np.testing.assert_allclose(losses, alone.losses[5:], rtol=5e-6)  # measured: 2e-7


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_every_optimizer_has_shardings_for_its_state(optimizer):
    _, shapes = jax.eval_shape(functools.partial(llama.create, SMALL))
    state = jax.eval_shape(optimizers.build(config(optimizer, None), SMALL.layers).init, shapes)
    where = shardings(optimizer, MESHES[-1]).opt_state
    divided = jax.tree.map(lambda leaf, s: s.shard_shape(leaf.shape) != leaf.shape, state, where)
    assert any(jax.tree.leaves(divided))


def test_weights_lie_by_their_role():
    mesh = spread_mesh("fsdp=4,tensor=2")
    _, shapes = jax.eval_shape(functools.partial(llama.create, presets.PRESETS["tiny"]))
    specs = jax.tree.map(lambda s: s.spec, meshes.param_shardings(mesh, shapes))
    block = specs["layers"][0]
    assert block["attn"]["q"]["kernel"] == block["mlp"]["up"]["kernel"] == P("fsdp", "tensor")
    assert block["attn"]["o"]["kernel"] == block["mlp"]["down"]["kernel"] == P("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
    assert specs["embed"]["embedding"] == P(("tensor", "fsdp"))
    assert block["attn_norm"]["scale"] == specs["norm"]["scale"] == P()


def test_what_cannot_be_divided_is_whole_and_named():
    odd = presets.Architecture(32, 87, 2, 4, 2, vocab_size=330, seq_len=32)
    _, shapes = jax.eval_shape(functools.partial(llama.create, odd))
    mesh = spread_mesh("fsdp=4,tensor=2")
    specs = jax.tree.map(lambda s: s.spec, meshes.param_shardings(mesh, shapes))
    assert specs["layers"][1]["mlp"]["down"]["kernel"] == P(None, "fsdp")
    assert specs["embed"]["embedding"] == P("tensor")
    assert meshes.describe(mesh, shapes).splitlines() == [
        "mesh data=1, fsdp=4, tensor=2; 1 process(es)",
        "embed/embedding (330, 32) is not divided along fsdp",
        "layers/*/mlp/down/kernel (87, 32) is not divided along tensor",
        "layers/*/mlp/gate/kernel (32, 87) is not divided along tensor",
        "layers/*/mlp/up/kernel (32, 87) is not divided along tensor",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2", "`mesh`: data=2 is for 2 devices, but there are 8"),
        ("data=2,tensor=2,fsdp=4", "is for 16 devices, but there are 8"),
        ("data=8,model=1", "names 'model'; the axes are data, fsdp, tensor"),
        ("8", "names '8'; the axes are data, fsdp, tensor"),
        ("data=8,data=1", "names data twice"),
        ("data=0", "gives data the size '0'; write data=2"),
        ("data=-8", "gives data the size '-8'"),
        ("data", "gives data the size ''"),
    ],
)
def test_a_mistaken_mesh_is_named(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        meshes.build(text)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match="`batch_size` is 6; `mesh` divides it into 4 parts"):
        meshes.rows(meshes.build("data=2,fsdp=2,tensor=2"), 6)


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [2], [0, 1, 2, 3]])
def test_some_rows_of_each_batch_are_read_in_the_order_of_all(rows):
    tokens = np.arange(8 * 13 + 1, dtype=np.uint16)
    prepared: Any = collections.namedtuple("Prepared", "train validation")(tokens, tokens)
    whole = data.training_batches(prepared, 8, 4, seed=3)
    part = data.training_batches(prepared, 8, 4, seed=3, rows=rows)
    for _ in range(7):  # two epochs of 13 windows
        np.testing.assert_array_equal(next(part), next(whole)[rows])
    assert part.get_state() == whole.get_state()
    part.set_state({"next_index": 2})
    whole.set_state({"next_index": 2})
    np.testing.assert_array_equal(next(part), next(whole)[rows])
    for mine, all_rows in zip(
        data.validation_batches(prepared, 8, 4, 9, rows),
        data.validation_batches(prepared, 8, 4, 9),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, all_rows[rows])
