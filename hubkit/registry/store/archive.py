"""A bundle: one uncompressed tar archive of artifacts, written to the same bytes everywhere, read with suspicion.

The first member is ``bundle.json``; it lists every other one, in order. A reader knows each header before it comes, to
the byte: name, size, kind, mode and times can be no others. So links, paths that lead out, members that occur twice or
that nobody listed, and archives inside are refused as what they are, another header, before anything is written. All
bytes are hashed before the first artifact goes to the store, where each is checked once more, as a pull is.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hubkit.documents.bundle import BUNDLE_NAME, Bundle, BundledArtifact, bad_bundle
from hubkit.documents.drafts import claim
from hubkit.documents.files import refusing, sync_file, sync_folder
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.manifest import FileEntry
from hubkit.documents.schema import MAX_BYTES
from hubkit.errors import HubkitError
from hubkit.registry.api import Arrived, RemoteFile
from hubkit.registry.store.fetching import Limits

LIMITS = Limits(max_files=100_000, max_bytes=8 << 40, max_file_bytes=256 << 30)
_BLOCK = 512
_CHUNK = 1 << 20
_USTAR_BYTES = 8 << 30
_END = bytes(2 * _BLOCK)
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder",
          b"6": "a pipe", b"S": "a sparse file", b"L": "a long name", b"K": "a long name", b"x": "extended headers",
          b"g": "extended headers"}  # fmt: skip


def write_archive(path: Path, bundle: Bundle, lock: bytes, sources: Mapping[str, Path], *, replace: bool) -> None:
    """Write a bundle; it appears whole or not at all.

    Args:
        path: the file.
        bundle: what is in it.
        lock: the bytes of ``hubkit.lock``.
        sources: folder in the archive -> folder here that holds those files.
        replace: overwrite a file that is there.

    Raises:
        HubkitError: ``HK-EXISTS``; ``HK-NAME`` for a name that no tar header holds; ``HK-FILES`` for a file that is not
            what the bundle lists; ``HK-DISK``, ``HK-IO``.
    """
    if os.path.lexists(path) and not replace:
        raise HubkitError("HK-EXISTS", f"{path.name!r} exists already", where=str(path), fix="another -o, or --replace")
    contents = bundle.to_bytes()
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = claim(path.parent, f".{path.name}.", ".tmp")
        try:
            with draft.path.open("xb") as out:
                _put(out, FileEntry(BUNDLE_NAME, len(contents), ""), [contents])
                _put(out, bundle.lock, [lock])
                for one in bundle.artifacts:
                    for file in one.files:
                        entry = FileEntry(f"{one.folder}/{file.path}", file.size, file.sha256)
                        with (sources[one.folder] / file.path).open("rb") as source:
                            _put(out, entry, iter(lambda source=source: source.read(_CHUNK), b""))  # type: ignore[misc]
                out.write(_END)
            sync_file(draft.path)
            os.replace(draft.path, path)
            sync_folder(path.parent)
        finally:
            draft.path.unlink(missing_ok=True)
            draft.end()


def _put(out: BinaryIO, entry: FileEntry, pieces: Iterable[bytes]) -> None:
    """One member; its digest is compared where the entry has one."""
    out.write(_header(entry.path, entry.size))
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        out.write(piece)
        digest.update(piece)
        size += len(piece)
    out.write(bytes(-size % _BLOCK))
    if size != entry.size or entry.sha256 not in ("", f"sha256:{digest.hexdigest()}"):
        raise HubkitError("HK-FILES", "a file changed while it was bundled", where=entry.path, fix="bundle again")


def _header(name: str, size: int) -> bytes:
    """The one header that a file of this name and size has."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    large = size >= _USTAR_BYTES
    try:
        header = info.tobuf(tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise HubkitError("HK-NAME", "a file's name is too long for an archive", where=name, have=str(error)) from None
    if len(header) != _BLOCK:
        raise HubkitError("HK-NAME", "a file's name is too long for an archive", where=name)
    return header


class Archive:
    """A bundle that was read and is whole: every byte of it was compared with ``bundle.json``.

    Args:
        path: the file.
        bundle: its table of contents.
        lock: the lock in it.
    """

    def __init__(self, path: Path, bundle: Bundle, lock: Lock, places: Mapping[str, tuple[int, int]]) -> None:
        self.path, self.bundle, self.lock, self._places = path, bundle, lock, places

    def view(self, one: BundledArtifact) -> View:
        """One artifact as something to fetch from."""
        return View(self, one)

    def pieces(self, member: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes of a member, or a part of them."""
        offset, size = self._places[member]
        left = (size if stop is None else min(stop, size)) - start
        with self.path.open("rb") as file:
            file.seek(offset + start)
            while left > 0 and (piece := file.read(min(_CHUNK, left))):
                yield piece
                left -= len(piece)


class View:
    """One artifact of a bundle, read as a registry is; it claims to be from none."""

    name = "bundle"

    def __init__(self, archive: Archive, one: BundledArtifact) -> None:
        self._archive, self._one = archive, one

    def files(self, repo: str, commit: str) -> tuple[RemoteFile, ...]:
        """See `Readable`."""
        return tuple(RemoteFile(file.path, file.size, file.sha256) for file in self._one.files)

    def read(self, repo: str, commit: str, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Readable`."""
        return b"".join(self._archive.pieces(self._member(path), start, stop))

    def download(
        self,
        repo: str,
        commit: str,
        path: str,
        dest: Path,
        progress: Arrived | None = None,
        *,
        resume: bool = False,
    ) -> str:
        """See `Readable`; it always begins anew."""
        digest = hashlib.sha256()
        if resume:
            dest.unlink(missing_ok=True)
        with dest.open("xb") as out:
            for piece in self._archive.pieces(self._member(path)):
                out.write(piece)
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
            out.flush()
            os.fsync(out.fileno())
        return f"sha256:{digest.hexdigest()}"

    def _member(self, path: str) -> str:
        return f"{self._one.folder}/{path}"


def open_archive(path: Path) -> Archive:
    """Read a bundle, and hash all of it; nothing is written.

    Raises:
        HubkitError: ``HK-MISSING``; ``HK-BUNDLE`` for what is no bundle, and for every difference to its table of
            contents; ``HK-LIMIT``; what reading the lock raises.
    """
    where = str(path)
    with _opened(path) as (file, length):
        bundle, offset = _contents(file, where)
        LIMITS.check({one.path: RemoteFile(one.path, one.size) for one in bundle.members()}, where)
        places = _places(file, bundle, offset, length, where)
        damaged = [entry.path for entry in bundle.members() if _digest(file, *places[entry.path]) != entry.sha256]
        if damaged:
            raise bad_bundle(where, [f"{name}: not what {BUNDLE_NAME} says" for name in damaged])
        start, size = places[LOCK_NAME]
        file.seek(start)
        lock = Lock.from_bytes(file.read(size), f"{where}  {LOCK_NAME}")
    have = {one.digest for one in bundle.artifacts}
    if missing := [f"{one.name}: {one.digest} is not in it" for one in lock.adapters if one.digest not in have]:
        raise bad_bundle(where, missing)
    return Archive(path, bundle, lock, places)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    if not path.is_file():
        what, fix = "there is no bundle", "hubkit bundle -o FILE makes one"
        raise HubkitError("HK-MISSING", what, where=str(path), fix=fix)
    with refusing(path), path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _contents(file: BinaryIO, where: str) -> tuple[Bundle, int]:
    """The table of contents, and where the next member begins."""
    head = file.read(_BLOCK)
    size = _size_of_first(head, where)
    data = file.read(size)
    if len(data) != size or file.read(-size % _BLOCK).strip(b"\0"):
        raise bad_bundle(where, f"{BUNDLE_NAME} is cut off")
    return Bundle.from_bytes(data, where), file.tell()


def _size_of_first(head: bytes, where: str) -> int:
    if (
        head[:2] == b"\x1f\x8b"
        or head[:4] in (b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh9")
        or head[:6] == b"\xfd7zXZ\0"
    ):
        raise bad_bundle(where, "a compressed archive; a bundle is none")
    found = _described(head)
    if found is None:
        raise bad_bundle(where, "no tar archive")
    if found.name != BUNDLE_NAME or head != _header(BUNDLE_NAME, max(found.size, 0)):
        raise bad_bundle(where, f"it begins with {_said(found)}, not with {BUNDLE_NAME}")
    if found.size > MAX_BYTES:
        raise HubkitError("HK-LIMIT", f"{BUNDLE_NAME} is too large", where=where, have=f"{found.size} bytes")
    return found.size


def _places(file: BinaryIO, bundle: Bundle, offset: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    """Where each member's bytes are: name -> (offset, size); every header is the one that was to be expected."""
    found = {}
    for entry in bundle.members():
        file.seek(offset)
        head = file.read(_BLOCK)
        if head != _header(entry.path, entry.size):
            have = _described(head)
            said = "the archive ends" if have is None else f"there is {_said(have)}"
            raise bad_bundle(where, f"where {entry.path} belongs, of {entry.size} bytes, {said}")
        found[entry.path] = (offset + _BLOCK, entry.size)
        offset += _BLOCK + entry.size
        file.seek(offset)
        if file.read(-entry.size % _BLOCK).strip(b"\0"):
            raise bad_bundle(where, f"behind {entry.path}: bytes that belong to nothing")
        offset += -entry.size % _BLOCK
    file.seek(offset)
    if offset > length or file.read(len(_END)) != _END or length != offset + len(_END):
        rest = _described(_first(file, offset))
        said = f"{_said(rest)}, which nobody listed" if rest is not None else f"{length - offset} bytes"
        cut = length < offset + len(_END)
        raise bad_bundle(where, "it is cut off" if cut else f"behind its last file: {said}")
    return found


def _first(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(_BLOCK)


def _described(head: bytes) -> tarfile.TarInfo | None:
    """What a header says, for the message; None where it is no header."""
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError, IndexError):
        return None


def _said(info: tarfile.TarInfo) -> str:
    kind = _KINDS.get(info.type, "a file" if info.type in (b"0", b"\0") else "something else")
    return f"{kind} named {info.name!r}, of {info.size} bytes"


def _digest(file: BinaryIO, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while size > 0 and (piece := file.read(min(_CHUNK, size))):
        digest.update(piece)
        size -= len(piece)
    return f"sha256:{digest.hexdigest()}"
