"""Rows of other tasks than the next token: they say themselves how they are put together."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hubkit.training.rows.encode import IGNORED, Row


class TaskRow(Row):
    """A row of a task of its own. What distinguishes it lies in ``ids`` and ``labels``, so that digests cover it."""

    __slots__ = ()
    fewest: ClassVar[int] = 1
    """Rows that a micro-batch has at least: more where what is learnt of a row lies in the others."""

    @classmethod
    @abstractmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """What the model is called with: tensors by name of argument, ``labels`` among them."""


class Labelled(TaskRow):
    """A row with one label: it counts as one target. ``labels`` is (-100, label), so that digests cover it.

    Of a pair of texts that the base tells apart the kinds of its tokens stand behind these: 0 of the first text, 1 of
    the second.

    Args:
        pad: the id that pads it; a decoder with a head looks for it, to find the last token.
    """

    __slots__ = ("pad",)
    pad: int

    @classmethod
    def of(
        cls, ids: Sequence[int], label: int, pad: int, where: str, types: Sequence[int] = (), cut: int = 0
    ) -> Labelled:
        """A row of token ids and the number of its label.

        Args:
            types: for each token which text it belongs to; none where the base does not ask.
            cut: tokens that were cut off.
        """
        made = cls(array("i", ids), array("i", [IGNORED, label, *types]), where, cut)
        object.__setattr__(made, "pad", pad)
        return made

    def targets(self) -> int:
        """One."""
        return 1

    @classmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """input_ids and attention_mask (rows, longest), padded on the right, and labels (rows,), int64.

        Also token_type_ids, of the shape of input_ids, where a row has kinds of tokens.
        """
        batch = _padded(rows) | {"labels": [row.labels[1] for row in rows]}
        if any(len(row.labels) > 2 for row in rows):
            batch["token_type_ids"] = _filled([row.labels[2:] for row in rows], [0] * len(rows), rows)
        return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}


class Worded(TaskRow):
    """A row with a label for each of its words, at the word's first token; all other tokens have -100.

    Args:
        pad: the id that pads it.
    """

    __slots__ = ("pad",)
    pad: int

    @classmethod
    def of(cls, ids: Sequence[int], labels: Sequence[int], pad: int, where: str, cut: int = 0) -> Worded:
        """A row of token ids and the numbers of their labels, -100 for none.

        Args:
            cut: tokens that were cut off.
        """
        made = cls(array("i", ids), array("i", labels), where, cut)
        object.__setattr__(made, "pad", pad)
        return made

    def targets(self) -> int:
        """The number of words: nothing has to precede a word."""
        return sum(label != IGNORED for label in self.labels)

    @classmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (rows, longest), padded on the right, int64."""
        batch = _padded(rows) | {"labels": _filled([row.labels for row in rows], [IGNORED] * len(rows), rows)}
        return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}


def _padded(rows: Sequence[TaskRow]) -> dict[str, list[list[int]]]:
    """input_ids and attention_mask."""
    ids, pads = [row.ids for row in rows], [row.pad for row in rows if isinstance(row, Labelled | Worded)]
    mask = _filled([[1] * len(row.ids) for row in rows], [0] * len(rows), rows)
    return {"input_ids": _filled(ids, pads, rows), "attention_mask": mask}


def _filled(values: Sequence[Sequence[int]], fill: Sequence[int], rows: Sequence[TaskRow]) -> list[list[int]]:
    """Each of `values` with its own filling at its end, up to the longest row."""
    longest = max(len(row.ids) for row in rows)
    return [[*one, *[pad] * (longest - len(one))] for one, pad in zip(values, fill, strict=True)]
