"""Random trees, dtypes and settings against the library: `python -m experiments.reliability.fuzz`.

An example with a flaw must be refused with an error that names it. Every other example must run:
updates are finite and have the structure, shapes and dtypes of the gradients; the state keeps its
structure and takes the bytes that `memory_plan` gives; `init` warns if nothing is compressed. Three
laws are checked: over scripted draws the mean of the estimates is the gradient; a residual that
passes through the identity is not lost; with feedback, the estimates and the last error add up to
the sum of the gradients.

Random models whose gradients are compressed in the backward pass are checked as well (`programs`).
"""

import dataclasses
import math
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from experiments import reporting
from experiments.reliability import programs
from experiments.reliability.strategies import (
    BAD_PARTS,
    DIRECTIONS,
    OPTIMIZERS,
    OTHER_GRADIENTS,
    Example,
    arrays,
    compression,
    examples,
)
from experiments.trainer import cli
from gum_optax import residuals, samplers

PROGRAM = "experiments.reliability.fuzz"


@dataclasses.dataclass(frozen=True)
class Config:
    """Run random examples and count the checks."""

    #: Number of distinct examples.
    examples: int = 1000
    #: Seed of the examples.
    seed: int = 0
    #: Number of random models, each of which is compiled.
    models: int = 200
    #: Interval, in examples, at which the checks are repeated with the update compiled.
    compile_every: int = 25
    #: Result file.
    out: Path = Path("experiments/results/fuzz.json")


def check(example: Example, *, compiled: bool = False) -> Counter[str]:
    """Checks one example; returns the counts of its checks.

    Raises:
      AssertionError: a check failed, a flaw passed unnoticed, or an error is not clear.
    """
    # Without jit, operations of equal shapes are compiled once for all examples.
    try:
        with jax.disable_jit(not compiled):
            counts = _run(example)
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        return Counter({_refusal(example, error): 1})
    assert example.flaw is None, f"{example.flaw} passed unnoticed"
    return counts + Counter({"accepted": 1})


def _refusal(example: Example, error: Exception) -> str:
    """Returns the kind of a clear error; raises `AssertionError` from any other.

    An error is clear if the library itself raised it, as `TypeError` or `ValueError`, with the name
    of the flawed argument in backticks.
    """
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    clear = isinstance(error, TypeError | ValueError) and "gum_optax" in Path(file).parts
    named = {OTHER_GRADIENTS: "params|state.*"} | {name: name for name in BAD_PARTS}
    named = named.get(example.flaw or "", "flawed")
    if example.flaw is None or not clear or not re.search(rf"`({named})`", str(error)):
        raise AssertionError(f"not a clear error for {example.flaw}: {error!r}") from error
    return f"refused with {type(error).__name__}"


def _run(example: Example) -> Counter[str]:
    """Takes a few steps and checks all that must hold; returns the counts of checks."""
    # 1. The state is the same whether it is computed or only described.
    tx = OPTIMIZERS[example.optimizer](compression=compression(**example.parts), **example.options)
    params = arrays(example.tree, "ordinary", seed=0)
    state, warned = _initial(tx, params)
    described = _described(state)
    abstract, _ = _initial(tx, params, abstract=True)
    assert described == _described(abstract), "init differs when abstract"
    # 2. Steps through the first period and the refresh after it. A flaw of the gradients begins at
    # the second step.
    update = jax.jit(tx.update)  # op by op, where jit is disabled
    steps = example.parts["period"] + 2
    for step in range(steps):
        changed = example.flaw == OTHER_GRADIENTS and step == 1
        gradients = arrays(example.tree, example.size, seed=1 + step, other=example.other_dtype)
        if changed:
            gradients["changing"] = np.ones((4, 5), np.float32)
        updates, state = update(gradients, state, params)
        assert _described(updates) == _described(gradients), "updates do not fit the gradients"
        assert _described(state) == described, "the state drifts"
        for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), f"update {path} at {step}"
    # 3. Memory, and the laws for optimizers whose updates are estimates of gradients.
    _check_plan(gum_optax.memory_plan(tx, params), state, warned)
    counts = Counter(steps=steps, leaves=len(jax.tree.leaves(params)))
    counts += Counter({"checks of dtype, shape and structure": 2 * steps})
    counts += Counter({"checks of memory_plan": 1})
    if example.optimizer in DIRECTIONS:
        counts += Counter({"checks of the law, by leaf": _check_law(example)})
        counts += Counter(
            {"checks that no residual is lost, by leaf": _check_nothing_is_lost(example)}
        )
    return counts


