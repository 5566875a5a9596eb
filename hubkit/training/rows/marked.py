"""Rows as the model sees them: their text, taken apart into what is learnt and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hubkit.training.rows.encode import IGNORED, Row


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other and are all learnt, or all not.

    Args:
        text: what they say, special tokens spelt out.
        tokens: how many they are.
        learnt: whether the loss is taken on them.
    """

    text: str
    tokens: int
    learnt: bool


@dataclass(frozen=True)
class MarkedRow:
    """One training row.

    Args:
        where: the record it came from.
        tokens, targets: how many there are, and how many of them are learnt.
        pieces: all of its text, in order.
        cut: tokens that were cut off at its end.
        answer: what is learnt of the row as a whole, in words: its label.
    """

    where: str
    tokens: int
    targets: int
    pieces: tuple[Piece, ...]
    cut: int = 0
    answer: str = ""

    def text(self, opening: str = "[[", closing: str = "]]") -> str:
        """The row as one text, with marks around what is learnt."""
        return "".join(f"{opening}{one.text}{closing}" if one.learnt else one.text for one in self.pieces)


def marked(row: Row, tokenizer: Any) -> MarkedRow:
    """A row in pieces.

    Args:
        tokenizer: of transformers, by which the row was made.
    """
    pieces: list[Piece] = []
    stop, before = 0, ""
    for learnt, labels in groupby(row.labels, lambda label: label != IGNORED):
        start, stop = stop, stop + sum(1 for _ in labels)
        whole = _decoded(tokenizer, row.ids[:stop])
        # what a piece says depends on what stands before it: some tokenizers take the space before a first word away
        said = whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, row.ids[start:stop])
        pieces.append(Piece(said, stop - start, learnt))
        before = whole
    return MarkedRow(row.where, len(row.ids), row.targets(), tuple(pieces), row.cut)


def unmarked(row: Row, tokenizer: Any, answer: str) -> MarkedRow:
    """A row in one piece, of which an `answer` is learnt that is none of its tokens."""
    piece = Piece(_decoded(tokenizer, row.ids), len(row.ids), False)
    return MarkedRow(row.where, len(row.ids), row.targets(), (piece,), row.cut, answer)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
