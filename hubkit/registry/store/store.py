"""The store: what was pulled, verified, read-only and named by its content; pulling is the only way in.

Layout below ``HUBKIT_HOME`` (default ``~/.cache/hubkit``)::

    store/sha256/<64 hex>/     one artifact each; the folder appears whole, by a rename, and never changes
    index/                     which name meant which commit, which commit holds which artifact (`index`, `seals`),
                               when each was used (`uses`), which locks need it (`needs`), what searches read
    quarantine/                files that were found to hold other bytes; the next pull fetches them anew
    staging/                   downloads under way; those of killed processes are swept by the next pull
    partial/                   large files that have begun to arrive (`partials`); the next pull goes on with them

The order of a pull: limits, names, download into staging, digests, formats, rename. Nothing is executed or unpickled.
An artifact's digest is that of its ``hubkit.json``; without one, `digest_files`. ``README.md`` belongs to neither
(people edit it on the Hub), so the card kept is that of the first pull; ``.gitattributes`` is not kept at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from warnings import warn

from hubkit.documents.drafts import scratch
from hubkit.documents.files import refusing
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError, Notice
from hubkit.registry.api import Progress, Readable, Registry, RemoteFile
from hubkit.registry.store.alike import alike
from hubkit.registry.store.fetching import Limits, fetch, take_over
from hubkit.registry.store.index import Pulled, Source
from hubkit.registry.store.kept import Examined, Kept, Stored, StoredEntry
from hubkit.registry.store.partials import Partials
from hubkit.registry.store.placing import digest_files, discard, occupied, publish
from hubkit.registry.store.selection import CARD, Selection, select_adapter, select_base
from hubkit.registry.versions import Resolved, resolve_revision

__all__ = ["ADAPTER_LIMITS", "BASE_LIMITS", "Examined", "Limits", "Store", "Stored", "StoredEntry", "digest_files"]

ADAPTER_LIMITS = Limits(max_files=1_000, max_bytes=64 << 30, max_file_bytes=32 << 30)
BASE_LIMITS = Limits(max_files=10_000, max_bytes=4 << 40, max_file_bytes=256 << 30)
Select = Callable[[Iterable[RemoteFile], str | None, Callable[[RemoteFile], bytes], str], Selection]


class Store(Kept):
    """The artifacts below a home folder; safe for several processes and for kill -9.

    Args:
        home: None is ``HUBKIT_HOME``, else ``~/.cache/hubkit``.
    """

    def __init__(self, home: Path | None = None) -> None:
        super().__init__(home)
        self.partials = Partials(self.home / "partial")

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
        allow_moved: bool = False,
    ) -> Stored:
        """Bring an adapter into the store.

        A commit that is stored costs no download; given in full, no request at all.

        Args:
            registry: where it lives; with `offline` only its name counts.
            revision: branch, tag, commit, version or range; None is the default branch.
            folder: inside the repository.
            offline: serve what was pulled before, by what the revision meant then.
            progress: called with (bytes so far, bytes in all).
            allow_moved: take a tag although it meant another commit when it was last pulled.

        Raises:
            HubkitError: HK-OFFLINE, HK-NO-REVISION, HK-MOVED, HK-LIMIT, HK-NAME, HK-PICKLE, HK-FORBIDDEN-FILE,
                HK-FILES (every difference), HK-SAFETENSORS, HK-JSON, HK-NOT-ADAPTER, HK-DISK and what the registry
                raises; nothing is left behind then.
        """
        source = Source("adapter", registry.name, repo, folder or "")
        return self._pull(registry, source, revision, offline, limits, progress, select_adapter, allow_moved)

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
        allow_moved: bool = False,
    ) -> Stored:
        """Bring a model into the store: configuration, tokenizer and safetensors; otherwise as `pull`."""
        source = Source("base", registry.name, repo, folder or "")
        return self._pull(registry, source, revision, offline, limits, progress, select_base, allow_moved)

    def receive(self, kind: str, place: Readable, repo: str, commit: str) -> Stored:
        """Bring an adapter or base into the store from something that is no registry, a bundle; checked as by `pull`.

        Args:
            kind: ``adapter`` or ``base``.
            place: what holds it; its name is remembered as the registry's.
            repo: what it is called there.
            commit: 40 hex digits.

        Raises:
            HubkitError: as `pull`.
        """
        source = Source(kind, place.name, repo)
        known = self._index.get(source, commit, claimed=True)
        if known is not None and self._is_here(known):
            return self._stored(known, None)
        limits, select = (BASE_LIMITS, select_base) if kind == "base" else (ADAPTER_LIMITS, select_adapter)
        pulled, fetched = self._fetch(place, source, commit, limits, None, select, claimed=True)
        return self._stored(pulled, None, fetched)

    def remember(
        self,
        kind: str,
        registry: str,
        repo: str,
        folder: str | None,
        commit: str,
        digest: str,
        files: Iterable[FileEntry],
        names: Iterable[str | None] = (),
    ) -> None:
        """Note that a commit is said to hold an artifact that is stored, however it came; offline it is found by that.

        Where the registry can be asked, it is: what a lock or a bundle says of a commit is not believed then.

        Args:
            digest: of the artifact.
            files: its files.
            names: revisions that mean the commit, None for the default branch; one that is known keeps its meaning.
        """
        source = Source(kind, registry, repo, folder or "")
        if self._index.get(source, commit, claimed=True) is None:
            listed = tuple(sorted((file for file in files if file.path != CARD), key=lambda file: file.path))
            self._index.add(Pulled(source, commit, digest, listed, claimed=True))
        for name in names:
            if self._index.meaning(source, name, claimed=True) is None:
                self._index.name(source, name, commit, claimed=True)

    def remove(self, digest: str, *, unused_since: float | None = None) -> int | None:
        """Take an artifact out of the store; no error when it is not there.

        It is renamed aside, and deleted there: whoever is killed between leaves nothing that looks like an artifact,
        and the next writer sweeps it.

        Args:
            unused_since: seconds since 1970: leave it where it was used after that.

        Returns:
            the bytes that came free; None where it stays.
        """
        path = self.path(digest)
        with refusing(path), scratch(self.home / "staging") as work:
            with self._writing():
                if unused_since is not None and self.last_used(digest) > unused_since:
                    return None
                discard(path, work)
                self._seals.forget(digest)
                self._uses.forget(digest)
            return occupied(work)

    def _pull(
        self,
        registry: Registry,
        source: Source,
        revision: str | None,
        offline: bool,
        limits: Limits,
        progress: Progress | None,
        select: Select,
        allow_moved: bool,
    ) -> Stored:
        if offline:
            return self._offline(source, revision)
        exact = self._index.get(source, revision) if revision is not None else None
        if exact is not None and self._is_here(exact):
            return self._stored(exact, None)
        try:
            resolved = resolve_revision(registry, source.repo, revision)
            if not allow_moved:
                self._require_unmoved(registry, source, resolved)
            pulled = self._index.get(source, resolved.commit)
            fetched = 0
            if pulled is None or not self._is_here(pulled):
                self._notice_alike(source)
                pulled, fetched = self._fetch(registry, source, resolved.commit, limits, progress, select)
        except HubkitError as fault:
            before = self._index.find(source, revision) if fault.code == "HK-OFFLINE" else None
            if before is not None:
                fault.fix = f"--offline uses commit {before.commit[:12]}, which was pulled before"
            raise
        for name in {revision, resolved.name}:
            self._index.name(source, name, resolved.commit)
        return self._stored(pulled, resolved.name, fetched)

    def require_unmoved(self, kind: str, registry: Registry, repo: str, folder: str | None, found: Resolved) -> None:
        """Refuse a tag that meant another commit when it was last pulled: tags do not move by themselves.

        Args:
            kind: ``adapter`` or ``base``.
            found: what the registry says now.

        Raises:
            HubkitError: ``HK-MOVED`` with both commits, and the digests of what they hold as far as they are known.
        """
        self._require_unmoved(registry, Source(kind, registry.name, repo, folder or ""), found)

    def _require_unmoved(self, registry: Registry, source: Source, found: Resolved) -> None:
        before = self._index.meaning(source, found.name) if found.tag else None
        if before is None or before == found.commit:
            return
        known = self._index.get(source, before)
        now = ""
        with suppress(HubkitError):
            inside = f"{source.folder}/" if source.folder else ""
            now = f"  {sha256(registry.read(source.repo, found.commit, inside + MANIFEST_NAME))}"
        what = f"the tag {found.name} of {source.repo} meant another commit when it was last pulled here"
        reference = source.reference(found.name)
        pull = f"hubkit pull {'--base ' if source.kind == 'base' else ''}{reference} --allow-moved"
        fix = f"ask its publisher; to take it: {pull}"
        want = before + (f"  {known.digest}" if known else "")
        raise HubkitError("HK-MOVED", what, where=reference, want=want, have=found.commit + now, fix=fix)

    def _notice_alike(self, source: Source) -> None:
        """Says of a repository that is pulled for the first time when it could be taken for another one."""
        known = {pulled.source.repo for pulled in self._index.pulled() if not pulled.claimed}
        said = None if source.repo in known else alike(source.repo, known)
        if said:
            warn(f"{source.repo} was never pulled here before: {said}; is it the one you mean?", Notice, stacklevel=2)

    def _offline(self, source: Source, revision: str | None) -> Stored:
        pulled = self._index.find(source, revision)
        bad = self._put_away(pulled) if pulled is not None and self.path(pulled.digest).is_dir() else ()
        if pulled is not None and bad:
            damaged = [f"{path}: missing or damaged" for path in bad]
            what, where = "files in the store are not what was pulled", str(self.path(pulled.digest))
            fix = f"hubkit pull {'--base ' if source.kind == 'base' else ''}{source.reference(pulled.commit)}"
            raise HubkitError("HK-FILES", what, where=where, have=damaged, fix=fix)
        if pulled is None or not self._is_here(pulled):
            known = [name or "(default)" for name in sorted(self._index.names(source))]
            what, where = "it is not in the store, and offline nothing can be downloaded", source.reference(revision)
            names = ", ".join(known) or "nothing of this repository was ever pulled"
            fix = f"hubkit pull {'--base ' if source.kind == 'base' else ''}{where}, once without --offline"
            raise HubkitError("HK-OFFLINE", what, where=where, have=names, fix=fix)
        return self._stored(pulled, revision if revision != pulled.commit else None)

    def _fetch(
        self,
        registry: Readable,
        source: Source,
        commit: str,
        limits: Limits,
        progress: Progress | None,
        select: Select,
        claimed: bool = False,
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
        known = self._known(source, commit, selected, claimed)
        bad = set(self._put_away(known)) if known is not None else set()
        if known is not None and not bad and selected.manifest is not None:
            self._index.add(known)
            return known, 0
        have = {file.path: file for file in (known.files if known else ()) if file.path not in bad}
        with refusing(self.home), scratch(self.home / "staging") as work:
            made = work / "artifact"
            made.mkdir()
            kept = take_over(self.path(known.digest), have, selected, made) if known else {}
            self.partials.sweep()
            fetched = fetch(registry, source.repo, commit, selected, made, where, progress, kept, self.partials)
            files = fetched.files
            digest = sha256(selected.content[MANIFEST_NAME]) if selected.manifest else digest_files(files)
            pulled = Pulled(source, commit, digest, tuple(file for file in files if file.path != CARD), claimed)
            with self._writing():
                if not self._is_whole(pulled):
                    discard(self.path(digest), work)  # damaged: somebody has been in there
                    publish(made, self.path(digest))
                    self._seals.seal(digest, self.path(digest), pulled.files)
        self._index.add(pulled)
        return pulled, fetched.arrived

    def _known(self, source: Source, commit: str, selected: Selection, claimed: bool) -> Pulled | None:
        """What should be in the store already: the same manifest, from whatever commit or registry, or this commit."""
        if selected.manifest is None:
            pulled = self._index.get(source, commit, claimed=claimed)
        else:
            data = selected.content[MANIFEST_NAME]
            files = (*selected.manifest.files, FileEntry(MANIFEST_NAME, len(data), sha256(data)))
            pulled = Pulled(source, commit, sha256(data), tuple(sorted(files, key=lambda file: file.path)), claimed)
        return pulled if pulled is not None and self.path(pulled.digest).is_dir() else None
