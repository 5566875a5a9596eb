"""The bytes of a directory registry's repository: files named by their sha256, written once, never changed.

One store per repository, so that nobody reaches another repository's private bytes by knowing their hash, and
removing a repository removes them.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from hubkit.documents.files import sync_folder, write_through
from hubkit.errors import HubkitError
from hubkit.registry.directory import rules

CHUNK = 1 << 20
SAMPLE = 512  # as many first bytes as clients of a Hub send it: the same file is judged alike on every way in
HEX64 = re.compile(r"[0-9a-f]{64}")
_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
# opening a pipe must not wait for a writer; Windows has neither flag
_PLAIN: int = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class Entry:
    """What a commit knows of one file.

    Args:
        size: bytes.
        sha256: 64 hex digits, of the content; names the object.
        oid: git's sha1 of the blob, or of the pointer text for a large object, as a Hub lists it.
        large: whether a Hub would keep it as a large (LFS) object.
    """

    size: int
    sha256: str
    oid: str
    large: bool


def pointer_text(sha256: str, size: int) -> bytes:
    """Git LFS's pointer file of an object (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob(data: bytes) -> str:
    """Git's 40-hex name of a blob with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def large_entry(sha256: str, size: int) -> Entry:
    """The entry of a large object."""
    return Entry(size, sha256, git_blob(pointer_text(sha256, size)), True)


class Incoming:
    """One object on its way in: written to scratch, hashed meanwhile, renamed into place by `finish`.

    Args:
        folder: the store's folder of objects.
        work: a scratch folder on the same file system; what is not finished goes with it.
        limit: bytes that may be written.
    """

    def __init__(self, folder: Path, work: Path, limit: int) -> None:
        self._folder = folder
        self._path = work / secrets.token_hex(8)
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._out: IO[bytes] = os.fdopen(handle, "wb", buffering=0)
        self._hash = hashlib.sha256()
        self._limit = limit
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; HK-LIMIT beyond the limit."""
        self.size += len(data)
        if self.size > self._limit:
            self.close()
            raise HubkitError("HK-LIMIT", "file is larger than allowed", want=f"at most {self._limit} bytes")
        view = memoryview(data)
        while view:
            view = view[self._out.write(view) :]
        self._hash.update(data)

    def finish(self, want: str | None = None) -> str:
        """Make it durable and give it its name; its sha256.

        Raises:
            HubkitError: HK-FILES when the bytes are not those that `want` names; nothing is kept then.
        """
        found = self._hash.hexdigest()
        if want is not None and found != want:
            self.close()
            raise HubkitError("HK-FILES", "content differs from its digest", want=f"sha256:{want}", have=found)
        os.fsync(self._out.fileno())
        self.close()
        os.chmod(self._path, 0o444)
        target = object_path(self._folder, found)
        if not offered_again(target):
            if not target.parent.exists():
                # not `parents=True`: when the repository was removed meanwhile it must not come back
                target.parent.mkdir(exist_ok=True)
                sync_folder(self._folder)
            os.replace(self._path, target)
        sync_folder(target.parent)  # also when another process put it there: it may not have got so far
        return found

    def close(self) -> None:
        """Let go of the file; what was written stays scratch."""
        self._out.close()


def offered_again(path: Path) -> bool:
    """Whether an object is there; then it is as young as one that came just now, and not collected meanwhile."""
    with suppress(PermissionError):  # another user's: only its owner may say so
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
    return True


def publish(path: Path, data: bytes, work: Path) -> None:
    """Write `data` to `path`, in an existing folder, so that it is there whole or not at all, even across a power cut.

    Args:
        work: a scratch folder on the same file system.
    """
    write_through(work / secrets.token_hex(8), path, data)


def object_path(folder: Path, sha256: str) -> Path:
    """Where an object lies; HK-FILES when `sha256` is not 64 hex digits."""
    if not HEX64.fullmatch(sha256):
        raise HubkitError("HK-FILES", "not a sha256 digest", have=sha256[:80])
    return folder / sha256[:2] / sha256


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading; HK-SYMLINK for a symlink, device, pipe or folder."""
    try:
        if not _NO_FOLLOW and path.is_symlink():
            raise not_plain(path)
        handle = os.open(path, _PLAIN)
    except FileNotFoundError:
        raise HubkitError("HK-NOT-FOUND", "no such file", where=str(path)) from None
    except OSError as error:
        if path.is_symlink():
            raise not_plain(path) from None
        raise HubkitError("HK-IO", "file cannot be read", where=str(path), have=error.strerror or "") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_plain(path)
    return os.fdopen(handle, "rb")


def not_plain(path: Path) -> HubkitError:
    """The refusal of whatever is not a plain file."""
    return HubkitError(
        "HK-SYMLINK",
        "only plain files can be stored, no links, pipes or folders",
        where=str(path),
        fix="replace it with a copy of the file it means",
    )


def ingest(
    folder: Path, work: Path, path: str, content: Path | bytes, attributes: Sequence[rules.Rule] = rules.DEFAULT
) -> Entry:
    """Store one file's bytes and say what a commit records of it.

    Raises:
        HubkitError: HK-SYMLINK, HK-NOT-FOUND, HK-FILES when the file changed while it was read.
    """
    if isinstance(content, bytes):
        sha256, blob = hashlib.sha256(content).hexdigest(), git_blob(content)
        target = object_path(folder, sha256)
        if offered_again(target):
            sync_folder(target.parent)
        else:
            incoming = Incoming(folder, work, len(content))
            incoming.write(content)
            incoming.finish()
        return _entry(sha256, path, content, blob, len(content), attributes)
    with open_regular(content) as source:
        return _copied(folder, work, path, source, attributes)


def _copied(folder: Path, work: Path, path: str, source: BinaryIO, attributes: Sequence[rules.Rule]) -> Entry:
    size = os.fstat(source.fileno()).st_size
    named = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    incoming = Incoming(folder, work, 1 << 62)
    head = b""
    try:
        while data := source.read(CHUNK):
            head = head or data
            named.update(data)
            incoming.write(data)
        if incoming.size != size:
            raise HubkitError("HK-FILES", "file changed while it was read", where=path, fix="try again")
        return _entry(incoming.finish(), path, head, named.hexdigest(), size, attributes)
    finally:
        incoming.close()


def _entry(sha256: str, path: str, head: bytes, blob: str, size: int, attributes: Sequence[rules.Rule]) -> Entry:
    if rules.is_large(path, size, head[:SAMPLE], attributes):
        return large_entry(sha256, size)
    return Entry(size, sha256, blob, False)


def copy(source: BinaryIO, out: IO[bytes], progress: Callable[[int], None] | None = None) -> str:
    """Copy a stream; the sha256 (64 hex digits) of what went through."""
    digest = hashlib.sha256()
    while data := source.read(CHUNK):
        digest.update(data)
        out.write(data)
        if progress is not None:
            progress(len(data))
    return digest.hexdigest()
