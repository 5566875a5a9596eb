"""The store: what was pulled, verified, read-only and named by its content; pulling is the only way in.

Layout below ``HUBKIT_HOME`` (default ``~/.cache/hubkit``)::

    store/sha256/<64 hex>/     one artifact each; the folder appears whole, by a rename, and never changes
    index/                     which name meant which commit, which commit holds which artifact (`index`)
    staging/                   downloads under way; those of killed processes are swept by the next pull

The order of a pull: limits, names, download into staging, digests, formats, rename. Nothing is executed or unpickled.
An artifact's digest is that of its ``hubkit.json``; without one, `digest_files`. ``README.md`` belongs to neither
(people edit it on the Hub), so the card kept is that of the first pull; ``.gitattributes`` is not kept at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.drafts import locked, scratch
from hubkit.documents.files import refusing, sync_folder
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.registry.api import Progress, Registry, RemoteFile
from hubkit.registry.store.fetching import Limits, fetch
from hubkit.registry.store.index import Index, Pulled, Source
from hubkit.registry.store.selection import CARD, Selection, select_adapter, select_base
from hubkit.registry.versions import resolve_revision

__all__ = ["ADAPTER_LIMITS", "BASE_LIMITS", "Limits", "Store", "Stored", "StoredEntry", "digest_files"]

ADAPTER_LIMITS = Limits(max_files=1_000, max_bytes=64 << 30, max_file_bytes=32 << 30)
BASE_LIMITS = Limits(max_files=10_000, max_bytes=4 << 40, max_file_bytes=256 << 30)
Select = Callable[[Iterable[RemoteFile], str | None, Callable[[RemoteFile], bytes], str], Selection]


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


class Store:
    """The artifacts below a home folder; safe for several processes and for kill -9.

    Args:
        home: None is ``HUBKIT_HOME``, else ``~/.cache/hubkit``.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home or os.environ.get("HUBKIT_HOME") or Path("~/.cache/hubkit").expanduser()).absolute()
        self._index = Index(self.home / "index")

    def pull(
        self,
        registry: Registry,
        repo: str,
        revision: str | None = None,
        *,
        folder: str | None = None,
        offline: bool = False,
        limits: Limits = ADAPTER_LIMITS,
        progress: Progress | None = None,
    ) -> Stored:
        """Bring an adapter into the store.

        A commit that is stored costs no download; given in full, no request at all.

        Args:
            registry: where it lives; with `offline` only its name counts.
            revision: branch, tag, commit, version or range; None is the default branch.
            folder: inside the repository.
            offline: serve what was pulled before, by what the revision meant then.
            progress: called with (bytes so far, bytes in all).

        Raises:
            HubkitError: HK-OFFLINE, HK-NO-REVISION, HK-LIMIT, HK-NAME, HK-PICKLE, HK-FORBIDDEN-FILE, HK-FILES (every
                difference), HK-SAFETENSORS, HK-JSON, HK-NOT-ADAPTER, HK-DISK and what the registry raises; nothing is
                left behind then.
        """
        source = Source("adapter", registry.name, repo, folder or "")
        return self._pull(registry, source, revision, offline, limits, progress, select_adapter)

    def pull_base(
        self,
        registry: Registry,
        repo: str,
        revision: str | None = None,
        *,
        folder: str | None = None,
        offline: bool = False,
        limits: Limits = BASE_LIMITS,
        progress: Progress | None = None,
    ) -> Stored:
        """Bring a model into the store: configuration, tokenizer and safetensors; otherwise as `pull`."""
        source = Source("base", registry.name, repo, folder or "")
        return self._pull(registry, source, revision, offline, limits, progress, select_base)

    def list(self) -> tuple[StoredEntry, ...]:
        """Everything in the store, sorted by reference."""
        found = []
        for pulled in self._index.pulled():
            if not self._is_whole(pulled):
                continue
            source = pulled.source
            names = sorted(n for n, c in self._index.names(source).items() if c == pulled.commit and n)
            size = sum(file.size for file in pulled.files)
            reference = source.reference(pulled.commit)
            place = (source.registry, source.repo, source.folder or None, pulled.commit, pulled.digest, size)
            found.append(StoredEntry(reference, source.kind, *place, tuple(names), self.path(pulled.digest)))
        return tuple(sorted(found, key=lambda entry: (entry.reference, entry.kind)))

    def path(self, digest: str) -> Path:
        """Where the artifact of this digest lies, or would lie."""
        return self.home / "store" / "sha256" / digest.removeprefix("sha256:")

    def remove(self, digest: str) -> None:
        """Take an artifact out of the store; no error when it is not there."""
        path = self.path(digest)
        with refusing(path), scratch(self.home / "staging") as work, self._writing():
            _discard(path, work)

    def _pull(
        self,
        registry: Registry,
        source: Source,
        revision: str | None,
        offline: bool,
        limits: Limits,
        progress: Progress | None,
        select: Select,
    ) -> Stored:
        if offline:
            return self._offline(source, revision)
        exact = self._index.get(source, revision) if revision is not None else None
        if exact is not None and self._is_whole(exact):
            return self._stored(exact, None)
        try:
            resolved = resolve_revision(registry, source.repo, revision)
            pulled = self._index.get(source, resolved.commit)
            fetched = 0
            if pulled is None or not self._is_whole(pulled):
                pulled, fetched = self._fetch(registry, source, resolved.commit, limits, progress, select)
        except HubkitError as fault:
            before = self._index.find(source, revision) if fault.code == "HK-OFFLINE" else None
            if before is not None:
                fault.fix = f"--offline uses commit {before.commit[:12]}, which was pulled before"
            raise
        for name in {revision, resolved.name}:
            self._index.name(source, name, resolved.commit)
        return self._stored(pulled, resolved.name, fetched)

    def _offline(self, source: Source, revision: str | None) -> Stored:
        pulled = self._index.find(source, revision)
        if pulled is None or not self._is_whole(pulled):
            known = [name or "(default)" for name in sorted(self._index.names(source))]
            raise HubkitError(
                "HK-OFFLINE",
                "it is not in the store, and offline nothing can be downloaded",
                where=source.reference(revision),
                have=", ".join(known) or "nothing of this repository was ever pulled",
                fix="pull it once without --offline",
            )
        return self._stored(pulled, revision if revision != pulled.commit else None)

    def _fetch(
        self,
        registry: Registry,
        source: Source,
        commit: str,
        limits: Limits,
        progress: Progress | None,
        select: Select,
    ) -> tuple[Pulled, int]:
        where = source.reference(commit)
        listing = registry.files(source.repo, commit)
        selected = select(
            listing,
            source.folder or None,
            lambda file: registry.read(source.repo, commit, file.path),
            where,
        )
        limits.check(selected.files, where)
        if selected.manifest is not None:
            pulled = self._known(source, commit, selected)
            if pulled is not None:
                return pulled, 0
        with refusing(self.home), scratch(self.home / "staging") as work:
            made = work / "artifact"
            made.mkdir()
            files = fetch(registry, source.repo, commit, selected, made, where, progress)
            digest = sha256(selected.content[MANIFEST_NAME]) if selected.manifest else digest_files(files)
            pulled = Pulled(source, commit, digest, tuple(file for file in files if file.path != CARD))
            with self._writing():
                if not self._is_whole(pulled):
                    _discard(self.path(digest), work)  # damaged: somebody has been in there
                    _publish(made, self.path(digest))
        self._index.add(pulled)
        return pulled, sum(file.size for file in files)

    def _known(self, source: Source, commit: str, selected: Selection) -> Pulled | None:
        """The same manifest is in the store already, from another commit, tag or registry."""
        data = selected.content[MANIFEST_NAME]
        listed = selected.manifest.files if selected.manifest else ()
        files = (*listed, FileEntry(MANIFEST_NAME, len(data), sha256(data)))
        pulled = Pulled(source, commit, sha256(data), tuple(sorted(files, key=lambda file: file.path)))
        if not self._is_whole(pulled):
            return None
        self._index.add(pulled)
        return pulled

    @contextmanager
    def _writing(self) -> Iterator[None]:
        (self.home / "store" / "sha256").mkdir(parents=True, exist_ok=True)
        with locked(self.home / "store" / ".lock"):
            yield

    def _stored(self, pulled: Pulled, name: str | None, fetched: int = 0) -> Stored:
        return Stored(self.path(pulled.digest), pulled.digest, pulled.commit, name, pulled.files, fetched)

    def _is_whole(self, pulled: Pulled) -> bool:
        """Whether every file is there with its size: a look, not a verification."""
        folder = self.path(pulled.digest)
        try:
            found = [os.lstat(folder / file.path) for file in pulled.files]
        except OSError:
            return False
        return all(
            stat.S_ISREG(info.st_mode) and info.st_size == file.size
            for info, file in zip(found, pulled.files, strict=True)
        )


def digest_files(files: Iterable[FileEntry]) -> str:
    """The digest of an artifact without a manifest: sha256 of its lines ``path size sha256``, sorted, no card."""
    lines = sorted(f"{file.path} {file.size} {file.sha256}\n" for file in files if file.path != CARD)
    return sha256("".join(lines).encode())


def _publish(made: Path, target: Path) -> None:
    """Rename into the store, then take the right to write."""
    folders = [Path(place) for place, _, _ in os.walk(made, topdown=False)]
    for folder in folders:
        sync_folder(folder)
    os.rename(made, target)
    sync_folder(target.parent)
    for folder in folders:
        # after the rename: a read-only folder can be neither moved nor, when its owner dies, swept
        os.chmod(target / folder.relative_to(made), 0o555)


def _discard(path: Path, work: Path) -> None:
    """Move a folder of the store to scratch, which is removed."""
    for place, _, _ in os.walk(path):
        os.chmod(place, 0o755)
    with suppress(FileNotFoundError):
        os.rename(path, work / "discarded")
