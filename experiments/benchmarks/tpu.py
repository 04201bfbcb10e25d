"""Memory of training steps on TPUs, by their compiler: `python -m experiments.benchmarks.tpu`.

No TPU is needed and nothing runs: `libtpu`, the extra `tpu`, compiles for a chip that is absent. A
step is traced on shapes and compiled for one chip. Its bytes are those of the program that the chip
would run:

    total = arguments + outputs - aliased + temporaries

`peak_bytes` is the compiler's own total, which it compares with the memory of the chip. Its account
of temporaries counts some bytes twice, so `sum_bytes`, the sum above, is larger.

Programs are compiled with the least effort for speed. With the default effort a step took five
minutes and more on two cores instead of one, and temporaries differed by 4 percent.

Weights and gradients are in bfloat16. Layers are scanned and recomputed in the backward pass;
attention and loss work on chunks of tokens (`experiments.models.scanned`).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import gum_optax
from experiments import reporting
from experiments.benchmarks import parameters
from experiments.benchmarks.collectives import collectives, total_bytes
from experiments.benchmarks.communication import at_step
from experiments.models import scanned
from experiments.models.presets import Architecture
from experiments.trainer import cli
from experiments.trainer.options import choose
from gum_optax import LowRank, backward, dimension_numbers, fallbacks, residuals, storages

PROGRAM = "experiments.benchmarks.tpu"
GIB = 2**30
_RATE = 1e-3
_STACKED = dimension_numbers.scanned_layers

MODELS = {
    "LLaMA-1B": parameters.SHAPES["1b"],
    "LLaMA-7B": parameters.SHAPES["7b"],
    "Llama-3-8B": Architecture(4096, 14336, 32, 32, 8, vocab_size=128_256, seq_len=8192),
}
# Kind -> (the compiler's name of a board, the number of its chips that train). Several chips are
# data parallel: the same weights, and a part of the windows each.
KINDS = {
    "v5p": ("v5p:2x2x1", 1),
    "v6e": ("v6e:2x2", 1),
    "v5e": ("v5e:2x2", 1),
    "4 v5e": ("v5e:2x2", 4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Count the bytes of training steps on TPUs, by model, batch, step and kind of chip."""

    #: Models to compile a step of.
    models: tuple[str, ...] = tuple(MODELS)
    #: Windows x tokens of a step; parts are microbatches, accumulated in float32. All but the first
    #: are for LLaMA-1B alone.
    batches: tuple[str, ...] = ("1 x 2048", "4 x 1024", "4 parts of 4 x 1024")
    #: Steps to compile, by their names in the table; none: all.
    steps: tuple[str, ...] = ()
    #: Chips, of 95, 32 and 16 GiB; "4 v5e" are four of the last, for the batch of 4 x 1024.
    kinds: tuple[str, ...] = ("v5p", "v6e", "v5e")
    #: Result file. Rows that it has are kept and not compiled again.
    out: Path = Path("experiments/results/tpu.json")


class Batch(NamedTuple):
    """The tokens of a step: `parts` microbatches of `windows` windows of `tokens` tokens."""

    parts: int
    windows: int
    tokens: int


BATCHES = {
    "1 x 2048": Batch(1, 1, 2048),
    "4 x 1024": Batch(1, 4, 1024),
    "4 parts of 4 x 1024": Batch(4, 4, 1024),
}


class Step(NamedTuple):
    """A training step to compile.

    Attributes:
      optimizer: a function from the width of the model to the optimizer.
      make: `full`, `between_refreshes`, `projected`, `refresh` or `both`: (loss, optimizer, parts)
        -> step.
    """

    optimizer: Callable[[int], optax.GradientTransformation]
    make: Callable[..., Callable[..., Any]]


# Training steps --------------------------------------------------------------------------------


