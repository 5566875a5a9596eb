"""`push`: publish an adapter folder as ONE commit and one version tag, or nothing.

Everything that can be refused is refused before the first byte is sent. A kill leaves the old tip, or the new commit
without its tag, which the next push of the same folder adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.card import render_card
from hubkit.artifact.folder import CARD_NAME, AdapterFolder, open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.arguments import checked
from hubkit.documents.files import read, refusing
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.names import check_allowed, check_names
from hubkit.documents.schema import sha256
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import require_published
from hubkit.named.where import Where
from hubkit.registry.api import Refs, Registry, RemoteFile
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import sorted_versions, tag_version
from hubkit.verbs.verify import require_finite

ATTEMPTS = 3
"""How often the changes are computed anew after somebody else's commit came first."""
MAX_TEXT = 4 << 20


@dataclass(frozen=True, repr=False)
class Pushed(Shown):
    """What was published.

    Args:
        repo: ``org/name``.
        registry: its name, without credentials.
        version: of the manifest; the tag is ``v<version>``.
        digest: the adapter's identity: the sha256 of its ``hubkit.json``.
        commit: the 40-hex commit that holds it; None in a dry run that would make one.
        created: the repository was (would be) made.
        uploaded: files that were (would be) sent.
        removed: files of the version before that were (would be) taken out.
        left_out: files in the folder that the manifest does not list: they stay here.
        dry_run: nothing was sent.
    """

    repo: str
    registry: str
    version: str
    digest: str
    commit: str | None
    created: bool
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    dry_run: bool

    @property
    def unchanged(self) -> bool:
        """These very bytes were already published."""
        return not (self.created or self.uploaded or self.removed)


