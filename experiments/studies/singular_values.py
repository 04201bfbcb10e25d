"""The singular values of trained weights."""

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.trainer.config import Config
from experiments.trainer.loop import Result
from experiments.trainer.pretraining import train

_QUANTILES = 17  # kept of each matrix's singular values, from the smallest to the largest


def pretrain(config: Config, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Pretrains; returns the result and the spectra of its weights, for the result file."""
    result = train(config, show=show)
    return result, {"spectra": spectra(result.params)}


def pretrain_for_ranks(config: Config, *, show: bool) -> tuple[Result, dict[str, Any]]:
    """Pretrains; returns the result and the stable ranks of its weights, for the result file."""
    result = train(config, show=show)
    return result, stable_ranks(result.params)


def stable_ranks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns by kind of matrix (q, gate, ...) the mean stable rank over the blocks of a model."""
    by_kind: dict[str, list[float]] = {}
    for path, found in spectra(params).items():
        by_kind.setdefault(path.split("/")[-2], []).append(found["stable_rank"])
    return {"stable_rank": {kind: statistics.mean(ranks) for kind, ranks in by_kind.items()}}


def spectra(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns by path the stable rank and singular values of every hidden matrix of a model."""
    leaves = jax.tree_util.tree_flatten_with_path(params["layers"])[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        name: spectrum(np.asarray(leaf, np.float64))
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if leaf.ndim == 2
    }


def spectrum(matrix: np.ndarray) -> dict[str, Any]:
    """Returns stable rank, spectral norm, and quantiles of the singular values over the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)  # descending
    quantiles = np.quantile(values / values[0], np.linspace(0, 1, _QUANTILES))
    # Stable rank: ||W||_F^2 / ||W||_2^2.
    return {
        "stable_rank": float(np.sum(values**2) / values[0] ** 2),
        "norm": float(values[0]),
        "quantiles": [round(float(q), 5) for q in quantiles],
    }
