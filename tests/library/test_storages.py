"""Storages: dtypes, bytes and values of the inner state between two steps."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, low_rank, residuals, samplers, storages
from tests import helpers, tables

TREE = {
    "a": [np.asarray(G, np.float32) for G in helpers.gradients(0, 4, 5, 8)],
    "b": np.asarray(helpers.gradients(1, 2, 3, 8, 5), np.float32),
    "single": np.asarray(helpers.gradients(2, 6, 6), np.float32),  # Uncompressed.
}
STEPS = 5


def trees(tree: Any) -> list[Any]:
    scales = np.asarray([1.0, -0.7, 1.9, 0.4, 1.1], np.float32)
    assert len(scales) == STEPS
    return [jax.tree.map(lambda x, s=scale: s * x, tree) for scale in scales]


def run(tx: Any, tree: Any) -> Any:
    """Steps from a state that is one program, not as many as it has operations."""
    state = jax.jit(tx.init, compiler_options=helpers.QUICK)(tree)
    return helpers.run(tx, trees(tree), state=state)


def around(inner: Any, storage: storages.Storage, **parts: Any) -> Any:
    """Low rank with one slot for each group, refreshed every other step."""
    return low_rank(inner, dataclasses.replace(tables.SIMPLE, storage=storage, **parts))


class Quantized(NamedTuple):
    """Integers, and what one of them is worth in each row."""

    values: Any
    scale: Any


def _quantize(array: jax.Array) -> Quantized:
    scale = jnp.max(jnp.abs(array), axis=-1, keepdims=True) / 127
    values = jnp.round(array / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Quantized(values, scale.astype(jnp.float32))


INT8 = storages.Storage(
    pack=_quantize,
    unpack=lambda packed, like: (packed.values * packed.scale).astype(like.dtype),
)

INNER = {
    "trace": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "chain": optax.chain(optax.trace(0.9), gum_optax.scale_by_polar(), optax.scale(-0.1)),
}


# Cast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", np.dtype("float16")], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_cast_changes_floating_arrays_of_the_inner_state_alone(inner, dtype):
    storage = storages.cast(dtype)
    plain, cast = (
        jax.eval_shape(around(INNER[inner], s).init, TREE) for s in (storages.plain(), storage)
    )
    for before, after in zip(helpers.described(plain), helpers.described(cast), strict=True):
        path, shape, was = before
        inside = path.startswith((".inner", ".uncompressed"))
        floating = jnp.issubdtype(was, jnp.floating)
        expected = jnp.dtype(dtype) if inside and floating else was
        assert after == (path, shape, expected)
    # Half of the bytes of moments; bases, slots, counts and keys are as before.
    moments = [
        leaf.size
        for part in (plain.inner, plain.uncompressed)
        for leaf in jax.tree.leaves(part)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert helpers.state_bytes(plain) - helpers.state_bytes(cast) == 2 * sum(moments) > 0


def test_a_cast_state_is_the_float32_state_rounded():
    """Step by step: what is kept is rounded, what is computed from it is not."""
    bfloat16 = around(optax.trace(0.9), storages.cast(jnp.bfloat16), carry=carries.keep)
    exact = around(optax.trace(0.9), storages.plain(), carry=carries.keep)
    state, update = exact.init(TREE), jax.jit(exact.update, compiler_options=helpers.QUICK)
    for tree, (updates, packed) in zip(trees(TREE), run(bfloat16, TREE), strict=True):
        expected, state = update(tree, state)
        # Updates are those of the unrounded momentum.
        helpers.assert_trees_close(updates, expected, 1e-6)
        as_float32 = lambda leaf: np.asarray(leaf, np.float32)  # noqa: E731
        kept, momentum = (packed.inner, packed.uncompressed), (state.inner, state.uncompressed)
        for got, want in zip(jax.tree.leaves(kept), jax.tree.leaves(momentum), strict=True):
            assert got.dtype == jnp.bfloat16
            rounded = np.asarray(want).astype(jnp.bfloat16)
            # Two programs: where float32 differs in its last bit, rounding may go the other way.
            np.testing.assert_allclose(as_float32(got), as_float32(rounded), rtol=2**-8)
        # The next step starts from the rounded state on both sides.
        inner, uncompressed = jax.tree.map(as_float32, kept)
        state = state._replace(inner=inner, uncompressed=uncompressed)


@pytest.mark.parametrize("parameters", ["float64", "float32", "bfloat16"])
def test_the_inner_transformation_computes_in_float32_or_in_float64(parameters):
    seen = []

    def inner(updates, state, params=None):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(state))
        return updates, state

    spy = optax.GradientTransformation(optax.trace(0.9).init, inner)
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda leaf: leaf.astype(parameters), TREE)
        tx = around(spy, storages.cast(jnp.bfloat16))
        state = jax.eval_shape(tx.init, tree)
        updates, after = jax.eval_shape(tx.update, tree, state)
        assert helpers.described(after) == helpers.described(state)
        assert helpers.described(updates) == helpers.described(tree)
    assert set(seen) == {jnp.promote_types(parameters, jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after.inner)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", ["int32", jnp.int32, bool, jnp.complex64, "bogus", 3.0, None])
def test_cast_rejects_what_is_no_real_floating_dtype(dtype):
    with pytest.raises(TypeError, match="`dtype` must be a real floating-point dtype"):
        storages.cast(dtype)


def test_plain_is_the_default_and_keeps_the_dtypes_of_the_parameters():
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), TREE)
    default = jax.eval_shape(low_rank(optax.trace(0.9), tables.SIMPLE).init, tree)
    plain = jax.eval_shape(around(optax.trace(0.9), storages.plain()).init, tree)
    assert helpers.described(default) == helpers.described(plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(plain.inner)} == {jnp.dtype(jnp.bfloat16)}


# A user's storage that changes the structure ------------------------------------------------------


def numbers(state: Any) -> list[np.ndarray]:
    """A packed state in float32."""

    def is_packed(node):
        return isinstance(node, Quantized)

    return [
        np.multiply(*node) if is_packed(node) else np.asarray(node, np.float32)
        for node in jax.tree.leaves(state, is_leaf=is_packed)
    ]


# Second moments do not rotate, and a restart sees nothing of the old state. A storage sees one
# array of each group, whether its matrices are separate leaves or one leaf.
@pytest.mark.parametrize(
    ("inner", "carry", "group"),
    [
        ("trace", "restart", "b"),
        ("trace", "keep", "a"),
        ("trace", "rotate", "b"),
        ("adam", "keep", "a"),
    ],
)
def test_a_structure_changing_storage_works_with_every_carry(inner, carry, group):
    parts, tree = {"carry": getattr(carries, carry)}, {k: TREE[k] for k in (group, "single")}
    packed = run(around(INNER[inner], INT8, **parts), tree)
    plain = run(around(INNER[inner], storages.plain(), **parts), tree)
    for (_, got), (_, expected) in zip(packed, plain, strict=True):
        for part in ("inner", "uncompressed"):
            mine, theirs = numbers(getattr(got, part)), numbers(getattr(expected, part))
            for a, b in zip(mine, theirs, strict=True):
                # At most five roundings of half a 127th of the largest entry; decay 0.9 and
                # rotations do not enlarge them.
                np.testing.assert_allclose(a, b, rtol=0, atol=STEPS / 254 * np.abs(b).max())


@tables.every_storage
@pytest.mark.parametrize("inner", INNER)
def test_dtypes_and_structure_are_stable_over_a_scan(inner, storage):
    tx = around(INNER[inner], storage, carry=carries.keep)

    def steps(state, tree):
        def step(state, _):
            updates, state = tx.update(tree, state)
            return state, updates

        # A scan raises unless a step keeps structure, shapes and dtypes of the state.
        return jax.lax.scan(step, state, length=3)

    state = jax.eval_shape(tx.init, TREE)
    after, updates = jax.eval_shape(steps, state, TREE)
    assert helpers.described(after) == helpers.described(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


@tables.every_storage
@pytest.mark.parametrize("inner", INNER)
def test_the_plan_counts_a_packed_state_to_the_byte(inner, storage):
    tx = gum_optax.for_matrices(around(INNER[inner], storage, basis_storage=storage), 0.1)
    params = TREE | {"bias": np.ones(7, np.float32)}
    state = jax.eval_shape(tx.init, params)
    plan = gum_optax.memory_plan(tx, params)
    assert plan.total_bytes == helpers.state_bytes(state)
    [row] = [row for row in plan.rows if row.name == "a.*"]
    own = helpers.low_rank_state(state)
    of_group = (own.basis["a.*"], own.slots["a.*"])
    moments = [
        node["a.*"]
        for node in jax.tree.leaves(
            own.inner, is_leaf=lambda node: isinstance(node, dict) and "a.*" in node
        )
        if isinstance(node, dict)
    ]
    assert row.bytes == helpers.state_bytes((of_group, moments))


def test_an_int8_state_takes_a_quarter():
    plain, int8 = (
        helpers.state_bytes(jax.eval_shape(around(optax.trace(0.9), s).init, TREE).inner)
        for s in (storages.plain(), INT8)
    )
    rows = 4 * 2 + 5 + 6 * 2 + 5  # Of a: low and slot; of b likewise.
    assert int8 == plain / 4 + 4 * rows


@pytest.mark.parametrize("storage", [storages.int8, storages.float8, storages.int6, storages.int4])
def test_without_a_block_each_row_has_one_scale(storage):
    """However long rows are, their numbers are those of a block of their length."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 700)), jnp.float32)
    rows, long = storage(block=None), storage(block=700)
    packed = rows.pack(x)
    assert packed.scale.shape == (3, 1)
    jax.tree.map(np.testing.assert_array_equal, packed, long.pack(x))
    np.testing.assert_array_equal(rows.unpack(packed, x), long.unpack(packed, x))
    with pytest.raises(ValueError, match="`block` must be at least 1, got 0"):
        storage(block=0)


