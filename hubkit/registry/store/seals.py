"""Whether the store's files still hold the bytes that were checked when they came: by a look, or by reading them.

A seal says what each file of an artifact looked like when its bytes were last compared with their digests: size, time
of its content and of its inode, inode. A file that looks otherwise is read again, and only that one. What holds other
bytes goes to quarantine, so that the next pull finds it missing and fetches it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from hubkit.documents.files import write
from hubkit.documents.manifest import FileEntry
from hubkit.errors import HubkitError

Mark = list[int]


class Seals:
    """The seals below a folder, and the quarantine beside it.

    Args:
        home: of the store.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / "index" / "seals"
        self.quarantined = home / "quarantine"

    def damaged(self, digest: str, folder: Path, files: Iterable[FileEntry], *, again: bool = False) -> tuple[str, ...]:
        """The files of an artifact that are missing or hold other bytes; those of an unchanged look are not read.

        Args:
            digest: the artifact's.
            folder: where it lies.
            files: what belongs into it.
            again: read every file, however it looks.
        """
        known, found, now = self._load(digest), [], {}
        for file in files:
            mark = _mark(folder / file.path)
            same = mark is not None and mark[0] == file.size
            if same and (again or known.get(file.path) != mark):
                same = _holds(folder, file)
            if same and mark is not None:
                now[file.path] = mark
            else:
                found.append(file.path)
        if now != known:
            self._save(digest, now)
        return tuple(found)

    def seal(self, digest: str, folder: Path, files: Iterable[FileEntry]) -> None:
        """Remember how files look whose bytes were checked just now."""
        marks = {file.path: _mark(folder / file.path) for file in files}
        self._save(digest, {path: mark for path, mark in marks.items() if mark is not None})

    def put_away(self, digest: str, folder: Path, paths: Iterable[str]) -> list[Path]:
        """Move files of an artifact to quarantine; where they are now. One that is not there is passed over."""
        moved = []
        for path in paths:
            target = self.quarantined / digest.removeprefix("sha256:")[:12] / f"{path}.{secrets.token_hex(4)}"
            above = (folder / path).parent
            with suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.chmod(above, 0o755)
                try:
                    os.rename(folder / path, target)
                    moved.append(target)
                finally:
                    os.chmod(above, 0o555)
        return moved

    def forget(self, digest: str) -> None:
        """Remove a seal; no error when there is none."""
        with suppress(OSError):
            self._path(digest).unlink()

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.json"

    def _load(self, digest: str) -> dict[str, Mark]:
        try:
            document = json.loads(self._path(digest).read_bytes())
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    def _save(self, digest: str, marks: Mapping[str, Mark]) -> None:
        # a user who may only read the store reads the files again each time
        with suppress(OSError, HubkitError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write(self._path(digest), json.dumps(marks, sort_keys=True).encode())


def _mark(path: Path) -> Mark | None:
    """How a plain file looks; None when there is none."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _holds(folder: Path, file: FileEntry) -> bool:
    try:
        with (folder / file.path).open("rb") as content:
            return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}" == file.sha256
    except OSError:
        return False