def _initial(tx: Any, params: Any, *, abstract: bool = False) -> tuple[Any, bool]:
    """Returns the first state, and whether `init` warned of uncompressed matrices."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = jax.eval_shape(tx.init, params) if abstract else tx.init(params)
    texts = [str(each.message) for each in told]
    assert all("compressed" in text for text in texts), f"init warns: {texts}"
    return state, bool(texts)


def _check_plan(plan: gum_optax.MemoryPlan, state: Any, warned: bool) -> None:
    """Checks bytes and warning against the memory plan."""
    planned, held = plan.total_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert planned == held, f"memory_plan says {planned} bytes, the state has {held}"
    # The warning comes if most of the matrices' parameters are uncompressed.
    sizes: Counter[str] = Counter()
    for row in plan.rows:
        if row.why != "full rank":  # of an optimizer that compresses nothing on purpose
            sizes[row.treatment] += row.count * math.prod(row.shape)
    compressed = sizes["sampled"] + sizes["low rank"]
    most = sizes["uncompressed"] > compressed
    assert warned == most, f"init warned: {warned}; memory_plan has {sizes}"


def _check_law(example: Example) -> int:
    """Checks that the mean estimate is G, if each matrix is drawn in `included` of `runs` runs.

    With q = included / runs, the exclusive form gives
    ``(1 - q) P P'G / (1 - q) + q (G - P P'G) / q = G``, and the additive one
    ``P P'G + q (G - P P'G) / q = G``. The scripted sampler works for any number of matrices, so
    that all groups of the tree are checked at once. Returns the number of leaves.
    """
    # 1. Numbers of runs and form, from the digits of the example's key.
    key = example.parts["key"]
    runs = 2 + key % 3
    included = 1 + key // 3 % (runs - 1)
    form: Any = ("exclusive", "additive")[key // 9 % 2]
    gradients = arrays(example.tree, example.size, seed=99)

    def of_run(run: Any) -> Any:
        scripted = _scripted_sampler(run, runs, included)
        return _estimator(example, residuals.sampled(scripted, form=form))

    # 2. The estimate of each run. One program for all runs; op by op, where jit is disabled.
    @jax.jit
    def estimate(run: Any, state: Any) -> Any:
        return of_run(run).update(gradients, state)[0]

    state, _ = _initial(of_run(0), gradients)
    estimates = [estimate(run, state) for run in range(runs)]
    for G, *each in zip(*map(jax.tree.leaves, (gradients, *estimates)), strict=True):
        # 3. The mean is G up to rounding. Estimates are up to `runs` times as large as G.
        mean = np.mean([_double(estimate) for estimate in each], axis=0)
        _assert_close(mean, _double(G), _norm(G), runs, G.dtype, "the law")
    return len(jax.tree.leaves(gradients))


def _check_nothing_is_lost(example: Example) -> int:
    """Checks that no residual is lost; returns the number of leaves.

    ``P P'G + (G - P P'G) = G`` in one step or, with feedback, in the sum over two steps and the
    last error.
    """
    # 1. Through the identity, in one step.
    steps = [arrays(example.tree, example.size, seed=seed) for seed in (99, 100)]
    tx = _estimator(example, residuals.through(optax.identity()))
    estimates, _ = jax.jit(tx.update)(steps[0], _initial(tx, steps[0])[0])
    for G, estimate in zip(*map(jax.tree.leaves, (steps[0], estimates)), strict=True):
        _assert_close(_double(estimate), _double(G), _norm(G), 1, G.dtype, "through")

    # 2. With feedback, ``U_1 + U_2 + E_2 = G_1 + G_2``; uncompressed leaves have no error E.
    feedback = residuals.feedback()
    tx = _estimator(example, feedback)
    state, _ = _initial(tx, steps[0])
    update = jax.jit(tx.update)
    first, state = update(steps[0], state)
    second, state = update(steps[1], state)
    left: list[Any] = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(steps[0])]
    for group in _compression(example, feedback).groups(steps[0]):
        for position, error in zip(group.leaves, state.residual.get(group.name, ()), strict=False):
            left[position] = error
    columns = map(jax.tree.leaves, (*steps, first, second))
    for G, H, *parts in zip(*columns, left, strict=True):
        # Four roundings: of two updates and two errors.
        found, total = sum(map(_double, parts)), _double(G) + _double(H)
        _assert_close(found, total, _norm(G) + _norm(H), 4, G.dtype, "feedback")
    return len(left)


def _compression(example: Example, rule: residuals.Residual) -> gum_optax.LowRank:
    """Returns the example's compression with another residual rule and no storage."""
    picked = {"rank", "period", "projector", "group_by", "key"} & example.parts.keys()
    return gum_optax.LowRank(residual=rule, **{name: example.parts[name] for name in picked})


