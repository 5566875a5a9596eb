"""Words of a text, and which tokens they begin at: what a label of a word is learnt at."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Range = tuple[int, int]
"""Where something stands in a text, in characters: its first one, and the one behind it."""
_ALONE = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA")
"""Beginnings of the names of characters that are written without spaces between words: each is one."""


@dataclass(frozen=True)
class Placed:
    """A text as tokens.

    Args:
        ids: its token ids, special tokens among them.
        words: where its words stand; those that share a token are one.
        firsts: for each word the number of the first token that lies in it; -1 for one that the tokenizer drops.
        shared: number of each word, as it was given, that has no token of its own.
        cut: tokens that were cut off.
    """

    ids: tuple[int, ...]
    words: tuple[Range, ...]
    firsts: tuple[int, ...]
    shared: tuple[int, ...] = ()
    cut: int = 0


def words_in(text: str) -> list[Range]:
    """Where words stand in a text: a sign of punctuation is one, and each sign that is written without spaces, too.

    What lies between these and blanks is a word: ``Aromi's`` is three, ``city`` one.
    """
    found: list[Range] = []
    open_at: int | None = None
    for at, sign in enumerate(text):
        alone = unicodedata.category(sign)[0] in "PS" or unicodedata.name(sign, "").startswith(_ALONE)
        if (alone or sign.isspace()) and open_at is not None:
            found.append((open_at, at))
            open_at = None
        if alone:
            found.append((at, at + 1))
        elif not sign.isspace() and open_at is None:
            open_at = at
    return [*found, (open_at, len(text))] if open_at is not None else found


def joined_words(words: Sequence[str]) -> tuple[str, list[Range]]:
    """Words as one text, blanks between them, and where they stand in it."""
    found, at = [], 0
    for word in words:
        found.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(words), found


def placed(tokenizer: Any, text: str, words: Sequence[Range]) -> Placed:
    """A text as tokens, with the place of each of its words.

    Args:
        tokenizer: a fast one: it says which characters a token stands for.
        words: ranges of `text` in order, that do not overlap.
    """
    coded = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    begins = [start for start, _ in words]
    heads: dict[int, int] = {}
    shared: set[int] = set()
    for number, (start, end) in enumerate(coded["offset_mapping"]):
        while start < end and text[start].isspace():  # the blank before a word belongs to its token
            start += 1
        if start < end:
            near = range(max(0, bisect_right(begins, start) - 1), bisect_right(begins, end - 1))
            touched = [word for word in near if words[word][1] > start]
            for word in touched:
                heads.setdefault(word, number)
            shared.update(touched[1:])
    kept: list[Range] = []
    firsts: list[int] = []
    for word, (start, end) in enumerate(words):
        if word in shared:
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((start, end))
            firsts.append(heads.get(word, -1))
    return Placed(tuple(coded["input_ids"]), tuple(kept), tuple(firsts), tuple(sorted(shared)))


def placed_within(tokenizer: Any, text: str, words: Sequence[Range], longest: int) -> Placed:
    """`placed`, with as many words from the beginning as fit, each whole: none where not even one does.

    Args:
        longest: most tokens.
    """
    whole = placed(tokenizer, text, words)
    if len(whole.ids) <= longest:
        return whole
    count = sum(first < longest for first in whole.firsts)
    while count:
        end = whole.words[count - 1][1]
        found = placed(tokenizer, text[:end], [word for word in words if word[1] <= end])
        if len(found.ids) <= longest:
            return replace(found, cut=len(whole.ids) - len(found.ids))
        count -= 1
    return Placed((), (), (), cut=len(whole.ids))
