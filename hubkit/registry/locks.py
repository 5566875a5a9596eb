"""Files and folders shared by several processes: locks, private scratch folders, durable atomic writes.

Locks are ``flock``: the kernel lets go of them when a process dies, whatever killed it, so nothing is ever left
locked. A scratch folder is locked by its owner; one whose lock is free belonged to a process that died and is swept.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` (made when absent, never removed); waits for other holders, threads included."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def scratch(area: Path) -> Iterator[Path]:
    """A private folder under `area`, removed at the end; those of dead processes are removed on the way."""
    area.mkdir(parents=True, exist_ok=True)
    guard = area / ".lock"
    folder = area / secrets.token_hex(12)
    with locked(guard):
        _sweep(area)
        folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep(area: Path) -> None:
    for name in os.listdir(area):
        path = area / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            continue  # its owner has just finished, or it is the lock file
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner is alive
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def sync_folder(path: Path) -> None:
    """Make renames into `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, data: bytes, work: Path) -> None:
    """Write `data` to `path` so that it is there whole or not at all, even across a power cut.

    Args:
        path: the file; its folder must exist.
        data: the whole content.
        work: a scratch folder on the same file system.
    """
    temporary = work / secrets.token_hex(8)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
