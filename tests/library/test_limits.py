"""Limits in which GUM and GaLore must equal optimizers of optax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import LowRank, galore, residuals, samplers
from tests import helpers

STEPS = 7  # Over three periods of PERIOD steps.
PERIOD = 3

# Largest differences measured: 1.1e-6 for directions, whose Newton-Schulz in float32 starts from
# momenta that differ by a factor; 6.6e-7 for parameters.
DIRECTIONS, PARAMETERS = 2e-5, 2e-6


def everyone(count):
    """A sampler that draws every matrix, always."""
    return samplers.Sampling(count, 1.0, lambda key: jnp.arange(count, dtype=jnp.int32))


def trees(shapes, seed=0, steps=STEPS):
    """Float32 gradients of a tree of shapes, for each step."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return [
        treedef.unflatten([np.asarray(rng.normal(size=shape), np.float32) for shape in leaves])
        for _ in range(steps)
    ]


UNCOMPRESSED = {
    # Shapes, the compression that leaves them uncompressed, and the reason.
    "rank_at_least_m": (
        {"layers": [{"w": (4, 9)}] * 3, "down": [(9, 4)] * 2},
        LowRank(4, PERIOD),
        "rank 4 >= 4",
    ),
    "one_matrix": (
        {"square": (6, 6), "tall": (9, 4), "wide": (4, 9)},
        LowRank(2, PERIOD),
        "single matrix",
    ),
    "everyone_drawn": (
        {"layers": [{"w": (4, 9)}] * 3, "down": [(9, 4)] * 2},
        LowRank(1, PERIOD, residuals.sampled(everyone)),
        "always drawn",
    ),
    "everyone_drawn_additive": (
        {"layers": [{"w": (4, 9)}] * 3, "down": [(9, 4)] * 2},
        LowRank(1, PERIOD, residuals.sampled(everyone, form="additive")),
        "always drawn",
    ),
}


# Compiled once for all trees of the same shapes.
MUON = optax.contrib.scale_by_muon(
    beta=0.9,
    nesterov=False,
    weight_dimension_numbers=lambda tree: jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(), tree
    ),
)


@pytest.mark.parametrize("why", UNCOMPRESSED)
def test_uncompressed_groups_are_muon(why):
    shapes, compression, reason = UNCOMPRESSED[why]
    gradients = trees(shapes)
    ours = gum_optax.scale_by_gum(compression, beta=0.9)
    with pytest.warns(UserWarning, match=f"None of . group.*{reason}"):
        state = jax.jit(ours.init)(gradients[0])
    runs = zip(helpers.run(ours, gradients, state=state), helpers.run(MUON, gradients), strict=True)
    for (updates, state), (expected, _) in runs:
        assert not state.basis
        assert not state.slots
        helpers.assert_trees_close(updates, expected, DIRECTIONS)


@pytest.mark.parametrize(("consistent_rms", "weight_decay"), [(None, 0.1), (0.2, 0.0)])
def test_uncompressed_gum_is_muon_with_its_scaling_decay_and_fallback(consistent_rms, weight_decay):
    shapes = {"up": (4, 9), "down": (9, 4), "mix": [(6, 6)] * 2, "gain": (5,), "offset": ()}
    params, *gradients = trees(shapes, seed=1, steps=STEPS + 1)
    schedule = optax.linear_schedule(0.1, 0.01, STEPS)
    ours = gum_optax.gum(
        schedule,
        LowRank(6, PERIOD),
        weight_decay=weight_decay,
        consistent_rms=consistent_rms,
    )
    muon = optax.contrib.muon(
        schedule,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=consistent_rms,
        nesterov=False,
    )
    # Muon's fallback takes its `nesterov` for Adam as well, which is plain AdamW here.
    with pytest.warns(UserWarning, match="None of 3 group"):
        got = helpers.train(ours, gradients, params)
    expected = helpers.train(muon, gradients, params)
    assert len(got) == STEPS
    for mine, theirs in zip(got, expected, strict=True):
        helpers.assert_trees_close(mine, theirs, PARAMETERS)


def test_galore_on_square_matrices_is_that_of_optax():
    """Square, since for others optax projects the long side, and the paper the short one."""
    weight_decay, scale = 0.1, 0.25
    params, *gradients = trees({"layers": [(8, 8)] * 3, "one": (6, 6)}, seed=2, steps=STEPS + 1)
    ours = gum_optax.adamw(scale * 0.1, galore(3, PERIOD), weight_decay=weight_decay / scale)
    theirs = optax.contrib.galore(
        0.1, rank=3, update_proj_gap=PERIOD, scale=scale, weight_decay=weight_decay
    )
    got, expected = (helpers.train(tx, gradients, params) for tx in (ours, theirs))
    for mine, other in zip(got, expected, strict=True):
        # Moments are carried over refreshes, so the signs of the bases agree too.
        helpers.assert_trees_close(mine, other, PARAMETERS)


SHAPES = {"layers": [{"q": (6, 10), "bias": (10,)}] * 5, "down": [(10, 6)] * 4, "one": (4, 4)}
BYTES = {
    "bases, low-rank momenta": 4 * (5 + 4) * (6 * 2 + 2 * 10),
    "two slots for q, two for down": 4 * 4 * (6 * 10),
    "the single matrix": 4 * (4 * 4),
    "slots, count, period, key": 4 * (2 + 2 + 1 + 1 + 2),
    "adam: two moments of five biases, a count": 4 * (2 * 5 * 10 + 1),
}


def test_state_never_grows_and_its_bytes_are_the_formula():
    params, *gradients = trees(SHAPES, steps=2 * PERIOD + 2)
    # A projector and a direction without state, which compile at once.
    compression = LowRank(2, PERIOD, residuals.sampled(2), helpers.first_coordinates)
    tx = gum_optax.gum(0.1, compression, orthogonalizer=optax.identity())
    first = jax.jit(tx.init)(params)
    before = helpers.described(first)
    assert helpers.state_bytes(first) == sum(BYTES.values())
    draws = []
    for _, state in helpers.run(tx, gradients, params, first):
        assert helpers.described(state) == before
        draws.append(helpers.low_rank_state(state).slots["layers.*.q"].tolist())
    assert any(a != b for a, b in itertools.pairwise(draws[::PERIOD])), "other matrices are drawn"
