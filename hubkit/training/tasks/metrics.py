"""Measures of predictions against true labels, as scikit-learn defines them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

NAMES = ("accuracy", "f1_macro", "f1_micro")
"""What `scores` gives."""


def scores(truth: Sequence[int], guessed: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 as the mean over labels and over rows.

    A label that neither side holds does not count; one without a right guess has F1 0. With one label a row, the F1
    over rows (``f1_micro``) equals the accuracy.

    Args:
        truth: the true label of each row, as its number.
        guessed: the predicted one, in the same order.

    Returns:
        ``accuracy``, ``f1_macro``, ``f1_micro``, each in [0, 1].

    Raises:
        ValueError: for no rows, or sides of different length.
    """
    if not truth or len(truth) != len(guessed):
        raise ValueError(f"{len(truth)} true and {len(guessed)} predicted labels")
    right = sum(t == g for t, g in zip(truth, guessed, strict=True))
    true, said = Counter(truth), Counter(guessed)
    both = Counter(t for t, g in zip(truth, guessed, strict=True) if t == g)
    each = [2 * both[label] / (true[label] + said[label]) for label in sorted({*true, *said})]
    accuracy = right / len(truth)
    return dict(zip(NAMES, (accuracy, math.fsum(each) / len(each), accuracy), strict=True))
