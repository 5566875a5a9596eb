"""How near what was written is to what was to be written."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def answer_scores(wanted: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """Means over answers.

    Args:
        wanted: the true text of each row.
        written: what was written, in the same order.

    Returns:
        ``exact_match``: the share of texts that are the same but for the kind of white space; with the package
        rouge-score also ``rouge1``, ``rouge2``, ``rougeL``: F-measures, without stemming. All in [0, 1].

    Raises:
        ValueError: for no texts, or sides of different length.
    """
    if not wanted or len(wanted) != len(written):
        raise ValueError(f"{len(wanted)} wanted and {len(written)} written texts")
    pairs = [(" ".join(one.split()), " ".join(other.split())) for one, other in zip(wanted, written, strict=True)]
    found = {"exact_match": sum(one == other for one, other in pairs) / len(pairs)}
    if len(measured_names()) == 1:
        return found
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    each = [scorer.score(one, other) for one, other in pairs]
    return found | {name: sum(float(one[name].fmeasure) for one in each) / len(each) for name in ROUGE}


def measured_names() -> tuple[str, ...]:
    """The figures that `answer_scores` gives here."""
    return ("exact_match", *(ROUGE if importlib.util.find_spec("rouge_score") else ()))
