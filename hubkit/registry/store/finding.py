"""Searching the store: what was pulled, by an index of what it holds."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from hubkit.registry.catalogue import Catalogue, Row, Stamp
from hubkit.registry.directory.finding import DOCUMENTS, LARGEST
from hubkit.registry.searching import Hit, Wanted, described
from hubkit.registry.store.selection import CARD
from hubkit.registry.store.store import Store


def search_store(store: Store, wanted: Wanted, indexes: Path) -> list[Hit]:
    """The stored adapters that fit, sorted.

    Args:
        indexes: as in `search_directory`.
    """
    folder = store.home / "index" / "pulled"
    rows = Catalogue(indexes / "store.json").rows(_seen(folder), lambda name: _read(store, folder / name))
    found = [hit for row in rows if wanted.fits(row) and store.path((hit := Hit.from_row(row)).artifact).is_dir()]
    return sorted(found, key=lambda hit: (hit.repo, hit.folder, hit.registry, hit.commit))


def _seen(folder: Path) -> dict[str, Stamp]:
    found = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.name.endswith(".json"):
                info = entry.stat()
                found[entry.name] = [info.st_mtime_ns, info.st_ino, info.st_size]
    return found


def _read(store: Store, file: Path) -> list[Row] | None:
    """What one pull brought; nothing of a base, and None while it is not in the store."""
    try:
        fact = json.loads(file.read_bytes())
        place = {name: str(fact[name]) for name in ("repo", "folder", "commit", "registry")}
        digest, base = str(fact["digest"]), fact["kind"] == "base"
    except (OSError, ValueError, KeyError, TypeError):
        return []
    folder = store.path(digest)
    if not folder.is_dir():
        return None
    said = described(*(_small(folder / name) for name in (*DOCUMENTS, CARD)))
    return [] if base and not (folder / DOCUMENTS[0]).is_file() else [Hit(artifact=digest, **place, **said).to_row()]


def _small(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST)
    except OSError:
        return None
