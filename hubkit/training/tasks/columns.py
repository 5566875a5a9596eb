"""Which columns of the rows a task reads."""

from __future__ import annotations

from collections.abc import Sequence

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record, shorten

TEXTS = ("text", "sentence")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("text", "text_pair"),
)
"""What the two columns of a pair of texts are called."""


def column_of(records: Sequence[Record], asked: str | None, names: Sequence[str], option: str) -> str:
    """The column that is `asked`, else the first of `names` that the rows have.

    Args:
        option: by which one is asked for.

    Raises:
        HubkitError: ``HK-COLUMNS`` for none.
    """
    present = records[0].values
    found = asked or next((name for name in names if name in present), None)
    if found is None or found not in present:
        want, fix = asked or " or ".join(names), f"{option} COLUMN"
        raise HubkitError("HK-COLUMNS", "a column is not there", want=want, have=list(present), fix=fix)
    return found


def text_column(records: Sequence[Record], columns: Columns | None, names: Sequence[str] = TEXTS) -> str:
    """The column of text: what is asked, else what is called so.

    Args:
        names: what such columns are called.

    Raises:
        HubkitError: ``HK-COLUMNS``, also for columns that only language models read.
    """
    other = [name for name in (columns.names() if columns else ()) if columns and name != columns.text]
    if other:
        what = "the task reads a column of text and one of labels"
        raise HubkitError("HK-COLUMNS", what, want="--text, --label", have=other)
    return column_of(records, columns.text if columns else None, names, "--text")


def text_columns(records: Sequence[Record], columns: Columns | None, pair: str | None) -> tuple[str, ...]:
    """The column of text, or the two of a pair: what is asked, else what is called so.

    Args:
        pair: the second column that is asked for.

    Raises:
        HubkitError: ``HK-COLUMNS``.
    """
    present = records[0].values
    found = next((names for names in PAIRS if all(name in present for name in names)), None)
    if found and found[0] not in TEXTS and any(name in present for name in TEXTS):
        found = None
    first = columns.text if columns else None
    if pair is None and (first or not found or (columns and columns.names())):
        return (text_column(records, columns),)
    if pair is None and found:
        return found
    names = [*TEXTS, *(one for one, other in PAIRS if other == pair), *(one for one, _ in PAIRS)]
    both = text_column(records, columns, names), column_of(records, pair, (), "--text-pair")
    if both[0] == both[1]:
        what = "the two texts of a pair are one column"
        raise HubkitError("HK-COLUMNS", what, want="two columns", have=both[0], fix="--text COLUMN --text-pair COLUMN")
    return both


def require_texts(records: Sequence[Record], column: str) -> None:
    """Refuses rows without text: ``HK-DATA``."""
    bad = [r.where for r in records if not isinstance(r.values.get(column), str) or not str(r.values[column]).strip()]
    if bad:
        raise HubkitError("HK-DATA", f"column {column!r} holds no text", want="text in each row", have=shorten(bad))
