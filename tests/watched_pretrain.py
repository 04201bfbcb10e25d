"""The training program, which also writes each process's part of the optimizer state.

`test_multi_process.py` runs it, with a model that compiles faster than the smallest preset.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import pretrain
from experiments.models import presets
from experiments.trainer import checkpoints, cli
from tests.helpers import low_rank_state

# With rank 16 the attention's q and o are sampled; all other matrices, 16 wide, are uncompressed.
SMALL = presets.Architecture(32, 16, 2, 4, 2, vocab_size=320, seq_len=32)


def view(array: jax.Array) -> np.ndarray:
    """The array as this process's devices hold it; NaN where they hold nothing."""
    seen = np.full(array.shape, np.nan)
    for shard in array.addressable_shards:
        seen[shard.index] = shard.data
    return seen


class Watched(checkpoints.Checkpoints):
    """Checkpoints with one more file for each process."""

    def __init__(self, config):
        super().__init__(config)
        self._beside = Path(config.run_dir)

    def save(self, step, state, data):
        super().save(step, state, data)
        seen = low_rank_state(state.opt_state)
        views: Any = {"key": view(seen.key)}
        views |= {f"slots {name}": view(slots) for name, slots in seen.slots.items()}
        views |= {f"basis {name}": view(basis) for name, basis in seen.basis.items()}
        np.savez(self._beside / f"step{step}-process{jax.process_index()}.npz", **views)


if __name__ == "__main__":
    gc.freeze()  # modules live to the end: garbage is not looked for among them
    gc.set_threshold(50_000, 20, 20)
    presets.PRESETS["tiny"] = SMALL
    checkpoints.Checkpoints = Watched
    sys.exit(cli.run(pretrain.main, pretrain.PROGRAM))
