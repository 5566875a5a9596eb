"""How results look where Python itself shows them: a few lines that a person reads, a table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from hubkit.errors import escape

WIDTH = 100
"""Characters of one value that are shown; of a text of its own, such as an answer, TEXT of them."""
TEXT = 2000
ROWS = 20
"""Rows inside of a result that are shown."""

Row = TypeVar("Row")


class Shown:
    """Base of a dataclass that is a result, declared with ``repr=False``: a line for each field that says something."""

    def __repr__(self) -> str:
        return "\n".join([type(self).__name__, *(f"  {line}" for line in _lines(self, True))])

    def _repr_html_(self) -> str:
        return _html([("", type(self).__name__), *_facts(self)])


class Table(tuple[Row, ...]):
    """A tuple of results that is shown as a table: the fields in which some result says something."""

    def __repr__(self) -> str:
        rows = self._cells()
        if not rows:
            return "()"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (map(str.ljust, row, widths) for row in rows)
        return "\n".join("  ".join(cells).rstrip() for cells in padded)

    def _repr_html_(self) -> str:
        return _html(self._cells())

    def _cells(self) -> list[list[str]]:
        """The head, then each row; nothing where there is none."""
        names = list(dict.fromkeys(name for one in self for name, _ in _facts(one)))
        return [names, *([_short(getattr(one, name)) for name in names] for one in self)] if names else []


def _lines(value: object, nested: bool) -> Iterator[str]:
    facts = _facts(value)
    width = max((len(name) for name, _ in facts), default=0)
    for name, text in facts:
        item = getattr(value, name)
        rows = _rows(item) if nested else []
        if rows:
            yield name
            yield from (f"  {line}" for line in rows)
        else:
            first, *rest = text.splitlines() or [""]
            yield f"{name.ljust(width)}  {first}"
            yield from (" " * (width + 2) + line for line in rest)


def _rows(item: object) -> list[str]:
    """The lines of a value that is a record, or several of them."""
    if _is_record(item):
        return list(_lines(item, False))
    if isinstance(item, tuple) and item and all(map(_is_record, item)):
        rows = [_cut(line, WIDTH) for line in repr(Table(item[:ROWS])).splitlines()]
        return rows + ([f"… {len(item) - ROWS} more"] if len(item) > ROWS else [])
    return []


def _facts(value: Any) -> list[tuple[str, str]]:
    """(field, its value as text) of a record, without what is empty."""
    items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    return [(name, _text(item)) for name, item in items if not _is_empty(item)]


def _text(item: object) -> str:
    if isinstance(item, str):
        return _cut("\n".join(map(escape, item.split("\n"))), TEXT)
    return _short(item)


def _short(item: object) -> str:
    """A value in one line."""
    if item is None:
        return ""
    if _is_record(item):
        found = ", ".join(f"{name}={_short(getattr(item, name))}" for name, _ in _facts(item))
    elif isinstance(item, Mapping):
        found = ", ".join(f"{key}={_short(value)}" for key, value in item.items())
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
        found = ", ".join(map(_short, item))
    else:
        found = f"{item:.6g}" if isinstance(item, float) else str(item)
    return _cut(escape(found), WIDTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _is_record(item: object) -> bool:
    return is_dataclass(item) and not isinstance(item, type)


def _is_empty(item: object) -> bool:
    return item is None or (isinstance(item, str | tuple | list | Mapping) and not item)


def _html(rows: Iterable[Sequence[str]]) -> str:
    """Rows as a table, the first of them its head."""
    marked: list[str] = []
    for row in rows:
        tag = "td" if marked else "th"
        cells = "".join(f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in row)
        marked.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(marked)}</table>" if marked else "<p>nothing</p>"