def full(loss: Any, tx: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
    """Makes the usual step, in which the optimizer receives full gradients."""

    def step(params: Any, state: Any, windows: Any) -> Any:
        value_and_grad = _accumulated(jax.value_and_grad(loss), parts)
        value, gradients = value_and_grad(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def between_refreshes(
    loss: Any, tx: optax.GradientTransformation, parts: int
) -> Callable[..., Any]:
    """Makes the usual step without its refresh, for a projector that takes too long to compile.

    GaLore's SVD had not compiled for LLaMA-1B after 12 minutes. With it, a step needs no less.
    """
    step = full(loss, tx, parts)
    return lambda params, state, windows: step(params, at_step(state, 1), windows)


def projected(loss: Any, tx: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
    """Makes a step whose gradients are compressed in the backward pass."""
    value_and_grad = backward.value_and_grad(loss, tx)

    def step(params: Any, state: Any, windows: Any) -> Any:
        # Bases are in the state, which is the same for all parts.
        one = lambda params, windows: value_and_grad(params, state, windows)  # noqa: E731
        value, gradients = _accumulated(one, parts)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def refresh(loss: Any, tx: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
    """Makes the refresh before the first step of a period: new bases, from one part of a batch."""
    renewed = backward.refresh(loss, tx)

    def step(params: Any, state: Any, windows: Any) -> Any:
        return params, renewed(params, state, windows[: len(windows) // parts])

    return step


def both(loss: Any, tx: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
    """Makes one program of the refresh, where it is due, and the step."""
    first, second = refresh(loss, tx, parts), projected(loss, tx, parts)
    return lambda params, state, windows: second(*first(params, state, windows), windows)


def _accumulated(value_and_grad: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Averages loss and gradients over the parts of a batch, accumulated in float32."""
    if parts == 1:
        return value_and_grad

    def in_float32(params: Any, windows: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), value_and_grad(params, windows))

    def mean(params: Any, windows: Any) -> Any:
        summed = optax.microbatching.microbatch(
            in_float32,
            argnums=1,
            microbatch_size=len(windows) // parts,
            accumulator=optax.microbatching.AccumulationType.MEAN,
        )
        value, gradients = summed(params, windows)
        # Gradients have their weights' dtype, as without parts. Projected ones stay in float32.
        projected = lambda x: isinstance(x, backward.Projected)  # noqa: E731
        return value, jax.tree.map(
            lambda g, p: g if projected(g) else g.astype(p.dtype),
            gradients,
            params,
            is_leaf=projected,
        )

    return mean


# Optimizers --------------------------------------------------------------------------------------


def _adamw(width: int) -> optax.GradientTransformation:
    return optax.adamw(_RATE)


def _muon(width: int) -> optax.GradientTransformation:
    return optax.contrib.muon(_RATE, muon_weight_dimension_numbers=_STACKED)


def _galore(width: int) -> optax.GradientTransformation:
    # The rank is a quarter of the width, as in its paper.
    compression = gum_optax.galore(width // 4)
    return gum_optax.adamw(_RATE, compression, weight_dimension_numbers=_STACKED)


def _lean_full_rank(storage: storages.Storage) -> Callable[[int], optax.GradientTransformation]:
    """Muon with momentum in a storage, and hardly any state for the rest."""
    return lambda width: gum_optax.muon(
        _RATE, storage, fallback=fallbacks.factored(), weight_dimension_numbers=_STACKED
    )


def _in_turn(
    optimizer: Callable[[int], optax.GradientTransformation],
) -> Callable[[int], optax.GradientTransformation]:
    """Applies an optimizer to one scanned layer after the other, and to a part of each table."""

    def axes(params: Any) -> Any:
        # Stacks have their layers along axis 0. Embedding and head are cut along axis 0, too, into
        # as many parts if that many divide their rows.
        layers = len(jax.tree.leaves(params["layers"])[0])

        def parts(table: jax.Array) -> gum_optax.InParts:
            return gum_optax.InParts(math.gcd(layers, len(table)))

        tables = {name: jax.tree.map(parts, params[name]) for name in ("embed", "lm_head")}
        return {**tables, "layers": 0, "norm": None}

    return lambda width: gum_optax.layer_by_layer(optimizer(width), axes)


def _quantized(storage: storages.Storage) -> Callable[[int], optax.GradientTransformation]:
    return lambda width: gum_optax.quantized(optax.adamw(_RATE), storage)


def _gum(residual: Any, **parts: Any) -> Callable[[int], optax.GradientTransformation]:
    """GUM at rank 128 with a residual rule; `parts` are options of `LowRank`, and a fallback."""
    fallback = parts.pop("fallback", None)
    compression = LowRank(128, residual=residual, **parts)
    return lambda width: gum_optax.gum(
        _RATE, compression, fallback=fallback, weight_dimension_numbers=_STACKED
    )


def _compact(storage: storages.Storage) -> Callable[[int], optax.GradientTransformation]:
    """Low rank, a quarter of the width, with an orthogonalized residual."""

    def optimizer(width: int) -> optax.GradientTransformation:
        compression = gum_optax.compact(width // 4, storage=storage, basis_storage=storage)
        return gum_optax.gum(
            _RATE, compression, fallback=fallbacks.factored(), weight_dimension_numbers=_STACKED
        )

    return optimizer


# "Lean": momenta, slots and bases in 8 bits, and a factored second moment for the fallback. With a
# scale per row, since the compiler does not fuse blocks of a row with the arithmetic around them.
_ROWS, _BLOCKS, _SIX = storages.int8(block=None), storages.int8(256), storages.int6(block=None)
_LEAN = {"storage": _ROWS, "basis_storage": _ROWS, "fallback": fallbacks.factored()}
_GUM, _LEAN_GUM = _gum(residuals.sampled(2)), _gum(residuals.sampled(2), **_LEAN)
_ONE = _gum(residuals.sampled(1), **_LEAN)
_LOW_RANK_MUON, _LEAN_MUON = _gum(residuals.drop()), _gum(residuals.drop(), **_LEAN)

STEPS = {
    "AdamW": Step(_adamw, full),
    "Muon": Step(_muon, full),
    "GaLore": Step(_galore, between_refreshes),
    "8-bit AdamW": Step(_quantized(_BLOCKS), full),
    "8-bit AdamW, layer by layer": Step(_in_turn(_quantized(_BLOCKS)), full),
    "8-bit AdamW, a scale per row": Step(_quantized(storages.float8()), full),
    "8-bit AdamW, rounded at random": Step(_quantized(storages.at_random(storages.float8())), full),
    "8-bit Muon, lean": Step(_lean_full_rank(_ROWS), full),
    "8-bit Muon in blocks, lean": Step(_lean_full_rank(_BLOCKS), full),
    "6-bit Muon, lean": Step(_lean_full_rank(_SIX), full),
    "6-bit Muon, lean, layer by layer": Step(_in_turn(_lean_full_rank(_SIX)), full),
    "compact, lean": Step(_compact(_ROWS), full),
    "compact, lean, layer by layer": Step(_in_turn(_compact(_ROWS)), full),
    "GUM": Step(_GUM, full),
    "GUM, projected": Step(_GUM, projected),
    "GUM, refresh": Step(_GUM, refresh),
    "low-rank Muon, projected": Step(_LOW_RANK_MUON, projected),
    "lean GUM, projected": Step(_LEAN_GUM, projected),
    "lean GUM, refresh": Step(_LEAN_GUM, refresh),
    "lean GUM, both": Step(_LEAN_GUM, both),
    "lean GUM, one drawn layer, projected": Step(_ONE, projected),
    "lean GUM, one drawn layer, refresh": Step(_ONE, refresh),
    "lean low-rank Muon, projected": Step(_LEAN_MUON, projected),
    "lean low-rank Muon, refresh": Step(_LEAN_MUON, refresh),
}


# Measuring ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Compiles the steps that the result file lacks, and prints all of its rows."""
    config = cli.parse(Config, PROGRAM, arguments)
    for field, known in _KNOWN.items():
        for name in getattr(config, field):
            choose(field, name, known)
    rows = json.loads(config.out.read_text())["rows"] if config.out.exists() else []
    done = [{key: row[key] for key in ("model", "batch", "step", "kind")} for row in rows]
    for wanted in _wanted(config):
        if wanted not in done:
            # A step takes minutes: keep each row at once.
            rows.append(wanted | measure(**wanted))
            reporting.write(config.out, config, rows=rows)
            print(json.dumps(rows[-1]), flush=True)
    show(rows)
    return 0


_KNOWN = {"models": MODELS, "batches": BATCHES, "steps": STEPS, "kinds": KINDS}


def _wanted(config: Config) -> Iterator[dict[str, str]]:
    for kind in config.kinds:
        for model in config.models:
            for batch in config.batches:
                if batch == "1 x 2048" or model == "LLaMA-1B":
                    for step in config.steps or STEPS:
                        yield {"model": model, "batch": batch, "step": step, "kind": kind}


def measure(model: str, batch: str, step: str, kind: str) -> dict[str, Any]:
    """Compiles one step for one kind of chip; returns its bytes."""
    return cost(*program(MODELS[model], BATCHES[batch], STEPS[step]), *placement(kind))


def program(arch: Architecture, batch: Batch, step: Step) -> tuple[Callable[..., Any], Any]:
    """Returns a step and the shapes of its arguments: parameters, state and windows.

    Windows are int32 ``[parts * windows, tokens + 1]``: the last token is only a target.
    """
    static, params = scanned.describe(arch)
    tx = step.optimizer(arch.width)

    def loss(params: Any, windows: Any) -> jax.Array:
        return scanned.loss(static, params, windows)

    windows = jax.ShapeDtypeStruct((batch.parts * batch.windows, batch.tokens + 1), jnp.int32)
    arguments = params, jax.eval_shape(tx.init, params), windows
    return step.make(loss, tx, batch.parts), arguments


def placement(kind: str) -> tuple[Any, Any]:
    """Returns the shardings of weights and state, and of windows, for a kind of chip."""
    board, count = KINDS[kind]
    chips = devices(board)[:count]
    if count == 1:
        here = SingleDeviceSharding(chips[0])
        return here, here
    mesh = Mesh(np.array(chips), ("data",))
    return NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def devices(board: str) -> Sequence[Any]:
    """Returns the compiler's descriptions of the chips of a board or slice, such as ``v5e:4x4``."""
    # Otherwise libtpu asks a metadata server of Google's cloud which machine this is.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    # Several processes may load libtpu, since none of them uses a chip.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=board).devices


def cost(
    step: Callable[..., Any], arguments: Any, weights: Any, windows: Any, state: Any = None
) -> dict[str, Any]:
    """Compiles a step for these shardings, with parameters and state updated in place.

    Args:
      step: ``(params, state, windows) -> (params, state, ...)``.
      arguments: the shapes of these three.
      weights: one sharding for all weights, or a tree of shardings.
      windows: the same for the third argument.
      state: the same for the state; by default the sharding of all weights.

    Returns:
      Bytes, FLOPs and seconds of compiling; or ``out_of_memory``, the compiler's figures, if the
      program does not fit into the chip.
    """
    # 1. Give each argument its sharding. Nothing exists but shapes.
    jax.clear_caches()
    where = (weights, weights if state is None else state, windows)
    found: dict[str, Any] = {
        "parameter_bytes": parameters.size(arguments[0]),
        "state_bytes": parameters.size(arguments[1]),
    }
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        arguments,
        jax.tree.broadcast(where, arguments),
    )
    mesh: Any = getattr(jax.tree.leaves(weights)[0], "mesh", None)
    # With shardings of its own, the state is returned with the same ones.
    kept: dict[str, Any] = {} if state is None else {"out_shardings": (weights, state, None)}
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        lowered = jax.jit(step, donate_argnums=(0, 1), **kept).lower(*placed)
    # 2. Compile. A program that does not fit is a result; any other error is raised.
    start = time.perf_counter()
    try:
        with _quickly():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (told := _OUT_OF_MEMORY.search(str(error))):
            raise
        needed, available = (value for value in told.groups() if value)
        return found | {"out_of_memory": f"used {needed} of {available}"}
    # 3. Read the compiler's account of memory, its model of cost, and the collectives.
    memory: Any = compiled.memory_analysis()
    sizes = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    costs: Any = compiled.cost_analysis() or {}
    seconds = costs.get("optimal_seconds", -1.0)
    sent = collectives(compiled.as_text() or "") if mesh else []
    by_kind = {name: [each for each in sent if each.kind == name] for name, *_ in sent}
    return found | {
        "compile_seconds": time.perf_counter() - start,
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "sum_bytes": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"],
        "peak_bytes": memory.peak_memory_in_bytes,
        "flops": costs.get("flops"),
        # From the compiler's model of cost, which overflows on large programs. Like `flops`, it
        # seems to count each loop once, so that neither is the value of a step.
        "estimated_seconds": seconds if seconds > 0 else None,
        # Bytes that each of several chips receives. The head's gradient is summed in each chunk of
        # the loss.
        "collective_bytes": {name: total_bytes(each) for name, each in by_kind.items()},
    }


# The compiler has two messages for it.
_OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm"
    r"|temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)"
)


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Compiles with the least effort, without the cache, which cannot read programs for TPUs."""
    settings = {"jax_exec_time_optimization_effort": -1.0, "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints all rows in GiB; of a program that did not fit, the compiler's figures."""
    columns = ("parameter_bytes", "state_bytes", "argument_bytes", "sum_bytes", "peak_bytes")
    reporting.table(
        "GiB of a training step on each chip",
        ("model", "batch", "step", "chips", *(name.removesuffix("_bytes") for name in columns)),
        (
            (row["model"], row["batch"], row["step"], row["kind"],
             *(row[name] / GIB if name in row else None for name in columns[:-1]),
             row.get("out_of_memory") or row["peak_bytes"] / GIB)
            for row in rows
        ),
    )  # fmt: skip


if __name__ == "__main__":
    # With libtpu installed, JAX would look for a TPU to run on.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main, PROGRAM))
