"""The loss of each row under a model: nats of its targets, added up row by row, so that rows can be drawn again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hubkit.errors import HubkitError
from hubkit.training.rows.batching import collate
from hubkit.training.rows.encode import IGNORED, Row

BUDGET = 1024
"""Tokens of a batch, padding counted: their logits are in memory at once."""


@dataclass(frozen=True)
class Losses:
    """What a model says of rows, in their order.

    Args:
        nats: the negative log-probability of all targets of each row, added up.
        targets: how many targets each row has.
    """

    nats: tuple[float, ...]
    targets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a target, over all rows."""
        return math.fsum(self.nats) / sum(self.targets)


def losses_of(model: nn.Module, rows: Sequence[Row], device: torch.device | str = "cpu") -> Losses:
    """The losses of `rows`, dropout off, nothing kept for a backward pass; the model's modes are restored.

    Args:
        model: a causal language model: logits (rows, tokens, vocabulary) of `input_ids` and `attention_mask`.
        rows: encoded rows, each with a target.
        device: where the model is.

    Raises:
        HubkitError: ``HK-NAN`` naming the rows whose loss is not finite.
    """
    caller: Any = model
    nats = [0.0] * len(rows)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches([len(row.ids) for row in rows]):
                inputs = collate([rows[index] for index in batch], device)
                labels = inputs.pop("labels")
                logits = caller(**inputs).logits
                for place, index in enumerate(batch):
                    nats[index] = _nats(logits[place], labels[place])
    finally:
        for module, mode in modes.items():
            module.training = mode
    bad = [row.where or f"row {n}" for n, (row, value) in enumerate(zip(rows, nats, strict=True), 1) if value != value]
    if bad or not all(map(math.isfinite, nats)):
        what, fix = "the loss of rows is not finite", "--dtype float32"
        raise HubkitError("HK-NAN", what, want="finite numbers", have=bad[:10] or "infinity", fix=fix)
    return Losses(tuple(nats), tuple(row.targets() for row in rows))


def _nats(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss of one row, (tokens, vocabulary) and (tokens,): only its targets' logits are taken to float32."""
    following = labels[1:]
    at = (following != IGNORED).nonzero().squeeze(1)
    each = F.cross_entropy(logits[:-1][at].float(), following[at], reduction="none")
    return float(each.double().sum())


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like length together, longest first, at most `BUDGET` tokens with padding, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BUDGET:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
