"""A small index of what many repositories hold, so that a search reads one file: remembered, and refreshed by a look.

Each entry has the stamp that its repository's file had when it was read; what has another one now is read again, and
nothing else. The file is replaced whole, so processes that refresh it at once do not disturb each other: whoever is
last leaves entries that are all true of their stamps. A damaged file is a forgotten one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from hubkit.documents.files import write
from hubkit.errors import HubkitError
from hubkit.registry.searching import COLUMNS

Row = list[str]
Stamp = list[int]
_FORMAT = 1


class Catalogue:
    """The index in one file.

    Args:
        file: its folder is made when it is first written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def rows(self, seen: Mapping[str, Stamp], read: Callable[[str], list[Row] | None]) -> Iterator[Row]:
        """Every row of what is there now.

        Args:
            seen: key of everything that is there -> its stamp now.
            read: what a key holds; asked for what is new or has another stamp. None: nothing yet, ask again next time.
        """
        known, changed = self._load(), False
        entries: dict[str, tuple[Stamp, list[Row]]] = {}
        for key, stamp in seen.items():
            entry = known.get(key)
            if entry is None or entry[0] != stamp:
                found = read(key)
                if found is None:
                    continue
                entry, changed = (stamp, found), True
            entries[key] = entry
            yield from entry[1]
        if changed or len(known) != len(entries):
            self._save(entries)

    def _load(self) -> dict[str, tuple[Stamp, list[Row]]]:
        try:
            document = json.loads(self._file.read_bytes())
            entries = document["entries"] if document["format"] == _FORMAT else {}
            sound = all(
                len(row) == COLUMNS and {*map(type, row)} == {str} for _, rows in entries.values() for row in rows
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        return entries if sound else {}

    def _save(self, entries: Mapping[str, tuple[Stamp, list[Row]]]) -> None:
        data = json.dumps({"format": _FORMAT, "entries": entries}, separators=(",", ":")).encode()
        with suppress(OSError, HubkitError):  # a home that may only be read is read anew each time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write(self._file, data)
