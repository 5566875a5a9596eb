"""Rows of other tasks than the next token: they say themselves how they are put together."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hubkit.training.rows.encode import IGNORED, Row


class TaskRow(Row):
    """A row of a task of its own. What distinguishes it lies in ``ids`` and ``labels``, so that digests cover it."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """What the model is called with: tensors by name of argument, ``labels`` among them."""


class Labelled(TaskRow):
    """A row with one label: it counts as one target. ``labels`` is (-100, label), so that digests cover it.

    Args:
        pad: the id that pads it; a decoder with a head looks for it, to find the last token.
    """

    __slots__ = ("pad",)
    pad: int

    @classmethod
    def of(cls, ids: Sequence[int], label: int, pad: int, where: str) -> Labelled:
        """A row of token ids and the number of its label."""
        made = cls(array("i", ids), array("i", [IGNORED, label]), where)
        object.__setattr__(made, "pad", pad)
        return made

    @classmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """input_ids and attention_mask (rows, longest), padded on the right, and labels (rows,), int64."""
        longest = max(len(row.ids) for row in rows)
        ids = [[*row.ids, *[row.pad] * (longest - len(row.ids))] for row in rows if isinstance(row, Labelled)]
        mask = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": [row.labels[1] for row in rows]}
        return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}