# Bases --------------------------------------------------------------------------------------------


@tables.every_storage
@pytest.mark.parametrize("carry", [carries.keep, carries.rotate], ids=["keep", "rotate"])
def test_packed_bases_are_those_of_a_projector_that_rounds(carry, storage):
    """Step by step over three periods, with a projector that starts from the previous basis."""

    def turned(key, gradient, rank, previous_basis):
        del key
        return jnp.linalg.qr(0.5 * previous_basis + gradient[:, :rank])[0]

    def rounded(*args):
        basis = turned(*args)
        return storage.unpack(storage.pack(basis), basis)

    parts = {"carry": carry, "projector": turned}
    packed = run(around(optax.trace(0.9), storages.plain(), basis_storage=storage, **parts), TREE)
    parts |= {"projector": rounded}
    plain = run(around(optax.trace(0.9), storages.plain(), **parts), TREE)
    for (updates, state), (expected, of_plain) in zip(packed, plain, strict=True):
        helpers.assert_trees_close(updates, expected, 1e-6)
        helpers.assert_trees_close(state.inner, of_plain.inner, 1e-6)
        for name, basis in of_plain.basis.items():
            got = storage.unpack(state.basis[name], basis)
            np.testing.assert_allclose(np.asarray(got, np.float32), basis, rtol=0, atol=1e-6)


