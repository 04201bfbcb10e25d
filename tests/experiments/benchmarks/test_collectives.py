"""The counter of collectives, on programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.collectives import Collective, collectives, total_bytes
from tests.helpers import QUICK

SHARDED = P("d")


def compiled(function, *shapes, out=SHARDED):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SHARDED, out_specs=out, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return collectives(jax.jit(mapped).lower(*arguments).compile(QUICK).as_text() or "")


def test_a_loop_counts_by_its_trips():
    def three_sums(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(jax.lax.psum(x, "d")), x)

    found = compiled(three_sums, (16, 5))
    assert found == [Collective("all-reduce", ((2, 5),), 40, 3)]
    assert total_bytes(found) == 120


def test_a_gather_has_the_shape_of_its_result():
    found = compiled(lambda x: jax.lax.all_gather(x, "d", tiled=True), (16, 5), out=P())
    assert found == [Collective("all-gather", ((16, 5),), 320, 1)]


def test_of_a_conditional_the_branch_that_sends_more_counts():
    def either(x):
        return jax.lax.cond(
            x[0, 0] > 0,
            lambda: jax.lax.psum(x, "d"),
            lambda: jnp.sum(jax.lax.all_gather(x, "d"), axis=0),
        )

    assert [each.kind for each in compiled(either, (16, 5))] == ["all-gather"]


def test_a_loop_of_unknown_length_is_refused():
    def until_large(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: jax.lax.psum(x, "d") + 1, x)

    with pytest.raises(ValueError, match="unknown length"):
        compiled(until_large, (16, 5))
