"""`outdated`: of each entry of a lock what is pinned, what its reference means now, and the newest there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.lock import Lock, LockedAdapter, LockedBase
from hubkit.documents.manifest import Manifest
from hubkit.documents.shown import Shown, Table
from hubkit.errors import HubkitError
from hubkit.locking.differences import version_of
from hubkit.locking.pinned_base import base_at, local_files
from hubkit.named.locked import at
from hubkit.registry.api import Refs
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision, sorted_versions, tag_version
from hubkit.registry.yanked import read_yanked

_UNKNOWN = ("HK-OFFLINE", "HK-AUTH", "HK-FORBIDDEN", "HK-GATED", "HK-BUSY", "HK-REGISTRY")


@dataclass(frozen=True, repr=False)
class Outdated(Shown):
    """One entry of a lock.

    Args:
        name: ``base``, or the adapter's in the recipe.
        source: as the recipe names it.
        pinned: version and commit in the lock; of a folder version and digest.
        wanted: what `source` means now, within its range; what `lock --upgrade` would pin.
        newest: the highest version of all, pre-releases aside; without versions the default branch.
        state: ``current``; ``behind`` what it means now; ``newer``: only outside of its range; ``changed``: a folder;
            ``gone``: there is no such repository; ``yanked``: all that its range allows was taken back; ``unknown``:
            its registry does not answer.
        why: of ``gone``, ``yanked`` and ``unknown``: what was said.
        yanked: why the version that is pinned was taken back by its publisher; None: it was not.
    """

    name: str
    source: str
    pinned: str
    wanted: str
    newest: str
    state: str
    why: str = ""
    yanked: str | None = None


@checked
def outdated(lock: Path | str = ".", *, registry: str | None = None, offline: bool = False) -> tuple[Outdated, ...]:
    """Compare a lock with what its registries have now; nothing changes.

    Args:
        lock: the lock or its folder.
        registry: for references that name none, if not the default registry.
        offline: ask nobody: only folders are compared, everything else is ``unknown``.

    Raises:
        HubkitError: ``HK-MISSING``, ``HK-LOCK-EDITED`` and what else reading a lock raises; what a registry answers
            that is neither an answer nor silence.
    """
    path = Path(lock)
    pinned, folder = Lock.read(path), path if path.is_dir() else path.parent
    where = Where(registry, offline)
    base = base_at(pinned.base, folder, pinned.base.requested)
    rows = [_base_folder(pinned.base, base) if base.path is not None else _remote("base", pinned.base, base, where)]
    for one in pinned.adapters:
        reference = at(folder, parse_reference(one.source))
        rows.append(_folder(one, reference) if reference.path is not None else _remote(one.name, one, reference, where))
    return Table(rows)


def _folder(one: LockedAdapter, reference: Reference) -> Outdated:
    pinned = version_of(one)
    assert reference.path is not None
    try:
        manifest = Manifest.read(reference.path)
    except HubkitError as error:
        return Outdated(one.name, one.source, pinned, "", "", "gone", error.what)
    now = f"{manifest.version} ({manifest.digest.removeprefix('sha256:')[:12]})"
    return Outdated(one.name, one.source, pinned, now, now, "current" if manifest.digest == one.digest else "changed")


def _base_folder(base: LockedBase, reference: Reference) -> Outdated:
    assert reference.path is not None
    pinned = version_of(base)
    try:
        same = {file.path: file.sha256 for file in local_files(reference.path)} == {
            f.path: f.sha256 for f in base.files
        }
    except HubkitError as error:
        return Outdated("base", base.source, pinned, "", "", "gone", error.what)
    now = pinned if same else "other files"
    return Outdated("base", base.source, pinned, now, now, "current" if same else "changed")


def _remote(name: str, one: LockedAdapter | LockedBase, reference: Reference, where: Where) -> Outdated:
    pinned = version_of(one)
    if where.offline:
        return Outdated(name, one.source, pinned, "", "", "unknown", "offline")
    place, repo = where.open(reference), reference.repo or ""
    try:
        refs = place.refs(repo)
        taken_back = read_yanked(place, repo, refs) if refs.tags else {}
        mine = [taken_back.get(tag) for tag in sorted_versions(refs.tags) if refs.tags[tag] == one.revision]
        yanked = next((why for why in mine if why), None) if all(mine) else None
        wanted = resolve_revision(place, repo, reference.revision).commit
        known = (tag for tag in sorted_versions(refs.tags) if tag not in taken_back)
        versions = [tag for tag in known if not getattr(tag_version(tag), "pre", ())]
        newest = refs.tags[versions[-1]] if versions else resolve_revision(place, repo, None).commit
    except HubkitError as error:
        if error.code == "HK-YANKED":
            return Outdated(name, one.source, pinned, "", "", "yanked", error.what, yanked)
        if error.code not in (*_UNKNOWN, "HK-NOT-FOUND", "HK-NO-REVISION"):
            raise
        state = "unknown" if error.code in _UNKNOWN else "gone"
        return Outdated(name, one.source, pinned, "", "", state, error.what)
    ahead = newest not in (wanted, one.revision) and _above(refs, newest, wanted)
    state = "behind" if wanted != one.revision else "newer" if ahead else "current"
    return Outdated(name, one.source, pinned, _called(refs, wanted), _called(refs, newest), state, yanked=yanked)


def _above(refs: Refs, newest: str, wanted: str) -> bool:
    """Whether the newest version is above what the reference means; what has no version is not compared with one."""
    known = sorted_versions(tag for tag, commit in refs.tags.items() if commit in (newest, wanted))
    return not known or (refs.tags[known[-1]] == newest and any(refs.tags[tag] == wanted for tag in known))


def _called(refs: Refs, commit: str) -> str:
    """The version of a commit and the commit, as `version_of` has them."""
    versions = sorted_versions(tag for tag, at in refs.tags.items() if at == commit)
    return f"{versions[-1].removeprefix('v')} ({commit[:12]})" if versions else commit[:12]
