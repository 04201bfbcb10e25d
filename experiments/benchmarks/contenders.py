"""The optimizers of the benchmarks, in tables from a name to a function that makes one.

Each function is `(rank, full_rank_layers, period, layout) -> transformation`, and returns None if
the optimizer does not support the layout. All have one learning rate, which does not affect time or
memory, and leave embedding, head and norms to AdamW.
"""

from collections.abc import Callable
from functools import partial

import jax
import optax

import gum_optax
from gum_optax import dimension_numbers, projectors, residuals, storages

LEARNING_RATE = 1e-3
# Layout -> which axes form matrices: whole leaves [m, n], or leaves [L, m, n] of stacked layers.
NUMBERS = {"separate": dimension_numbers.default, "stacked": dimension_numbers.scanned_layers}
NOT_STACKED = "projects 2-D leaves only"  # a result's note in place of times

Optimizer = optax.GradientTransformation
Contender = Callable[[int, int, int, str], Optimizer | None]


def gum(
    rank: int,
    full_rank_layers: int,
    period: int,
    layout: str,
    projector: projectors.Projector = projectors.subspace_iteration,
) -> Optimizer:
    """GUM, by default with power iteration as its projector."""
    compression = gum_optax.LowRank(
        rank,
        period,
        residual=gum_optax.residuals.sampled(full_rank_layers),
        projector=projector,
    )
    return gum_optax.gum(LEARNING_RATE, compression, weight_dimension_numbers=NUMBERS[layout])


def adamw(rank: int, full_rank_layers: int, period: int, layout: str) -> Optimizer:
    """AdamW for all parameters."""
    del rank, full_rank_layers, period, layout
    return optax.adamw(LEARNING_RATE)


def muon(rank: int, full_rank_layers: int, period: int, layout: str) -> Optimizer:
    """optax's Muon: Newton-Schulz on every hidden matrix, at full rank."""
    del rank, full_rank_layers, period
    return optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=NUMBERS[layout])


def optax_galore(rank: int, full_rank_layers: int, period: int, layout: str) -> Optimizer | None:
    """optax's GaLore for hidden matrices alone."""
    del full_rank_layers
    # Without the partition it would project embedding and head as well.
    if layout == "stacked":
        return None
    projected = optax.contrib.galore(LEARNING_RATE, rank, period)
    rest = optax.adamw(LEARNING_RATE)
    return optax.partition({"matrix": projected, "rest": rest}, _matrix_or_rest)


def galore(rank: int, full_rank_layers: int, period: int, layout: str) -> Optimizer:
    """This library's GaLore, which projects by SVD."""
    del full_rank_layers
    return gum_optax.adamw(
        LEARNING_RATE,
        gum_optax.galore(rank, period),
        weight_decay=0.0,
        weight_dimension_numbers=NUMBERS[layout],
    )


TABLE: dict[str, Contender] = {
    "gum": gum,
    "adamw": adamw,
    "optax muon": muon,
    "optax galore": optax_galore,
    "galore": galore,
}


def _low_rank_muon(
    residual: gum_optax.residuals.Residual, rank: int, period: int = 200
) -> Optimizer:
    return gum_optax.gum(LEARNING_RATE, gum_optax.LowRank(rank, period, residual=residual))


# The methods of `experiments.studies.frontier`: (rank, full_rank_layers, period) -> transformation.
# Without a period it is 200, so that no step of a benchmark but the first is a refresh.
VARIANTS: dict[str, Callable[..., Optimizer]] = {
    "GaLore-Muon": lambda rank, _, *period: _low_rank_muon(residuals.drop(), rank, *period),
    "columns of the residual": lambda rank, _, *period: _low_rank_muon(
        residuals.through(gum_optax.normalize_columns()), rank, *period
    ),
    "orthogonalized residual": lambda rank, _, *period: _low_rank_muon(
        residuals.orthogonalized(), rank, *period
    ),
    "GUM": lambda rank, drawn, *period: _low_rank_muon(residuals.sampled(drawn), rank, *period),
    "Muon, 8 bits": lambda *_: gum_optax.muon(LEARNING_RATE),
    "Muon, 6 bits": lambda *_: gum_optax.muon(LEARNING_RATE, storages.int6()),
    "Muon, 4 bits": lambda *_: gum_optax.muon(LEARNING_RATE, storages.int4()),
    "Muon": lambda *_: gum_optax.muon(LEARNING_RATE, storages.plain()),
    "MUD, 8 bits": lambda *_: gum_optax.muon(
        LEARNING_RATE, orthogonalizer=gum_optax.scale_by_decorrelation()
    ),
    "SWAN": lambda *_: gum_optax.swan(LEARNING_RATE),
    "SWAN by MUD": lambda *_: gum_optax.swan(LEARNING_RATE, gum_optax.scale_by_decorrelation()),
    "SCALE": lambda *_: gum_optax.for_matrices(gum_optax.normalize_columns(), LEARNING_RATE),
    "AdamW": lambda *_: optax.adamw(LEARNING_RATE),
    "AdamW, 8 bits": lambda *_: gum_optax.quantized(optax.adamw(LEARNING_RATE)),
}

gum_svd = partial(gum, projector=projectors.svd)

# The contenders with a period. All steps of the others are plain.
REFRESHING = frozenset({"gum", "gum, svd", "optax galore", "galore"})


def _matrix_or_rest(params: optax.Params) -> optax.Params:
    numbers = dimension_numbers.default(params)
    return jax.tree.map(lambda _, number: "rest" if number is None else "matrix", params, numbers)
