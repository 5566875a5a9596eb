"""`copy`: bring an adapter or a base from one registry into another, to the byte, with its versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import CARD_NAME as CARD
from hubkit.artifact.folder import PEFT_CONFIG
from hubkit.documents.arguments import checked
from hubkit.documents.drafts import scratch
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.publishing import Publication, retrying
from hubkit.registry.address import check_repo, is_repo
from hubkit.registry.api import Progress, Refs, Registry
from hubkit.registry.opening import open_named, open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import Resolved, resolve_revision, sorted_versions, tag_version
from hubkit.registry.yanked import YANKED, read_yanked, yanked_bytes

if TYPE_CHECKING:
    from hubkit.registry.store.store import Store, Stored


@dataclass(frozen=True, repr=False)
class CopiedVersion(Shown):
    """One version that is in the target now.

    Args:
        version: None for a commit that has none.
        digest: of the adapter or base, in both registries.
        commit: that holds it in the target.
        uploaded: files that were sent for it.
        present: it was there already, with the same content.
    """

    version: str | None
    digest: str
    commit: str
    uploaded: tuple[str, ...]
    present: bool


@dataclass(frozen=True, repr=False)
class Copied(Shown):
    """What was copied.

    Args:
        source: repository and registry that it came from.
        repo: ``org/name`` in the target.
        registry: the target's name, without credentials.
        created: the repository was made.
        versions: lowest first.
        left_out: files of the newest of them that belong to neither adapter nor base, as other formats do.
    """

    source: str
    repo: str
    registry: str
    created: bool
    versions: tuple[CopiedVersion, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    """One commit of the source, in the store and proven."""

    tag: str | None
    stored: Stored
    content: Mapping[str, Path]
    left_out: tuple[str, ...]


@checked
def copy(
    reference: str,
    to: str,
    *,
    name: str | None = None,
    all_versions: bool = False,
    private: bool = False,
    registry: str | None = None,
    progress: Progress | None = None,
) -> Copied:
    """Copy a repository's adapter or base, or all of its versions.

    It comes through the store, so what was pulled before, or arrived in part, is not read again; nothing is sent that
    the target has. Each version is one commit and one tag. Run it again after whatever stopped it.

    Args:
        reference: what to copy: at a version or range that version, without one the default branch.
        to: a registry (``hf``, a server's address, a directory), or a whole reference: ``org/name`` in the default
            registry, ``hf://org/name``, ``https://host/org/name``.
        name: ``org/name`` in the target; by default as in the source.
        all_versions: every version, lowest first, and which of them are yanked.
        private: make the repository private, if it is made.
        registry: of `reference`, if it names none.
        progress: of what is fetched, see `pull`.

    Raises:
        HubkitError: ``HK-VERSION-EXISTS`` for a version that the target has with other content; ``HK-VERSION`` where
            the target has newer ones only; what pulling and pushing raise. Nothing is sent before all is known.
    """
    from hubkit.registry.store.store import Store

    source = parse_reference(reference)
    if source.repo is None or source.folder or (all_versions and source.revision):
        what, want = "copy takes a whole repository", "org/name, org/name@1.2.0, or org/name --all-versions"
        raise HubkitError("HK-REFERENCE", what, want=want, have=reference, status=USAGE)
    origin, repo = open_registry(source, registry), source.repo
    place, named = _target(to)
    target = check_repo(name or named or repo)
    there = Publication(place, target)
    refs, store, created = origin.refs(repo), Store(), not there.exists
    chosen = _versions(origin, repo, refs) if all_versions else [_one(origin, repo, source.revision, refs)]
    with scratch(store.home / "staging") as work:
        items = [_fetched(store, origin, repo, one, work, progress) for one in chosen]
        done = _tagged_there(there, items)
        versions = tuple(done.get(n) or _published(place, target, one, private) for n, one in enumerate(items))
    if all_versions:
        _copy_yanks(place, target, read_yanked(origin, repo, refs), [one.tag for one in items])
    return Copied(f"{origin.name}/{repo}", target, place.name, created, versions, items[-1].left_out)


def _target(to: str) -> tuple[Registry, str | None]:
    """The registry that `to` names, and the repository, if it names one."""
    path = to.partition("://")[2].partition("/")[2].strip("/")
    whole = (is_repo(to) and not Path(to).is_dir()) or (to.startswith("hf://") and "/" in to.removeprefix("hf://"))
    if whole or (to.startswith(("http://", "https://")) and path.count("/") >= 1):
        target = parse_reference(to)
        if target.revision or target.folder:
            what = "a copy has the versions of what is copied"
            raise HubkitError("HK-REFERENCE", what, want="a registry, or org/name", have=to, status=USAGE)
        return open_registry(target), target.repo
    return open_named(to), None


def _one(origin: Registry, repo: str, revision: str | None, refs: Refs) -> Resolved:
    """The commit that is meant, under its highest version, where it has one."""
    found = resolve_revision(origin, repo, revision)
    versions = sorted_versions(tag for tag, commit in refs.tags.items() if commit == found.commit)
    return Resolved(found.commit, versions[-1], True) if versions and not found.tag else found


def _versions(origin: Registry, repo: str, refs: Refs) -> list[Resolved]:
    found = [Resolved(refs.tags[tag], tag, True) for tag in sorted_versions(refs.tags)]
    if not found:
        what, fix = f"{repo} has no versions", f"hubkit copy {repo} TO, without --all-versions"
        raise HubkitError("HK-NO-REVISION", what, where=origin.name, fix=fix)
    return found


def _fetched(store: Store, origin: Registry, repo: str, one: Resolved, work: Path, progress: Progress | None) -> _Item:
    """One commit, brought into the store: every file is what its digest says; its card as it is at this commit."""
    listing = {file.path: file for file in origin.files(repo, one.commit)}
    base = "config.json" in listing and not {MANIFEST_NAME, PEFT_CONFIG} & listing.keys()
    store.require_unmoved("base" if base else "adapter", origin, repo, None, one)
    pull = store.pull_base if base else store.pull
    stored = pull(origin, repo, one.commit, progress=progress)
    content = {file.path: stored.path / file.path for file in stored.files}
    if CARD in listing:  # the store keeps one card for an artifact, whatever commit it came from
        content[CARD] = work / f"{one.commit}.md"
        content[CARD].write_bytes(origin.read(repo, one.commit, CARD))
    return _Item(one.name if one.tag else None, stored, content, tuple(sorted(listing.keys() - content.keys())))


def _tagged_there(there: Publication, items: list[_Item]) -> dict[int, CopiedVersion]:
    """Those that the target has already, by their number; refuses before anything is sent what cannot be copied."""
    done: dict[int, CopiedVersion] = {}
    known = [version for tag in there.refs.tags if (version := tag_version(tag))]
    top = max(known, key=lambda version: version.precedence, default=None)
    for number, item in enumerate(items):
        commit = there.refs.tags.get(item.tag or "")
        version = tag_version(item.tag or "")
        if commit is not None and item.tag is not None:
            identity = {path: file for path, file in item.content.items() if path != CARD}
            if other := there.differing(identity, commit):
                what = f"version {version or item.tag} of {there.repo} is in the target with other content"
                where = f"{there.where}@{item.tag}"
                fix = "copy it under another name: --as ORG/NAME"
                raise HubkitError("HK-VERSION-EXISTS", what, where=where, want=item.stored.digest, have=other, fix=fix)
            shown = str(version) if version else item.tag
            done[number] = CopiedVersion(shown, item.stored.digest, commit, (), True)
        elif version is not None and top is not None and version.precedence < top.precedence:
            what = "the target has newer versions, and the default branch holds the newest"
            fix = "copy it under another name: --as ORG/NAME"
            have, want = f"v{top}", f"a version above v{top}"
            raise HubkitError("HK-VERSION", what, where=there.where, want=want, have=have, fix=fix, status=USAGE)
    return done


def _published(place: Registry, repo: str, item: _Item, private: bool) -> CopiedVersion:
    """One version as one commit and its tag; a kill leaves the commit without it, which the next copy finds."""

    def attempt() -> tuple[str, tuple[str, ...]]:
        there = Publication(place, repo)
        there.create(private)
        add, removed = there.lacking(item.content), there.leftovers(item.content, weights=True)
        if not add and not removed and there.tip is not None:
            return there.tip, ()
        message = f"{repo} {item.tag or item.stored.commit[:12]}"
        return there.commit(add, removed, message, item.content), tuple(sorted(add))

    commit, sent = retrying(attempt)
    version = tag_version(item.tag or "")
    if item.tag is not None:
        place.tag(repo, item.tag, commit)
    return CopiedVersion(str(version) if version else item.tag, item.stored.digest, commit, sent, False)


def _copy_yanks(place: Registry, repo: str, yanked: Mapping[str, str], tags: list[str | None]) -> None:
    """What was taken back in the source is taken back in the target."""

    def attempt() -> None:
        refs = place.refs(repo)
        before = read_yanked(place, repo, refs)
        after = before | {tag: why for tag, why in yanked.items() if tag in tags and tag not in before}
        if after != before:
            content = {YANKED: yanked_bytes(after)}
            place.commit(repo, content, [], message="yanked versions", parent=refs.branches.get("main"))

    retrying(attempt)
