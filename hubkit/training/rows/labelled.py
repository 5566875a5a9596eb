"""Rows whose target is one label for the whole, not the next token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hubkit.training.rows.encode import IGNORED, Row


class Labelled(Row):
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


def collate_labelled(rows: Sequence[Labelled], device: torch.device | str) -> dict[str, Tensor]:
    """input_ids and attention_mask (rows, longest), padded on the right, and labels (rows,), int64."""
    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[row.pad] * (longest - len(row.ids))] for row in rows]
    mask = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": [row.labels[1] for row in rows]}
    return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}
