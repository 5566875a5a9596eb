"""What processes share: locks of files, and drafts, private names that are swept when their writer died.

A lock is one of the package filelock: the system's own (``flock``, ``LockFileEx``), freed when its holder ends,
whatever ended it, so nothing is ever left locked. A draft is a name that nobody else uses and a lock file beside it:

=========================  ==============================================================
``<prefix><16 hex>``       the draft, a file or a folder: its writer makes and removes it
``<prefix><16 hex>.lock``  locked while the writer lives; removed last
=========================  ==============================================================

A lock file that others wait for is never removed: they would hold one that has no name.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_POLL_SECONDS = 0.005
_UMASK = os.umask(0o077)  # nobody can ask for it without setting it
os.umask(_UMASK)
_SCRATCH = "work."
_LOCK = re.compile(r"(\..+\.[0-9a-f]{16})\.lock")
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems without locks answer."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` (made when absent, never removed); waits for other holders, threads included."""
    lock = _lock(path)
    lock.acquire(poll_interval=_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held(path: Path, busy: HubkitError) -> Iterator[None]:
    """Hold the lock file `path` without waiting for another holder; it is removed at the end.

    Raises:
        HubkitError: `busy` when another one holds it.
    """
    lock = _taken(path, soft=True)
    if lock is None:
        raise busy
    try:
        yield
    finally:
        _removed(lock, path)


@dataclass(frozen=True)
class Draft:
    """A private name, of this process until `end`.

    Args:
        path: nothing is there at first.
    """

    path: Path
    _lock: BaseFileLock | None

    def end(self, *, swept: bool = True) -> None:
        """Let go of the name.

        Args:
            swept: nothing is left of the draft; otherwise its lock file stays, so that the next sweep finds it.
        """
        gone, name = swept and not os.path.lexists(self.path), _lock_path(self.path)
        if gone:
            _removed(self._lock, name)
        elif self._lock is not None:
            self._lock.release()
            name.touch()  # some releases of filelock remove what they release


def claim(folder: Path, prefix: str, suffix: str = "") -> Draft:
    """A fresh name in `folder`, which must exist; where the file system has no locks, nobody will sweep it.

    A sweeper may take the lock file between its making and its locking; then there is another name.
    """
    while True:
        path = folder / f"{prefix}{secrets.token_hex(8)}{suffix}"
        try:
            lock = _taken(_lock_path(path))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return Draft(path, None)
        if lock is not None:
            return Draft(path, lock)


def abandoned(folder: Path, prefix: str, suffix: str = "") -> Iterator[Draft]:
    """The drafts of writers that died, each of this process now: clear it away, then `Draft.end`.

    Those of living writers and of other users are left alone.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    left = re.compile(rf"({re.escape(prefix)}[0-9a-f]{{16}}{re.escape(suffix)})\.lock")
    for name in os.listdir(folder):
        match, lock = left.fullmatch(name), None
        if match is not None:
            with suppress(OSError):
                lock = _taken(folder / name)
        if match is not None and lock is not None:
            yield Draft(folder / match[1], lock)


def sweep_locks(folder: Path) -> None:
    """Remove the lock files of writers that were killed when all but that was done: nothing of a draft is left.

    Those of living writers, and of drafts that are still to be cleared away, stay.
    """
    for name in os.listdir(folder):
        match = _LOCK.fullmatch(name)
        if match is None or any(os.path.lexists(folder / f"{match[1]}{end}") for end in ("", ".old")):
            continue
        with suppress(OSError):
            lock = _taken(folder / name)
            if lock is not None:
                Draft(folder / match[1], lock).end()


@contextmanager
def scratch(area: Path) -> Iterator[Path]:
    """A private folder in `area`, removed at the end; those of dead processes are removed on the way."""
    area.mkdir(parents=True, exist_ok=True)
    for left in leftovers(area):
        shutil.rmtree(left.path, ignore_errors=True)
        left.end()
    draft = claim(area, _SCRATCH)
    try:
        draft.path.mkdir(mode=0o700)
        yield draft.path
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)
        draft.end()


def leftovers(area: Path) -> Iterator[Draft]:
    """What dead processes left of `scratch` in an area: see `abandoned`."""
    return abandoned(area, _SCRATCH)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _lock(path: Path) -> BaseFileLock:
    from filelock import FileLock

    # as every other file; filelock's own choice keeps the others of a shared store out
    return FileLock(path, mode=0o666 & ~_UMASK, thread_local=False)  # a draft may end in another thread


def _taken(path: Path, *, soft: bool = False) -> BaseFileLock | None:
    """The lock of `path`, ours now; None when another one holds it, or removed its file just now.

    Args:
        soft: where the file system has no locks, the mere existence of the file will do: it outlives a killed holder.

    Raises:
        OSError: also where there are no locks.
    """
    from filelock import SoftFileLock, Timeout

    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except NotImplementedError as error:  # what older releases of filelock make of ENOSYS
        raise OSError(errno.ENOSYS, str(error), str(path)) from None
    if isinstance(lock, SoftFileLock) and not soft:
        lock.release()
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(path))
    return lock


def _removed(lock: BaseFileLock | None, path: Path) -> None:
    """Remove the file of a lock, and let go of it; None where the file system has no locks."""
    if lock is not None and sys.platform == "win32":  # where only a file that nobody has open can be removed
        lock.release()
    with suppress(OSError):
        path.unlink()  # while it is held, or the next holder's would be removed
    if lock is not None:
        lock.release()
