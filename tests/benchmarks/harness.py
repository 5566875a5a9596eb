"""Timing two sides of a comparison in turn: the machine's speed drifts, so only ratios of neighbours mean something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7) -> tuple[float, float, float]:
    """Seconds of ours, seconds of theirs (medians), and the median of the per-round ratios ours / theirs.

    One round of each is run first and not counted; the order alternates.
    """
    ours(), theirs()
    a: list[float] = []
    b: list[float] = []
    for index in range(rounds):
        pairs = ((ours, a), (theirs, b))
        for call, times in pairs if index % 2 else reversed(pairs):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
    return statistics.median(a), statistics.median(b), ratio


def report(name: str, figures: tuple[float, float, float], target: float, unit: str = "ms", scale: float = 1e3) -> None:
    """One line: name, ours, theirs, ratio, target."""
    ours, theirs, ratio = figures
    mark = "met" if ratio <= target else "MISSED"
    print(
        f"{name:44s} {ours * scale:9.1f} {theirs * scale:9.1f} {unit}   ratio {ratio:.3f}   target {target:.2f} {mark}",
        flush=True,
    )
