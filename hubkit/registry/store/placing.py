"""How an artifact gets its name in the store, its place there, and how it leaves."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hubkit.documents.files import sync_folder
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.schema import sha256
from hubkit.registry.store.selection import CARD


def digest_files(files: Iterable[FileEntry]) -> str:
    """The digest of an artifact without a manifest: sha256 of its lines ``path size sha256``, sorted, no card."""
    lines = sorted(f"{file.path} {file.size} {file.sha256}\n" for file in files if file.path != CARD)
    return sha256("".join(lines).encode())


def base_digest(files: Iterable[FileEntry]) -> str:
    """The name in the store of a base of these files."""
    listed = tuple(files)
    return {file.path: file.sha256 for file in listed}.get(MANIFEST_NAME) or digest_files(listed)


def publish(made: Path, target: Path) -> None:
    """Rename into the store, then take the right to write."""
    folders = [Path(place) for place, _, _ in os.walk(made, topdown=False)]
    for folder in folders:
        sync_folder(folder)
    os.rename(made, target)
    sync_folder(target.parent)
    for folder in folders:
        # after the rename: a read-only folder can be neither moved nor, when its owner dies, swept
        os.chmod(target / folder.relative_to(made), 0o555)


def discard(path: Path, work: Path) -> None:
    """Move a folder of the store to scratch, which is removed."""
    for place, _, _ in os.walk(path):
        os.chmod(place, 0o755)
    with suppress(FileNotFoundError):
        os.rename(path, work / "discarded")


def occupied(path: Path) -> int:
    """The bytes that come free when a file, or all in a folder, is removed: what has another name elsewhere stays."""
    found = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names] or [str(path)]
    total = 0
    for name in found:
        with suppress(OSError):
            info = os.lstat(name)
            total += info.st_size if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 else 0
    return total
