"""What a task is: the model it needs, how its rows are made, what is learnt of them, how it is measured and used."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.heads import STD, TaskModel, fill_made
from hubkit.training.options import TrainOptions
from hubkit.training.rows.data import Columns, Record, read_rows, shorten
from hubkit.training.rows.encode import Row
from hubkit.training.rows.marked import MarkedRow, unmarked
from hubkit.training.tasks.columns import TEXTS, require_texts, text_column

TrainStep = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Asked:
    """What a user says of the rows of a task; what is left out is found by the columns' names.

    Args:
        columns: of the text.
        label: the column of labels.
        pair: the column of the second text of a pair.
        labels: the label set, in the order of the head's outputs.
    """

    columns: Columns | None = None
    label: str | None = None
    pair: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task(ABC):
    """One task on one base: for a training by its rows, or for an adapter by its manifest.

    Args:
        model: how the model is made of the base's files.
        sites: the modules of its head; they are trained as a whole.
        roles: what a column is taken as -> the columns of the rows.
    """

    kind: ClassVar[str]
    """By which users name it."""
    frequent: ClassVar[bool] = True
    """Whether `measured` is quick enough for each evaluation of a training, not only for the last state."""
    learns_tokens: ClassVar[bool] = False
    """Whether its targets are tokens of a text: an adapter is then made as large as the rows ask for."""
    model: TaskModel
    sites: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]

    @classmethod
    @abstractmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """For a training.

        Args:
            records: to train on.
            folder: the base's.

        Raises:
            HubkitError: ``HK-COLUMNS``, ``HK-LABELS``, ``HK-HEAD``, ``HK-BASE-LOAD``, ``HK-CODEC``.
        """

    @classmethod
    @abstractmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """For an adapter.

        Args:
            document: of its manifest, see `document`.
            folder: the base's.

        Raises:
            HubkitError: ``HK-HEAD`` where the base has another head; ``HK-BASE-LOAD``, ``HK-CODEC``.
        """

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> Mapping[str, tuple[str, ...]]:
        """The `roles` of some rows with labels.

        Raises:
            HubkitError: ``HK-COLUMNS``; ``HK-OPTIONS`` for a task that does not say.
        """
        what = f"the task {cls.kind} does not read rows for an adapter that is there"
        raise HubkitError("HK-OPTIONS", what, fix="hubkit predict, which reads rows without labels", status=USAGE)

    def on(self, records: Sequence[Record], asked: Asked) -> Self:
        """The same task for other rows, with labels: to go on training with them, or to measure.

        Raises:
            HubkitError: as `columns`.
        """
        return dataclasses.replace(self, roles=self.columns(records, asked))

    def require_learnable(self, records: Sequence[Record]) -> None:  # noqa: B027  # most tasks learn from any rows
        """Refuses rows of which nothing can be learnt; `of` does it itself."""

    @abstractmethod
    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> Sequence[Row]:
        """One row for each record.

        Args:
            longest: most tokens of a row.
            truncate: cut longer rows instead of refusing them.

        Raises:
            HubkitError: ``HK-LABELS``, ``HK-DATA``, ``HK-ROW-TOO-LONG``.
        """

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Label -> how many times it is learnt in `rows`; none of a task without labels."""
        return {}

    def marked(self, row: Row, tokenizer: Any) -> MarkedRow:
        """A row as people are shown it before it is trained on; by default its text alone."""
        return unmarked(row, tokenizer, "")

    def train_step(self, own: TrainStep) -> TrainStep:
        """What gives the mean loss of a batch: a method's `own`, of the loss that the model itself computes."""
        return own

    def measured(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
        """Figures on held-out rows, at least one, dropout off: by default `scored` of the `answers`."""
        answers = self.answers(model, rows, batch_size)
        assert answers is not None, "a task has answers that can be scored, or a `measured` of its own"
        return self.scored(rows, answers)

    def watched(self, batch_size: int) -> Callable[[nn.Module, Sequence[Row]], dict[str, float]] | None:
        """What is measured at each evaluation of a training; None: nothing."""
        return (lambda model, rows: self.measured(model, rows, batch_size)) if self.frequent else None

    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any] | None:
        """What the model says of each row, dropout off; None where rows can only be measured all together.

        What takes long belongs here: `scored` is called again for each draw of rows, to say how sure the figures are.
        """
        return None

    def scored(self, rows: Sequence[Row], answers: Sequence[Any]) -> dict[str, float]:
        """The figures of some of the rows and the `answers` to them, in the same order."""
        raise NotImplementedError

    def constant(self, rows: Sequence[Row]) -> list[Any] | None:
        """For each row the answer that is right most often, in the form of `answers`; None: there is none.

        It is what adapters are compared with where the base has no head.
        """
        return None

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the figures that `measured` gives, by which gates name them."""
        return ()

    @classmethod
    def questions(
        cls, data: Path | str, asked: Asked, offline: bool, document: Mapping[str, Any] | None = None
    ) -> list[Record]:
        """The rows of a file to predict on, checked; what is no file is one text, a row of one column.

        Args:
            offline: take data sets of the Hub from what is here.
            document: of the adapter's manifest, see `document`.

        Raises:
            HubkitError: ``HK-COLUMNS``, ``HK-DATA``; what reading raises.
        """
        records = cls.asked_of(data, asked, offline)
        require_texts(records, text_column(records, asked.columns))
        return records

    @staticmethod
    def asked_of(data: Path | str, asked: Asked, offline: bool) -> list[Record]:
        """`questions`, as they are."""
        if isinstance(data, str) and (" " in data or not Path(data).suffix):
            return [Record({(asked.columns and asked.columns.text) or TEXTS[0]: data}, "")]
        return read_rows(Path(data), offline)

    @abstractmethod
    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """What is said of each of `questions`: ``where`` it stands, and JSON values.

        Raises:
            HubkitError: ``HK-ROW-TOO-LONG``, ``HK-DATA``.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the rows to train on, a line each."""
        return ()

    @property
    def facts(self) -> dict[str, Any]:
        """What distinguishes two trainings on the same rows, and an adapter has to know: JSON values."""
        return {}

    def fitted(self, settings: Any, method: str, options: TrainOptions) -> tuple[Any, TrainOptions]:
        """`settings` of a method, with the head's modules among those that are trained as a whole; and options.

        The loss is not that of the next token: it is not computed in chunks.

        Raises:
            HubkitError: ``HK-HEAD`` for a head, and a method that trains no module as a whole.
        """
        options = dataclasses.replace(options, chunked_loss=False)
        if not self.sites:
            return settings, options
        if not hasattr(settings, "modules_to_save"):
            what = f"method {method!r} cannot train a head beside its parts"
            raise HubkitError("HK-HEAD", what, want="a method with the option modules_to_save", fix="hubkit methods")
        saved = {*settings.modules_to_save, *self.sites}
        return dataclasses.replace(settings, modules_to_save=tuple(sorted(saved))), options

    def fill(self, model: Any, seed: int) -> None:
        """Gives a model that was just loaded the values of the head that was made."""
        found = getattr(model.config, "initializer_range", None)
        std = float(found) if isinstance(found, int | float) and found > 0 else STD
        fill_made(Base.from_model(model).sites, self.model.made, seed, std)

    def clear(self, model: nn.Module) -> None:
        """Puts zeros in the place of what transformers drew for a head that was made: an adapter's stands there."""
        sites = Base.from_model(model).sites
        with torch.no_grad():
            for name in self.model.made:
                for parameter in sites[name].module.parameters():  # type: ignore[union-attr]
                    parameter.zero_()

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed run must share."""
        return {"task": self.kind, **self.facts}

    def document(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """For the manifest."""
        found = {"kind": self.kind, **self.facts, **self.model.to_document()}
        return found | ({"scores": dict(scores)} if scores else {})


@dataclass(frozen=True)
class Reading:
    """How rows are put through a model.

    Args:
        longest: tokens that the base can take; None where it has no limit.
        batch_size: rows per forward pass.
    """

    longest: int | None
    batch_size: int

    def require_short(self, rows: Sequence[Row]) -> None:
        """Refuses rows of more tokens than the base can take, or of none: ``HK-ROW-TOO-LONG``, ``HK-DATA``."""
        long = [f"{r.where}: {len(r.ids)} tokens" for r in rows if self.longest and len(r.ids) > self.longest]
        if long:
            want = f"at most {self.longest} tokens"
            raise HubkitError("HK-ROW-TOO-LONG", "rows are longer than the context", want=want, have=shorten(long))
        empty = [row.where or "the text" for row in rows if not len(row.ids)]
        if empty:
            raise HubkitError("HK-DATA", "there is nothing to read", want="text", have=shorten(empty))