@checked
def push(
    folder: Path | str,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    registry: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish an adapter.

    Args:
        folder: the adapter's folder, as ``hubkit pack`` leaves it.
        repo: ``org/name``; made if it is not there.
        private: make it private, if it is made.
        message: of the commit; name and version by default.
        registry: where, if not the default registry.
        dry_run: check everything, send nothing.

    Raises:
        HubkitError: what opening the folder raises; ``HK-NAME``, ``HK-PICKLE``, ``HK-FORBIDDEN-FILE``, ``HK-NAN``;
            ``HK-MIX-MEMBER`` for a mix with a member that others could not get;
            ``HK-VERSION-EXISTS`` when the version is published with other content; ``HK-STALE`` when others keep
            committing; ``HK-FILES`` when the registry holds other bytes than were sent; what the registry raises.
    """
    adapter = open_adapter(Path(folder))
    target = parse_reference(repo)
    if target.repo is None or target.revision or target.folder:
        raise HubkitError("HK-REFERENCE", "push needs a repository", want="org/name", have=repo, status=USAGE)
    content = _content(adapter)
    if adapter.manifest.kind == "mix":
        require_published(adapter, target, Where(registry))
    place = open_registry(target, registry)
    for _ in range(ATTEMPTS - 1):
        with suppress(_Stale):
            return _Publication(place, target.repo, adapter, content).run(private, message, dry_run)
    return _Publication(place, target.repo, adapter, content).run(private, message, dry_run, last=True)


class _Stale(Exception):
    """Somebody committed between our look and our commit."""


class _Publication:
    """One attempt: what the repository holds, what must change, the commit, the tag."""

    def __init__(self, place: Registry, repo: str, adapter: AdapterFolder, content: Mapping[str, Path]) -> None:
        self.place, self.repo, self.adapter, self.content = place, repo, adapter, content
        self.where = f"{place.name}/{repo}"
        self._look()

    def _look(self) -> None:
        self.exists, self.tip, self.refs = True, None, Refs()
        try:
            self.refs = self.place.refs(self.repo)
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            self.exists = False
        self.tip = self.refs.branches.get("main")
        self.files = {f.path: f for f in self.place.files(self.repo, self.tip)} if self.tip else {}

    def run(self, private: bool, message: str | None, dry_run: bool, last: bool = False) -> Pushed:
        manifest, created = self.adapter.manifest, not self.exists
        tagged = self._tagged()
        add: dict[str, Path | bytes] = {
            path: source for path, source in self.content.items() if not self._holds(path, source)
        }
        card = self._card()
        if card is not None:
            add[CARD_NAME] = card
        removed = self._leftovers()
        commit = None if add or removed else tagged or self.tip
        if not dry_run:
            if created:
                self.place.create(self.repo, private=private)
                self._look()
            if commit is None:
                commit = self._commit(add, removed, message or f"{manifest.name} {manifest.version}", last)
            if tagged is None:
                self.place.tag(self.repo, f"v{manifest.version}", commit)
        return Pushed(
            repo=self.repo,
            registry=self.place.name,
            version=manifest.version,
            digest=manifest.digest,
            commit=commit,
            created=created,
            uploaded=tuple(sorted(add)),
            removed=removed,
            left_out=self.adapter.unlisted(),
            dry_run=dry_run,
        )

    def _tagged(self) -> str | None:
        """The commit that already carries this version, when its content is ours."""
        manifest = self.adapter.manifest
        commit = self.refs.tags.get(f"v{manifest.version}")
        if commit is None:
            return None
        have = self._digest_at(commit)
        if have != manifest.digest:
            raise HubkitError(
                "HK-VERSION-EXISTS",
                f"version {manifest.version} of {self.repo} is published with other content",
                where=f"{self.where}@v{manifest.version}",
                want=f"{manifest.digest}  ({self.adapter.path})",
                have=have,
                fix=f"hubkit pack {self.adapter.path} --version {self._next()}",
            )
        return commit

    def _next(self) -> str:
        """The first patch version above all that are published."""
        known = [v for tag in self.refs.tags if (v := tag_version(tag))]
        top = max(known, key=lambda version: version.precedence)
        return f"{top.major}.{top.minor}.{top.patch + 1}"

    def _digest_at(self, commit: str) -> str:
        try:
            return sha256(self.place.read(self.repo, commit, MANIFEST_NAME))
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            return f"no {MANIFEST_NAME}"

    def _holds(self, path: str, source: Path) -> bool:
        """Whether the tip already has these bytes at `path`."""
        there = self.files.get(path)
        if there is None or there.size != source.stat().st_size:
            return False
        return self._digest_of(there, self.tip or "") == hash_file(source)

    def _digest_of(self, file: RemoteFile, commit: str) -> str:
        """As listed; a Hub lists no sha256 for small files, which are then read."""
        return file.sha256 or sha256(self.place.read(self.repo, commit, file.path))

    def _card(self) -> bytes | None:
        """The model card to send, None when the tip has it. Text that people wrote on the registry since the last
        version stays; otherwise the folder's text is published. Only our block is rewritten."""
        local = self.adapter.path / CARD_NAME
        text = read(local, MAX_TEXT).decode("utf-8", "replace") if local.is_file() else None
        there = self._text_at(self.tip) if self.tip else None
        versions = sorted_versions(self.refs.tags)
        if there is not None and (not versions or self._text_at(self.refs.tags[versions[-1]]) != there):
            text = there
        wanted = render_card(self.adapter.manifest, text, repository=self.repo)
        return None if wanted == there else wanted.encode()

    def _text_at(self, commit: str) -> str | None:
        try:
            return self.place.read(self.repo, commit, CARD_NAME, 0, MAX_TEXT).decode("utf-8", "replace")
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            return None

    def _leftovers(self) -> tuple[str, ...]:
        """Files of the version before that this one no longer has; what others put beside them stays."""
        if self.tip is None or MANIFEST_NAME not in self.files:
            return ()
        try:
            before = Manifest.from_bytes(self.place.read(self.repo, self.tip, MANIFEST_NAME), self.where)
        except HubkitError as error:
            if error.code not in ("HK-JSON", "HK-SCHEMA", "HK-NOT-CANONICAL"):
                raise
            return ()
        ours = {entry.path for entry in before.files} - self.content.keys()
        return tuple(sorted(ours & self.files.keys() - {CARD_NAME}))

    def _commit(self, add: Mapping[str, Path | bytes], removed: Iterable[str], message: str, last: bool) -> str:
        try:
            commit = self.place.commit(self.repo, add, removed, message=message, parent=self.tip)
        except HubkitError as error:
            if error.code == "HK-STALE" and not last:
                raise _Stale from error
            raise
        self._reread(commit)
        return commit

    def _reread(self, commit: str) -> None:
        """What the registry now has is what was sent: a server may lose or change bytes, or take half a commit."""
        there = {file.path: file for file in self.place.files(self.repo, commit)}
        wrong = [
            f"{path}: {'missing' if path not in there else 'other bytes'}"
            for path, source in self.content.items()
            if path not in there or self._digest_of(there[path], commit) != hash_file(source)
        ]
        if wrong:
            raise HubkitError(
                "HK-FILES",
                "the registry does not hold what was sent",
                where=f"{self.where}@{commit[:12]}",
                have=wrong,
                fix="push again; the version is not tagged",
            )


def _content(adapter: AdapterFolder) -> dict[str, Path]:
    """Path -> file of everything the manifest vouches for, and the manifest; judged by name, kind and values."""
    paths = [MANIFEST_NAME, *(entry.path for entry in adapter.manifest.files)]
    check_names(paths, str(adapter.path))
    content = {path: adapter.path / path for path in paths}
    for path, source in content.items():
        with refusing(source), source.open("rb") as file:
            check_allowed(path, file.read(512), str(adapter.path))
    require_finite(adapter)
    return content
