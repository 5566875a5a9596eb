"""Which rows make up which step: shuffled by seed and epoch, grouped by length, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.seed import derived_seed
from hubkit.training.rows.encode import IGNORED, Row
from hubkit.training.rows.labelled import TaskRow

POOL = 8
"""Steps whose rows are sorted by length together: less padding, and still a new mixture in every epoch."""

T = TypeVar("T")


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed of its own for each purpose of a run: its order of rows, its steps, their dropout."""
    return derived_seed(seed, *purpose, between="/")


def _permutation(count: int, seed: int, *purpose: object) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, *purpose))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def split(rows: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """`rows` as training and validation rows, both in their old order; at least one of each when `share` > 0.

    Raises:
        HubkitError: HK-OPTIONS for a share outside [0, 1); HK-NO-ROWS when there are too few rows to split.
    """
    if not 0 <= share < 1:
        want = "a share >= 0 and < 1"
        raise HubkitError("HK-OPTIONS", "validation is no share", want=want, have=str(share), status=USAGE)
    if share == 0:
        return list(rows), []
    if len(rows) < 2:
        raise HubkitError("HK-NO-ROWS", "too few rows to hold some out", want="at least 2 rows", have=f"{len(rows)}")
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    held = set(_permutation(len(rows), seed, "validation")[:count])
    return [r for n, r in enumerate(rows) if n not in held], [r for n, r in enumerate(rows) if n in held]


def fewest(rows: Sequence[Row]) -> int:
    """Rows that a micro-batch of such rows has at least: see `hubkit.training.rows.labelled.TaskRow`."""
    return rows[0].fewest if rows and isinstance(rows[0], TaskRow) else 1


def steps_per_epoch(count: int, batch_size: int, accumulate: int, least: int = 1) -> int:
    """Optimizer steps that take each of `count` rows once; `least` as for `plan_epoch`."""
    width = batch_size * accumulate
    return max(1, -(-count // width) - (0 < count % width < least))


def plan_epoch(
    lengths: Sequence[int], batch_size: int, accumulate: int, seed: int, epoch: int, least: int = 1
) -> list[list[list[int]]]:
    """The steps of one epoch: for each its micro-batches, for each of these its rows' indices.

    Every row is in exactly one step. The rows of a step depend on batch_size * accumulate only, so that the same
    rows meet whether they are accumulated or not; the last step drawn may have fewer.

    Args:
        least: a step of fewer rows joins the one before, and so does a micro-batch of fewer.
    """
    width = batch_size * accumulate
    order = _permutation(len(lengths), seed, "order", epoch)
    steps: list[list[int]] = []
    for start in range(0, len(order), width * POOL):
        pool = sorted(order[start : start + width * POOL], key=lambda row: -lengths[row])
        steps += _cut(pool, width, least)
    if len(steps) > 1 and len(steps[-1]) < least:  # the last pool was so small itself
        steps[-2:] = [steps[-2] + steps[-1]]
    mixed = [steps[n] for n in _permutation(len(steps), seed, "steps", epoch)]
    return [_cut(step, batch_size, least) for step in mixed]


def plan_evaluation(lengths: Sequence[int], batch_size: int, least: int = 1) -> Iterator[list[int]]:
    """Batches of all rows, longest first: memory is tried at once, and little is padded; `least`: see `plan_epoch`."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return iter(_cut(order, batch_size, least))


def _cut(rows: list[int], size: int, least: int) -> list[list[int]]:
    """`rows` in pieces of `size`; a rest of fewer than `least` joins the piece before."""
    pieces = [rows[at : at + size] for at in range(0, len(rows), size)]
    if len(pieces) > 1 and len(pieces[-1]) < least:
        pieces[-2:] = [pieces[-2] + pieces[-1]]
    return pieces


def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`rows` as input_ids, attention_mask and labels, each (rows, longest), int64; padding is masked and no target.

    The padding id is 0: behind the mask any id of the vocabulary computes the same. A batch goes to a CUDA device in
    one piece, out of pinned memory, while the host goes on.
    """
    if isinstance(rows[0], TaskRow):
        return rows[0].collated([row for row in rows if isinstance(row, TaskRow)], device)
    longest = max(len(row.ids) for row in rows)

    def padded(values: Iterable[Sequence[int]], fill: int) -> list[list[int]]:
        return [[*v, *[fill] * (longest - len(v))] for v in values]

    sides = [
        padded((row.ids for row in rows), 0),
        padded(([1] * len(row.ids) for row in rows), 0),
        padded((row.labels for row in rows), IGNORED),
    ]
    batch = torch.tensor(sides, dtype=torch.int64, pin_memory=torch.device(device).type == "cuda")
    return dict(zip(("input_ids", "attention_mask", "labels"), batch.to(device, non_blocking=True), strict=True))


def packed(rows: Sequence[Row], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`rows` one after the other as a single row: input_ids, position_ids and labels, each (1, all tokens), int64.

    Positions begin anew with each row, and there is no attention mask: by that transformers knows where rows begin,
    and keeps them apart. Nothing is padded. The first label of a row is no target, so none crosses a border.
    """
    sides = [
        [token for row in rows for token in row.ids],
        [position for row in rows for position in range(len(row.ids))],
        [label for row in rows for label in row.labels],
    ]
    batch = torch.tensor(sides, dtype=torch.int64, pin_memory=torch.device(device).type == "cuda")
    whole = batch.to(device, non_blocking=True).unsqueeze(1)
    return dict(zip(("input_ids", "position_ids", "labels"), whole, strict=True))
