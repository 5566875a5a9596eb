"""Classification: one label for each row, by a head that the base's files hold or that is made for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from hubkit.training.tasks.columns import column_of, require_texts, text_column
from hubkit.training.tasks.heads import Head, bad_labels, head_for, in_order, label_names, labels_of
from hubkit.training.tasks.metrics import NAMES, scores
from hubkit.training.tasks.task import Asked, Reading, Task

LABELS = ("label", "labels", "class")


@dataclass(frozen=True)
class Classification(Task):
    """One label a row.

    Args:
        labels: the label set, in the order of the head's outputs.
        pad: the id that pads rows; a decoder with a head looks for it, to find the last token.
    """

    kind: ClassVar[str] = "classification"
    labels: tuple[str, ...]
    pad: int

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """Reads columns and labels, then what the base's files hold."""
        roles = cls.columns(records, asked)
        found = tuple(in_order(_label(record, *roles["label"]) for record in records))
        head = head_for(cls.kind, folder, len(found))
        return cls(head.model, head.sites, roles, label_names(found, head), head.pad)

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> dict[str, tuple[str, ...]]:
        """One of text, one of labels."""
        text, label = text_column(records, asked.columns), column_of(records, asked.label, LABELS, "--label")
        return {"text": (text,), "label": (label,)}

    @classmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Without columns: what is predicted on has no labels."""
        head: Head = head_for(cls.kind, folder, len(document.get("labels", ())))
        return cls(head.model, head.sites, {}, labels_of(document, head), head.pad)

    def require_learnable(self, records: Sequence[Record]) -> None:
        """Two labels or more: ``HK-LABELS``."""
        in_order(_label(record, *self.roles["label"]) for record in records)

    @property
    def facts(self) -> dict[str, Any]:
        """The labels."""
        return {"labels": [*self.labels]}

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> list[Labelled]:
        """One row per record."""
        (text,), (column,) = self.roles["text"], self.roles["label"]
        number = {name: n for n, name in enumerate(self.labels)}
        strange = [f"{r.where}: {_label(r, column)!r}" for r in records if _label(r, column) not in number]
        if strange:
            raise bad_labels(f"{len(strange)} labels are not in the label set", ", ".join(self.labels), strange)
        require_texts(records, text)
        rows, long = [], []
        for record in records:
            ids = list(tokenizer(record.values[text], add_special_tokens=True)["input_ids"])
            if len(ids) > longest and truncate:  # the tokenizer's own way keeps the special tokens
                ids = list(tokenizer(record.values[text], truncation=True, max_length=longest)["input_ids"])
            long += [f"{record.where}: {len(ids)} tokens"] * (len(ids) > longest)
            rows.append(Labelled.of(ids, number[_label(record, column)], self.pad, record.where))
        if long:
            want, fix, what = (
                f"at most {longest} tokens",
                "shorter rows, or --truncate",
                "rows are longer than the context",
            )
            raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=shorten(long), fix=fix)
        return rows

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

    def constant(self, rows: Sequence[Row]) -> int:
        """The number of the commonest label."""
        counts = Counter(map(_true, rows))
        return min(counts, key=lambda label: (-counts[label], label))

    @property
    def measures(self) -> tuple[str, ...]:
        """See `scores`."""
        return NAMES

    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """For each row its ``label``, and ``probabilities``: label -> share, adding up to 1."""
        text = text_column(records, asked.columns)
        rows = [
            Labelled.of(tokenizer(r.values[text], add_special_tokens=True)["input_ids"], 0, self.pad, r.where)
            for r in records
        ]
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


def _label(record: Record, column: str) -> str:
    value = record.values.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise bad_labels(f"column {column!r} holds no label", "text or a whole number", [repr(value)], record.where)
    return str(value)


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
