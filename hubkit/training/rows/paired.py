"""Rows for encoder-decoders: a text to read and one to write."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hubkit.training.rows.encode import IGNORED
from hubkit.training.rows.labelled import TaskRow


class Paired(TaskRow):
    """A row with two sides: ``ids`` is what the encoder reads, ``labels`` is -100 and then what is to be written.

    Two rows of the same text to read are the same text, whatever is to be written: none of them is trained on while the
    other one is validated on.

    Args:
        pad: the id that pads the read side.
        answer: what is to be written, as text.
        spell: token ids as text.
    """

    __slots__ = ("answer", "pad", "spell")
    pad: int
    answer: str
    spell: Callable[[Sequence[int]], str]

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        target: Sequence[int],
        where: str,
        cut: int = 0,
        *,
        pad: int,
        answer: str,
        spell: Callable[[Sequence[int]], str],
    ) -> Paired:
        """A row of the ids of both sides; see the class.

        Args:
            cut: tokens that were cut off, of both.
        """
        made = cls(array("i", ids), array("i", [IGNORED, *target]), where, cut)
        for name, value in (("pad", pad), ("answer", answer), ("spell", spell)):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """input_ids and attention_mask (rows, longest read), labels (rows, longest written), int64.

        Both sides are padded on the right; what the decoder is given, a model makes of the labels.
        """
        longest = max(len(row.ids) for row in rows)
        most = max(len(row.labels) for row in rows)
        batch = {
            "input_ids": [[*row.ids, *[row.pad] * (longest - len(row.ids))] for row in rows if isinstance(row, Paired)],
            "attention_mask": [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows],
            "labels": [[*row.labels[1:], *[IGNORED] * (most - len(row.labels))] for row in rows],
        }
        return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}
