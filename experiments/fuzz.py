"""Random trees, types and settings against the library: `python -m experiments.fuzz`.

An example either has a flaw, and is refused with an error that names it, or it runs: updates have
the gradients' structure, shapes and dtypes and are finite, the state keeps its own and costs what
`memory_plan` says, and over scripted draws the mean of the estimates is the gradient.
"""

import dataclasses
import re
import sys
import time
import traceback
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
from experiments import cli, record
from experiments.examples import (
    BAD_OPTIONS,
    ENGINES,
    OPTIMIZERS,
    OTHER_GRADIENTS,
    Example,
    arrays,
    examples,
)
from gum_optax import samplers

PROGRAM = "experiments.fuzz"


@dataclasses.dataclass(frozen=True)
class Config:
    """Run random examples and count what was checked."""

    examples: int = 1000
    """How many examples."""
    seed: int = 0
    """Seed of the examples."""
    compile_every: int = 25
    """Every so many examples, the checks run a second time with the update compiled."""
    out: Path = Path("experiments/results/fuzz.json")
    """Result file."""


def check(example: Example, *, compiled: bool = False) -> Counter[str]:
    """Checks one example; returns what was counted, raises `AssertionError` if it fails."""
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
    """The kind of a clear error; any other is raised again."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    clear = isinstance(error, TypeError | ValueError) and "gum_optax" in Path(file).parts
    named = {OTHER_GRADIENTS: "params|state.*"} | {name: name for name in BAD_OPTIONS}
    named = named.get(example.flaw or "", "flawed")
    if example.flaw is None or not clear or not re.search(rf"`({named})`", str(error)):
        raise AssertionError(f"not a clear error for {example.flaw}: {error!r}") from error
    return f"refused with {type(error).__name__}"


def _run(example: Example) -> Counter[str]:
    tx = OPTIMIZERS[example.optimizer](**example.options)
    params = arrays(example.tree, "ordinary", seed=0)
    state = tx.init(params)
    described = _described(state)
    assert described == _described(jax.eval_shape(tx.init, params)), "init differs when abstract"
    update = jax.jit(tx.update)  # op by op, where jit is disabled
    steps = example.options["period"] + 2
    for step in range(steps):
        changed = example.flaw == OTHER_GRADIENTS and step == 1
        gradients = arrays(example.tree, example.size, seed=1 + step, other=example.other_dtype)
        if changed:
            gradients["changing"] = jnp.ones((4, 5))
        updates, state = update(gradients, state, params)
        assert _described(updates) == _described(gradients), "updates do not fit the gradients"
        assert _described(state) == described, "the state drifts"
        for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), f"update {path} at {step}"
    counts = Counter(steps=steps, leaves=len(jax.tree.leaves(params)))
    counts += Counter({"checks of dtype, shape and structure": 2 * steps})
    if example.optimizer == "gum":
        _check_bytes(example, params, state)
        counts += Counter({"checks of memory_plan": 1})
    if example.optimizer in ENGINES:
        counts += Counter({"checks of the law, by leaf": _check_law(example)})
    return counts


def _check_bytes(example: Example, params: Any, state: Any) -> None:
    planned = gum_optax.memory_plan(params, **example.options).total_bytes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert planned == held, f"memory_plan says {planned} bytes, the state has {held}"


def _check_law(example: Example) -> int:
    """Over `runs` draws each matrix is full-rank in `included`: the mean estimate is G.

    ``(1 - q) P P'G / (1 - q) + q (G - P P'G) / q = G`` with q = included / runs. The rule works for
    any number of matrices, so every stack of the tree is checked at once.
    """
    runs = 2 + example.options["key"] % 3
    included = 1 + example.options["key"] // 3 % (runs - 1)
    gradients = arrays(example.tree, example.size, seed=99)
    picked = ("rank", "period", "projector", "stack_by", "key")
    options = {name: example.options[name] for name in picked}
    estimates = []
    for run in range(runs):
        scripted = _scripted_sampler(run, runs, included)
        tx = gum_optax.low_rank(optax.identity(), sampler=scripted, **options)
        estimates.append(tx.update(gradients, tx.init(gradients))[0])
    for G, *each in zip(*map(jax.tree.leaves, (gradients, *estimates)), strict=True):
        _assert_mean(each, np.asarray(G, np.float64), runs, G.dtype)
    return len(jax.tree.leaves(gradients))


def _assert_mean(estimates: list[Any], G: np.ndarray, runs: int, dtype: Any) -> None:
    mean = np.mean([np.asarray(estimate, np.float64) for estimate in estimates], axis=0)
    # Estimates are up to `runs` times the gradient, and rounded to its dtype once; within, all is
    # float32, whose errors over products of at most five terms stay below ten roundings.
    rounding = float(jnp.finfo(dtype).eps) + 10 * float(jnp.finfo(jnp.float32).eps)
    norm = np.linalg.norm(G, axis=(-2, -1), keepdims=True) if G.size else 0
    smallest = float(jnp.finfo(dtype).tiny)  # below it, numbers are flushed to zero
    assert np.all(np.abs(mean - G) <= runs * (norm * rounding + smallest)), "the law"


def _scripted_sampler(run: int, runs: int, included: int) -> samplers.Sampler:
    def sampler(count: int) -> samplers.Sampling:
        drawn = {
            start: [i for i in range(count) if (i + start) % runs < included]
            for start in range(runs)
        }
        slots = max(map(len, drawn.values()))
        padded = drawn[run] + [count] * (slots - len(drawn[run]))
        return samplers.Sampling(slots, included / runs, lambda key: jnp.asarray(padded, jnp.int32))

    return sampler


def _described(tree: Any) -> list[tuple[Any, ...]]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(str(treedef),), *((str(path), x.shape, str(x.dtype)) for path, x in leaves)]


def count_checks(config: Config) -> Counter[str]:
    """Checks `config.examples` distinct examples."""
    counts: Counter[str] = Counter()
    examples_seen: set[str] = set()
    trees_seen: set[str] = set()

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


def main(arguments: Sequence[str]) -> int:
    """Runs the examples, prints and writes the counts."""
    config = cli.parse(Config, PROGRAM, arguments)
    began = time.perf_counter()
    counts = count_checks(config)
    result = record.write(
        config.out,
        config,
        counts=dict(sorted(counts.items())),
        seconds=round(time.perf_counter() - began),
    )
    print("\n".join(f"{count:>8,}  {name}" for name, count in result["counts"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
