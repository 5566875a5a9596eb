"""How many bytes the objects of a directory registry take, by namespace: asked often, so little is read again."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_SETTLED = 0.1
"""Seconds after which a folder that changes once more has another time, on any file system in use."""


class Usage:
    """Bytes below ``repos/<namespace>``, whoever put them there: other processes write to the same directory.

    A folder of objects is read again only when its own time says that something came or went.

    Args:
        root: the registry's directory.
    """

    def __init__(self, root: Path) -> None:
        self._repos = root / "repos"
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, tuple[int, int]]] = {}
        """Namespace -> folder of objects -> its time when it was read, and the bytes in it."""

    def of(self, namespace: str) -> int:
        """Bytes stored in a namespace, all of its repositories together."""
        with self._lock:
            return self._count(namespace)

    def all(self) -> dict[str, int]:
        """Bytes by namespace."""
        with self._lock:
            found = {name: self._count(name) for name in _folders(self._repos)}
            self._known = {name: known for name, known in self._known.items() if name in found}
            return found

    def _count(self, namespace: str) -> int:
        before, now = self._known.get(namespace, {}), {}
        total = 0
        for repo in _folders(self._repos / namespace):
            place = self._repos / namespace / repo / "objects"
            for name in _folders(place):
                folder = str(place / name)
                changed, size = before.get(folder, (-1, 0))
                found = _time(folder)
                if found != changed:
                    size = _bytes(folder)
                if time.time() - found / 1e9 > _SETTLED:
                    now[folder] = found, size
                total += size
        self._known[namespace] = now
        return total


def _folders(place: Path) -> list[str]:
    try:
        with os.scandir(place) as found:
            return [one.name for one in found if one.is_dir(follow_symlinks=False)]
    except OSError:  # gone meanwhile, or not there yet
        return []


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _bytes(folder: str) -> int:
    size = 0
    try:
        with os.scandir(folder) as found:
            for one in found:
                size += one.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
    return size
