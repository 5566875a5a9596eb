"""Downloading the chosen files of a commit into a private folder, several at once, each checked when it has arrived."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.identity.header import read_header
from hubkit.documents.files import sync_file
from hubkit.documents.manifest import FileEntry
from hubkit.documents.names import check_allowed
from hubkit.documents.schema import parse
from hubkit.errors import HubkitError
from hubkit.registry.api import Progress, Registry, RemoteFile
from hubkit.registry.directory.objects import open_regular
from hubkit.registry.store.selection import INDEX, PEFT_CONFIG, Selection, differing

WORKERS = 4
_CHUNK = 1 << 20
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
        self._total = total
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
                    self._progress(self._done, self._total)

        return count


def fetch(
    registry: Registry,
    repo: str,
    commit: str,
    selected: Selection,
    folder: Path,
    where: str,
    progress: Progress | None = None,
) -> tuple[FileEntry, ...]:
    """Download a selection into `folder` and check it: sizes, digests, kinds, formats, the manifest's list.

    Returns:
        The files with the digests of the bytes that lie in `folder`, sorted by path.

    Raises:
        HubkitError: HK-FILES, HK-LIMIT, HK-PICKLE, HK-FORBIDDEN-FILE, HK-SAFETENSORS, HK-JSON and what the registry
            raises; the other downloads are stopped then.
    """
    meter = _Meter(sum(file.size for file in selected.files.values()), progress)

    def one(path: str) -> FileEntry:
        file, target = selected.files[path], folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        counter = meter.counter(file, where)
        if path in selected.content:
            target.write_bytes(selected.content[path])
            counter(len(selected.content[path]))
        else:
            registry.download(repo, commit, file.path, target, counter)
        return _check(path, target, file, where)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            tasks = [pool.submit(one, path) for path in selected.files]
            wait(tasks, return_when=FIRST_EXCEPTION)
            faults = [task.exception() for task in tasks if task.done() and not task.cancelled()]
            if any(faults):
                raise next(fault for fault in faults if fault is not None)
            files = [task.result() for task in tasks]
        except BaseException:  # Ctrl-C, too: leaving the block waits for the threads
            meter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _compare(selected, files, where)
    return tuple(sorted(files, key=lambda entry: entry.path))


def _check(path: str, target: Path, file: RemoteFile, where: str) -> FileEntry:
    """Look at what has arrived: its bytes, not what was said of it."""
    digest, size, head = hashlib.sha256(), 0, b""
    with open_regular(target) as content:
        while piece := content.read(_CHUNK):
            head = head or piece[:_HEAD]
            size += len(piece)
            digest.update(piece)
        found = f"sha256:{digest.hexdigest()}"
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
    sync_file(target)
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
