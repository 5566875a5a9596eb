"""Classification: one label for each row, by a head that the base's files hold or that is made for it."""

from __future__ import annotations

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
from hubkit.training.rows.encode import Row
from hubkit.training.rows.labelled import Labelled
from hubkit.training.rows.marked import MarkedRow, unmarked
from hubkit.training.tasks.columns import column_of, require_texts, text_column, text_columns
from hubkit.training.tasks.heads import (
    bad_labels,
    given_labels,
    head_for,
    in_order,
    label_names,
    labels_of,
    made_anew,
    numbered,
    unheld,
)
from hubkit.training.tasks.metrics import NAMES, scores
from hubkit.training.tasks.task import Asked, Reading, Task

LABELS = ("label", "labels", "class")


@dataclass(frozen=True)
class Classification(Task):
    """One label a row, of a text or of a pair of texts.

    Args:
        labels: the label set, in the order of the head's outputs.
        pad: the id that pads rows; a decoder with a head looks for it, to find the last token.
        types: kinds of text that the base tells apart, see `Head`.
        pair: whether each row has two texts.
        given: the labels, as far as a user gave them: whole numbers in the rows count into these.
        said: what is to be said of the rows.
    """

    kind: ClassVar[str] = "classification"
    labels: tuple[str, ...]
    pad: int
    types: int
    pair: bool
    given: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """Reads columns and labels, then what the base's files hold."""
        roles, given = cls.columns(records, asked), given_labels(asked.labels)
        found = in_order(_label(record, roles["label"][0], given) for record in records)
        head = head_for(cls.kind, folder, len(given or found), given)
        names, said = label_names(found, head, given), unheld(given, found)
        return cls(head.model, head.sites, roles, names, head.pad, head.types, "text_pair" in roles, given, said)

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> dict[str, tuple[str, ...]]:
        """One of text or two, one of labels."""
        texts = text_columns(records, asked.columns, asked.pair)
        label = column_of(records, asked.label, LABELS, "--label")
        roles = {"text": texts[:1], "text_pair": texts[1:], "label": (label,)}
        return {role: names for role, names in roles.items() if names}

    @classmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Without columns: what is predicted on has no labels."""
        head = head_for(cls.kind, folder, len(document.get("labels", ())), anew=made_anew(document))
        labels, pair = labels_of(document, head), bool(document.get("pair"))
        return cls(head.model, head.sites, {}, labels, head.pad, head.types, pair)

    def on(self, records: Sequence[Record], asked: Asked) -> Self:
        """Whole numbers in the rows count into the labels that there are.

        Raises:
            HubkitError: also ``HK-COLUMNS`` for one text where there were two, and for two where there was one.
        """
        roles = self.columns(records, asked)
        if ("text_pair" in roles) != self.pair:
            want = "two columns of text: --text, --text-pair" if self.pair else "one column of text: --text"
            have = [*roles["text"], *roles.get("text_pair", ())]
            raise HubkitError("HK-COLUMNS", "the adapter was trained on other rows", want=want, have=have)
        return replace(self, roles=roles, given=self.labels)

    def require_learnable(self, records: Sequence[Record]) -> None:
        """Two labels or more: ``HK-LABELS``."""
        in_order(_label(record, self.roles["label"][0], self.given) for record in records)

    @property
    def facts(self) -> dict[str, Any]:
        """The labels, and whether there are two texts."""
        return {"labels": [*self.labels]} | ({"pair": True} if self.pair else {})

    @property
    def notes(self) -> tuple[str, ...]:
        """Labels that no row holds."""
        return self.said

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> list[Labelled]:
        """One row per record."""
        texts, (column,) = self._texts(), self.roles["label"]
        number = {name: n for n, name in enumerate(self.labels)}
        named = [_label(record, column, self.given) for record in records]
        strange = [f"{r.where}: {name!r}" for r, name in zip(records, named, strict=True) if name not in number]
        if strange:
            raise bad_labels(f"{len(strange)} labels are not in the label set", ", ".join(self.labels), strange)
        for text in texts:
            require_texts(records, text)
        rows, long = [], []
        for record, name in zip(records, named, strict=True):
            row = self._row(record, texts, tokenizer, number[name], longest if truncate else None)
            long += [f"{record.where}: {len(row.ids)} tokens"] * (len(row.ids) > longest)
            rows.append(row)
        if long:
            want, fix, what = (
                f"at most {longest} tokens",
                "shorter rows, or --truncate",
                "rows are longer than the context",
            )
            raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=shorten(long), fix=fix)
        return rows

    def _texts(self) -> tuple[str, ...]:
        """The columns of the texts."""
        return (*self.roles["text"], *self.roles.get("text_pair", ()))

    def _row(
        self, record: Record, texts: Sequence[str], tokenizer: Any, label: int, most: int | None = None
    ) -> Labelled:
        """One row; two texts go into it as the tokenizer puts pairs together.

        Where it puts nothing between them, as those of decoders do, there is a line break.

        Args:
            texts: the columns.
            most: tokens that it may have; None: all of them.
        """
        said = [str(record.values[text]) for text in texts]
        if len(said) > 1 and tokenizer.num_special_tokens_to_add(True) <= tokenizer.num_special_tokens_to_add(False):
            said = ["\n".join(said)]
        coded = tokenizer(*said, add_special_tokens=True)
        whole = len(coded["input_ids"])
        if most is not None and whole > most:  # the tokenizer's own way keeps the special tokens
            coded = tokenizer(*said, truncation=True, max_length=most)
        ids, types = list(coded["input_ids"]), coded.get("token_type_ids", ())
        told = types if self.types > 1 and any(types) else ()
        return Labelled.of(ids, label, self.pad, record.where, told, whole - len(ids))

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Of each label, also of those that no row has."""
        found = Counter(map(_true, rows))
        return {name: found[n] for n, name in enumerate(self.labels)}

    def marked(self, row: Row, tokenizer: Any) -> MarkedRow:
        """With its label."""
        return unmarked(row, tokenizer, self.labels[_true(row)])

    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[int]:
        """The number of the likeliest label of each row."""
        return [max(range(len(one)), key=one.__getitem__) for one in _logits(model, rows, batch_size)]

    def scored(self, rows: Sequence[Row], answers: Sequence[int]) -> dict[str, float]:
        """Accuracy and F1; see `scores`."""
        return scores([_true(row) for row in rows], answers)

    def constant(self, rows: Sequence[Row]) -> list[int]:
        """The number of the commonest label, for each row."""
        counts = Counter(map(_true, rows))
        return [min(counts, key=lambda label: (-counts[label], label))] * len(rows)

    @property
    def measures(self) -> tuple[str, ...]:
        """See `scores`."""
        return NAMES

    @classmethod
    def questions(
        cls, data: Path | str, asked: Asked, offline: bool, document: Mapping[str, Any] | None = None
    ) -> list[Record]:
        """Rows with one text, or with two where the adapter was trained on pairs."""
        records = cls.asked_of(data, asked, offline)
        for text in _asked_texts(records, asked, bool((document or {}).get("pair"))):
            require_texts(records, text)
        return records

    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """For each row its ``label``, and ``probabilities``: label -> share, adding up to 1."""
        texts = _asked_texts(records, asked, self.pair)
        rows = [self._row(record, texts, tokenizer, 0) for record in records]
        reading.require_short(rows)
        found = []
        for row, logits in zip(rows, _logits(model, rows, reading.batch_size), strict=True):
            shares = torch.tensor(logits).softmax(-1).tolist()
            best = max(range(len(shares)), key=shares.__getitem__)
            probabilities = dict(zip(self.labels, shares, strict=True))
            found.append({"where": row.where, "label": self.labels[best], "probabilities": probabilities})
        return found


