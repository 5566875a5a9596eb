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

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.heads import STD, TaskModel, fill_made
from hubkit.training.options import TrainOptions
from hubkit.training.rows.data import Columns, Record, read_rows, shorten
from hubkit.training.rows.encode import Row
from hubkit.training.tasks.columns import TEXTS, require_texts, text_column

TrainStep = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Asked:
    """What a user says of the rows of a task; what is left out is found by the columns' names.

    Args:
        columns: of the text.
        label: the column of labels.
    """

    columns: Columns | None = None
    label: str | None = None


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

    @abstractmethod
    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> Sequence[Row]:
        """One row for each record.

        Args:
            longest: most tokens of a row.
            truncate: cut longer rows instead of refusing them.

        Raises:
            HubkitError: ``HK-LABELS``, ``HK-DATA``, ``HK-ROW-TOO-LONG``.
        """

    def train_step(self, own: TrainStep) -> TrainStep:
        """What gives the mean loss of a batch: a method's `own`, of the loss that the model itself computes."""
        return own

    @abstractmethod
    def measured(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
        """Figures on held-out rows, at least one, dropout off."""

    @classmethod
    def questions(cls, data: Path | str, asked: Asked, offline: bool) -> list[Record]:
        """The rows of a file to predict on, checked; what is no file is one text, a row of one column.

        Args:
            offline: take data sets of the Hub from what is here.

        Raises:
            HubkitError: ``HK-COLUMNS``, ``HK-DATA``; what reading raises.
        """
        if isinstance(data, str) and (" " in data or not Path(data).suffix):
            records = [Record({(asked.columns and asked.columns.text) or TEXTS[0]: data}, "")]
        else:
            records = read_rows(Path(data), offline)
        require_texts(records, text_column(records, asked.columns))
        return records

    @abstractmethod
    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """What is said of each of `questions`: ``where`` it stands, and JSON values.

        Raises:
            HubkitError: ``HK-ROW-TOO-LONG``, ``HK-DATA``.
        """

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
