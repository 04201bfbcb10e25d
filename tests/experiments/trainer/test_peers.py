"""Optimizers of other papers, as the experiments build them, against float64 and by their state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.trainer import optimizers
from experiments.trainer.config import Config, change
from experiments.trainer.options import ConfigError
from tests import helpers, reference

M, N, RANK = 6, 10, 2
# With names of the models, by which the leaf is a matrix.
LAYER = {"attention": {"query": {"kernel": np.zeros((M, N), np.float32)}}}
TREE = {"layers": [LAYER]}


def _build(name: str, layers: int = 1, **options: Any) -> Any:
    """Builds an optimizer with steps of the size of its direction: no clipping, no schedule."""
    base = Config(warmup=0.0, clip_norm=0.0, learning_rate=1.0, final_learning_rate=1.0)
    return optimizers.build(change(base, optimizer=name, **options), layers)


def _gradients() -> np.ndarray:
    """Four gradients whose columns differ in size."""
    return np.random.default_rng(0).normal(size=(4, M, N)) * np.arange(1, N + 1)


def _updates(name: str, **options: Any) -> list[np.ndarray]:
    trees = [jax.tree.map(lambda _, G=G: G.astype(np.float32), TREE) for G in _gradients()]
    run = helpers.run(_build(name, **options), trees, TREE)
    return [np.asarray(jax.tree.leaves(update)[0]) for update, _ in run]


def test_rmnp_is_momentum_with_columns_of_one_size():
    momentum = 0.0
    for G, update in zip(_gradients(), _updates("rmnp"), strict=True):
        momentum = 0.95 * momentum + G
        expected = -0.2 * momentum / np.sqrt(np.mean(momentum**2, axis=0))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)


def test_normuon_is_muon_with_outputs_of_one_size():
    momentum, v, b2 = 0.0, 0.0, Config().b2
    for t, (G, update) in enumerate(zip(_gradients(), _updates("normuon"), strict=True), 1):
        momentum = 0.95 * momentum + G
        polar = reference.newton_schulz(momentum)
        v = b2 * v + (1 - b2) * np.mean(polar**2, axis=0)
        step = polar / np.sqrt(v / (1 - b2**t))
        expected = -0.2 * step / np.sqrt(np.mean(step**2))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


def test_mud_is_momentum_with_decorrelated_rows():
    momentum = 0.0
    for G, update in zip(_gradients(), _updates("mud"), strict=True):
        momentum = 0.95 * momentum + G
        expected = -0.2 * N**0.5 * reference.decorrelated(momentum)
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("columns", ["standardized", "normalized", "as_is"])
def test_swan_is_the_polar_factor_of_standardized_columns(decay, columns):
    of = {
        "standardized": lambda M: (M - M.mean(0)) / M.std(0),
        "normalized": lambda M: M / np.linalg.norm(M, axis=0),
        "as_is": lambda M: M,
    }[columns]
    momentum, updates = 0.0, _updates("swan", decay=decay, columns=columns)
    for G, update in zip(_gradients(), updates, strict=True):
        momentum = decay * momentum + G
        expected = -0.2 * N**0.5 * reference.newton_schulz(of(momentum))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


def test_swan_by_mud_decorrelates_standardized_gradients():
    for G, update in zip(
        _gradients(), _updates("swan", orthogonalizer="decorrelation"), strict=True
    ):
        expected = -0.2 * N**0.5 * reference.decorrelated((G - G.mean(0)) / G.std(0))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


def test_swan_without_momentum_stores_none():
    with pytest.raises(ConfigError, match=r"`momentum` is int8, .* `decay` is 0"):
        _build("swan", momentum="int8")


def test_the_ramp_begins_anew_with_every_period():
    """One of two layers is drawn, and the count restarts for both."""
    layers = {"layers": [LAYER] * 2}
    rng = np.random.default_rng(0)
    trees = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), layers)
        for _ in range(5)
    ]
    options = {"rank": RANK, "period": 3, "full_rank_layers": 1, "layers": 2}
    ramped, plain = (
        [update for update, _ in helpers.run(_build(name, **options), trees, layers)]
        for name in ("ramped_gum", "gum")
    )
    for t, update, of_gum in zip((1, 2, 3, 1, 2), ramped, plain, strict=True):
        weight = 1 - 0.95**t
        jax.tree.map(
            lambda ours, theirs, weight=weight: np.testing.assert_allclose(
                ours, weight * theirs, rtol=1e-5, atol=1e-7
            ),
            update,
            of_gum,
        )


def test_the_orthogonalized_residual_draws_no_layers():
    for options in ({"full_rank_layers": 1}, {"full_rank_layers": 0, "residual_decay": 1.0}):
        with pytest.raises(ConfigError, match="`residual` is polar"):
            _build("gum", residual="polar", **options)


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("rmnp", M * N),
        ("normuon", M * N + N),
        ("mud", M * N),
        ("swan", 0),
        ("racs", M + N + 1),
        ("adam_mini", M * N + N),
        ("mofasgd", RANK * (M + N + 1)),
        ("ldadam", M * N + M * RANK + 2 * N * RANK),
        ("subtrack", M * RANK + 2 * N * RANK + 1),
    ],
)
def test_states_have_the_sizes_of_the_table_of_methods(name, numbers):
    """docs/methods.md counts the numbers of one matrix."""
    ranked = name in ("mofasgd", "ldadam", "subtrack")
    state = jax.eval_shape(_build(name, **({"rank": RANK} if ranked else {})).init, TREE)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sum(leaf.size for leaf in floats) == numbers
