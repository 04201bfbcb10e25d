"""The update lowers for TPU and GPU from a machine without them, and runs there by itself."""

import itertools
import re
from typing import Any

import jax
import optax
import pytest

import gum_optax
from gum_optax import LowRank, carries, dimension_numbers, low_rank, projectors, residuals, storages
from tests.tables import CARRIES, PROJECTORS, RESIDUALS

PLATFORMS = ("tpu", "cuda")
SWITCH = projectors.switch(projectors.svd, projectors.random_orthonormal, 3)


def shapes(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# Separate and stacked leaves, wide and tall, an uncompressed group, and one in lower precision.
MATRICES = {
    "layers": [{"wide": shapes(4, 6)} for _ in range(2)],
    "stacked": {"tall": shapes(3, 6, 4, dtype="bfloat16")},
    "single": shapes(4, 6),
}
MODEL = MATRICES | {"embedding": shapes(8, 4), "norm": shapes(4)}


def assert_lowers(tx: optax.GradientTransformation, params: Any) -> None:
    """Exports the update, for both platforms at once.

    That fails for an op without a lowering on one of them, and for a custom call that jax does not
    promise to keep, such as every call into this Python process.
    """
    state = jax.eval_shape(tx.init, params)
    exported = jax.export.export(jax.jit(tx.update), platforms=PLATFORMS)(params, state, params)
    module = exported.mlir_module()
    calls = set(re.findall(r"custom_call @(\w+)", module))
    assert not [name for name in calls if "callback" in name.lower()]
    assert not re.findall(r"stablehlo\.(?:send|recv|infeed|outfeed)", module)
    assert not exported.ordered_effects and not exported.unordered_effects
    # Factorizations are calls into each platform's own library; that of the CPU is in none.
    assert {name.startswith("cusolver") for name in calls} == {True, False}, calls
    assert not [name for name in calls if "lapack" in name]


def momentum(projector: Any, **parts: Any) -> Any:
    parts = {"residual": residuals.sampled(1), "projector": projector} | parts
    return low_rank(optax.trace(0.9), LowRank(2, 2, **parts))


# What lowers does not depend on what is beside it, so one program serves a part of each kind.
PARTS = [PROJECTORS | {"switch": SWITCH}, RESIDUALS, CARRIES]
NAMES = itertools.islice(zip(*map(itertools.cycle, PARTS), strict=True), max(map(len, PARTS)))
COMBINED = [
    pytest.param(
        *(parts[name] for parts, name in zip(PARTS, names, strict=True)), id=", ".join(names)
    )
    for names in NAMES
]


@pytest.mark.parametrize(("projector", "residual", "carry"), COMBINED)
def test_every_projector_residual_rule_and_carry(projector, residual, carry):
    storage = storages.cast("bfloat16")
    assert_lowers(momentum(projector, residual=residual, carry=carry, storage=storage), MATRICES)


def test_every_leaf_in_bfloat16():
    halves = jax.tree.map(lambda leaf: shapes(*leaf.shape, dtype="bfloat16"), MATRICES)
    assert_lowers(momentum(projectors.subspace_iteration), halves)


def test_low_rank_adam_that_goes_on():
    compression = LowRank(2, 2, projector=projectors.svd, carry=carries.keep)
    assert_lowers(low_rank(optax.scale_by_adam(), compression), MATRICES)


def test_gum_with_its_fallback():
    tx = gum_optax.gum(
        optax.cosine_decay_schedule(0.1, 10),
        LowRank(2, 2, residuals.sampled(1)),
        weight_decay=0.1,
        weight_dimension_numbers=dimension_numbers.scanned_layers,
    )
    assert_lowers(optax.chain(optax.clip_by_global_norm(1.0), tx), MODEL)


def test_a_projector_on_the_host_is_refused():
    """What the tests above rest on: a call into Python does not pass."""

    def on_the_host(key, gradient, rank, previous_basis):
        like = jax.ShapeDtypeStruct(previous_basis.shape, previous_basis.dtype)
        return jax.pure_callback(lambda basis: basis, like, previous_basis)

    with pytest.raises(NotImplementedError, match="lowering for python_callback"):
        assert_lowers(momentum(on_the_host), MATRICES)
