"""Seconds, measured by turns so that a machine that slows down slows all alike, and ratios."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def by_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times, one after the other in the order of `steps`.

    A step waits for its results. Each is called once before, in the same order, to compile.
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
    """The median, with how far single measurements are from it."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "repeats": len(seconds),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The ratio of medians, and the least and largest ratio of values of the same turn."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    return {"of_medians": of_medians, "min": min(each), "max": max(each)}


def amortized(plain: float, refresh: float, period: int) -> float:
    """Mean seconds of a step, of which one in `period` is a refresh."""
    return plain + (refresh - plain) / period


def costs(plain: Sequence[float], refresh: Sequence[float] | None, period: int) -> dict[str, Any]:
    """What the steps of one optimizer cost; without refreshes, every step is plain."""
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
