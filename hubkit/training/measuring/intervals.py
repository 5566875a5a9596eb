"""How sure a mean over rows is: the percentile bootstrap, rows drawn again with what was measured of them.

A mean is nats a target: the sum over the drawn rows divided by their targets. Two models are compared on the same draws
(paired), so that what makes a row hard for both falls out of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubkit.training.measuring.losses import Losses

LEVEL = 95
"""Per cent of the draws that an interval holds."""


@dataclass(frozen=True)
class Interval:
    """A mean over all rows, and where 95 % of the means over drawn rows lie; all in nats a target."""

    value: float
    low: float
    high: float


def interval(measured: Losses, samples: int, seed: int) -> Interval:
    """The mean loss of `measured` with its interval.

    Args:
        samples: how often rows are drawn.
        seed: of the draws: the same seed, the same bytes.
    """
    rows = drawn(len(measured.nats), samples, seed)
    return between(measured.mean, _means(measured, rows))


def difference(after: Losses, before: Losses, samples: int, seed: int) -> Interval:
    """How much more `after` loses than `before` on the same rows: paired, below zero where it is better."""
    rows = drawn(len(after.nats), samples, seed)
    return between(after.mean - before.mean, _means(after, rows) - _means(before, rows))


def drawn(rows: int, samples: int, seed: int) -> np.ndarray:
    """Indices of the drawn rows, (samples, rows), of a generator whose numbers no version of numpy changes."""
    return np.random.RandomState(seed).randint(0, rows, size=(samples, rows))


def _means(measured: Losses, drawn: np.ndarray) -> np.ndarray:
    nats, targets = np.asarray(measured.nats, np.float64), np.asarray(measured.targets, np.int64)
    means: np.ndarray = nats[drawn].sum(axis=1) / targets[drawn].sum(axis=1)
    return means


def between(value: float, means: np.ndarray) -> Interval:
    """`value` with the ends of what holds 95 % of `means`, those of drawn rows."""
    rest = (100 - LEVEL) / 2
    low, high = np.percentile(means, [rest, 100 - rest])
    return Interval(value, float(low), float(high))
