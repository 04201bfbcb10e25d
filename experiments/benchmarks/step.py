"""Seconds of an update: GUM and each contender by turns, plain steps and refreshes apart.

The two keep their own states and share the parameters: each donates them and hands the new ones to
the other. With a period of two, even steps are refreshes and odd steps are plain.
"""

import gc
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from experiments import reporting
from experiments.benchmarks import contenders, floors, parameters, timing
from experiments.benchmarks.settings import Config

_ALTERNATING = 2  # the period at which refreshes and plain steps alternate


def run(config: Config) -> None:
    """Times every pair, writes a file for each preset and layout, and prints a table."""
    # Measured once, for the lower bounds of all steps.
    rates = {"bytes_per_second": floors.copy_bandwidth(), "flops_per_second": floors.matmul_rate()}
    for preset in config.presets:
        for layout in config.layouts:
            tree = {"preset": preset, "layout": layout}
            found = list(_pairs(config, preset, layout))
            reporting.write(
                config.out / "step" / f"{preset}-{layout}.json",
                config,
                rates=rates,
                pairs=[tree | pair for pair in found],
                costs=[tree | c for c in _contenders(config, preset, layout, found, rates)],
            )
    _show(**stored(config.out))


def stored(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the pairs and costs of all presets that have been timed, the smallest first."""
    files = [out / "step" / f"{p}-{k}.json" for p in parameters.SHAPES for k in parameters.LAYOUTS]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    return {key: [row for each in found for row in each[key]] for key in ("pairs", "costs")}


def jitted(tx: contenders.Optimizer) -> Any:
    """Returns the jitted update `(params, state, grads) -> (params, state)`, which is in place."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def stepper(tx: contenders.Optimizer, shared: dict[str, Any]) -> Callable[[], None]:
    """Returns a step that updates `shared["params"]` by `shared["grads"]`, with its own state."""
    step = jitted(tx)
    state = jax.jit(tx.init)(shared["params"])

    def call() -> None:
        nonlocal state
        shared["params"], state = step(shared["params"], state, shared["grads"])
        # Execution is asynchronous: without this only the launch would be timed.
        jax.block_until_ready((shared["params"], state))

    return call


def alternating(
    optimizers: dict[str, contenders.Optimizer], tree: Any, config: Config
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Times plain steps and refreshes of optimizers of period two, by turns.

    Returns:
      Seconds of plain steps, and of refreshes, by optimizer; those without a period have none.
    """
    shared = {
        "params": parameters.random(tree, config.seed),
        "grads": parameters.random(tree, config.seed + 1),
    }
    steps = {name: stepper(tx, shared) for name, tx in optimizers.items()}
    # In each turn, first the refreshes, then the plain steps. An optimizer with a period is called
    # twice, so its refreshes stay at even steps; the others are called once, as plain.
    turns = {(name, "refresh"): s for name, s in steps.items() if name not in _PERIODLESS}
    turns |= {(name, "plain"): s for name, s in steps.items()}
    seconds = timing.by_turns({"|".join(turn): s for turn, s in turns.items()}, config.repeats)
    plain = {name: seconds[f"{name}|plain"] for name in steps}
    return plain, {n: seconds[f"{n}|refresh"] for n in steps if f"{n}|refresh" in seconds}


def compare(
    plain: dict[str, list[float]], refresh: dict[str, list[float]], other: str, period: int
) -> dict[str, Any]:
    """Compares GUM with another optimizer: the costs of both, and their ratios.

    Args:
      plain: seconds of plain steps by optimizer, turn by turn.
      refresh: seconds of refreshes, for optimizers with a period.
      other: the other's name.
      period: steps over which the cost of a refresh is spread.
    """
    gum = timing.costs(plain["gum"], refresh["gum"], period)
    theirs = timing.costs(plain[other], refresh.get(other), period)
    result = {
        "other": other,
        "gum_costs": gum,
        "other_costs": theirs,
        "plain_ratio": timing.ratio(plain["gum"], plain[other]),
        "amortized_ratio": gum["amortized_seconds"] / theirs["amortized_seconds"],
    }
    # For the same optimizer under the SVD: the ratio of the extra time of a refresh.
    if other == "gum, svd":
        result["svd_refresh_ratio"] = timing.ratio(
            _extra(plain[other], refresh[other]), _extra(plain["gum"], refresh["gum"])
        )
    return result


_PERIODLESS = frozenset(contenders.TABLE) - contenders.REFRESHING


def _pairs(config: Config, preset: str, layout: str) -> Iterator[dict[str, Any]]:
    """Times GUM with each contender in turn; yields their comparison, or a note if not possible."""
    make = {name: contenders.TABLE[name] for name in config.contenders}
    if config.svd:
        make["gum, svd"] = contenders.gum_svd
    for name, contender in make.items():
        arguments = (config.rank, config.full_rank_layers, _ALTERNATING, layout)
        other = contender(*arguments)
        if other is None:
            yield {"other": name, "note": contenders.NOT_STACKED}
            continue
        pair = {"gum": contenders.gum(*arguments), name: other}
        plain, refresh = alternating(pair, parameters.LAYOUTS[layout](preset), config)
        yield compare(plain, refresh, name, config.period)
        print(f"timed {preset} {layout}: gum and {name}", flush=True)
        gc.collect()  # frees the states of this pair before those of the next are allocated


def _contenders(
    config: Config, preset: str, layout: str, pairs: list[dict[str, Any]], rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yields bytes, FLOPs and the ratio of measured time to its lower bound, by optimizer."""
    # 1. The measured seconds. GUM was timed in every pair: take the median over pairs.
    timed = {p["other"]: p["other_costs"]["plain"]["median"] for p in pairs if "note" not in p}
    timed.pop("gum, svd", None)
    ours = [p["gum_costs"]["plain"]["median"] for p in pairs if "note" not in p]
    if ours:
        timed = {"gum": statistics.median(ours)} | timed
    # 2. The lower bound of each optimizer: the slower of moving its bytes and computing its FLOPs.
    tree = parameters.LAYOUTS[layout](preset)
    for name, measured in timed.items():
        arguments = (config.rank, config.full_rank_layers, config.period, layout)
        optimizer = contenders.TABLE[name](*arguments)
        assert optimizer is not None
        moved, flops = floors.count(name, tree, config.rank, config.full_rank_layers)
        floor = floors.seconds(moved, flops, rates["bytes_per_second"], rates["flops_per_second"])
        yield {
            "contender": name,
            "state_bytes": parameters.size(jax.eval_shape(optimizer.init, tree)),
            "floor": {"bytes": moved, "flops": flops, "seconds": floor},
            "plain_seconds": measured,
            "measured_over_floor": measured / floor,
        }


def _extra(plain: list[float], refresh: list[float]) -> list[float]:
    """Returns the seconds by which refreshes exceed the plain steps of the same turns."""
    return [b - a for a, b in zip(plain, refresh, strict=True)]


def _show(pairs: list[dict[str, Any]], costs: list[dict[str, Any]]) -> None:
    reporting.table(
        "Seconds of an update: GUM over another, by turns",
        ("preset", "layout", "other", "plain", "min", "max", "amortized", "refresh/plain"),
        (
            (p["preset"], p["layout"], p["other"], *p["plain_ratio"].values(), p["amortized_ratio"],
             p["gum_costs"]["refresh_over_plain"])
            for p in pairs
            if "note" not in p
        ),
    )  # fmt: skip
    reporting.table(
        "Plain steps and their lower bound on this device",
        ("preset", "layout", "optimizer", "state MiB", "ms", "floor ms", "measured/floor"),
        (
            (c["preset"], c["layout"], c["contender"], c["state_bytes"] / 2**20,
             1000 * c["plain_seconds"], 1000 * c["floor"]["seconds"], c["measured_over_floor"])
            for c in costs
        ),
    )  # fmt: skip
