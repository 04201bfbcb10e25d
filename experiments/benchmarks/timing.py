"""Timing by turns, so that a machine that slows down affects all contenders alike; ratios."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def by_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Times each step `repeats` times, one after the other in the order of `steps`.

    Args:
      steps: functions that wait for their results. Each is called once before, to compile.
      repeats: the number of turns.

    Returns:
      The seconds of each step, turn by turn.
    """
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum, maximum and number of the measurements, in seconds."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "repeats": len(seconds),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the ratio of medians, and the minimum and maximum ratio within one turn."""
    # Within a turn the machine has the same speed for both, so these ratios vary by noise alone.
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    return {"of_medians": of_medians, "min": min(each), "max": max(each)}


def amortized(plain: float, refresh: float, period: int) -> float:
    """Returns the mean seconds of a step if one in `period` is a refresh."""
    return plain + (refresh - plain) / period


def costs(plain: Sequence[float], refresh: Sequence[float] | None, period: int) -> dict[str, Any]:
    """Summarizes the seconds of one optimizer's steps.

    Args:
      plain: seconds of plain steps.
      refresh: seconds of refreshes; None for an optimizer without.
      period: steps over which the cost of a refresh is spread.

    Returns:
      ``refresh_share`` is the share of a plain step that refreshes add to the mean.
    """
    ordinary = statistics.median(plain)
    if refresh is None:
        return {"plain": summary(plain), "amortized_seconds": ordinary}
    renewed = statistics.median(refresh)
    return {
        "plain": summary(plain),
        "refresh": summary(refresh),
        "amortized_seconds": amortized(ordinary, renewed, period),
        "refresh_over_plain": renewed / ordinary,
        "refresh_share": (renewed - ordinary) / period / ordinary,
    }
