"""The shardings of states: the rules, whole optimizers on a mesh, wrappers, bad specs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import LowRank, residuals, state_shardings, storages
from tests import helpers, tables

R, PERIOD = 4, 2
# Where a basis comes from does not matter for where it belongs.
SAMPLED = LowRank(R, PERIOD, projector=tables.SIMPLE.projector)
MODES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}

# A small language model: an attention kernel [embed, heads, head_dim], a wide and a tall matrix.
SHAPES = {"q": (16, 4, 4), "up": (16, 24), "down": (24, 16), "norm": (16,)}
SPECS = {
    "q": P("fsdp", "tensor"),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
    "norm": P(),
}
NUMBERS = optax.contrib.MuonDimensionNumbers((0,), (1, 2))
PLAIN = optax.contrib.MuonDimensionNumbers()
LAYERS = 2


def mesh_of(mode: str = "Auto") -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(MODES[mode],) * 2)


def model(layer: Any, embed: Any) -> Any:
    return {"embed": embed, "layers": [dict(layer) for _ in range(LAYERS)]}


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    layers = [
        {name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)
    ]
    tree = {"embed": rng.normal(size=(32, 16)), "layers": layers}
    return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), tree)


def dimension_numbers(params: Any) -> Any:
    del params
    return model({"q": NUMBERS, "up": PLAIN, "down": PLAIN, "norm": None}, None)


def specs() -> Any:
    return model(SPECS, P("tensor", "fsdp"))


def shardings(mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(), is_leaf=lambda x: isinstance(x, P)
    )


def gum(learning_rate: Any = 0.1, **options: Any) -> optax.GradientTransformationExtraArgs:
    options = {"weight_dimension_numbers": dimension_numbers} | options
    return gum_optax.gum(learning_rate, SAMPLED, **options)


def _injected() -> Any:
    make: Any = optax.inject_hyperparams(gum_optax.gum, static_args="weight_dimension_numbers")
    rate = optax.linear_schedule(0.1, 0.01, 5)
    return make(rate, SAMPLED, weight_dimension_numbers=dimension_numbers, weight_decay=0.1)


OPTIMIZERS = {
    "gum, injected, on a schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), _injected()
    ),
    "adamw, galore, bases in 8 bits": lambda: gum_optax.adamw(
        0.1,
        gum_optax.galore(R, PERIOD, basis_storage=storages.int8(4)),
        weight_decay=0.0,
        weight_dimension_numbers=dimension_numbers,
    ),
    "adamw": lambda: gum_optax.adamw(0.1, SAMPLED, weight_dimension_numbers=dimension_numbers),
    # The residual of every matrix has momentum, sharded as the matrix.
    "adamw, residual through momentum": lambda: gum_optax.adamw(
        0.1,
        dataclasses.replace(SAMPLED, residual=residuals.through(optax.trace(0.5))),
        weight_dimension_numbers=dimension_numbers,
    ),
    "gum, feedback": lambda: gum_optax.gum(
        0.1,
        dataclasses.replace(SAMPLED, residual=residuals.feedback(0.5)),
        weight_dimension_numbers=dimension_numbers,
    ),
    # A group for each matrix: all are uncompressed.
    "muon": lambda: gum_optax.gum(
        0.1,
        dataclasses.replace(SAMPLED, group_by=lambda path, leaf: path),
        weight_dimension_numbers=dimension_numbers,
    ),
}

# In Explicit mode, the default; Auto mode has fewer ways to fail, and each run compiles twice.
# Of the others each part is tested alone, by `make test`.
QUICK_RUN = "adamw, galore, bases in 8 bits"
QUICK_RUNS = {(QUICK_RUN, "Explicit"), (QUICK_RUN, "Auto")}
SLOW = pytest.mark.slow
UNCOMPRESSED = {"muon": [pytest.mark.filterwarnings("ignore:None of .* is compressed:UserWarning")]}
RUNS = [
    pytest.param(
        *run, marks=[*UNCOMPRESSED.get(run[0], []), *([] if run in QUICK_RUNS else [SLOW])]
    )
    for run in [*((name, "Explicit") for name in OPTIMIZERS), (QUICK_RUN, "Auto")]
]


def three_steps(tx: Any, params: Any, state: Any, place: Any) -> tuple[Any, Any]:
    @functools.partial(jax.jit, compiler_options=helpers.QUICK)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = [jax.device_put(gradients(t), place) for t in range(1, 4)]
    # A compiled program refuses arrays of other types or shardings than it was made for.
    compiled = step.lower(params, state, grads[0]).compile()
    for each in grads:
        params, state = compiled(params, state, each)
    return params, state


@pytest.mark.parametrize(("name", "mode"), RUNS)
@jax.enable_x64(True)
def test_whole_optimizers_equal_the_unsharded_run(name, mode):
    tx, mesh = OPTIMIZERS[name](), mesh_of(mode)
    params = gradients(0)
    expected, _ = three_steps(tx, params, jax.jit(tx.init)(params), None)
    with jax.set_mesh(mesh):
        place = shardings(mesh)
        placed = jax.device_put(params, place)
        state = jax.jit(tx.init, out_shardings=state_shardings(tx, placed, place))(placed)
        actual, _ = three_steps(tx, placed, state, place)
    helpers.assert_trees_close(jax.device_get(actual), jax.device_get(expected), 1e-9)


def test_basis_has_the_m_axis_low_rank_state_the_n_axis_slots_both():
    tx = gum_optax.scale_by_gum(SAMPLED)
    params = {"layers": [{"up": jnp.zeros((16, 24)), "down": jnp.zeros((24, 16))}] * LAYERS}
    spec = {"layers": [{"up": P("fsdp", "tensor"), "down": P("tensor")}] * LAYERS}
    state = state_shardings(tx, params, spec, mesh_of())
    trace = state.inner[0].trace
    found = {
        "basis": {name.split(".")[-1]: s.spec for name, s in state.basis.items()},
        "low": {name.split(".")[-1]: value.low.spec for name, value in trace.items()},
        "slots": {name.split(".")[-1]: value.residual.spec for name, value in trace.items()},
    }
    assert found == {
        # Of `down` [24, 16] the short side m is the columns, which are not sharded.
        "basis": {"up": P(None, "fsdp"), "down": P()},
        # The mesh axes of m cut n as well: projected values are nowhere whole.
        "low": {"up": P(None, None, ("tensor", "fsdp")), "down": P(None, None, "tensor")},
        "slots": {"up": P(None, "fsdp", "tensor"), "down": P(None, None, "tensor")},
    }
    others = [state.count, state.key, *state.slots.values()]
    assert {sharding.spec for sharding in others} == {P()}
    assert all(s.mesh == mesh_of() for s in jax.tree.leaves(state))


def test_codes_and_scales_of_bases_are_sharded_as_the_bases():
    compression = dataclasses.replace(SAMPLED, basis_storage=storages.int8())
    tx = gum_optax.scale_by_gum(compression)
    params = {"layers": [{"up": jnp.zeros((16, 24))}] * LAYERS}
    spec = {"layers": [{"up": P("fsdp", "tensor")}] * LAYERS}
    basis = state_shardings(tx, params, spec, mesh_of()).basis["layers.*.up"]
    assert {sharding.spec for sharding in basis} == {P(None, "fsdp")}


RESIDUAL_STATES = {
    # A buffer like each leaf.
    "feedback": (residuals.feedback(), lambda state: state, P("tensor", "fsdp")),
    # A transformation of wide matrices, [m, n].
    "through": (
        residuals.through(optax.trace(0.9)),
        lambda state: [leaf.trace for leaf in state],
        P("fsdp", "tensor"),
    ),
    "sampled": (
        residuals.sampled(undrawn=optax.trace(0.9)),
        lambda state: [leaf.trace for leaf in state],
        P("fsdp", "tensor"),
    ),
}


@pytest.mark.parametrize("name", RESIDUAL_STATES)
def test_the_state_of_a_residual_rule_is_sharded_as_its_matrices(name):
    rule, buffers, expected = RESIDUAL_STATES[name]
    tx = gum_optax.scale_by_gum(dataclasses.replace(SAMPLED, residual=rule))
    params = {"layers": [{"down": jnp.zeros((24, 16))}] * LAYERS}
    state = state_shardings(tx, params, P("tensor", "fsdp"), mesh_of())
    found = buffers(state.residual["layers.*.down"])
    assert [sharding.spec for sharding in found] == [expected] * LAYERS


@pytest.mark.parametrize(
    ("shape", "spec", "lead"),
    [
        ((8, 16, 24), P("fsdp"), ["fsdp"]),
        ((2, 4, 16, 24), P(None, "fsdp", None, "tensor"), [None, "fsdp"]),
        ((4, 16, 24), P(("fsdp",), "tensor"), ["fsdp"]),
    ],
)
def test_batch_axes_stay_sharded(shape, spec, lead):
    tx = gum_optax.scale_by_gum(SAMPLED)
    state = state_shardings(tx, {"w": jnp.zeros(shape)}, {"w": spec}, mesh_of())
    basis = [entry[0] if isinstance(entry, tuple) else entry for entry in state.basis["w"].spec]
    assert basis[: len(lead)] == lead


@pytest.mark.parametrize(
    ("shape", "spec", "low", "slots"),
    [
        # Slots have no axis of layers, so the axis of layers cuts their columns.
        ((8, 16, 24), P("fsdp"), P("fsdp"), P(None, None, "fsdp")),
        ((8, 16, 24), P("fsdp", None, "tensor"), P("fsdp", None, "tensor"),
         P(None, None, ("tensor", "fsdp"))),
        ((8, 16, 24), P("fsdp", "tensor"), P("fsdp", None, "tensor"), P(None, "tensor", "fsdp")),
        # Columns that the parts do not divide stay as they are in the leaf.
        ((8, 16, 18), P("fsdp", None, "tensor"), P("fsdp", None, "tensor"),
         P(None, None, "tensor")),
        ((8, 16, 18), P(None, "fsdp"), P(), P(None, "fsdp")),
    ],
)  # fmt: skip
def test_state_is_cut_along_all_mesh_axes_of_its_leaf(shape, spec, low, slots):
    tx = gum_optax.scale_by_gum(SAMPLED)
    state = state_shardings(tx, {"w": jnp.zeros(shape)}, {"w": spec}, mesh_of())
    assert state.inner[0].trace["w"].low.spec == low
    assert state.inner[0].trace["w"].residual.spec == slots


def test_leaves_of_one_group_that_are_sharded_differently_share_what_they_agree_on():
    tx = gum_optax.scale_by_gum(SAMPLED)
    params = [jnp.zeros((16, 24)) for _ in range(LAYERS)]
    spec = [P("fsdp", "tensor"), P("fsdp")]
    state = state_shardings(tx, params, spec, mesh_of())
    assert state.basis["*"].spec == P(None, "fsdp")
    assert state.inner[0].trace["*"].low.spec == P(None, None, "fsdp")
    # Where neither is the other's, no axis is left.
    state = state_shardings(tx, params, [P("fsdp"), P(None, "tensor")], mesh_of())
    assert state.basis["*"].spec == state.inner[0].trace["*"].low.spec == P()


def test_merged_axes_are_sharded_if_their_outermost_is():
    params = {"layers": [{"q": jnp.zeros((16, 4, 8)), "k": jnp.zeros((16, 4, 8))}] * LAYERS}
    spec = {"layers": [{"q": P("fsdp", "tensor"), "k": P("fsdp", None, "tensor")}] * LAYERS}
    numbers = {"layers": [{"q": NUMBERS, "k": NUMBERS}] * LAYERS}
    tx = gum(weight_dimension_numbers=numbers)
    state = helpers.low_rank_state(state_shardings(tx, params, spec, mesh_of()))
    trace = state.inner[0].trace
    assert trace["layers.*.q"].low.spec == P(None, None, ("tensor", "fsdp"))
    assert trace["layers.*.k"].low.spec == P(None, None, "fsdp")


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("gum", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.adam(0.1), "empty": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", p),
    ),
    "lookahead-free ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_wrapper(name):
    """The tree is that of `init`, and copies of parameters are sharded as they are."""
    tx, mesh = WRAPPERS[name](gum()), mesh_of()
    params, place = gradients(0), shardings(mesh)
    found = state_shardings(tx, params, specs(), mesh)
    state = jax.jit(tx.init, out_shardings=found)(jax.device_put(params, place))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    actual, rules = helpers.low_rank_state(state), helpers.low_rank_state(found)
    expected: Any = rules.basis["layers.*.up"]
    assert expected.spec == P(None, "fsdp")
    assert actual.basis["layers.*.up"].addressable_shards[0].data.shape == (LAYERS, 16 // 4, R)
    # Moments, accumulators and averages are copies of parameters.
    by_shape = {(32, 16): P("tensor", "fsdp"), (24, 16): P("tensor", "fsdp")}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        if leaf.shape in by_shape:
            assert sharding.spec == by_shape[leaf.shape]


@pytest.mark.parametrize("mode", MODES)
def test_shapes_alone_prefixes_and_the_mesh_in_force(mode):
    mesh, tx = mesh_of(mode), gum()
    params = gradients(0)
    expected = state_shardings(tx, params, shardings(mesh))
    abstract = jax.eval_shape(lambda: gradients(0))
    assert state_shardings(tx, abstract, specs(), mesh) == expected
    with jax.set_mesh(mesh):
        assert state_shardings(tx, abstract, specs()) == expected
        jitted = jax.jit(tx.init, out_shardings=expected)
        assert jax.tree.structure(jitted(params)) == jax.tree.structure(expected)
    prefix = {"embed": None, "layers": P()}
    replicated = state_shardings(tx, abstract, prefix, mesh)
    assert {sharding.spec for sharding in jax.tree.leaves(replicated)} == {P()}


@pytest.mark.parametrize("mode", MODES)
def test_eager_init_puts_the_low_rank_state_where_the_parameters_are(mode):
    mesh, tx = mesh_of(mode), gum_optax.scale_by_gum(SAMPLED)
    params = [jax.device_put(jnp.zeros((16, 24)), NamedSharding(mesh, P("fsdp")))] * LAYERS
    state = tx.init(params)
    expected = state_shardings(tx, params, P("fsdp"), mesh)
    for part in ("basis", "inner"):
        jax.tree.map(
            lambda leaf, sharding: _assert_equivalent(leaf, sharding),
            getattr(state, part),
            getattr(expected, part),
        )


def _assert_equivalent(leaf: jax.Array, sharding: NamedSharding) -> None:
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), leaf.sharding


def test_empty_trees_and_masked_leaves():
    tx, mesh = gum_optax.scale_by_gum(SAMPLED), mesh_of()
    assert jax.tree.leaves(state_shardings(tx, {}, {}, mesh))
    params = {"a": optax.MaskedNode(), "b": None, "w": [jnp.zeros((16, 24))] * LAYERS}
    state = state_shardings(tx, params, {"a": None, "b": None, "w": P("fsdp")}, mesh)
    assert state.basis["w.*"].spec == P(None, "fsdp")


BAD = {
    "no such axis": (P("model"), ValueError, r"`w`.*no axis 'model'"),
    "too many entries": (P(None, None, "fsdp"), ValueError, r"`w`.*more entries"),
    "unequal parts": (P(None, "fsdp"), ValueError, r"`w`.*axis of 10 into 4 parts"),
    "an axis twice": (P("fsdp", "fsdp"), ValueError, r"`w`.*twice"),
    "no sharding": ("fsdp", TypeError, r"`w`.*'fsdp'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_specs_name_the_parameter(name):
    spec, error, message = BAD[name]
    params = {"w": jnp.zeros((16, 10)), "v": jnp.zeros((16, 10))}
    with pytest.raises(error, match=message):
        state_shardings(optax.adam(0.1), params, {"w": spec, "v": P()}, mesh_of())


def test_other_bad_arguments():
    params = {"w": jnp.zeros((16, 24))}
    tx = gum_optax.scale_by_gum(gum_optax.galore(R))
    with pytest.raises(ValueError, match="`mesh` is needed"):
        state_shardings(tx, params, P("fsdp"))
    other = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="one mesh"):
        state_shardings(tx, params, NamedSharding(other, P("fsdp")), mesh_of())
    with pytest.raises(ValueError, match="prefix tree"):
        state_shardings(tx, params, {"v": P("fsdp")}, mesh_of())
