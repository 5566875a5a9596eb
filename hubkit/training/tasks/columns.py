"""Which columns of the rows a task reads."""

from __future__ import annotations

from collections.abc import Sequence

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record, shorten

TEXTS = ("text", "sentence")


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


def text_column(records: Sequence[Record], columns: Columns | None) -> str:
    """The column of text: what is asked, else what is called so.

    Raises:
        HubkitError: ``HK-COLUMNS``, also for columns that only language models read.
    """
    other = [name for name in (columns.names() if columns else ()) if columns and name != columns.text]
    if other:
        what = "the task reads a column of text and one of labels"
        raise HubkitError("HK-COLUMNS", what, want="--text, --label", have=other)
    return column_of(records, columns.text if columns else None, TEXTS, "--text")


def require_texts(records: Sequence[Record], column: str) -> None:
    """Refuses rows without text: ``HK-DATA``."""
    bad = [r.where for r in records if not isinstance(r.values.get(column), str) or not str(r.values[column]).strip()]
    if bad:
        raise HubkitError("HK-DATA", f"column {column!r} holds no text", want="text in each row", have=shorten(bad))
