"""From records to the rows of one training, and those it is validated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hubkit.errors import USAGE, HubkitError
from hubkit.training.rows.batching import split
from hubkit.training.rows.data import Columns, Record, choose_columns, shorten, unused
from hubkit.training.rows.encode import Row, encode
from hubkit.training.rows.summary import Prepared, padding_of, summary

DUPLICATES = ("keep", "drop", "refuse")
OVERLAP = ("refuse", "drop")


class RowOptions(Protocol):
    """What is used of `TrainOptions`."""

    @property
    def max_length(self) -> int | None: ...
    @property
    def truncate(self) -> bool: ...
    @property
    def validation(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def packing(self) -> bool: ...


class TaskRows(Protocol):
    """How the rows of another task than language modelling are made."""

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """What a column is taken as -> the columns that are read."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the rows, a line each."""

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> Sequence[Row]:
        """One row for each record, of `longest` tokens at most."""

    def counts(self, rows: Sequence[Row]) -> Mapping[str, int]:
        """Label -> how many times it is learnt; none of a task without labels."""


def prepared_rows(
    records: Sequence[Record],
    held: Sequence[Record] | None,
    tokenizer: Any,
    columns: Columns | None,
    options: RowOptions,
    *,
    context: int | None,
    front: int,
    raw: bool,
    duplicates: str = "keep",
    overlap: str = "refuse",
    report: Callable[[Prepared], object] = lambda found: None,
    task: TaskRows | None = None,
) -> tuple[list[Row], list[Row]]:
    """Encoded training and validation rows, short enough for `front` virtual tokens to stand in front of each.

    No row is on both sides: rows that are held out take those that equal them with them.

    Args:
        held: records to validate on; None: a share of `records`.
        columns: which to train on; found from the data when None.
        options: of the run.
        context: tokens that the base can take; None where it has no limit.
        raw: prompt and completion without the chat template.
        duplicates: what becomes of training rows that equal one before them: one of `DUPLICATES`.
        overlap: what becomes of training rows that stand among `held`, too: one of `OVERLAP`.
        report: given the figures of what was made.
        task: another one than language modelling, with columns of its own.

    Raises:
        HubkitError: ``HK-OPTIONS`` where `max_length` is beyond the context; ``HK-COLUMNS``; ``HK-DATA`` for equal rows
            that are to be refused; ``HK-NO-ROWS`` where none is left; what `encode` raises.
    """
    require_choices(duplicates, overlap)
    limit = _limit(context, front, options.max_length)
    roles = task.roles if task else choose_columns(records, columns).roles()

    def encoded(some: Sequence[Record]) -> list[Row]:
        if task:
            return [*task.encode(some, tokenizer, limit, options.truncate)]
        chosen = choose_columns(some, columns)
        return encode(some, tokenizer, chosen, max_length=limit, truncate=options.truncate, raw=raw, front=front)

    every = encoded(records)
    validation = [] if held is None else encoded(held)
    rows, twice = _without_duplicates(every, duplicates)
    once = rows
    rows = _apart(rows, validation, overlap)
    overlapping = len(once) - len(rows)
    if held is None:
        rows, validation = split_apart(rows, options.validation, options.seed)
    report(
        summary(
            rows,
            validation,
            roles,
            unused(records, (name for names in roles.values() for name in names)),
            padding=0.0 if options.packing else padding_of(rows, options.batch_size, options.accumulate, options.seed),
            duplicates=twice,
            overlapping=overlapping,
            dropped=len(every) - len(once) + overlapping,
            notes=task.notes if task else (),
            labels=task.counts(rows) if task else {},
        )
    )
    return rows, validation


def require_choices(duplicates: str, overlap: str) -> None:
    """Refuse other words than `DUPLICATES` and `OVERLAP`: HK-OPTIONS."""
    for name, value, known in (("duplicates", duplicates, DUPLICATES), ("overlap", overlap, OVERLAP)):
        if value not in known:
            want = f"one of {', '.join(known)}"
            raise HubkitError("HK-OPTIONS", f"{name} is no choice", want=want, have=repr(value), status=USAGE)


def _limit(context: int | None, front: int, max_length: int | None) -> int:
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
    return max_length or longest or 1 << 30


def _without_duplicates(rows: list[Row], what: str) -> tuple[list[Row], int]:
    """`rows`, without those that equal one before if these are to be dropped; and how many such there are."""
    seen: dict[tuple[bytes, bytes], str] = {}
    first, again = [], []
    for row in rows:
        key = (_said(row), bytes(memoryview(row.labels)))  # type: ignore[arg-type]  # arrays, as `encode` makes them
        if key in seen:
            again.append(f"{row.where} equals {seen[key]}")
        else:
            seen[key] = row.where
            first.append(row)
    if again and what == "refuse":
        raise HubkitError(
            "HK-DATA",
            f"{len(again)} of {len(rows)} rows equal one before them",
            want="each row once",
            have=shorten(again),
            fix="--duplicates drop, or --duplicates keep",
        )
    return (first if what == "drop" else rows), len(again)


def _said(row: Row) -> bytes:
    """By what two rows are the same text, whatever is learnt of it."""
    return bytes(memoryview(row.ids))  # type: ignore[arg-type]  # arrays, as `encode` makes them


def _apart(rows: list[Row], held: Sequence[Row], what: str) -> list[Row]:
    """`rows` without those that stand among `held`, too; refused, unless they are to be dropped."""
    validated = {_said(row): row.where for row in held}
    both = [f"{row.where} is {validated[_said(row)]}" for row in rows if _said(row) in validated]
    if both and what == "refuse":
        raise HubkitError(
            "HK-DATA",
            f"{len(both)} of {len(rows)} rows stand in the validation data, too",
            want="validation rows that are not trained on",
            have=shorten(both),
            fix="--overlap drop, which leaves them out of the training rows",
        )
    left = [row for row in rows if _said(row) not in validated]
    if rows and not left:
        what, want = "all rows stand in the validation data", "rows to train on"
        raise HubkitError("HK-NO-ROWS", what, want=want, fix="other validation data, or --validation SHARE")
    return left


def split_apart(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """`split`, with equal rows on the same side: where it would part some, a share of the different rows is held out.

    Raises:
        HubkitError: as `split`.
    """
    kept, held = split(rows, share, seed)
    if not {_said(row) for row in kept} & {_said(row) for row in held}:
        return kept, held
    _, chosen = split(list(dict.fromkeys(map(_said, rows))), share, seed)
    aside = set(chosen)
    return [r for r in rows if _said(r) not in aside], [r for r in rows if _said(r) in aside]