def _estimator(example: Example, rule: residuals.Residual) -> Any:
    """Returns a transformation that compresses and expands, with nothing in between."""
    return gum_optax.low_rank(optax.identity(), _compression(example, rule))


def _assert_close(
    found: Any, expected: Any, norm: Any, roundings: int, dtype: Any, name: str
) -> None:
    """Asserts that numbers agree up to `roundings` roundings to the gradient's dtype.

    Everything else is computed in float32, whose error over products of at most five terms stays
    below ten roundings each.
    """
    rounding = float(jnp.finfo(dtype).eps) + 10 * float(jnp.finfo(jnp.float32).eps)
    smallest = float(jnp.finfo(dtype).tiny)  # below it, numbers are flushed to zero
    assert np.all(np.abs(found - expected) <= roundings * (norm * rounding + smallest)), name


def _norm(G: jax.Array) -> Any:
    """Returns the Frobenius norm of each matrix, ``[..., 1, 1]``."""
    return np.linalg.norm(_double(G), axis=(-2, -1), keepdims=True) if G.size else 0


def _double(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)


def _scripted_sampler(run: Any, runs: int, included: int) -> samplers.Sampler:
    """Returns the sampler of one run: matrix i is drawn if ``(i + run) % runs < included``.

    The number of the run may be traced, so that one program serves all runs.
    """

    def sampler(count: int) -> samplers.Sampling:
        drawn = [
            [i for i in range(count) if (i + start) % runs < included] for start in range(runs)
        ]
        # Runs draw different numbers of matrices; unused slots hold `count`, which is no matrix.
        slots = max(map(len, drawn))
        padded = [draw + [count] * (slots - len(draw)) for draw in drawn]
        return samplers.Sampling(
            slots, included / runs, lambda key: jnp.asarray(padded, jnp.int32)[run]
        )

    return sampler


def _described(tree: Any) -> list[tuple[Any, ...]]:
    """Returns structure, paths, shapes and dtypes of a tree, for comparison."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(str(treedef),), *((str(path), x.shape, str(x.dtype)) for path, x in leaves)]


def count_checks(config: Config) -> Counter[str]:
    """Checks `config.examples` distinct examples; returns the counts of checks."""
    counts: Counter[str] = Counter()
    examples_seen: set[str] = set()
    trees_seen: set[str] = set()

    # Hypothesis repeats examples. Of up to four times as many, the distinct ones are checked.
    @hypothesis.seed(config.seed)
    @hypothesis.settings(
        max_examples=4 * config.examples, deadline=None, database=None, derandomize=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )  # fmt: skip
    @hypothesis.given(example=examples())
    def every(example: Example) -> None:
        if repr(example) in examples_seen or len(examples_seen) >= config.examples:
            return
        counts.update(check(example))
        if len(examples_seen) % config.compile_every == 0:
            check(example, compiled=True)
            counts["also run compiled"] += 1
        examples_seen.add(repr(example))
        trees_seen.add(repr(example.tree))

    every()
    return counts + Counter({"examples": len(examples_seen), "distinct trees": len(trees_seen)})


def count_models(config: Config) -> Counter[str]:
    """Checks `config.models` random models with gradients compressed in the backward pass."""
    counts: Counter[str] = Counter()

    @hypothesis.seed(config.seed)
    @hypothesis.settings(
        max_examples=max(config.models, 1), deadline=None, database=None, derandomize=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )  # fmt: skip
    @hypothesis.given(model=programs.models())
    def every(model: programs.Model) -> None:
        with warnings.catch_warnings():
            # Random models leave weights unused or use them elementwise only, which is warned of.
            warnings.filterwarnings("ignore", ".*have uses other than dense products", UserWarning)
            programs.check(model)
        counts["models"] += 1
        counts["uses of weights in models"] += len(model.uses)

    if config.models:
        every()
    return counts


def main(arguments: Sequence[str]) -> int:
    """Runs the examples and models; prints and writes the counts. Returns the exit code."""
    config = cli.parse(Config, PROGRAM, arguments)
    began = time.perf_counter()
    counts = count_models(config) + count_checks(config)
    result = reporting.write(
        config.out,
        config,
        counts=dict(sorted(counts.items())),
        seconds=round(time.perf_counter() - began),
    )
    print("\n".join(f"{count:>8,}  {name}" for name, count in result["counts"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
