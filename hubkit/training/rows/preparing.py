"""From records to the rows of one training, and those it is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.training.rows.batching import split
from hubkit.training.rows.data import Columns, Record, choose_columns
from hubkit.training.rows.encode import Row, encode


def prepared_rows(
    records: Sequence[Record],
    held: Sequence[Record] | None,
    tokenizer: Any,
    columns: Columns | None,
    *,
    context: int | None,
    front: int,
    max_length: int | None,
    truncate: bool,
    raw: bool,
    share: float,
    seed: int,
) -> tuple[list[Row], list[Row]]:
    """Encoded training and validation rows, short enough for `front` virtual tokens to stand in front of each.

    Args:
        held: records to validate on; None: a share of `records`.
        columns: which to train on; found from the data when None.
        context: tokens that the base can take; None where it has no limit.
        max_length, truncate, share, seed: as in `TrainOptions` (`share` is its ``validation``).
        raw: prompt and completion without the chat template.

    Raises:
        HubkitError: ``HK-OPTIONS`` where `max_length` is beyond the context; ``HK-COLUMNS``; what `encode` raises.
    """
    chosen = choose_columns(records, columns)
    longest = None if context is None else context - front
    if max_length is not None and longest is not None and max_length > longest:
        beside = f" beside {front} virtual tokens" if front else ""
        raise HubkitError(
            "HK-OPTIONS",
            "max_length is beyond the base's context",
            want=f"at most {longest}{beside}",
            have=str(max_length),
            fix=f"--max-length {longest}",
            status=USAGE,
        )
    limit = max_length or longest or 1 << 30

    def encoded(some: Sequence[Record], columns: Columns) -> list[Row]:
        return encode(some, tokenizer, columns, max_length=limit, truncate=truncate, raw=raw, front=front)

    rows = encoded(records, chosen)
    if held is None:
        return split(rows, share, seed)
    return rows, encoded(held, choose_columns(held, columns))
