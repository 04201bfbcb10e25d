"""JAX's settings: the library works under each of them, with the same results.

Here the library is traced under the strictest settings; `make slow` runs `tests.one_setting` in a
separate process for every setting.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import one_setting

ROOT = pathlib.Path(__file__).parents[2]

# Strict promotion of dtypes and ranks: in the program alone -------------------------------------

# Adam is left out: optax's has ``b1 ** count``, a float to the power of an integer.
NO_ADAM = [name for name in one_setting.OPTIMIZERS if "adam" not in name]


# By `make slow`: what the first two and the test below trace as well.
SLOW = ("feedback", "random", "rotated", "rounded")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NO_ADAM]
)
def test_dtypes_and_ranks_are_never_promoted(name):
    tx = one_setting.OPTIMIZERS[name]
    params = one_setting.parameters(jnp.bfloat16 if name == "rounded" else np.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


def test_narrow_parameters_need_no_promotion():
    """With a storage: without one, optax adds momentum in bfloat16 to updates in float32."""
    tx = one_setting.OPTIMIZERS["rotated"]
    params = one_setting.parameters(jnp.bfloat16)
    matrices = {"layers": [{"up": layer["up"]} for layer in params["layers"]]}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, matrices)
        jax.eval_shape(tx.update, matrices, state, matrices)


def test_adam_of_optax_promotes():
    """So no optimizer with it runs under strict promotion, this library's or another."""
    params = {"w": np.ones(3, np.float32)}
    tx = optax.adam(0.1)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


# Every setting, run -----------------------------------------------------------------------------

# Setting -> its environment. Differences are those of the order of float32 operations, which
# Newton-Schulz multiplies.
SETTINGS: dict[str, dict[str, str]] = {
    "without jit": {"JAX_DISABLE_JIT": "1"},
    "float64": {"JAX_ENABLE_X64": "1"},
    "no NaN": {"JAX_DEBUG_NANS": "1"},
    "strict dtypes": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    "no rank promotion": {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    "rbg keys": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "unsafe rbg keys": {"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg"},
    "typed keys": {"JAX_LEGACY_PRNG_KEY": "error"},
    "no tracers leak": {"JAX_CHECK_TRACER_LEAKS": "1"},
    "sequential threefry": {"JAX_THREEFRY_PARTITIONABLE": "0"},
}
TOLERANCE = 2e-3
HALF = 2**-5  # Of weights in bfloat16, which is rounded to 2^-8: measured 3e-3 without jit.


@functools.cache
def _found(setting: str, *names: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.one_setting", *names],
        cwd=ROOT,
        env=os.environ | SETTINGS.get(setting, {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_nothing(setting):
    expected, found = _found(""), _found(setting)
    assert found.keys() == expected.keys() == {*one_setting.OPTIMIZERS, "compressed"}
    for name, result in found.items():
        if setting == "strict dtypes" and "adam" in name:
            assert "TypePromotionError" in result["error"], name
            continue
        assert "error" not in result, (name, result.get("error"))
        updates, wanted = (np.asarray(r["updates"]) for r in (result, expected[name]))
        assert np.isfinite(updates).all()
        if setting == "sequential threefry":
            # The one setting that changes bits; what is drawn is drawn as before.
            _assert_alike(result["draws"], expected[name]["draws"])
            continue
        assert result["draws"] == expected[name]["draws"], name
        tolerance = HALF if name == "rounded" else TOLERANCE
        assert np.abs(updates - wanted).max() < tolerance * np.abs(wanted).max(), name


def _assert_alike(draws: Any, expected: Any) -> None:
    """As many slots of each group, within its matrices; and a draw holds for its period."""
    for one, other in zip(draws, expected, strict=True):
        assert {n: len(s) for n, s in one.items()} == {n: len(s) for n, s in other.items()}
        assert all(0 <= i <= one_setting.LAYERS for slots in one.values() for i in slots)
    for period in range(0, len(draws), one_setting.PERIOD):
        of_period = draws[period : period + one_setting.PERIOD]
        assert all(draw == of_period[0] for draw in of_period)
