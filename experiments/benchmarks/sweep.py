"""The cost of GUM's settings: seconds of its update against rank, gamma and period, by turns."""

import statistics
from typing import Any

from experiments import reporting
from experiments.benchmarks import contenders, parameters, timing
from experiments.benchmarks.settings import Config
from experiments.benchmarks.step import alternating


def run(config: Config) -> None:
    """Times all settings by turns, writes `sweep.json` and prints a table."""
    # 1. The settings (rank, gamma), one of which varies while the other has its default.
    default = (config.rank, config.full_rank_layers)
    by_rank = {rank: (rank, config.full_rank_layers) for rank in config.ranks}
    by_gamma = {gamma: (config.rank, gamma) for gamma in config.gammas}
    # A dict instead of a set: each setting once, in an order that does not change between runs.
    settings = dict.fromkeys([default, *by_rank.values(), *by_gamma.values()])
    # 2. Time them, with the period of two at which refreshes and plain steps alternate.
    optimizers = {str(s): contenders.gum(*s, 2, "separate") for s in settings}
    plain, refresh = alternating(optimizers, parameters.separate(config.sweep_preset), config)
    costs = {name: timing.costs(plain[name], refresh[name], config.period) for name in optimizers}
    # 3. Costs by setting. Periods need no measurements of their own.
    results = {
        "rank": [{"rank": r} | costs[str(setting)] for r, setting in by_rank.items()],
        "gamma": [{"gamma": g} | costs[str(setting)] for g, setting in by_gamma.items()],
        "period": by_period(plain[str(default)], refresh[str(default)], config.periods),
    }
    reporting.write(config.out / "sweep.json", config, **results)
    _show(results)


def by_period(
    plain: list[float], refresh: list[float], periods: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Returns the mean seconds of a step by period, all from one plain step and one refresh."""
    medians = statistics.median(plain), statistics.median(refresh)
    return [
        {"period": period, "amortized_seconds": timing.amortized(*medians, period)}
        for period in periods
    ]


def _show(results: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in results.items():
        reporting.table(
            f"Milliseconds of GUM's update against {name}",
            (name, "plain", "refresh", "amortized"),
            (
                (
                    row[name],
                    1000 * row["plain"]["median"] if "plain" in row else None,
                    1000 * row["refresh"]["median"] if "refresh" in row else None,
                    1000 * row["amortized_seconds"],
                )
                for row in rows
            ),
        )
