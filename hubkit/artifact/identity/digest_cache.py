"""Digests remembered between runs: one small file per hashed file, under ``$HUBKIT_HOME/digests``.

A digest is believed only for the very file it was made of: path, size, modification and change time in nanoseconds,
inode. Entries carry a digest of themselves: one that is damaged, cut off or written by another version is as good as
absent. They are renamed into place, so processes may share the folder; where it cannot be written, nothing is cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Final

from hubkit.documents.files import write_through

ENTRIES: Final = 4096
"""Entries kept; the oldest quarter is removed when there are more."""

_VERSION: Final = 1
# A file written this recently may be written again without its times changing: the clocks of file systems tick.
_TICK_NS: Final = 100_000_000
_COARSE_TICK_NS: Final = 2_000_000_000

Identity = list[Any]


def home() -> Path | None:
    """Hubkit's own folder: ``HUBKIT_HOME``, else ``~/.cache/hubkit``; None where there is no home."""
    if chosen := os.environ.get("HUBKIT_HOME"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "hubkit"
    except RuntimeError:
        return None


def identity(path: Path, status: os.stat_result) -> Identity:
    """What tells a file from every other, and from itself before a change."""
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [os.path.realpath(path), status.st_size, *times, status.st_dev, status.st_ino]


def recall(path: Path, status: os.stat_result) -> dict[str, Any]:
    """The notes on a file, empty when there are none that can be believed.

    Args:
        path: the file.
        status: its `os.stat` now.
    """
    known = identity(path, status)
    try:
        data = _entry(known).read_bytes()
        seal, body = data[:64], data[65:]
        if hashlib.sha256(body).hexdigest().encode() != seal:
            return {}
        document = json.loads(body)
    except (OSError, ValueError):
        return {}
    notes = document["notes"] if document["version"] == _VERSION and document["file"] == known else {}
    return notes if isinstance(notes, dict) else {}


def note(path: Path, status: os.stat_result, notes: dict[str, Any]) -> None:
    """Remember notes on a file, beside those that are there.

    Args:
        path: the file.
        status: its `os.stat` before it was read; nothing is remembered when it changed since, or just now.
        notes: JSON values.
    """
    known = identity(path, status)
    with contextlib.suppress(OSError):
        if identity(path, os.stat(path)) != known or _fresh(status):
            return
        document = {"version": _VERSION, "file": known, "notes": {**recall(path, status), **notes}}
        body = json.dumps(document, separators=(",", ":")).encode()
        _replace(_entry(known), hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _fresh(status: os.stat_result) -> bool:
    tick = _COARSE_TICK_NS if status.st_mtime_ns % 1_000_000_000 == 0 else _TICK_NS
    return 0 <= time.time_ns() - status.st_mtime_ns < tick


def _entry(known: Identity) -> Path:
    folder = home()
    if folder is None:
        raise FileNotFoundError("no home")
    return folder / "digests" / hashlib.sha256(os.fsencode(known[0])).hexdigest()[:40]


def _replace(entry: Path, data: bytes) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # neither locked nor durable: what a kill leaves is forgotten like an old entry, what a power cut damages is seen
    write_through(entry.with_name(f".{secrets.token_hex(8)}"), entry, data, durable=False, mode=0o600)
    names = os.listdir(entry.parent)
    if len(names) > ENTRIES:
        _forget(entry.parent, names)


def _forget(folder: Path, names: list[str]) -> None:
    ages: list[tuple[int, str]] = []
    for name in names:
        with contextlib.suppress(OSError):
            ages.append((os.stat(folder / name).st_mtime_ns, name))
    for _, name in sorted(ages)[: ENTRIES // 4]:
        with contextlib.suppress(OSError):
            os.unlink(folder / name)
