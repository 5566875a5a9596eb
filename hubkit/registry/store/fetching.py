"""Downloading the chosen files of a commit into a private folder, several at once, each checked when it has arrived."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.identity.header import read_header
from hubkit.documents.files import sync_file
from hubkit.documents.manifest import FileEntry
from hubkit.documents.names import check_allowed
from hubkit.documents.schema import parse, sha256
from hubkit.documents.threads import at_once
from hubkit.errors import HubkitError
from hubkit.registry.api import Progress, Readable, RemoteFile
from hubkit.registry.directory.objects import open_regular
from hubkit.registry.store.partials import Partials
from hubkit.registry.store.selection import INDEX, PEFT_CONFIG, Selection, differing

WORKERS = 4
RESUMED = 1 << 20
"""Files from so many bytes on are gone on with by the next pull, when their sha256 is known."""
_HEAD = 512


@dataclass(frozen=True)
class Limits:
    """What one pull may bring; checked by the listing before it begins and by the bytes while they come.

    Args:
        max_files: number of files.
        max_bytes: of all files together.
        max_file_bytes: of one file.
    """

    max_files: int
    max_bytes: int
    max_file_bytes: int

    def check(self, files: Mapping[str, RemoteFile], where: str) -> None:
        """Refuse a selection beyond the limits.

        Raises:
            HubkitError: ``HK-LIMIT``, every excess.
        """
        total = sum(file.size for file in files.values())
        excess = [f"{len(files)} files; at most {self.max_files}"] if len(files) > self.max_files else []
        excess += [f"{total} bytes; at most {self.max_bytes}"] if total > self.max_bytes else []
        excess += [
            f"{path}: {file.size} bytes; at most {self.max_file_bytes}"
            for path, file in files.items()
            if file.size > self.max_file_bytes
        ]
        if excess:
            raise HubkitError("HK-LIMIT", "more than one pull may bring", where=where, have=excess)


class _Meter:
    """Counts what arrives, refuses more than was announced, and stops all downloads when one of them fails."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._lock = threading.Lock()
        self.total = total
        self._done = 0
        self._progress = progress
        self.stop = threading.Event()

    def counter(self, file: RemoteFile, where: str) -> Callable[[int], None]:
        """The callback of one file's download."""
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            if self.stop.is_set():
                raise HubkitError("HK-INTERRUPTED", "the download was stopped", where=where)
            arrived += size
            if arrived > file.size:
                raise HubkitError(
                    "HK-LIMIT", "the registry sends more than it announced", where=f"{where}  {file.path}"
                )
            with self._lock:
                self._done += size
                if self._progress is not None:
                    self._progress(self._done, self.total)

        return count


@dataclass(frozen=True)
class Fetched:
    """What came of a download.

    Args:
        files: with the digests of the bytes that lie in the folder, sorted by path.
        arrived: bytes that came over the network; what was there before is not among them.
    """

    files: tuple[FileEntry, ...]
    arrived: int


def fetch(
    registry: Readable,
    repo: str,
    commit: str,
    selected: Selection,
    folder: Path,
    where: str,
    progress: Progress | None = None,
    kept: Mapping[str, FileEntry] | None = None,
    partials: Partials | None = None,
) -> Fetched:
    """Download a selection into `folder` and check it: sizes, digests, kinds, formats, the manifest's list.

    Args:
        kept: files that lie in `folder` already, checked; see `take_over`.
        partials: where large files grow, so that the next pull goes on with them.

    Raises:
        HubkitError: HK-FILES, HK-LIMIT, HK-PICKLE, HK-FORBIDDEN-FILE, HK-SAFETENSORS, HK-JSON and what the registry
            raises; the other downloads are stopped then.
    """
    kept, had = kept or {}, [0]
    meter = _Meter(sum(file.size for file in selected.files.values()), progress)

    def one(path: str) -> FileEntry:
        file, target = selected.files[path], folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        counter = meter.counter(file, where)
        if path in kept:
            counter(file.size)
            return kept[path]
        if path in selected.content:
            target.write_bytes(selected.content[path])
            sync_file(target)
            counter(len(selected.content[path]))
            return _check(path, target, file, where, sha256(selected.content[path]))
        digest = file.sha256 if file.size >= RESUMED else None
        with partials.growing(digest) if partials and digest else nullcontext(None) as part:
            had.append(part.stat().st_size if part is not None and part.exists() else 0)
            found = registry.download(repo, commit, file.path, part or target, counter, resume=part is not None)
            if part is not None:
                os.rename(part, target)
        return _check(path, target, file, where, found)

    files = at_once(one, [*selected.files], WORKERS, meter.stop)
    _compare(selected, files, where)
    there = sum(had) + sum(entry.size for entry in kept.values())
    return Fetched(tuple(sorted(files, key=lambda entry: entry.path)), meter.total - there)


def take_over(source: Path, have: Mapping[str, FileEntry], selected: Selection, folder: Path) -> dict[str, FileEntry]:
    """Those files of an artifact in the store, of which others are damaged, that need not be downloaded again.

    Args:
        source: the artifact.
        have: its files whose bytes are as they should be.
        folder: where a link to each is made.
    """
    taken = {}
    for path, entry in have.items():
        file = selected.files.get(path)
        if file is not None and file.size == entry.size and file.sha256 in (None, entry.sha256):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a file system without links: it is downloaded
                os.link(source / path, folder / path)
                taken[path] = entry
    return taken


def _check(path: str, target: Path, file: RemoteFile, where: str, found: str) -> FileEntry:
    """Look at what has arrived: its bytes, not what was said of it. `found` is the digest of what was written."""
    with open_regular(target) as content:
        head, size = content.read(_HEAD), os.fstat(content.fileno()).st_size
    if size != file.size or (file.sha256 is not None and found != file.sha256):
        raise HubkitError(
            "HK-FILES",
            "a file is not what the registry's list says",
            where=f"{where}  {path}",
            want=f"{file.size} bytes, {file.sha256 or 'any digest'}",
            have=f"{size} bytes, {found}",
            fix="pull again",
        )
    check_allowed(path, head, where)
    if path.endswith(".safetensors"):
        read_header(target)
    elif path in (PEFT_CONFIG, INDEX):
        parse(target.read_bytes(), f"{where}  {path}")
    os.chmod(target, 0o444)
    return FileEntry(path, size, found)


def _compare(selected: Selection, files: list[FileEntry], where: str) -> None:
    if selected.manifest is None:
        return
    wanted = {entry.path: entry.sha256 for entry in selected.manifest.files}
    differences = [
        f"{file.path}: {file.sha256}, the manifest says {wanted[file.path]}"
        for file in sorted(files, key=lambda entry: entry.path)
        if file.path in wanted and file.sha256 != wanted[file.path]
    ]
    if differences:
        raise differing(differences, where)
