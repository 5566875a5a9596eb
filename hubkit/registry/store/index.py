"""What the store remembers of pulls: which commit a name meant, and which content a commit holds. Used when offline.

One small file for each fact, replaced whole: processes that pull at once never lose each other's facts, and a damaged
file is a forgotten fact, no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubkit.documents.drafts import locked
from hubkit.documents.files import refusing, write
from hubkit.documents.manifest import FileEntry
from hubkit.registry.versions import is_range, parse_version, pick_version


@dataclass(frozen=True)
class Source:
    """Where an artifact comes from.

    Args:
        kind: ``adapter`` or ``base``: how its files were chosen.
        registry: the registry's name.
        repo: ``org/name``.
        folder: inside the repository, "" for its top.
    """

    kind: str
    registry: str
    repo: str
    folder: str = ""

    def reference(self, revision: str | None) -> str:
        """The reference that names a revision of it, whatever the default registry is."""
        hub = self.registry == "https://huggingface.co"
        start = f"hf://{self.repo}" if hub else f"{self.registry}/{self.repo}"
        return start + (f"@{revision}" if revision else "") + (f":{self.folder}" if self.folder else "")


@dataclass(frozen=True)
class Pulled:
    """One commit of a source that was pulled: its content's digest and its files.

    Args:
        claimed: no registry said so, but a lock or a bundle; believed offline alone, where nobody can be asked.
    """

    source: Source
    commit: str
    digest: str
    files: tuple[FileEntry, ...]
    claimed: bool = False


class Index:
    """The facts below a folder."""

    def __init__(self, folder: Path) -> None:
        self._pulled = folder / "pulled"
        self._names = folder / "names"

    def add(self, pulled: Pulled) -> None:
        """Remember what a commit holds."""
        files = [[file.path, file.size, file.sha256] for file in pulled.files]
        document = {**asdict(pulled.source), "commit": pulled.commit, "digest": pulled.digest, "files": files}
        document |= {"claimed": True} if pulled.claimed else {}
        _put(self._pulled, (*asdict(pulled.source).values(), pulled.commit), document)

    def get(self, source: Source, commit: str, *, claimed: bool = False) -> Pulled | None:
        """What a commit holds, or None.

        Args:
            claimed: also where no registry said so.
        """
        document = _load(self._pulled / _file_name((*asdict(source).values(), commit)))
        found = _read(document)
        same = found is not None and found.source == source and found.commit == commit
        return found if same and found is not None and (claimed or not found.claimed) else None

    def name(self, source: Source, revision: str | None, commit: str, *, claimed: bool = False) -> None:
        """Remember what a revision (None: the default branch) means.

        Args:
            claimed: no registry said so, see `Pulled`.
        """
        key = (source.registry, source.repo, revision or "")
        fields = ("registry", "repo", "revision", "commit")
        document: dict[str, Any] = dict(zip(fields, (*key, commit), strict=True))
        _put(self._names, key, document | ({"claimed": True} if claimed else {}))

    def meaning(self, source: Source, revision: str | None, *, claimed: bool = False) -> str | None:
        """The commit that a revision meant when it was last asked for; None where it never was.

        Args:
            claimed: also where no registry said so.
        """
        document = _load(self._names / _file_name((source.registry, source.repo, revision or "")))
        return str(document["commit"]) if "commit" in document and (claimed or not document.get("claimed")) else None

    def names(self, source: Source) -> dict[str, str]:
        """The revisions of a source's repository that were asked for ("": the default branch), and their commits."""
        found = {}
        for document in _all(self._names):
            if (document.get("registry"), document.get("repo")) == (source.registry, source.repo):
                found[str(document.get("revision"))] = str(document.get("commit"))
        return found

    def known(self) -> set[tuple[str, str]]:
        """(repository, revision) of every name that was asked for and every commit that was pulled."""
        found = {(str(one.get("repo")), str(one.get("revision"))) for one in _all(self._names)}
        found |= {(str(one.get("repo")), str(one.get("commit"))) for one in _all(self._pulled)}
        return {(repo, revision) for repo, revision in found if revision and not is_range(revision)}

    def find(self, source: Source, revision: str | None) -> Pulled | None:
        """What a revision meant when it was last asked for; a range also finds the best version ever pulled."""
        commit = self.meaning(source, revision, claimed=True)
        if commit is None and revision is not None:
            names = self.names(source)
            if is_range(revision) or parse_version(revision):
                tag = pick_version(revision, names)
                commit = names[tag] if tag else None
            else:
                commits = {p.commit for p in self.pulled() if p.source == source and p.commit.startswith(revision)}
                commit = commits.pop() if len(commits) == 1 and len(revision) >= 5 else None
        return self.get(source, str(commit), claimed=True) if commit else None

    def pulled(self) -> Iterator[Pulled]:
        """Everything that was pulled."""
        for document in _all(self._pulled):
            found = _read(document)
            if found is not None:
                yield found


def _file_name(key: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(key).encode()).hexdigest() + ".json"


def _put(folder: Path, key: tuple[str, ...], document: dict[str, Any]) -> None:
    path = folder / _file_name(key)
    if _load(path) == document:
        return
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            write(path, json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False).encode())


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _all(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield _load(path)


def _read(document: dict[str, Any]) -> Pulled | None:
    try:
        source = Source(*(str(document[name]) for name in ("kind", "registry", "repo", "folder")))
        files = tuple(FileEntry(str(path), int(size), str(digest)) for path, size, digest in document["files"])
        claimed = bool(document.get("claimed"))
        return Pulled(source, str(document["commit"]), str(document["digest"]), files, claimed)
    except (KeyError, TypeError, ValueError):
        return None
