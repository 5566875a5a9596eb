"""What was made of the data, in figures: which columns were taken, how long the rows are, what is padded and cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hubkit.training.rows.encode import Row

SHOWN = 20
"""Labels that are named in one line."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows: of the shortest one, the middle one, the longest but 5 %, the longest one, of all together."""

    least: int
    median: int
    p95: int
    most: int
    total: int


@dataclass(frozen=True)
class Prepared:
    """Rows are read and encoded; the base is not loaded yet.

    Args:
        columns: what a column is taken as (a field of `Columns`, a role of the task) -> the columns.
        unused: columns that are there, usually hold something to learn from, and are not trained on.
        rows, validation_rows: number of rows.
        tokens: of the training rows.
        targets: tokens that are learnt, in all training rows.
        padding: share of what the model is given in the first epoch that is padding, 0 to 1.
        truncated: training rows whose end was cut off.
        duplicates: training rows that equal one before them; `dropped` says whether they are still there.
        overlapping: training rows that stand among the validation rows as well, and were dropped for it.
        dropped: rows that were dropped, duplicates and overlapping ones.
        notes: what else is to be said of them.
        labels: of a task with labels: each label -> how many times it is learnt, in all training rows.
    """

    columns: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]
    rows: int
    validation_rows: int
    tokens: Lengths
    targets: int
    padding: float
    truncated: int
    duplicates: int
    overlapping: int
    dropped: int
    notes: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The same for people, a few lines."""
        taken = ", ".join(f"{role} = {' + '.join(names)}" for role, names in self.columns.items())
        held = f", {self.validation_rows} held out" if self.validation_rows else ""
        t = self.tokens
        learnt = "" if self.labels else f", {self.targets} of them learnt"
        found = [
            f"rows: {self.rows}{held}; {taken}",
            f"tokens a row: least {t.least}, median {t.median}, 95 % {t.p95}, most {t.most};"
            f" {t.total} in all{learnt}; padding {self.padding:.0%}",
        ]
        if self.labels:
            found.append(f"labels: {_most(self.labels)}")
        if self.truncated:
            found.append(f"cut at their end: {self.truncated} rows")
        if self.duplicates:
            kept = "dropped" if self.dropped > self.overlapping else "kept: --duplicates drop"
            found.append(f"rows that were there before: {self.duplicates} ({kept})")
        if self.overlapping:
            found.append(f"rows that are validated on: {self.overlapping} (dropped)")
        if self.unused:
            found.append(f"not trained on: {', '.join(self.unused)}")
        return [*found, *self.notes]


def summary(
    rows: Sequence[Row],
    validation: Sequence[Row],
    columns: Mapping[str, tuple[str, ...]],
    unused: tuple[str, ...],
    *,
    padding: float,
    duplicates: int,
    overlapping: int,
    dropped: int,
    notes: tuple[str, ...] = (),
    labels: Mapping[str, int] | None = None,
) -> Prepared:
    """The figures of rows that are about to be trained on, see `Prepared`.

    Args:
        rows, validation: at least one row of the first.
        columns, notes: as `Prepared` has them.
        padding: see `padding_of`.
    """
    return Prepared(
        columns,
        unused,
        len(rows),
        len(validation),
        lengths_of([len(row.ids) for row in rows]),
        sum(row.targets() for row in rows),
        padding,
        sum(bool(row.cut) for row in rows),
        duplicates,
        overlapping,
        dropped,
        notes,
        labels or {},
    )


def _most(labels: Mapping[str, int]) -> str:
    """Labels with their numbers, the commonest first; of very many the first ones."""
    ordered = sorted(labels.items(), key=lambda one: -one[1])
    more = f", and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{name} {count}" for name, count in ordered[:SHOWN]) + more


def lengths_of(lengths: Sequence[int]) -> Lengths:
    """The figures of some lengths, at least one; each but the sum is the length of a row that is there."""
    ordered = sorted(lengths)

    def at(percent: int) -> int:  # the nearest rank: so many percent of the rows are no longer
        return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]

    return Lengths(ordered[0], at(50), at(95), ordered[-1], sum(ordered))


def padding_of(rows: Sequence[Row], batch_size: int, accumulate: int, seed: int) -> float:
    """The share of padding in the first epoch over `rows`, in [0, 1); the options are those of `TrainOptions`."""
    from hubkit.training.rows.batching import fewest, plan_epoch  # torch, which events do without

    lengths = [len(row.ids) for row in rows]
    steps = plan_epoch(lengths, batch_size, accumulate, seed, 0, fewest(rows))
    given = sum(max(lengths[n] for n in batch) * len(batch) for step in steps for batch in step)
    return 1 - sum(lengths) / given
