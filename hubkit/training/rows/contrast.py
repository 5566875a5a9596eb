"""Rows of texts that are told apart: an anchor, the text that belongs to it, and texts that do not."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hubkit.training.rows.labelled import TaskRow


class Texts(TaskRow):
    """An anchor, its positive, and negatives, if there are any; it counts as one target.

    ``ids`` are those of all texts one after the other, ``labels`` the number of tokens of each, so that digests cover
    both.

    Args:
        pad: the id that pads texts.
    """

    __slots__ = ("pad",)
    fewest: ClassVar[int] = 2
    pad: int

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], pad: int, where: str, cut: int = 0) -> Texts:
        """A row of the token ids of its texts, each of one token or more.

        Args:
            cut: tokens that were cut off.
        """
        ids = array("i", [token for text in texts for token in text])
        made = cls(ids, array("i", map(len, texts)), where, cut)
        object.__setattr__(made, "pad", pad)
        return made

    def targets(self) -> int:
        """One: which of the candidates belongs to the anchor."""
        return 1

    def texts(self) -> list[tuple[int, ...]]:
        """The token ids of each text."""
        found, at = [], 0
        for length in self.labels:
            found.append(tuple(self.ids[at : at + length]))
            at += length
        return found

    @classmethod
    def collated(cls, rows: Sequence[TaskRow], device: torch.device | str) -> dict[str, Tensor]:
        """All texts in one batch: the anchors, then their positives in the same order, then the negatives of all.

        Returns:
            ``input_ids`` and ``attention_mask`` (texts, longest), padded on the right; ``labels`` (rows,), the number
            of the right candidate; all int64. ``wrong`` (rows, candidates), bool: which candidates an anchor is told
            from. Those are not among them that are its positive's very text, or the positive of an equal anchor.
        """
        own = [row for row in rows if isinstance(row, Texts)]
        split = [row.texts() for row in own]
        anchors, positives = [one[0] for one in split], [one[1] for one in split]
        candidates = [*positives, *(text for one in split for text in one[2:])]
        right: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for anchor, positive in zip(anchors, positives, strict=True):
            right.setdefault(anchor, set()).add(positive)
        wrong = [[candidate not in right[anchor] for candidate in candidates] for anchor in anchors]
        batch = stacked([*anchors, *candidates], own[0].pad, device)
        batch["labels"] = torch.arange(len(own), device=device)
        return batch | {"wrong": torch.tensor(wrong, device=device)}


def stacked(texts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, (texts, longest), int64, padded on the right with `pad`."""
    longest = max(map(len, texts))
    ids = [[*text, *[pad] * (longest - len(text))] for text in texts]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    batch = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}
