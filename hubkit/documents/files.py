"""One file, read within limits or written whole, and what the file system's refusals mean to a user."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubkit.errors import HubkitError

if sys.platform != "win32":
    import fcntl

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAMELESS = _FULL | {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def refusal(error: OSError, where: str) -> HubkitError:
    """The `HubkitError` that tells a user what an `OSError` of the file system means.

    Returns:
        ``HK-DISK`` for a full disk or quota, ``HK-IO`` for everything else.
    """
    reason = error.strerror or type(error).__name__
    place = str(error.filename) if error.filename else where
    if error.errno in _FULL:
        return HubkitError("HK-DISK", "the disk is full", where=place, have=reason, fix="free some space and run again")
    fix = "check the path and its permissions"
    return HubkitError("HK-IO", "a file could not be read or written", where=place, have=reason, fix=fix)


@contextmanager
def refusing(where: Path | str) -> Iterator[None]:
    """Turn the file system's errors inside the block into `HubkitError`s; network errors pass as they are.

    Args:
        where: named in the refusal when the error itself names no file.

    Raises:
        HubkitError: ``HK-DISK`` or ``HK-IO``.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        if error.filename is None and error.errno not in _NAMELESS:
            raise  # a network library's error that only borrows the class
        raise refusal(error, str(where)) from error


def read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes.

    Raises:
        FileNotFoundError: when there is none: what that means, the caller knows.
        HubkitError: ``HK-IO`` for folders, devices and pipes, for larger files, and for what the system refuses.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise refusal(error, str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise HubkitError("HK-IO", "this is not a plain file", where=str(path))
    with refusing(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        want, have = f"at most {limit} bytes", f"{status.st_size} bytes"
        raise HubkitError("HK-IO", "the file is too large for what it should be", where=str(path), want=want, have=have)
    return data


def try_lock(descriptor: int) -> bool | None:
    """Take the file lock of an open file without waiting; it ends with the process, however that ends.

    Returns:
        True when it is ours now, False when another process (or another descriptor of this one) holds it, None where
        the system or the file system has no such locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system lets a folder be opened and synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """Write one file atomically: a private sibling is written, synced and renamed over `path`.

    A sibling left behind by a killed process is removed by the next `write` of the same path.

    Raises:
        HubkitError: ``HK-DISK`` (full, nothing left behind) or ``HK-IO``; the old file stays as it was.
    """
    with refusing(path):
        _sweep(path)
        descriptor, temporary = _open_temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def _open_temporary(path: Path) -> tuple[int, Path]:
    """A fresh sibling, locked: that says to other writers that it is no leftover.

    One of them may sweep it between its making and its locking; then there is another.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        if try_lock(descriptor) is not False and temporary.exists():
            return descriptor, temporary
        os.close(descriptor)


def _sweep(path: Path) -> None:
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(path.parent):
        if not leftover.fullmatch(name):
            continue
        with suppress(OSError):
            descriptor = os.open(path.parent / name, os.O_RDWR)
            try:
                if try_lock(descriptor) is True:
                    (path.parent / name).unlink()
            finally:
                os.close(descriptor)
