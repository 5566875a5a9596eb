"""What may not leave the store: locks and deployments of this machine, remembered by their paths in one small file.

Each line of it is one absolute path, as a JSON string. The documents are read afresh whenever it matters, as text: what
they need is every digest that stands in them. So a lock that holds merge conflicts, or was written by a later hubkit,
keeps what it names just as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.deployment import DEPLOYMENT_NAME
from hubkit.documents.drafts import locked
from hubkit.documents.files import read, refusing, write
from hubkit.documents.lock import LOCK_NAME
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.schema import MAX_BYTES
from hubkit.errors import HubkitError
from hubkit.registry.store.placing import base_digest

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FOLDER = re.compile(r'"(?:source|reference)": ?("(?:\.{0,2}/[^"\n]*|\.\.?)")')
"""Where a lock or mix names a folder: as a JSON string that begins as paths do."""


@dataclass(frozen=True)
class Need:
    """What one document names.

    Args:
        document: its path.
        digests: all that stand in it, and in the mixes that it names.
    """

    document: Path
    digests: frozenset[str]

    def holds(self, digest: str, files: Iterable[str]) -> bool:
        """Whether an artifact is needed: its own digest is named, or every one of its files is, as a base's are.

        Args:
            files: the digests of its files.
        """
        each = set(files)
        return digest in self.digests or (bool(each) and each <= self.digests)


class Needs:
    """The documents that are remembered below a home folder.

    Args:
        home: of the store.
    """

    def __init__(self, home: Path) -> None:
        self._file = home / "index" / "needed-by"
        self._store = home / "store" / "sha256"

    def register(self, document: Path) -> None:
        """Remember a lock or deployment; a store that may only be read, and so never loses anything, need not know."""
        line = json.dumps(str(document.absolute()))
        with suppress(OSError, NotImplementedError, HubkitError):
            if line in self._lines():
                return
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._file.with_name("needed-by.lock")):
                self._write({*self._lines(), line})

    def forget_gone(self) -> None:
        """Take out the paths at which nothing is any more.

        Raises:
            HubkitError: ``HK-IO``, ``HK-DISK``.
        """
        if all(map(_is_there, self.documents())):
            return
        with refusing(self._file), locked(self._file.with_name("needed-by.lock")):
            self._write(line for line in self._lines() if _is_there(_path(line)))

    def documents(self) -> tuple[Path, ...]:
        """Every path that is remembered, sorted, whether something is there or not.

        Raises:
            HubkitError: ``HK-JSON`` for a line that is no path: what it kept is not known.
        """
        lines = sorted(self._lines())
        paths = [_path(line) for line in lines]
        if bad := [line for line, path in zip(lines, paths, strict=True) if path is None]:
            what, want = "the list of locks that need the store is damaged", "one absolute path in each line, as JSON"
            fix = f"rm {self._file}, then hubkit sync in each project"
            raise HubkitError("HK-JSON", what, where=str(self._file), want=want, have=bad[:20], fix=fix)
        return tuple(sorted(path for path in paths if path is not None))

    def read(self, more: Iterable[Path] = ()) -> tuple[Need, ...]:
        """What each document needs that is there now.

        Args:
            more: further documents, or the folders they are in; these must be there.

        Raises:
            HubkitError: ``HK-MISSING`` for one of `more`; ``HK-IO`` for one that cannot be read.
        """
        given = [path.absolute() / LOCK_NAME if path.is_dir() else path.absolute() for path in more]
        for path in given:
            if not _is_there(path):
                raise HubkitError("HK-MISSING", "there is no lock to keep", where=str(path), fix="--keep hubkit.lock")
        known = [path for path in self.documents() if _is_there(path)]
        return tuple(Need(path, frozenset(self._named(path, set()))) for path in dict.fromkeys([*known, *given]))

    def _named(self, path: Path, seen: set[Path]) -> set[str]:
        """The digests in a document, in the lock beside a deployment, and in mixes, in folders or in the store."""
        if path in seen:
            return set()
        seen.add(path)
        try:
            text = read(path, MAX_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return set()
        found = set(_DIGEST.findall(text))
        found |= _base(text)
        inside = [path.parent / json.loads(folder) / MANIFEST_NAME for folder in _FOLDER.findall(text)]
        inside += [self._store / one.removeprefix("sha256:") / MANIFEST_NAME for one in found]
        for mix in filter(_is_mix, inside):
            found |= self._named(mix, seen)
        return found | self._named(path.with_name(LOCK_NAME), seen) if path.name == DEPLOYMENT_NAME else found

    def _lines(self) -> set[str]:
        try:
            return set(filter(None, self._file.read_text("utf-8", "replace").splitlines()))
        except FileNotFoundError:
            return set()

    def _write(self, lines: Iterable[str]) -> None:
        write(self._file, "".join(f"{line}\n" for line in sorted(lines)).encode())


def _path(line: str) -> Path | None:
    try:
        text = json.loads(line)
    except ValueError:
        return None
    return Path(text) if isinstance(text, str) and text.startswith("/") else None


def _is_there(path: Path | None) -> bool:
    """Whether something is at a path; what cannot be looked at may well be."""
    try:
        return path is None or os.stat(path) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _base(text: str) -> set[str]:
    """The digest by which the store knows the base of a lock; none where it does not parse, or is no lock."""
    try:
        files = json.loads(text)["base"]["files"]
        return {base_digest(FileEntry(str(one["path"]), int(one["size"]), str(one["sha256"])) for one in files)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def _is_mix(manifest: Path) -> bool:
    try:
        return b'"kind":"mix"' in manifest.read_bytes()  # it is canonical JSON
    except OSError:
        return False
