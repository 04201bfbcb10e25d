"""Eight devices: numbers, draws, shardings and communication between devices."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments.benchmarks.collectives import collectives
from gum_optax import LowRank, projectors, residuals
from tests import helpers, tables

# No dimension equals another; each is a multiple of the mesh axes that cut it.
M, N, R, GAMMA, PERIOD = 16, 24, 4, 2, 2
MODES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}

# The same program cut into pieces sums in another order. Updates are of order one, and
# Newton-Schulz is steep at zero: the largest difference measured is 1.5e-4 in float32 and 2.8e-13
# in float64. So float64 it is, where rounding cannot hide anything else.
TOLERANCE = 1e-12


class Case(NamedTuple):
    """Leading axes of the leaves, their number, the mesh, specs of matrices [M, N] and [N, M]."""

    leaves: int
    batch: tuple[int, ...]
    mesh: dict[str, int]
    up: P
    down: P

    @property
    def per_role(self) -> int:
        """The number of matrices of each role."""
        return self.leaves * math.prod(self.batch)

    def tree(self, leaf: Any) -> Any:
        """`leaf(layer, role)` for each parameter; a lone leaf with batch axes is no list."""
        layers = [
            {role: leaf(layer, role) for role in ("up", "down")} for layer in range(self.leaves)
        ]
        return {"layers": layers if self.leaves > 1 else layers[0]}

    def pack(self, matrices: dict[str, np.ndarray]) -> Any:
        """The matrices of each role, ``[count, rows, columns]``, as leaves."""
        leaves = {
            role: stacked.reshape(self.leaves, *self.batch, *stacked.shape[1:])
            for role, stacked in matrices.items()
        }
        return self.tree(lambda layer, role: leaves[role][layer])

    def make_mesh(self, mode: str) -> jax.sharding.Mesh:
        names, sizes = tuple(self.mesh), tuple(self.mesh.values())
        return jax.make_mesh(sizes, names, axis_types=(MODES[mode],) * len(names))

    def shardings(self, mesh: jax.sharding.Mesh) -> Any:
        specs = {"up": self.up, "down": self.down}
        return self.tree(lambda _, role: NamedSharding(mesh, specs[role]))


CASES = {
    "data parallel": Case(4, (), {"data": 8}, P(), P()),
    "fsdp, rows": Case(4, (), {"fsdp": 8}, P("fsdp"), P("fsdp")),
    "fsdp, columns": Case(4, (), {"fsdp": 8}, P(None, "fsdp"), P(None, "fsdp")),
    "tensor": Case(4, (), {"tensor": 8}, P(None, "tensor"), P("tensor")),
    "fsdp x tensor": Case(
        4, (), {"fsdp": 4, "tensor": 2}, P("fsdp", "tensor"), P("tensor", "fsdp")
    ),
    "data x fsdp, one axis entry": Case(
        4, (), {"data": 2, "fsdp": 4}, P(("data", "fsdp")), P(None, ("data", "fsdp"))
    ),
    "layers": Case(1, (8,), {"layer": 8}, P("layer"), P("layer")),
    "layers x fsdp": Case(
        1, (4,), {"layer": 4, "fsdp": 2}, P("layer", "fsdp"), P("layer", None, "fsdp")
    ),
    "stacked, fsdp x tensor": Case(
        1, (4,), {"fsdp": 4, "tensor": 2}, P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    ),
    "experts x fsdp": Case(
        1, (2, 4), {"expert": 4, "fsdp": 2}, P(None, "expert", "fsdp"), P(None, "expert", "fsdp")
    ),
    "separate layers of experts": Case(
        2, (4,), {"expert": 4, "tensor": 2}, P("expert", None, "tensor"), P("expert", "tensor")
    ),
}

# Explicit mode runs the same code; a case for each way in which a type can carry a sharding.
EXPLICIT = ("fsdp x tensor", "layers x fsdp", "experts x fsdp", "separate layers of experts")
# What runs in Explicit mode by `make test` runs in Auto mode by `make slow`.
# And each axis alone, of those that the cases of two axes have as well.
SLOW = (*EXPLICIT, "fsdp, rows", "fsdp, columns", "tensor", "layers", "data x fsdp, one axis entry")
RUNS = [
    pytest.param(name, "Auto", marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES
]
RUNS += [
    pytest.param(name, "Explicit", marks=[pytest.mark.slow] if "experts" in name else [])
    for name in EXPLICIT
]

every_run = pytest.mark.parametrize(("name", "mode"), RUNS)


# A refresh by the library's projectors takes most of the time to compile. Elsewhere, coordinates
# that the key decides.
PROJECTORS: dict[str, Any] = {
    "fsdp, rows": projectors.random_orthonormal,
    "fsdp x tensor": projectors.subspace_iteration,
    "layers x fsdp": projectors.subspace_iteration,
}


def projector_of(name: str) -> Any:
    return PROJECTORS.get(name, tables.SIMPLE.projector)


def scale_by_gum(projector: Any) -> optax.GradientTransformationExtraArgs:
    compression = LowRank(R, PERIOD, residuals.sampled(GAMMA), projector)
    return gum_optax.scale_by_gum(compression)


def assert_placed(tree: Any, shardings: Any) -> None:
    def check(path: Any, leaf: jax.Array, sharding: NamedSharding) -> None:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (
            f"{jax.tree_util.keystr(path)}: {leaf.sharding}, not {sharding}"
        )

    jax.tree_util.tree_map_with_path(check, tree, shardings)


def assert_close(actual: Any, expected: Any, atol: float = TOLERANCE) -> None:
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


def gradients(count: int, step: int) -> dict[str, np.ndarray]:
    """The matrices of each role at a step, whatever the layout of their leaves."""
    return {
        "up": helpers.gradients(2 * step, count, M, N),
        "down": helpers.gradients(2 * step + 1, count, N, M),
    }


def by_role(slots: dict[str, Any]) -> dict[str, list[int]]:
    """Slots by the names that separate and stacked layers have in common, as draws have them."""
    return {name.replace("*.", ""): np.asarray(drawn).tolist() for name, drawn in slots.items()}


@functools.cache
@jax.enable_x64(True)
def unsharded(count: int, projector: Any) -> list[tuple[Any, Any]]:
    """Updates and slots after each step of so many matrices, in one leaf for each role.

    In every layout the same matrices have the same updates, so a run serves all layouts.
    """
    trees = [{"layers": gradients(count, t)} for t in range(PERIOD + 1)]
    steps = helpers.run(scale_by_gum(projector), trees)
    return [(jax.device_get(updates["layers"]), by_role(state.slots)) for updates, state in steps]


class Program(NamedTuple):
    """A compiled step, its parameters and the state before it, and where they belong."""

    mesh: jax.sharding.Mesh
    shardings: Any
    state_shardings: Any
    params: Any
    state: Any
    step: jax.stages.Compiled


@functools.cache
@jax.enable_x64(True)
def compiled(name: str, mode: str) -> Program:
    case, tx = CASES[name], scale_by_gum(projector_of(name))
    mesh, grads = case.make_mesh(mode), case.pack(gradients(case.per_role, 0))
    shardings = case.shardings(mesh)
    zeros = jax.device_put(jax.tree.map(np.zeros_like, grads), shardings)
    state_shardings = gum_optax.state_shardings(tx, zeros, shardings)
    state = jax.device_put(jax.device_get(tx.init(grads)), state_shardings)

    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    # Without `out_shardings`: parameters and state must stay where they are.
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(zeros, state, zeros)
    program = lowered.compile(compiler_options=helpers.QUICK)
    return Program(mesh, shardings, state_shardings, zeros, state, program)


@every_run
@jax.enable_x64(True)
def test_equals_the_unsharded_run(name, mode):
    case, program = CASES[name], compiled(name, mode)
    mesh, shardings, state_shardings, zeros, state, step = program
    with jax.set_mesh(mesh):
        for t, (expected, slots) in enumerate(unsharded(case.per_role, projector_of(name))):
            grads = jax.device_put(case.pack(gradients(case.per_role, t)), shardings)
            # A compiled program refuses arrays of other types or shardings than it was made for.
            updates, state = step(zeros, state, grads)
            assert_placed(updates, shardings)
            assert_placed(state, state_shardings)
            assert_close(updates, case.pack(expected))
            assert by_role(state.slots) == slots


def plain_step(hlo: str) -> str:
    """The HLO of a step that is no refresh: of the entry's one conditional, the first branch."""
    others, entry = hlo.split("\nENTRY ")
    plain, conditionals = re.subn(
        r"branch_computations=\{([^,}]+),[^,}]+\}", r"branch_computations={\1}", entry
    )
    assert conditionals == 1
    return f"{others}\nENTRY {plain}"


