"""Memory of updates and time of compiling them; nothing is allocated or run.

State bytes are exact and follow from shapes alone. Temporary bytes are XLA's own analysis of the
compiled update on this device, with gradients as arguments and parameters and state donated.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from experiments import reporting
from experiments.benchmarks import contenders, parameters
from experiments.benchmarks.settings import Config
from experiments.benchmarks.step import jitted

_GROWING = ("gum", "adamw", "optax muon")  # contenders whose time of compiling is measured

# Preset -> layout -> "parameters" or a contender -> bytes
Bytes = dict[str, dict[str, dict[str, int]]]


def run(config: Config) -> None:
    """Writes `compiled.json` and prints its tables."""
    # 1. State, of models of any size.  2. Temporaries: large models are compiled with GUM alone.
    # 3. Seconds of tracing and compiling, by depth.
    state = {preset: _by_layout(config, preset, state_bytes) for preset in config.state}
    of_gum = set(config.compiled_gum) - set(config.compiled)
    needed = {preset: _by_layout(config, preset, temporary_bytes) for preset in config.compiled}
    needed |= {name: _by_layout(config, name, temporary_bytes, ["gum"]) for name in sorted(of_gum)}
    grown = list(growth(config))
    reporting.write(
        config.out / "compiled.json",
        config,
        state_bytes=state,
        temporary_bytes=needed,
        growth=grown,
    )
    _show_bytes("State, MiB", state)
    _show_bytes("Temporaries of the compiled update, MiB", needed)
    reporting.table(
        "Seconds of tracing and compiling",
        ("layout", "optimizer", "layers", "trace", "compile", "HLO MiB"),
        (
            (g["layout"], g["contender"], g["depth"], g["trace_seconds"], g["compile_seconds"],
             g["hlo_bytes"] / 2**20)
            for g in grown
        ),
    )  # fmt: skip


def state_bytes(tree: Any, optimizers: dict[str, contenders.Optimizer]) -> dict[str, int]:
    """Returns the bytes of parameters and of each optimizer's state."""
    sizes = {
        name: parameters.size(jax.eval_shape(tx.init, tree)) for name, tx in optimizers.items()
    }
    return {"parameters": parameters.size(tree), **sizes}


def temporary_bytes(tree: Any, optimizers: dict[str, contenders.Optimizer]) -> dict[str, int]:
    """Returns the bytes of temporaries of each optimizer's compiled update."""
    return {name: _temporaries(tx, tree) for name, tx in optimizers.items()}


def growth(config: Config) -> Iterator[dict[str, Any]]:
    """Yields the seconds of tracing and compiling and the program's length, by number of layers."""
    for layout in config.layouts:
        for name, tx in _optimizers(config, layout, _GROWING).items():
            for layers in config.depths:
                tree = parameters.depth(layers, config.depth_preset)
                tree = parameters.stack(tree) if layout == "stacked" else tree
                yield {"layout": layout, "contender": name, "depth": layers} | _compilation(
                    tx, tree
                )


def _compilation(tx: contenders.Optimizer, tree: Any) -> dict[str, Any]:
    # As in a new process: functions that another contender has traced would not be traced again.
    jax.clear_caches()
    state = jax.eval_shape(tx.init, tree)
    start = time.perf_counter()
    traced = jitted(tx).trace(tree, state, tree)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    lowered.compile()
    # Lowering to HLO counts as compiling. The HLO is the program before XLA's passes.
    return {
        "trace_seconds": after_trace - start,
        "compile_seconds": time.perf_counter() - after_trace,
        "hlo_bytes": len(lowered.as_text(dialect="hlo").encode()),
    }


def _temporaries(tx: contenders.Optimizer, tree: Any) -> int:
    state = jax.eval_shape(tx.init, tree)
    analysis = jitted(tx).lower(tree, state, tree).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{jax.default_backend()} gives no memory analysis of compiled programs")
    return analysis.temp_size_in_bytes


def _by_layout(
    config: Config, preset: str, measure: Any, names: Iterable[str] = tuple(contenders.TABLE)
) -> dict[str, dict[str, int]]:
    return {
        layout: measure(parameters.LAYOUTS[layout](preset), _optimizers(config, layout, names))
        for layout in config.layouts
    }


def _optimizers(
    config: Config, layout: str, names: Iterable[str]
) -> dict[str, contenders.Optimizer]:
    """Makes the contenders that support the layout."""
    arguments = (config.rank, config.full_rank_layers, config.period, layout)
    made = {name: contenders.TABLE[name](*arguments) for name in names}
    return {name: tx for name, tx in made.items() if tx is not None}


def _show_bytes(title: str, sizes: Bytes) -> None:
    # A preset may lack contenders, whose cells stay empty.
    names = ("parameters", *contenders.TABLE)
    reporting.table(
        title,
        ("preset", "layout", *names),
        (
            (preset, layout, *(each[name] / 2**20 if name in each else None for name in names))
            for preset, layouts in sizes.items()
            for layout, each in layouts.items()
        ),
    )