# Measured, of the singular values: 0.0028 (512 x 64) and 0.0049 (1024 x 256), 0.038 and 0.055.
@pytest.mark.parametrize(
    ("storage", "error", "bytes_"),
    [("int8", 0.005, 8), ("float8", 0.02, 8), ("int6", 0.02, 6), ("int4", 0.06, 4)],
)
@pytest.mark.parametrize(("m", "rank"), [(512, 64), (1024, 256)])
def test_bases_in_few_bits_are_nearly_orthonormal(storage, error, bytes_, m, rank):
    chosen = getattr(storages, storage)()
    gaussian = np.random.default_rng(0).standard_normal((m, rank))
    basis = jnp.asarray(np.linalg.qr(gaussian)[0], jnp.float32)
    packed = chosen.pack(basis)
    unpacked = np.asarray(chosen.unpack(packed, basis), np.float64)
    apart = np.abs(np.linalg.svd(unpacked, compute_uv=False) - 1).max()
    assert error / 4 < apart < error
    assert packed.codes.nbytes == m * rank * bytes_ // 8


def test_a_storage_sees_floating_arrays_alone():
    seen = []

    def pack(array):
        seen.append(array.dtype)
        return array

    spy = storages.Storage(pack, lambda packed, like: packed)
    tx = around(optax.scale_by_adam(), spy)
    jax.eval_shape(tx.update, TREE, jax.eval_shape(tx.init, TREE))
    assert set(seen) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("option", ["storage", "basis_storage"])
