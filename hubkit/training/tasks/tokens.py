"""Token classification: a label for each word, by a head that the base's files hold or that is made for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from hubkit.errors import HubkitError
from hubkit.training.rows.batching import collate, plan_evaluation
from hubkit.training.rows.data import Record, shorten
from hubkit.training.rows.encode import IGNORED, Row
from hubkit.training.rows.labelled import Worded
from hubkit.training.rows.marked import MarkedRow, unmarked
from hubkit.training.rows.words import Placed, placed, placed_within
from hubkit.training.tasks.heads import bad_labels, given_labels, head_for, label_names, labels_of, made_anew, unheld
from hubkit.training.tasks.metrics import NAMES, is_bio, spans_of, word_scores
from hubkit.training.tasks.tagged import Shape, Tagged, label_set, tags_of
from hubkit.training.tasks.task import Asked, Reading, Task


@dataclass(frozen=True)
class TokenClassification(Task):
    """A label for each word of a row.

    Args:
        labels: the label set, in the order of the head's outputs.
        pad: the id that pads rows.
        shape: of the rows to train on; None for an adapter that predicts.
        given: the labels, as far as a user gave them: whole numbers in the rows count into these.
        said: what is to be said of the rows.
    """

    kind: ClassVar[str] = "token-classification"
    labels: tuple[str, ...]
    pad: int
    shape: Shape | None = None
    given: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """Reads columns and labels, then what the base's files hold."""
        shape, given = Shape.of(records, asked), given_labels(asked.labels)
        names, held = label_set(shape.read(records, given), given, shape.listed)
        head = head_for(cls.kind, folder, len(names), names if given else ())
        labels = label_names(names, head, names if given else ())
        said = unheld(names if given else (), held)
        return cls(head.model, head.sites, shape.roles, labels, head.pad, shape, given, said)

    @classmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Without columns: what is predicted on has no labels."""
        head = head_for(cls.kind, folder, len(document.get("labels", ())), anew=made_anew(document))
        return cls(head.model, head.sites, {}, labels_of(document, head), head.pad)

    @property
    def facts(self) -> dict[str, Any]:
        """The labels."""
        return {"labels": [*self.labels]}

    @property
    def notes(self) -> tuple[str, ...]:
        """Labels that no row holds."""
        return self.said

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> list[Worded]:
        """One row per record: the label of a word at its first token."""
        _require_offsets(tokenizer)
        assert self.shape is not None
        read = self.shape.read(records, self.given)
        number = {name: n for n, name in enumerate(self.labels)}
        rows, strange, odd, long = list[Worded](), list[str](), list[str](), list[str]()
        for row in read:
            found = placed(tokenizer, row.text, row.words)
            if truncate and len(found.ids) > longest:
                found = placed_within(tokenizer, row.text, row.words, longest)
            if not found.words or len(found.ids) > longest:
                long.append(f"{row.where}: {len(found.ids) or found.cut} tokens")
                continue
            try:
                tags = tags_of(row, found.words)
            except ValueError as error:
                odd.append(f"{row.where}: span {error} begins inside of a token")
                continue
            odd += _unplaced(row, found) if self.shape.listed else []
            unknown = [tag for tag in dict.fromkeys(tags) if tag not in number]
            strange += [f"{row.where}: {tag!r}" for tag in unknown]
            if not unknown:
                rows.append(_row(row, found, [number[tag] for tag in tags], self.pad))
        if strange:
            raise bad_labels(f"{len(strange)} labels are not in the label set", ", ".join(self.labels), strange)
        _require_placed(odd)
        if long:
            what, want = "rows are longer than the context", f"at most {longest} tokens"
            fix = "shorter rows" if truncate else "shorter rows, or --truncate, which leaves out words at the end"
            raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=shorten(long), fix=fix)
        return rows

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> dict[str, tuple[str, ...]]:
        """One of words or text, one of labels or spans."""
        return Shape.of(records, asked).roles

    def on(self, records: Sequence[Record], asked: Asked) -> Self:
        """Also for rows of another shape."""
        shape = Shape.of(records, asked)
        return replace(self, roles=shape.roles, shape=shape, given=self.labels)

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Of each label, in words; also of those that no word has."""
        found = Counter(label for row in rows for label in _true(row))
        return {name: found[n] for n, name in enumerate(self.labels)}

    def marked(self, row: Row, tokenizer: Any) -> MarkedRow:
        """With the labels of its words."""
        return unmarked(row, tokenizer, " ".join(self.labels[n] for n in _true(row)))

    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[list[int]]:
        """The number of the likeliest label of each word, for each row."""
        return [[_best(word) for word in row] for row in _shares(model, rows, batch_size)]

    def scored(self, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """Figures by words; see `word_scores`."""
        return word_scores([_true(row) for row in rows], answers, self.labels)

    def constant(self, rows: Sequence[Row]) -> list[list[int]]:
        """The number of the commonest label, for each word."""
        counts = Counter(label for row in rows for label in _true(row))
        best = min(counts, key=lambda label: (-counts[label], label))
        return [[best for _ in _true(row)] for row in rows]

    @property
    def measures(self) -> tuple[str, ...]:
        """See `word_scores`."""
        return (*NAMES, "exact_match", *(("span_f1",) if is_bio(self.labels) else ()))

    @classmethod
    def questions(
        cls, data: Path | str, asked: Asked, offline: bool, document: Mapping[str, Any] | None = None
    ) -> list[Record]:
        """Texts, or lists of words."""
        records = cls.asked_of(data, asked, offline)
        Shape.of(records, asked, labelled=False).read(records)
        return records

    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """For a list of words ``labels`` and their ``probabilities``; for a text its ``spans`` where labels are BIO.

        A span has ``start``, ``end``, ``label``, ``text``, and as ``probability`` the product of those of its words.
        Of a text with other labels there are ``words`` beside ``labels`` and ``probabilities``.
        """
        _require_offsets(tokenizer)
        shape = Shape.of(records, asked, labelled=False)
        read = shape.read(records)
        found = [placed(tokenizer, row.text, row.words) for row in read]
        _require_placed([one for row, at in zip(read, found, strict=True) for one in _unplaced(row, at)] * shape.listed)
        rows = [_row(row, at, [0] * len(at.words), self.pad) for row, at in zip(read, found, strict=True)]
        reading.require_short(rows)
        answers = []
        for row, at, shares in zip(read, found, _shares(model, rows, reading.batch_size), strict=True):
            words = [place for place, first in zip(at.words, at.firsts, strict=True) if first >= 0]
            answers.append({"where": row.where, **self._said_of(row, words, shares, shape.listed)})
        return answers

    def _said_of(
        self, row: Tagged, words: Sequence[tuple[int, int]], shares: Sequence[Sequence[float]], listed: bool
    ) -> dict[str, Any]:
        best = [_best(word) for word in shares]
        labels, sure = [self.labels[n] for n in best], [word[n] for word, n in zip(shares, best, strict=True)]
        if listed or not is_bio(self.labels):
            beside = {} if listed else {"words": [row.text[start:end] for start, end in words]}
            return beside | {"labels": labels, "probabilities": sure}
        spans = [(name, words[a][0], words[b - 1][1], math.prod(sure[a:b])) for name, a, b in spans_of(labels)]
        names = ("label", "start", "end", "text", "probability")
        return {"spans": [dict(zip(names, (n, a, b, row.text[a:b], p), strict=True)) for n, a, b, p in spans]}


def _require_offsets(tokenizer: Any) -> None:
    """Refuses a tokenizer that does not say which characters a token stands for: ``HK-LABELS``."""
    if not getattr(tokenizer, "is_fast", False):
        what, want = "the tokenizer does not say where words begin", "a fast tokenizer: tokenizer.json"
        fix = "another base, or save its tokenizer as tokenizer.json"
        raise HubkitError("HK-LABELS", what, want=want, have=type(tokenizer).__name__, fix=fix)


def _require_placed(odd: Sequence[str]) -> None:
    """Refuses words that are none to the tokenizer: ``HK-DATA``."""
    if odd:
        what, want = f"the tokenizer does not take {len(odd)} words for words", "words of tokens of their own"
        raise HubkitError("HK-DATA", what, want=want, have=shorten(odd), fix="write these words otherwise")


def _unplaced(row: Tagged, found: Placed) -> list[str]:
    """Words of a list that have no token of their own."""
    lost = [place for place, first in zip(found.words, found.firsts, strict=True) if first < 0]
    lost += [row.words[n] for n in found.shared]
    return [f"{row.where}: {row.text[start:end]!r}" for start, end in sorted(lost)]


def _row(row: Tagged, found: Placed, numbers: Sequence[int], pad: int) -> Worded:
    labels = [IGNORED] * len(found.ids)
    for first, number in zip(found.firsts, numbers, strict=True):
        if first >= 0:
            labels[first] = number
    return Worded.of(found.ids, labels, pad, row.where, found.cut)


def _true(row: Row) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def _best(shares: Sequence[float]) -> int:
    return max(range(len(shares)), key=shares.__getitem__)


def _shares(model: nn.Module, rows: Sequence[Row], size: int) -> list[list[list[float]]]:
    """For each row and each of its words the share of each label, in float32, dropout off.

    Args:
        size: rows per forward pass.
    """
    found: list[list[list[float]]] = [[] for _ in rows]
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], size):
            inputs = collate([rows[n] for n in batch], device)
            where = inputs.pop("labels") != IGNORED
            shares = model(**inputs).logits.float().softmax(-1)
            for n, one, words in zip(batch, shares, where, strict=True):
                found[n] = one[words].tolist()
    return found
