"""What optimizers allocate for GaLore's LLaMA presets: `python -m experiments.memory`.

State bytes are exact and come from shapes alone; nothing is allocated. Temporary bytes are XLA's
own analysis of the compiled update (gradients in, parameters and state donated) on this device.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import optax

import gum_optax
from experiments import cli, model
from gum_optax import dimension_numbers

PROGRAM = "experiments.memory"


@dataclasses.dataclass(frozen=True)
class Config:
    """Optimizer state of AdamW, Muon, GaLore and GUM for LLaMA presets."""

    presets: tuple[str, ...] = ("60m", "130m", "350m", "1b")
    """Presets of experiments.model whose state is planned."""
    compiled: tuple[str, ...] = ("60m",)
    """Presets whose update is compiled too, for its temporaries (half a minute each at 60m)."""
    rank: int = 128
    """Rank of GaLore and GUM."""
    full_rank_layers: int = 2
    """Gamma: full-rank layers of each role in a period."""
    out: Path = Path("experiments/results/memory.json")
    """Result file."""


def main(arguments: Sequence[str]) -> int:
    """Prints a table in MiB and writes the bytes."""
    config = cli.parse(Config, PROGRAM, arguments)
    result = {
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "device": jax.devices()[0].device_kind,
        "state_bytes": {name: state_bytes(name, config) for name in config.presets},
        "temporary_bytes": {name: temporary_bytes(name, config) for name in config.compiled},
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    for title in ("state_bytes", "temporary_bytes"):
        print(f"{title.replace('_', ' ')}, MiB")
        for name, sizes in result[title].items():
            cells = (f"{kind} {size / 2**20:.0f}" for kind, size in sizes.items())
            print(f"  {name:<5} {'   '.join(cells)}")
    return 0


def parameter_shapes(preset: str) -> model.Params:
    """The parameters of a preset as shapes."""
    return jax.eval_shape(lambda: model.create(model.PRESETS[preset])[1])


def state_bytes(preset: str, config: Config) -> dict[str, int]:
    """Bytes of parameters and of each optimizer's state."""
    plan = gum_optax.memory_plan(
        parameter_shapes(preset), rank=config.rank, full_rank_layers=config.full_rank_layers
    )
    return {
        "parameters": plan.parameter_bytes,
        "AdamW": plan.adamw_bytes,
        "Muon": plan.muon_bytes,
        "GaLore": plan.galore_bytes,
        "GUM": plan.total_bytes,
    }


def temporary_bytes(preset: str, config: Config) -> dict[str, int]:
    """Bytes of temporaries of each optimizer's compiled update."""
    params = parameter_shapes(preset)
    optimizers = {
        "AdamW": optax.adamw(1e-3),
        "Muon": optax.contrib.muon(1e-3, muon_weight_dimension_numbers=dimension_numbers.default),
        "optax GaLore": optax.contrib.galore(1e-3, config.rank),
        "GUM": gum_optax.gum(1e-3, config.rank, full_rank_layers=config.full_rank_layers),
    }
    return {name: _temporaries(tx, params) for name, tx in optimizers.items()}


def _temporaries(tx: optax.GradientTransformation, params: model.Params) -> int:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = step.lower(params, state, params).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{jax.default_backend()} gives no memory analysis of compiled programs")
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