def test_what_is_no_storage_is_named(option):
    with pytest.raises(TypeError, match=f"`{option}` must be a Storage"):
        LowRank(**{option: jnp.bfloat16})


# Rounding errors of slots -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["exclusive", "additive"])
@pytest.mark.parametrize("stacked", [False, True], ids=["leaves", "stack"])
def test_what_rounding_adds_inside_the_basis_is_removed_from_drawn_matrices(form, stacked):
    """GUM's updates are those of its parts, less the rounding errors of slots in their bases.

    Newton-Schulz makes these errors large, since exact momentum has nothing there.
    """
    rng = np.random.default_rng(0)
    steps = [jnp.asarray(each, jnp.float32) for each in rng.standard_normal((5, 4, 24, 40))]
    # Of four slots, those for matrices that are not drawn are empty.
    rule = residuals.sampled(samplers.bernoulli(0.5), form=form)
    compression = LowRank(6, 10, residual=rule, storage=storages.int8(), key=1)
    muon = optax.chain(optax.trace(0.95), gum_optax.scale_by_polar())

    def last_updates(tx: Any) -> Any:
        updates: Any = None
        state, update = None, jax.jit(tx.update)
        for gradients in steps:
            tree = {"w": gradients} if stacked else list(gradients)
            updates, state = update(tree, state or tx.init(tree))
        each = updates["w"] if stacked else jnp.stack(updates)
        return np.asarray(each, np.float64), jax.tree.map(np.asarray, state)

    clean, state = last_updates(gum_optax.scale_by_gum(compression))
    raw, same_state = last_updates(low_rank(muon, compression))
    jax.tree.map(np.testing.assert_array_equal, state, same_state)
    ((slots,), (bases,)) = (list(each.values()) for each in (state.slots, state.basis))
    drawn = set(slots.tolist()) - {4}
    assert 0 < len(drawn) < 4
    for i, (matrix, unclean) in enumerate(zip(clean, raw, strict=True)):
        basis = bases[i].astype(np.float64)
        if i not in drawn:
            np.testing.assert_allclose(matrix, unclean, atol=1e-6)
            continue
        # Outside of the basis nothing changes. Inside, the additive form has the update of the
        # projection, all of whose singular values are near one; the exclusive form has nothing.
        outside = np.eye(24) - basis @ basis.T
        np.testing.assert_allclose(outside @ matrix, outside @ unclean, atol=1e-5)
        removed = np.linalg.norm(basis.T @ (matrix - unclean)) ** 2
        assert 0.02 < removed / np.linalg.norm(outside @ matrix) ** 2 < 0.3
        values = np.linalg.svd(basis.T @ matrix, compute_uv=False)
        if form == "exclusive":
            assert values.max() < 1e-5
        else:
            assert values.min() > 0.6 and values.max() < 1.25


def test_exact_momentum_is_left_alone():
    """Without a storage that rounds, GUM is the program of its parts."""
    tree = [jnp.ones((8, 12))] * 4
    muon = optax.chain(optax.trace(0.95), gum_optax.scale_by_polar())
    gum, parts = (
        str(jax.make_jaxpr(tx.update)(tree, jax.eval_shape(tx.init, tree)))
        for tx in (gum_optax.scale_by_gum(LowRank(2, 2)), low_rank(muon, LowRank(2, 2)))
    )
    assert gum == parts
