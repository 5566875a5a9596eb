"""Folders that appear complete or not at all, whatever interrupts the writer.

A writer fills a hidden sibling of the destination, makes it durable and renames it into place. Beside it lies a
lock file whose lock the system frees when the writer ends, so that the next writer can tell a leftover from work in
progress.

========================  =========================================================
``.name.<16 hex>``        the new folder, being written
``.name.<16 hex>.old``    the folder it replaces, for the moment between two renames
``.name.<16 hex>.lock``   locked while the writer lives; removed last
========================  =========================================================

Where the system can exchange two names in one step (Linux), there is no moment without a folder at the destination;
elsewhere a kill between the two renames is mended by ``recover``, which every reader and writer calls.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hubkit.documents.drafts import Draft, abandoned, claim, sweep_locks
from hubkit.documents.files import refusal, refusing, sync_file, sync_folder
from hubkit.errors import HubkitError

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
_AT_FDCWD, _EXCHANGE = -100, 2  # fcntl.h and linux/fs.h


@contextmanager
def staged(dest: Path, *, replace: bool = False, rescue: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Give an empty private folder to fill; on success it becomes `dest`, on any exception nothing is left of it.

    Args:
        dest: the folder to make; its parents are made too. A link is followed.
        replace: an existing folder is exchanged for the new one when that is complete, and then removed.
        rescue: called with each draft that a killed writer left, before it is removed, and the new folder: may move
            files from one to the other.

    Yields:
        the folder to write into, beside `dest`, on the same file system.

    Raises:
        HubkitError: ``HK-EXISTS`` when `dest` is there (also when another process made it meanwhile) or is not a
            folder; ``HK-DISK`` for a full disk; ``HK-IO`` for what else the file system refuses.
    """
    dest = Path(os.path.realpath(dest))
    with refusing(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        sweep_locks(dest.parent)
        draft = claim(dest.parent, _prefix(dest))
    stage = draft.path
    try:
        with refusing(dest):
            stage.mkdir()
            recover(dest, None if rescue is None else lambda left: rescue(left, stage))
            _require_free(dest, replace)
            yield stage
            _sync(stage)
            _publish(stage, dest, replace)
            _remove(_old_path(stage))
    finally:
        _settle(draft, dest)


def recover(dest: Path, rescue: Callable[[Path], None] | None = None) -> None:
    """Mend what killed writers left beside `dest`: put back a folder they had moved aside, remove their drafts.

    A writer that is alive is left alone.

    Args:
        rescue: called with each draft before it is removed.

    Raises:
        HubkitError: ``HK-IO``.
    """
    dest = Path(os.path.realpath(dest))
    with refusing(dest), suppress(FileNotFoundError, NotADirectoryError):
        for draft in abandoned(dest.parent, _prefix(dest)):
            if rescue is not None:
                rescue(draft.path)
            _settle(draft, dest)


def reclaimed(dest: Path) -> int:
    """Bytes in the drafts beside `dest` that killed writers left: the next writer takes them over or removes them."""
    dest, size = Path(os.path.realpath(dest)), 0
    with suppress(OSError):
        for draft in abandoned(dest.parent, _prefix(dest)):
            size += sum(path.stat().st_size for path in draft.path.rglob("*") if path.is_file())
            draft.end(swept=False)
    return size


def wait_for(dest: Path, seconds: float = 2.0) -> None:
    """Return when `dest` is there, mending or waiting out a writer between its two renames; give up silently.

    Raises:
        HubkitError: ``HK-IO``.
    """
    place = Path(os.path.realpath(dest))
    limit = time.monotonic() + seconds
    while not place.exists():
        recover(place)
        between = [path for path in _siblings(place) if path.name.endswith(".old")]
        if place.exists() or not between or time.monotonic() > limit:
            return
        time.sleep(0.005)


def _prefix(dest: Path) -> str:
    name = dest.name
    if len(os.fsencode(name)) > 200:  # leave room for our own part of the name
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}."


def _siblings(dest: Path) -> list[Path]:
    try:
        names = os.listdir(dest.parent)
    except OSError:
        return []
    ours = re.compile(re.escape(_prefix(dest)) + r"[0-9a-f]{16}(\.old|\.lock)?")
    return [dest.parent / name for name in names if ours.fullmatch(name)]


def _require_free(dest: Path, replace: bool) -> None:
    if not os.path.lexists(dest):
        return
    if not replace:
        raise _exists(dest)
    if not dest.is_dir():
        what, fix = f"{dest.name!r} is a file, not a folder", "choose another folder"
        raise HubkitError("HK-EXISTS", what, where=str(dest), fix=fix)


def _exists(dest: Path) -> HubkitError:
    fix = "choose another folder, or remove this one"
    return HubkitError("HK-EXISTS", f"{dest.name!r} exists already", where=str(dest), fix=fix)


def _old_path(stage: Path) -> Path:
    return stage.with_name(stage.name + ".old")


def _settle(draft: Draft, dest: Path) -> None:
    """End a staging that is ours: the old folder goes back if nothing took its place, the rest goes away."""
    old = _old_path(draft.path)
    if old.exists():
        if not os.path.lexists(dest):
            with suppress(OSError):
                os.rename(old, dest)
        _remove(old)
    _remove(draft.path)
    draft.end(swept=not old.exists())


def _remove(folder: Path) -> None:
    """Remove a folder, read-only ones inside too; what cannot be removed stays for the next sweep."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        for place, names, _ in os.walk(folder):
            for path in (place, *(os.path.join(place, name) for name in names)):
                if not os.path.islink(path):
                    with suppress(OSError):
                        os.chmod(path, stat.S_IRWXU)
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make every file and folder below `folder` durable, deepest first."""

    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, topdown=False, onerror=refuse):
        for name in names:
            path = os.path.join(place, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                sync_file(path)
        sync_folder(Path(place))


def _publish(stage: Path, dest: Path, replace: bool) -> None:
    if replace and dest.is_dir() and exchange(stage, dest):
        sync_folder(dest.parent)
        return
    for _ in range(100):  # other processes may replace the same folder at the same moment
        if replace:
            _move_aside(dest, _old_path(stage))
        try:
            os.rename(stage, dest)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            if not replace:
                raise _exists(dest) from None
            continue
        sync_folder(dest.parent)
        return
    raise refusal(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), str(dest))


def _move_aside(dest: Path, old: Path) -> None:
    _remove(old)  # from an earlier round: another process's folder has taken its place since
    with suppress(FileNotFoundError):
        os.rename(dest, old)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names of one file system in one atomic step.

    Returns:
        False, with nothing changed, where system or file system cannot.
    """
    function = _renameat2()
    if function is None:
        return False
    return bool(function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)


@cache
def _renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function
