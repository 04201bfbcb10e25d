"""A lower bound of the time of a plain step on this device, from its bytes and its FLOPs.

A roofline: the step cannot be faster than the device moves its bytes, nor than it computes its
products. Both rates are measured on the device.
"""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gum_optax
from experiments.benchmarks import contenders, parameters, timing

_NS_STEPS = 5  # Muon's number of Newton-Schulz iterations
_REPEATS = 5  # measurements of each rate, of which the median counts
# Treatments, in a memory plan, of groups of matrices; all others are the fallback's.
_MATRICES = ("sampled", "low rank", "uncompressed")


def copy_bandwidth(elements: int = 2**26) -> float:
    """Measures bytes per second of ``x + 1`` in place on a float32 array, which reads and writes.

    Args:
      elements: of the array; 256 MiB by default, more than caches hold.
    """
    x = jnp.zeros(elements, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def step() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    return 2 * 4 * elements / _median(step)


def matmul_rate(side: int = 2048) -> float:
    """Measures FLOP/s of square float32 products at the default precision, as optimizers use."""
    # An accelerator would spend most of the time of a single product on its launch.
    products = 2 if jax.default_backend() == "cpu" else 64
    x = jax.random.normal(jax.random.key(0), (side, side)) / side**0.5

    @jax.jit
    def multiply(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, y: y @ x, x)

    return products * 2 * side**3 / _median(lambda: jax.block_until_ready(multiply(x)))


def count(name: str, tree: Any, rank: int, gamma: int) -> tuple[int, int]:
    """Counts bytes and FLOPs of a contender's plain step, without elementwise FLOPs.

    Gradients are read, parameters and state are read and written, and bases are only read.

    Raises:
      ValueError: the contender does not support the layout of `tree`.
    """
    layout = "stacked" if _is_stacked(tree) else "separate"
    optimizer = contenders.TABLE[name](rank, gamma, 1, layout)
    if optimizer is None:
        raise ValueError(f"{name} {contenders.NOT_STACKED}")
    state = jax.eval_shape(optimizer.init, tree)
    # 1 read of gradients + 2 of parameters + 2 of the state, of which bases are not written.
    moved = 3 * parameters.size(tree) + 2 * parameters.size(state) - parameters.size(_bases(state))
    # GUM's plan names the groups of matrices, which are the same under every contender.
    plan = gum_optax.memory_plan(contenders.gum(rank, gamma, 1, layout), tree)
    groups = (row for row in plan.rows if row.treatment in _MATRICES)
    return moved, sum(_flops(name, row, rank) for row in groups)


def seconds(moved: int, flops: int, bandwidth: float, rate: float) -> float:
    """Returns the time of the slower of the two: moving bytes or computing FLOPs."""
    return max(moved / bandwidth, flops / rate)


def newton_schulz(a: int, b: int) -> int:
    """Counts the FLOPs of Newton-Schulz on an a x b matrix, directly or on its Gram matrix."""
    a, b = sorted((a, b))
    # A direct step has two products with X, of 2 a^2 b FLOPs each, and one of a x a, of 2 a^3.
    # With a single Gram matrix for all five steps there are two products with X and 17 of a x a.
    # The library makes a new Gram matrix after three steps for the sake of accuracy, so this is a
    # lower bound of what it computes.
    direct = _NS_STEPS * (4 * a**2 * b + 2 * a**3)
    gram = 4 * a**2 * b + 17 * 2 * a**3
    return min(direct, gram)


def _flops(name: str, group: gum_optax.PlanRow, rank: int) -> int:
    """Counts the FLOPs of one group of matrices under a contender."""
    m, n = sorted(group.shape)
    if name == "optax muon":
        return group.count * newton_schulz(m, n)
    project = group.count * 4 * m * n * rank  # P'G, and P times the update: 2 m n r each
    if name in ("galore", "optax galore"):
        return project if rank < m else 0
    if name != "gum":
        return 0
    if group.treatment == "uncompressed":
        return group.count * newton_schulz(m, n)
    # A drawn matrix needs P (P'G) for its residual, and no product that expands its update: the
    # count of `project` holds for it too.
    slots = group.slots or 0
    low = (group.count - slots) * newton_schulz(rank, n)
    return project + low + slots * newton_schulz(m, n)


def _bases(state: Any) -> list[Any]:
    """Finds the bases in the state of this library's or optax's low-rank optimizers."""
    kinds = (gum_optax.LowRankState, optax.contrib.GaLoreState)
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kinds))
    return [
        part.basis if isinstance(part, gum_optax.LowRankState) else part.projector
        for part in parts
        if isinstance(part, kinds)
    ]


def _is_stacked(tree: Any) -> bool:
    return any(leaf.ndim > 2 for leaf in jax.tree.leaves(tree))


def _median(step: Any) -> float:
    return statistics.median(timing.by_turns({"step": step}, _REPEATS)["step"])
