"""What is in the store: found by its digest or by what it was pulled as, looked at, and read again when it changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.drafts import locked
from hubkit.documents.files import refusing
from hubkit.documents.manifest import FileEntry
from hubkit.errors import HubkitError
from hubkit.registry.store.index import Index, Pulled, Source
from hubkit.registry.store.needs import Needs
from hubkit.registry.store.placing import occupied
from hubkit.registry.store.seals import Seals
from hubkit.registry.store.uses import Uses

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stored:
    """A pulled artifact.

    Args:
        path: its read-only folder.
        digest: ``sha256:...`` of its content.
        commit: 40 hex digits.
        revision: the branch or tag that led to the commit; None for a commit or the default branch.
        files: its files with sizes and digests, sorted by path; ``README.md`` is not among them.
        fetched: bytes this pull downloaded, 0 when it was stored already.
    """

    path: Path
    digest: str
    commit: str
    revision: str | None
    files: tuple[FileEntry, ...]
    fetched: int = 0


@dataclass(frozen=True)
class StoredEntry:
    """One line of `Store.list`: a source's commit and the artifact it holds.

    Args:
        reference: as one would write it to pull this commit again.
        kind: ``adapter`` or ``base``.
        names: branches, tags and ranges that meant this commit when they were last asked for.
        size: bytes of all files.
    """

    reference: str
    kind: str
    registry: str
    repo: str
    folder: str | None
    commit: str
    digest: str
    size: int
    names: tuple[str, ...]
    path: Path


@dataclass(frozen=True)
class Artifact:
    """Everything about one artifact that says whether it should stay.

    Args:
        digest: of its content.
        references: by which it was pulled, with their commits, sorted; none where the index knows nothing of it.
        kind: ``adapter`` or ``base``; "" where the index knows nothing of it.
        size: bytes of its files.
        pulled: when it came, seconds since 1970.
        used: when it was last named by a command, to the day.
        path: its folder.
        needed: the locks and deployments that name it.
    """

    digest: str
    references: tuple[str, ...]
    kind: str
    size: int
    pulled: float
    used: float
    path: Path
    needed: tuple[Path, ...]


@dataclass(frozen=True)
class Examined:
    """What `Store.verify` found of one artifact.

    Args:
        reference: one by which it was pulled.
        digest: of its content.
        size: bytes of all its files.
        damaged: files that are missing, or hold other bytes and were put into quarantine.
    """

    reference: str
    digest: str
    size: int
    damaged: tuple[str, ...]


class Kept:
    """The artifacts below a home folder, for reading.

    Args:
        home: None is ``HUBKIT_HOME``, else ``~/.cache/hubkit``.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home or os.environ.get("HUBKIT_HOME") or Path("~/.cache/hubkit").expanduser()).absolute()
        self._index = Index(self.home / "index")
        self._seals = Seals(self.home)
        self._uses = Uses(self.home)
        self.needs = Needs(self.home)

    def list(self) -> tuple[StoredEntry, ...]:
        """Everything in the store, sorted by reference."""
        found = []
        for pulled in self._index.pulled():
            if not all((self.path(pulled.digest) / file.path).is_file() for file in pulled.files):
                continue
            source = pulled.source
            names = sorted(n for n, c in self._index.names(source).items() if c == pulled.commit and n)
            size = sum(file.size for file in pulled.files)
            reference = source.reference(pulled.commit)
            place = (source.registry, source.repo, source.folder or None, pulled.commit, pulled.digest, size)
            found.append(StoredEntry(reference, source.kind, *place, tuple(names), self.path(pulled.digest)))
        return tuple(sorted(found, key=lambda entry: (entry.reference, entry.kind)))

    def artifacts(self, keep: Iterable[Path] = ()) -> tuple[Artifact, ...]:
        """Every artifact once, whether the index knows of it or not, sorted by reference.

        Args:
            keep: further locks whose artifacts are needed.

        Raises:
            HubkitError: what `Needs.read` raises.
        """
        needs, facts, found = self.needs.read(keep), dict[str, list[Pulled]](), []
        for pulled in self._index.pulled():
            facts.setdefault(pulled.digest, []).append(pulled)
        folder = self.path("")
        names = [path.name for path in folder.iterdir() if _HEX.fullmatch(path.name)] if folder.is_dir() else []
        for digest in (f"sha256:{name}" for name in names):
            known, path = facts.get(digest, []), self.path(digest)
            files = [file.sha256 for file in known[0].files] if known else []
            size = sum(file.size for file in known[0].files) if known else occupied(path)
            references = tuple(sorted({one.source.reference(one.commit) for one in known}))
            needed = tuple(need.document for need in needs if need.holds(digest, files))
            times = path.stat().st_mtime, self.last_used(digest)
            kind = known[0].source.kind if known else ""
            found.append(Artifact(digest, references, kind, size, *times, path, needed))
        return tuple(sorted(found, key=lambda one: (one.references or ("~",), one.digest)))

    def last_used(self, digest: str) -> float:
        """When an artifact was last used, or else came: seconds since 1970, to the day; 0 where it is not there."""
        path = self.path(digest)
        return (self._uses.last(digest) or path.stat().st_mtime) if path.is_dir() else 0.0

    def path(self, digest: str) -> Path:
        """Where the artifact of this digest lies, or would lie."""
        return self.home / "store" / "sha256" / digest.removeprefix("sha256:")

    def use(self, digest: str) -> Path:
        """Where the artifact of this digest lies, which is about to be read: it is noted, once a day, that it was used.

        That waits for an artifact that is just leaving the store, so look after it, not before, whether it is there.
        """
        path = self.path(digest)
        if self._uses.is_due(digest) and path.is_dir():
            # a store that may only be read, or a file system without locks, takes no notes
            with suppress(OSError, NotImplementedError, HubkitError), self._writing():
                self._uses.note(digest)
        return path

    def at(self, kind: str, registry: str, repo: str, folder: str | None, commit: str) -> Stored | None:
        """What is stored of a commit, by what was remembered of it; nobody is asked.

        Args:
            kind: ``adapter`` or ``base``.
            registry: the registry's name.
            commit: 40 hex digits.
        """
        pulled = self._index.get(Source(kind, registry, repo, folder or ""), commit)
        return self._stored(pulled, None) if pulled is not None and self._is_here(pulled) else None

    def digests(
        self, repo: str, folder: str | None, revision: str | None, registry: str | None = None
    ) -> dict[str, set[str]]:
        """Registry -> digests of what is stored of a repository.

        Args:
            revision: what it meant when it was last asked for; None: every commit.
            registry: this one alone.
        """
        found: dict[str, set[str]] = {}
        for pulled in self._index.pulled():
            source = pulled.source
            if (source.repo, source.folder) != (repo, folder or "") or registry not in (None, source.registry):
                continue
            meant = pulled if revision is None else self._index.find(source, revision)
            if meant is not None and meant.digest == pulled.digest and self.path(pulled.digest).is_dir():
                found.setdefault(source.registry, set()).add(pulled.digest)
        return found

    def references(self, digest: str) -> tuple[str, ...]:
        """Every reference, with its commit, under which an artifact was ever pulled from a registry; sorted."""
        found = (one for one in self._index.pulled() if one.digest == digest and "://" in one.source.registry)
        return tuple(sorted(one.source.reference(one.commit) for one in found))

    def base_of(self, weights: Mapping[str, str]) -> tuple[str, str] | None:
        """(repository, commit) of a stored base that consists of these weight files, name -> digest; None for none."""
        found = [
            (pulled.source.repo, pulled.commit)
            for pulled in self._index.pulled()
            if pulled.source.kind == "base" and not pulled.source.folder
            if weights == {f.path: f.sha256 for f in pulled.files if f.path.endswith(".safetensors")}
        ]
        return min(found, default=None) if weights else None

    def verify(self, digest: str | None = None) -> tuple[Examined, ...]:
        """Read every byte again, of everything or of one artifact, and put what is damaged into quarantine.

        Returns:
            one for each artifact, sorted by reference; the next pull of a damaged one fetches what is missing.
        """
        seen: dict[str, list[Pulled]] = {}
        for pulled in self._index.pulled():
            if digest in (None, pulled.digest) and self.path(pulled.digest).is_dir():
                seen.setdefault(pulled.digest, []).append(pulled)
        found = []
        for one, pulled_as in seen.items():
            references = sorted(pulled.source.reference(pulled.commit) for pulled in pulled_as)
            size = sum(file.size for file in pulled_as[0].files)
            found.append(Examined(references[0], one, size, self._put_away(pulled_as[0], again=True)))
        return tuple(sorted(found, key=lambda examined: examined.reference))

    def _put_away(self, pulled: Pulled, again: bool = False) -> tuple[str, ...]:
        """The files of an artifact that are missing or damaged; the damaged ones are in quarantine then."""
        folder = self.path(pulled.digest)
        bad = self._seals.damaged(pulled.digest, folder, pulled.files, again=again)
        if bad:
            with refusing(folder), self._writing():
                self._seals.put_away(pulled.digest, folder, bad)
        return bad

    @contextmanager
    def _writing(self) -> Iterator[None]:
        (self.home / "store" / "sha256").mkdir(parents=True, exist_ok=True)
        with locked(self.home / "store" / ".lock"):
            yield

    def _stored(self, pulled: Pulled, name: str | None, fetched: int = 0) -> Stored:
        return Stored(self.use(pulled.digest), pulled.digest, pulled.commit, name, pulled.files, fetched)

    def _is_here(self, pulled: Pulled) -> bool:
        """`_is_whole` of what is about to be used; not for whoever writes in the store."""
        self.use(pulled.digest)
        return self._is_whole(pulled)

    def _is_whole(self, pulled: Pulled) -> bool:
        """Whether every file is there with its bytes; those that look as they did are not read for it."""
        return not self._seals.damaged(pulled.digest, self.path(pulled.digest), pulled.files)
