"""On eight devices: numbers, draws, shardings and what is sent between devices."""

import functools
import math
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
from experiments.collectives import collectives
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

    def tree(self, leaf: Any) -> Any:
        """`leaf(shape, spec)` for each parameter; a lone leaf with batch axes is no list."""
        layers = [
            {
                "up": leaf((*self.batch, M, N), self.up),
                "down": leaf((*self.batch, N, M), self.down),
            }
            for _ in range(self.leaves)
        ]
        return {"layers": layers if self.leaves > 1 else layers[0]}

    def gradients(self, seed: int) -> Any:
        seeds = iter(range(100 * seed, 100 * seed + 50))
        return self.tree(lambda shape, _: helpers.gradients(next(seeds), *shape))

    def make_mesh(self, mode: str) -> jax.sharding.Mesh:
        names, sizes = tuple(self.mesh), tuple(self.mesh.values())
        return jax.make_mesh(sizes, names, axis_types=(MODES[mode],) * len(names))

    def shardings(self, mesh: jax.sharding.Mesh) -> Any:
        return self.tree(lambda _, spec: NamedSharding(mesh, spec))


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

# Every case is compiled, for what it sends. The others than these run too; each compiles again.
NOT_RUN = (
    "fsdp, columns",
    "data x fsdp, one axis entry",
    "stacked, fsdp x tensor",
    "layers x fsdp",
    "separate layers of experts",
)
# Explicit mode runs the same code; a case for each way in which a type can carry a sharding.
EXPLICIT = ("fsdp x tensor", "layers x fsdp", "experts x fsdp", "separate layers of experts")
AUTO = [(name, "Auto") for name in CASES if name not in NOT_RUN]
# In both modes, and so once by `make test` and once by `make slow`.
TWICE = {(name, "Auto") for name in EXPLICIT}
RUNS = [pytest.param(*run, marks=[pytest.mark.slow] if run in TWICE else []) for run in AUTO]
RUNS += [(name, "Explicit") for name in EXPLICIT]

every_case = pytest.mark.parametrize("name", CASES)


# A refresh by the library's projectors takes most of the time to compile. Elsewhere, coordinates
# that the key decides.
PROJECTORS: dict[str, Any] = {
    "fsdp, rows": projectors.random_orthonormal,
    "fsdp x tensor": projectors.subspace_iteration,
    "layers x fsdp": projectors.subspace_iteration,
}


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


@functools.cache
@jax.enable_x64(True)
def unsharded(
    leaves: int, batch: tuple[int, ...], projector: Any
) -> tuple[Any, list[tuple[Any, Any]]]:
    """The first state and, after each step, updates and state; of cases with the same leaves."""
    tx, case = scale_by_gum(projector), Case(leaves, batch, {}, P(), P())
    trees = [case.gradients(t) for t in range(PERIOD + 1)]
    state = tx.init(trees[0])
    return jax.device_get((state, list(helpers.run(tx, trees, state=state))))


@pytest.mark.parametrize(("name", "mode"), RUNS)
@jax.enable_x64(True)
def test_equals_the_unsharded_run(name, mode):
    case, projector = CASES[name], PROJECTORS.get(name, tables.SIMPLE.projector)
    tx, mesh = scale_by_gum(projector), case.make_mesh(mode)
    shardings = case.shardings(mesh)
    params = jax.device_put(case.gradients(0), shardings)
    state_shardings = gum_optax.state_shardings(tx, params, shardings)
    first_state, expected_steps = unsharded(case.leaves, case.batch, projector)
    with jax.set_mesh(mesh):
        state = jax.device_put(first_state, state_shardings)
        # A compiled program refuses arrays of other types or shardings than it was made for.
        update = jax.jit(tx.update).lower(params, state).compile(compiler_options=helpers.QUICK)
        for t, (expected, expected_state) in enumerate(expected_steps):
            grads = jax.device_put(case.gradients(t), shardings)
            updates, state = update(grads, state)
            assert_placed(updates, shardings)
            assert_placed(state, state_shardings)
            assert_close(updates, expected)
            assert state.slots.keys() == expected_state.slots.keys()
            for group, slots in state.slots.items():
                np.testing.assert_array_equal(slots, expected_state.slots[group])


def plain_step(name: str) -> str:
    """The HLO of a step that is no refresh: its counter is a constant, so XLA drops the branch."""
    # The projector is part of that branch, so the cheapest will do.
    case, tx = CASES[name], scale_by_gum(helpers.first_coordinates)
    mesh = case.make_mesh("Auto")
    shardings = case.shardings(mesh)
    params = case.tree(
        lambda shape, spec: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        )
    )
    state_shardings = gum_optax.state_shardings(tx, params, shardings)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        state_shardings,
    )

    def step(grads, state):
        return tx.update(grads, state._replace(count=jnp.int32(1)))

    compiled = jax.jit(step).lower(params, state).compile(compiler_options=helpers.QUICK)
    return compiled.as_text() or ""


@every_case
def test_a_plain_step_gathers_each_slot_once_and_no_other_matrix(name):
    """A slot's rows are gathered; along its columns, each iteration reduces a product [M, M].

    Low-rank matrices reduce [R, n], and [R, R] in each iteration.
    """
    case = CASES[name]
    found = collectives(plain_step(name))
    arrays = [(each.times, shape) for each in found for shape in each.shapes]
    roles, count, iterations = 2, case.leaves * math.prod(case.batch), 5
    slots = roles * GAMMA
    # The low-rank values of a group can be as large as a matrix, but have one short side.
    wide = [each for each in arrays if math.prod(each[1]) >= M * M and R not in each[1]]
    products = [each for each in wide if each[1][-2:] == (M, M)]
    matrices = [each for each in wide if each not in products and math.prod(each[1]) >= M * N]
    assert _entries(products) <= slots * iterations * M * M, products
    assert _entries(matrices) <= slots * M * N, matrices
    # A slot whose layer axis is sharded comes with the basis and the low-rank part of its matrix.
    per_slot = 2 * M * N + iterations * M * M + M * R + R * N
    per_matrix = R * N + iterations * R * R
    scalars = 100
    allowed = slots * per_slot + roles * count * per_matrix + scalars
    assert _entries(arrays) <= allowed
    assert bool(found) == (case.mesh.keys() != {"data"})


def _entries(arrays: Sequence[tuple[int, tuple[int, ...]]]) -> int:
    return sum(times * math.prod(shape) for times, shape in arrays)


def test_one_device_needs_no_mesh():
    tx, case = gum_optax.scale_by_gum(LowRank(R)), CASES["fsdp, rows"]
    tree = case.tree(lambda shape, _: jax.ShapeDtypeStruct(shape, jnp.float32))
    hlo = jax.jit(tx.update).lower(tree, jax.eval_shape(tx.init, tree)).as_text()
    assert "sharding_constraint" not in hlo
