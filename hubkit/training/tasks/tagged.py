"""Rows with labels of words: a list of words and one of labels, or a text and its spans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Record, shorten
from hubkit.training.rows.words import Range, joined_words, words_in
from hubkit.training.tasks.columns import TEXTS, column_of, text_column
from hubkit.training.tasks.heads import in_order, numbered
from hubkit.training.tasks.metrics import OUTSIDE, is_bio
from hubkit.training.tasks.task import Asked

WORDS, TAGS, SPANS = ("tokens", "words"), ("tags", "ner_tags", "labels"), ("spans", "entities")

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """A named part of a text.

    Args:
        place: where it stands, without blanks at its ends.
        label: its name.
    """

    place: Range
    label: str


@dataclass(frozen=True)
class Tagged:
    """One row as it was read.

    Args:
        text: of a row of words, these with blanks between them.
        words: where they stand in the text.
        tags: for each word its label; None where the row has spans.
        spans: in order; none of them overlap.
        where: the record.
    """

    text: str
    words: tuple[Range, ...]
    tags: tuple[str, ...] | None
    spans: tuple[Span, ...]
    where: str


@dataclass(frozen=True)
class Shape:
    """Which columns hold words and their labels, and in which of the two forms.

    Args:
        listed: whether the rows hold lists of words.
        text: the column of words, or of the text.
        labels: the column of labels, or of spans; none of rows that are predicted on.
    """

    listed: bool
    text: str
    labels: str = ""

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, labelled: bool = True) -> Shape:
        """By the columns that are asked for, else by their names; rows of lists by the first of them.

        Args:
            labelled: whether the rows have labels.

        Raises:
            HubkitError: ``HK-COLUMNS``.
        """
        text = text_column(records, asked.columns, (*WORDS, *TEXTS))
        listed = isinstance(records[0].values[text], list)
        label = column_of(records, asked.label, TAGS if listed else SPANS, "--label") if labelled else ""
        return cls(listed, text, label)

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """What the columns are taken as."""
        names = ("words", "labels") if self.listed else ("text", "spans")
        return dict(zip(names, ((self.text,), (self.labels,)), strict=True))

    def read(self, records: Sequence[Record], asked: Sequence[str] = ()) -> list[Tagged]:
        """The rows; without labels where there is no column of them.

        Args:
            asked: labels that were given by hand: what whole numbers count into.

        Raises:
            HubkitError: ``HK-DATA`` with all faults: rows of another shape, without words, with as many labels as not,
                with spans that overlap, cut a word or lie outside of the text.
        """
        return _each(records, lambda record: self._listed(record, asked) if self.listed else self._spanned(record))

    def _listed(self, record: Record, asked: Sequence[str]) -> Tagged:
        words = record.values.get(self.text)
        if not isinstance(words, list):
            raise _Fault(f"column {self.text!r} is {_kind(words)}, the first row has a list of words")
        strange = [repr(word) for word in words if not isinstance(word, str) or not word.strip()]
        if strange or not words:
            raise _Fault(f"{self.text}: {strange[0] if strange else 'nothing'} is no word")
        text, places = joined_words(words)
        if not self.labels:
            return Tagged(text, tuple(places), None, (), record.where)
        tags = record.values.get(self.labels)
        if not isinstance(tags, list):
            raise _Fault(f"column {self.labels!r} is {_kind(tags)}, not a list of labels")
        if len(tags) != len(words):
            raise _Fault(f"{len(words)} words, {len(tags)} labels")
        return Tagged(text, tuple(places), tuple(numbered(_label(tag), asked) for tag in tags), (), record.where)

    def _spanned(self, record: Record) -> Tagged:
        text = record.values.get(self.text)
        if not isinstance(text, str):
            raise _Fault(f"column {self.text!r} is {_kind(text)}, the first row has a text")
        words = words_in(text)
        if not words:
            raise _Fault(f"{self.text}: no word")
        if not self.labels:
            return Tagged(text, tuple(words), None, (), record.where)
        given = record.values.get(self.labels)
        if not isinstance(given, list):
            raise _Fault(f"column {self.labels!r} is {_kind(given)}, not a list of spans")
        spans = sorted((_span(one, text, words) for one in given), key=lambda span: span.place)
        for one, other in pairwise(spans):
            if other.place[0] < one.place[1]:
                raise _Fault(f"spans overlap: {_shown(one, text)} and {_shown(other, text)}")
        return Tagged(text, tuple(words), None, tuple(spans), record.where)


class _Fault(Exception):
    """What is wrong with one row."""


def _each(records: Iterable[Record], read: Callable[[Record], T]) -> list[T]:
    found, faults = [], []
    for record in records:
        try:
            found.append(read(record))
        except _Fault as fault:
            faults.append(f"{record.where}: {fault}")
    if faults:
        want = "a list of words with a label for each, or a text with spans, of the same shape in every row"
        what, fix = f"{len(faults)} rows of words cannot be read", "correct the rows, or --text COLUMN --label COLUMN"
        raise HubkitError("HK-DATA", what, want=want, have=shorten(faults), fix=fix)
    return found


def _kind(value: object) -> str:
    names = {str: "a text", list: "a list", dict: "an object", type(None): "not there", bool: "true or false"}
    return names.get(type(value), "a number")


def _label(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _Fault(f"{value!r} is no label: text or a whole number")
    return str(value)


def _span(value: object, text: str, words: Sequence[Range]) -> Span:
    if not isinstance(value, dict) or not {"start", "end", "label"} <= value.keys():
        raise _Fault(f"{str(value)[:60]} is no span: an object with start, end and label")
    start, end = value["start"], value["end"]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (start, end)):
        raise _Fault(f"a span from {start!r} to {end!r}: whole numbers, in characters")
    if not 0 <= start < end <= len(text):
        raise _Fault(f"a span from {start} to {end} in a text of {len(text)} characters")
    inside = text[start:end]
    place = (start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip()))
    span = Span(place, _label(value["label"]))
    if place[0] >= place[1]:
        raise _Fault(f"a span of blanks from {start} to {end}")
    cut = next((text[a:b] for a, b in words if a < place[0] < b or a < place[1] < b), None)
    if cut is not None:
        raise _Fault(f"span {_shown(span, text)} cuts the word {cut!r}")
    return span


def _shown(span: Span, text: str) -> str:
    return f"{text[slice(*span.place)]!r:.40} ({span.label})"


def label_set(rows: Sequence[Tagged], asked: Sequence[str], listed: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels in the order of the head's outputs, as far as rows and user say it; and those that rows hold.

    Of spans these are ``O``, and for each name one for its first word (``B-name``) and one for the others (``I-name``).

    Args:
        asked: labels given by hand, of spans their names or the labels of words.

    Raises:
        HubkitError: ``HK-LABELS`` for rows with one label only.
    """
    if listed:
        found = in_order(tag for row in rows for tag in row.tags or ())
        return tuple(asked or found), tuple(found)
    names = sorted({span.label for row in rows for span in row.spans})
    in_order([OUTSIDE, *names])
    held = _marked(names)
    return (tuple(asked) if is_bio(asked) else _marked(asked or names)), held


def _marked(names: Iterable[str]) -> tuple[str, ...]:
    return (OUTSIDE, *(f"{mark}-{name}" for name in names for mark in "BI"))


def tags_of(row: Tagged, words: Sequence[Range]) -> list[str]:
    """The labels of a row's words.

    Args:
        words: where they stand, as the tokenizer has them: several of `row.words` can be one, which has the label of
            the first.

    Raises:
        ValueError: with the text of a span that begins inside of one.
    """
    if row.tags is not None:
        return [*row.tags[: len(words)]]
    starts = [start for start, _ in words]
    found = [OUTSIDE] * len(words)
    for span in row.spans:
        inside = [n for n, start in enumerate(starts) if span.place[0] <= start < span.place[1]]
        if words and span.place[0] < words[-1][1] and (not inside or starts[inside[0]] != span.place[0]):
            raise ValueError(_shown(span, row.text))
        for n in inside:
            found[n] = f"{'B' if n == inside[0] else 'I'}-{span.label}"
    return found