def _true(row: Row) -> int:
    return int(row.labels[1])


def _asked_texts(records: Sequence[Record], asked: Asked, pair: bool) -> tuple[str, ...]:
    """The columns to predict on: ``HK-COLUMNS`` where there is one, and the adapter was trained on pairs."""
    if not pair:
        return (text_column(records, asked.columns),)
    texts = text_columns(records, asked.columns, asked.pair)
    if len(texts) < 2:
        what, fix = "the adapter was trained on pairs of texts", "a file of rows, --text COLUMN --text-pair COLUMN"
        raise HubkitError("HK-COLUMNS", what, want="two columns", have=list(records[0].values), fix=fix)
    return texts


def _label(record: Record, column: str, given: Sequence[str]) -> str:
    value = record.values.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise bad_labels(f"column {column!r} holds no label", "text or a whole number", [repr(value)], record.where)
    return numbered(str(value), given)


def _logits(model: nn.Module, rows: Sequence[Row], size: int) -> list[list[float]]:
    """In float32, of each row, in the order of the head's outputs; dropout off.

    Args:
        size: rows per forward pass.
    """
    found: list[list[float]] = [[] for _ in rows]
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], size):
            inputs = collate([rows[n] for n in batch], device)
            del inputs["labels"]
            for n, logits in zip(batch, model(**inputs).logits.float().tolist(), strict=True):
                found[n] = logits
    return found
