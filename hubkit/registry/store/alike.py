"""Names that could be taken for others: what a repository that was never pulled here looks like."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TWINS = str.maketrans({"0": "o", "1": "l", "i": "l", "_": "-", ".": "-"})
SHORT = 3
"""Of names with so many letters many are one letter from each other by chance."""


def alike(repo: str, known: Iterable[str]) -> str | None:
    """Which known repository another one could be taken for, in words; None where there is none.

    That is one whose owner is written almost the same, or one of the same name of another owner. Names that differ
    in their numbers are versions of one thing.

    Args:
        repo: ``org/name``, not among `known`.
        known: repositories that somebody chose before.
    """
    owner, _, name = repo.partition("/")
    others = sorted(set(known))
    if any(other.partition("/")[0] == owner for other in others):
        return None  # whoever has the owner's name may give names below it
    for other in others:
        theirs = other.partition("/")[0]
        if _twins(owner, theirs):
            return f"its owner {owner!r} looks like {theirs!r}, of whom {other} is stored"
    same = next((other for other in others if other.partition("/")[2].casefold() == name.casefold()), None)
    return f"{same} is stored, which is of another owner" if same else None


def _twins(one: str, other: str) -> bool:
    """Whether two names are one edit apart, or equal once letters that look alike are the same letter."""
    if _unnumbered(one) == _unnumbered(other):
        return False
    if _skeleton(one) == _skeleton(other):
        return True
    return max(len(one), len(other)) > SHORT and _one_edit(one.casefold(), other.casefold())


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _skeleton(name: str) -> str:
    return name.casefold().translate(_TWINS).replace("rn", "m").replace("vv", "w")


def _one_edit(one: str, other: str) -> bool:
    """Whether one letter more, less or changed, or two neighbours exchanged, makes one name of the other."""
    if abs(len(one) - len(other)) > 1:
        return False
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    mine, theirs = one[at:], other[at:]
    swapped = mine[:2] == theirs[:2][::-1] and mine[2:] == theirs[2:]
    return mine[1:] == theirs[1:] or mine[1:] == theirs or mine == theirs[1:] or swapped
