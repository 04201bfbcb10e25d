"""Warnings of `init` about matrices that are not found, and the remedies that they name."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import dataclasses
import functools
import json
import pathlib
import re
import warnings

import jax
import numpy as np
import pytest

import gum_optax
from gum_optax import dimension_numbers
from tests.helpers import first_coordinates, letters, tree_of

TREES = json.loads(pathlib.Path("tests/data/trees.json").read_text())
LAST_TWO = dimension_numbers.MuonDimensionNumbers(-2, -1)
RANK_2 = gum_optax.LowRank(rank=2, residual=gum_optax.residuals.drop(), projector=first_coordinates)


def _ones(*shape):
    return np.ones(shape, np.float32)


def _messages(params, optimizer=gum_optax.gum, compression=RANK_2, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(optimizer(0.1, compression, **options).init, params)
    return [str(w.message) for w in caught]


def _tree(name):
    return tree_of({path: shape for path, shape, _ in TREES[name]})


# Leaves with three or more axes ------------------------------------------------------------------


def test_one_warning_at_init_and_none_at_update():
    params = {"layers": {"up": _ones(3, 8, 12), "w": _ones(8, 12)}}
    optimizer = gum_optax.gum(0.1, RANK_2)
    [message] = _messages(params)
    assert message.startswith("75 % of the parameters outside tables and vectors")
    assert "`layers/up` [3, 8, 12]" in message
    assert "layers/w" not in message
    assert "weight_dimension_numbers=gum_optax.dimension_numbers.infer(function, params" in message
    with pytest.warns(UserWarning):
        state = jax.jit(optimizer.init)(params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    # Adam's first step is a step of the learning rate.
    np.testing.assert_allclose(updates["layers"]["up"], -0.1, rtol=1e-5)


def test_shares_and_the_largest_leaves():
    params = {f"w{i}": _ones(3, 8, 12 + i) for i in range(9)} | {"embed": _ones(99, 99)}
    [message] = _messages(params)
    assert message.startswith("100 % of")
    assert "`w8` [3, 8, 20], `w7` [3, 8, 19], `w6` [3, 8, 18] and 6 more" in message


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"w": _ones(3, 8, 12)}, {"weight_dimension_numbers": {"w": None}}),
        ({"w": _ones(3, 8, 12)}, {"weight_dimension_numbers": LAST_TWO}),
        ({"pos_embedding": _ones(1, 8, 12)}, {}),
        ({"w": _ones(8, 12), "b": _ones(3)}, {}),
        ({}, {}),
        # A rule that knows most of a model, and one that sends a 2-D leaf to the fallback.
        (
            {"query": {"kernel": _ones(8, 4, 8)}, "x": _ones(2, 2, 2)},
            {"weight_dimension_numbers": dimension_numbers.flax},
        ),
        ({"w": _ones(8, 12)}, {"weight_dimension_numbers": lambda params: {"w": None}}),
    ],
    ids=["None", "given", "table", "no such leaf", "empty", "most are known", "function"],
)
def test_no_warning_where_nothing_is_to_say(params, options):
    assert _messages(params, **options) == []


def test_a_rule_that_leaves_most_of_a_model_open_does_not_silence_the_warning():
    params = _tree("maxtext_llama3_8b_scanned")
    rule = functools.partial(dimension_numbers.scanned_layers, layer_axis=0)
    assert _messages(params, weight_dimension_numbers=dimension_numbers.default)[0].startswith(
        "100 % of the parameters outside tables and vectors"
    )
    assert "than a matrix has entries" in _messages(params, weight_dimension_numbers=rule)[0]


@pytest.mark.parametrize(
    ("known", "open_leaves", "share"),
    [
        # More than half of the parameters in one of three leaves.
        ([(1, 8, 12), (1, 8, 12)], [(3, 8, 12)], "60 %"),
        # Less than half of them in two of three leaves.
        ([(3, 8, 12)], [(1, 8, 12), (1, 8, 12)], None),
        ([(1, 8, 12)], [(1, 8, 12)], None),
    ],
    ids=["more than half", "less than half", "half"],
)
def test_the_share_of_the_parameters_decides_whether_a_rule_is_warned_of(known, open_leaves, share):
    """It is the share of the parameters, not of the leaves."""
    params = {f"known{i}": _ones(*shape) for i, shape in enumerate(known)}
    params |= {f"open{i}": _ones(*shape) for i, shape in enumerate(open_leaves)}
    messages = _messages(
        params,
        compression=dataclasses.replace(RANK_2, group_by=gum_optax.by_shape),
        weight_dimension_numbers=lambda params: {
            name: LAST_TWO if name.startswith("known") else None for name in params
        },
    )
    assert [message[: len("60 %")] for message in messages] == ([share] if share else [])


def test_a_rule_for_other_names_does_not_silence_the_warning():
    """`flax` does not know the einsums of Gemma, which are most of its parameters."""
    [message] = _messages(_tree("gemma3_4b"), weight_dimension_numbers=dimension_numbers.flax)
    assert message.startswith("72 % of the parameters outside tables and vectors")
    assert "dimension_numbers.gemma`, which knows all of them" in message


@pytest.mark.parametrize("optimizer", [gum_optax.adamw, functools.partial(gum_optax.gum, beta=0.5)])
def test_other_optimizers_warn_too(optimizer):
    assert len(_messages({"w": _ones(3, 8, 12)}, optimizer)) == 1


def test_the_warning_points_at_the_callers_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gum_optax.gum(0.1).init({"w": _ones(3, 8, 12)})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", [name for name in TREES if name != "easydel_llama3_8b"])
def test_what_it_says_to_write_is_right(name):
    """The rule that the warning names takes every matrix of the model by the right axes."""
    params = _tree(name)
    [message] = _messages(params)
    rule = re.search(r"`weight_dimension_numbers=gum_optax\.dimension_numbers\.(\w+)`", message)
    assert rule is not None, message
    found = letters(params, getattr(dimension_numbers, rule[1]))
    assert {path: set(axes) >= {"i", "o"} for path, axes in found.items()} == {
        path: axes is not None for path, _, axes in TREES[name]
    }
    assert _messages(params, weight_dimension_numbers=getattr(dimension_numbers, rule[1])) == []


def test_stacks_without_names_to_go_by_are_told_of_scanned_layers():
    [message] = _messages({"blocks": {"up": _ones(3, 8, 12), "down": _ones(3, 12, 8)}})
    assert "dimension_numbers.scanned_layers`, which knows all of them" in message
    [message] = _messages({"blocks": {"up": _ones(3, 8, 12), "down": _ones(4, 12, 8)}})
    assert "scanned_layers" not in message


def test_layers_on_the_second_axis_are_not_mixed_by_what_it_says_to_write():
    """Kernels ``[embed, layers, mlp]`` that all begin with the width: it is no number of layers."""
    kernels = {"wi_0": _ones(64, 4, 256), "wi_1": _ones(64, 4, 256)}
    # Norms [embed, layers] show the axis over layers. `scanned_layers` would know as many leaves.
    [message] = _messages({"layers": {**kernels, "norm": {"scale": _ones(64, 4)}}})
    assert "dimension_numbers.flax`, which knows all of them" in message
    # Nothing shows it here, and only the use of the kernels can.
    [message] = _messages({"layers": kernels})
    assert "scanned_layers" not in message
    assert "Write `weight_dimension_numbers=gum_optax.dimension_numbers.infer(" in message


def test_no_rule_is_recommended_that_makes_crowds():
    """`gemma` would make 3000 matrices of 4 x 8, of which `init` warns under an explicit rule."""
    params = {"gating_einsum": _ones(3000, 4, 8)}
    [message] = _messages(params)
    assert "gemma" not in message
    compression = dataclasses.replace(RANK_2, rank=1)
    [message] = _messages(
        params, compression=compression, weight_dimension_numbers=dimension_numbers.gemma
    )
    assert "than a matrix has entries" in message


def test_the_rule_that_knows_most_is_recommended():
    [message] = _messages({"q_einsum": {"w": _ones(4, 64, 16)}, "query": _ones(64, 4, 16)})
    assert (
        "`weight_dimension_numbers=gum_optax.dimension_numbers.gemma`, which knows all" in message
    )


# Axes that are probably mistaken -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 6, 2, 16), True),  # [embed, layers, heads, head_dim]: 3072 matrices of 2 x 16.
        ((12, 2, 16), False),
        ((6, 64, 64), False),
        ((5000, 16, 16), False),  # Neither side is below 16.
    ],
    ids=str,
)
def test_crowds_of_small_matrices(shape, expected):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    compression = dataclasses.replace(RANK_2, rank=1)
    rule = lambda params: LAST_TWO  # noqa: E731
    messages = _messages({"w": leaf}, compression=compression, weight_dimension_numbers=rule)
    assert len(messages) == expected
    if expected:
        assert f"entries of `w` {list(shape)}: an axis over layers or heads" in messages[0]
        assert "infer(function, params, batch)` finds the axes" in messages[0]


# Lists without names -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [None, dimension_numbers.default], ids=["none", "default"])
def test_lists_without_names_are_told_of(rule):
    model = [_ones(40, 8), _ones(8, 12), _ones(12), _ones(12, 8), _ones(8, 40)]
    [message] = _messages(model, weight_dimension_numbers=rule)
    assert message.startswith("The 5 leaves have no names, so that tables, heads and biases")
    assert "infer(function, params, batch)`" in message


def test_one_name_is_enough():
    """Lists below names, as of layers, are no lists without names."""
    assert _messages({"embed": _ones(40, 8), "layers": [_ones(8, 12), _ones(12)]}) == []


@pytest.mark.parametrize("params", [[_ones(8, 12)] * 3, [_ones(8)] * 3, {"w": _ones(8, 4)}, []])
def test_lists_of_nothing_but_matrices_need_no_names(params):
    assert _messages(params) == []
