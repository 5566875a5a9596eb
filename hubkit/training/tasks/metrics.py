"""Measures of predictions against true labels, as scikit-learn and seqeval define them, and of searches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

OUTSIDE = "O"
"""The label of words that belong to nothing."""
NAMES = ("accuracy", "f1_macro", "f1_micro")
"""What `scores` gives."""


def scores(truth: Sequence[int], guessed: Sequence[int], but: int | None = None) -> dict[str, float]:
    """Accuracy, and F1 as the mean over labels and over rows.

    A label that neither side holds does not count; one without a right guess has F1 0. With one label a row, the F1
    over rows (``f1_micro``) equals the accuracy.

    Args:
        truth: the true label of each row, as its number.
        guessed: the predicted one, in the same order.
        but: a label that both F1 leave out: that of words that belong to nothing. Where no other is there both are 0.

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
    labels = sorted({*truth, *guessed} - {but})
    if not labels:
        return dict(zip(NAMES, (right / len(truth), 0.0, 0.0), strict=True))
    each = [2 * both[label] / (true[label] + said[label]) for label in labels]
    micro = 2 * sum(both[label] for label in labels) / sum(true[label] + said[label] for label in labels)
    return dict(zip(NAMES, (right / len(truth), math.fsum(each) / len(each), micro), strict=True))


def word_scores(
    truth: Sequence[Sequence[int]], guessed: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, float]:
    """`scores` over all words, the share of rows without a fault, and F1 of spans where the labels are BIO.

    Args:
        truth: for each row the true labels of its words, as numbers.
        guessed: the predicted ones, in the same order.
        labels: their names; where one is `OUTSIDE`, F1 is over the others.

    Returns:
        ``accuracy``, ``f1_macro``, ``f1_micro``, ``exact_match``, and for BIO ``span_f1``, each in [0, 1].
    """
    rows = list(zip(truth, guessed, strict=True))
    words = [(t, g) for true, guess in rows for t, g in zip(true, guess, strict=True)]
    outside = labels.index(OUTSIDE) if OUTSIDE in labels else None
    found = scores([t for t, _ in words], [g for _, g in words], outside)
    found["exact_match"] = sum(list(t) == list(g) for t, g in rows) / len(rows)
    if is_bio(labels):
        found["span_f1"] = _span_f1([([labels[n] for n in t], [labels[n] for n in g]) for t, g in rows])
    return found


def is_bio(labels: Sequence[str]) -> bool:
    """Whether labels say where spans begin (``B-name``), go on (``I-name``), and are not (``O``)."""
    marked = [label for label in labels if label != OUTSIDE]
    return OUTSIDE in labels and bool(marked) and all(label[:2] in ("B-", "I-") and label[2:] for label in marked)


def spans_of(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans that BIO labels of words mean, as CoNLL's evaluation reads them: (name, first word, word behind it).

    A span begins with B, and also with an I that follows no word of the same name.
    """
    found: list[tuple[str, int, int]] = []
    for number, label in enumerate(labels):
        name = label[2:] if label != OUTSIDE else ""
        goes_on = bool(found) and label.startswith("I-") and found[-1][0] == name and found[-1][2] == number
        if goes_on:
            found[-1] = (name, found[-1][1], number + 1)
        elif name:
            found.append((name, number, number + 1))
    return found


def _span_f1(rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Over all spans: right is one with the same name and the same words; 0 where neither side has any."""
    sides = [[{*spans_of(labels)} for labels in side] for side in zip(*rows, strict=True)]
    both = sum(len(true & guess) for true, guess in zip(*sides, strict=True))
    count = sum(len(spans) for side in sides for spans in side)
    return 2 * both / count if count else 0.0


FOUND = 10
"""Candidates that a search shows."""
RETRIEVAL = ("accuracy_at_1", "mrr_at_10", "ndcg_at_10")
"""What `retrieval` gives."""


def retrieval(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """How well what belongs to a text is found among many candidates; means over the texts.

    Args:
        ranks: for each text the ranks of its right candidates, one at least, from 1, ascending.

    Returns:
        ``accuracy_at_1``: the share of texts whose nearest candidate is right; ``mrr_at_10``: one over the rank of the
        nearest right one, 0 beyond 10; ``ndcg_at_10``: the discounted gain of the first ten, 1 where nothing stands
        before the right ones. Each in [0, 1].

    Raises:
        ValueError: for no texts, or one without a right candidate.
    """
    if not ranks or not all(ranks):
        raise ValueError("texts without a right candidate")
    found = (
        [float(one[0] == 1) for one in ranks],
        [1 / one[0] if one[0] <= FOUND else 0.0 for one in ranks],
        [_gain(one) / _gain(range(1, len(one) + 1)) for one in ranks],
    )
    return {name: math.fsum(each) / len(each) for name, each in zip(RETRIEVAL, found, strict=True)}


def _gain(ranks: Sequence[int]) -> float:
    return math.fsum(1 / math.log2(rank + 1) for rank in ranks if rank <= FOUND)
