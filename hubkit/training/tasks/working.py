"""A task of one training: what it asks of base, rows and options, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.heads import fill_made
from hubkit.training.options import TrainOptions
from hubkit.training.rows.data import Columns, Record
from hubkit.training.rows.encode import Row
from hubkit.training.tasks.classification import (
    CLASSIFICATION,
    Head,
    columns_of,
    head_for,
    label_names,
    labelled_rows,
    measured,
    row_labels,
)

FOREIGN = {
    "raw": "--raw",
    "require": "--require",
    "general": "--general",
    "parent": "--from",
    "incomplete": "--allow-incomplete-base",
    "packing": "--packing",
    "compile": "--compile",
    "shard": "--shard",
    "chunked_loss": "--chunked-loss",
}
"""Arguments of a training that say something of language models, or that no task has been tried with."""


def require_applicable(task: str | None, label: str | None, given: Mapping[str, Any], processes: int) -> None:
    """Refuses arguments that do not go together with a task, or without one: ``HK-OPTIONS``.

    Args:
        given: arguments and options as they were given, by name.
        processes: of the launch.
    """
    if task is None:
        if label:
            fix = f"--task {CLASSIFICATION}"
            raise HubkitError("HK-OPTIONS", "label belongs to a task", have=f"--label {label}", fix=fix, status=USAGE)
        return
    if task != CLASSIFICATION:
        raise HubkitError("HK-OPTIONS", "task is no choice", want=CLASSIFICATION, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += [f"{processes} processes"] * (processes > 1)
    if have:
        what, fix = "these do not apply to a task with labels", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)


@dataclass(frozen=True)
class Work:
    """One label a row, for one base and the labels of some rows.

    Args:
        head: of the base's model.
        names: the label set, in the order of the head's outputs.
        columns: of the text.
        label: the column of labels.
    """

    head: Head
    names: tuple[str, ...]
    columns: Columns
    label: str

    @classmethod
    def of(cls, task: str, records: Sequence[Record], columns: Columns | None, label: str | None, folder: Path) -> Work:
        """Reads columns and labels, then what the base's files hold.

        Raises:
            HubkitError: ``HK-COLUMNS``, ``HK-LABELS``; what `head_for` raises.
        """
        columns, label = columns_of(records, columns, label)
        found = row_labels(records, label)
        head = head_for(task, folder, len(found))
        return cls(head, label_names(found, head), columns, label)

    def fitted(self, settings: Any, method: str, options: TrainOptions) -> tuple[Any, TrainOptions, Columns]:
        """`settings` of a method, with the head's modules among those that are trained as a whole; options and columns.

        The loss is of rows, not of tokens: it is not computed in chunks.

        Raises:
            HubkitError: ``HK-HEAD`` for a method that trains no module as a whole.
        """
        if not hasattr(settings, "modules_to_save"):
            what = f"method {method!r} cannot train a head beside its parts"
            raise HubkitError("HK-HEAD", what, want="a method with the option modules_to_save", fix="hubkit methods")
        saved = {*settings.modules_to_save, *self.head.sites}
        settings = dataclasses.replace(settings, modules_to_save=tuple(sorted(saved)))
        return settings, dataclasses.replace(options, chunked_loss=False), self.columns

    def labelled(self, tokenizer: Any, truncate: bool) -> tuple[str, Callable[[Sequence[Record], int], list[Row]]]:
        """The column of labels, and what makes rows out of records; see `labelled_rows`."""

        def encode(some: Sequence[Record], longest: int) -> list[Row]:
            columns = str(self.columns.text), self.label
            return [*labelled_rows(some, self.names, columns, self.head, tokenizer, longest, truncate)]

        return self.label, encode

    def fill(self, model: nn.Module, seed: int) -> None:
        """Gives a model that was just loaded the values of the head that was made."""
        fill_made(Base.from_model(model).sites, self.head.model.made, seed, self.head.std(model.config))

    def scores(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
        """Accuracy and F1 on held-out rows; nothing without rows."""
        return measured(model, rows, batch_size) if rows else {}

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed run must share."""
        return {"task": self.head.model.kind, "labels": [*self.names]}

    def document(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """For the manifest."""
        found = {"kind": self.head.model.kind, "labels": [*self.names], **self.head.model.to_document()}
        return found | ({"scores": dict(scores)} if scores else {})


def cleared(model: nn.Module, head: Head) -> None:
    """Puts zeros in the place of what transformers drew for a head that was made: an adapter's stands there."""
    sites = Base.from_model(model).sites
    with torch.no_grad():
        for name in head.model.made:
            for parameter in sites[name].module.parameters():  # type: ignore[union-attr]
                parameter.zero_()