@every_run
def test_a_plain_step_gathers_each_slot_once_and_no_other_matrix(name, mode):
    """A slot's rows are gathered; along its columns, each iteration reduces a product [M, M].

    Low-rank matrices reduce [R, n], and [R, R] in each iteration. Where layers are sharded, a slot
    is cut along its columns, and its update returns to the device of its layer.
    """
    case = CASES[name]
    found = collectives(plain_step(compiled(name, mode).step.as_text() or ""))
    arrays = [(each.times, shape) for each in found for shape in each.shapes]
    roles, iterations = 2, 5
    slots = roles * GAMMA
    # The low-rank values of a group can be as large as a matrix, but have one short side.
    wide = [each for each in arrays if math.prod(each[1]) >= M * M and R not in each[1]]
    products = [each for each in wide if each[1][-2:] == (M, M)]
    matrices = [each for each in wide if each not in products and math.prod(each[1]) >= M * N]
    assert _entries(products) <= slots * iterations * M * M, products
    layers_are_cut = any(case.up[: len(case.batch)])
    assert _entries(matrices) <= (2 if layers_are_cut else 1) * slots * M * N, matrices
    # A slot whose layer axis is sharded comes with the basis and the low-rank part of its matrix.
    per_slot = 2 * M * N + iterations * M * M + M * R + R * N
    per_matrix = R * N + iterations * R * R
    scalars = 100
    allowed = slots * per_slot + roles * case.per_role * per_matrix + scalars
    assert _entries(arrays) <= allowed
    assert bool(found) == (case.mesh.keys() != {"data"})


def _entries(arrays: Sequence[tuple[int, tuple[int, ...]]]) -> int:
    return sum(times * math.prod(shape) for times, shape in arrays)


def test_one_device_needs_no_mesh():
    tx = gum_optax.scale_by_gum(LowRank(R))
    tree = [jax.ShapeDtypeStruct((M, N), jnp.float32)] * 4
    jaxpr = jax.jit(tx.update).trace(tree, jax.eval_shape(tx.init, tree)).jaxpr
    assert "sharding_constraint" not in str(jaxpr)
