"""One file, read within limits or written whole, and what the file system's refusals mean to a user."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubkit.documents.drafts import abandoned, claim
from hubkit.errors import HubkitError

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


def require_unlinked(folder: Path, names: Iterable[str], *, cached: bool = False) -> None:
    """Refuses files below `folder` that are links or lie behind one: what they mean belongs to somebody else.

    Args:
        folder: named by the user; it may be a link itself.
        names: paths inside, ``/`` between segments; those that are not there are passed over.
        cached: let the links through of which a snapshot in huggingface_hub's cache consists (``../../blobs/<name>``).

    Raises:
        HubkitError: ``HK-SYMLINK`` with every such file.
    """
    blobs = folder.resolve().parent.parent / "blobs" if cached else None
    found = []
    for name in names:
        steps = [folder / Path(*name.split("/")[:end]) for end in range(1, name.count("/") + 2)]
        link = next((step for step in steps if step.is_symlink()), None)
        if link is not None and (blobs is None or link.resolve().parent != blobs):
            found.append(f"{name}: {link} -> {os.readlink(link)}")
    if found:
        what, fix = "links are not followed: what they lead to is not in the folder", f"cp -RL {folder} NEW-DIR"
        raise HubkitError("HK-SYMLINK", what, where=str(folder), want="plain files", have=found, fix=fix)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system lets a folder be opened and synced."""
    with suppress(PermissionError):  # Windows, where renames are journalled
        _sync(folder, os.O_RDONLY)


def sync_file(path: Path | str) -> None:
    """Make what was written to a file durable."""
    _sync(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)


def _sync(path: Path | str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write one file atomically: a private sibling is written, synced and renamed over `path`.

    A sibling left behind by a killed process is removed by the next `write` of the same path.

    Args:
        mode: of the file, less the umask.

    Raises:
        HubkitError: ``HK-DISK`` (full, nothing left behind) or ``HK-IO``; the old file stays as it was.
    """
    beside = (path.parent, f".{path.name}.", ".tmp")
    with refusing(path):
        for left in abandoned(*beside):
            with suppress(OSError):
                left.path.unlink()
            left.end()
        draft = claim(*beside)
        try:
            write_through(draft.path, path, data, mode=mode)
        finally:
            draft.end()


def require_free(path: Path, replace: bool) -> Path:
    """`path`, where a file may be written; asked before any work is done.

    Raises:
        HubkitError: ``HK-EXISTS`` for a file that is there and not to be replaced; ``HK-IO`` where none can be.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise HubkitError(
            "HK-IO", "no file can be written here", where=str(path), want="a file in a folder that exists"
        )
    if path.exists() and not replace:
        raise HubkitError(
            "HK-EXISTS", f"{path.name!r} exists already", where=str(path), fix="another name, or --replace"
        )
    return path


def write_through(temporary: Path, path: Path, data: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write `data` to a name of one's own, and rename that over `path`: it is there whole or not at all.

    Args:
        temporary: a name on the same file system where nothing is; nothing is there afterwards, whatever happens.
        path: its folder must exist.
        durable: also across a power cut.
        mode: of the file, less the umask.

    Raises:
        OSError: `path` is as it was.
    """
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(path.parent)
