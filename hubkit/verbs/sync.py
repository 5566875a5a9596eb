"""`sync`: bring everything that a lock names here, and prove that every byte of it is what was locked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME, Lock, LockedAdapter
from hubkit.documents.recipe import RECIPE_NAME, read_recipe
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.locking.bundling import received, remember
from hubkit.locking.freshness import require_fresh
from hubkit.locking.renewal import renewed
from hubkit.named.locked import find_adapter, find_base, needed_by, stored_files
from hubkit.named.members import open_mix
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.store.archive import open_archive
from hubkit.verbs.lock import Locked, locked_as


@dataclass(frozen=True)
class SyncedEntry:
    """One entry of the lock that lies here, as it was locked.

    Args:
        name: ``base``, or the adapter's in the recipe.
        digest: of an adapter its manifest's; of a base that of its weights, or of their layout where no more is known.
        path: its folder.
        place: where it was found: ``folder``, ``store``, or the registry it was fetched from.
        size: bytes of its files, of a mix with its adapters.
        fetched: bytes that were downloaded now.
    """

    name: str
    digest: str
    path: Path
    place: str
    size: int
    fetched: int


@dataclass(frozen=True, repr=False)
class Synced(Shown):
    """A project whose locked files all lie here.

    Args:
        path: the lock.
        digest: of its content.
        entries: the base, then the adapters in the order of the mix.
        fetched: bytes that were downloaded, or read from a bundle, now.
        locked: the lock that was made first; None where it was only read.
    """

    path: Path
    digest: str
    entries: tuple[SyncedEntry, ...]
    fetched: int
    locked: Locked | None = None


@checked
def sync(
    project: Path | str = ".",
    *,
    locked: bool = False,
    frozen: bool = False,
    bundle: Path | str | None = None,
    allow_base_mismatch: bool = False,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Synced:
    """Bring base, adapters, and what is in mixes, into the store; those in folders are proven where they lie.

    Args:
        project: the folder of ``hubkit.toml`` and ``hubkit.lock``, or either file.
        locked: refuse where the lock is older than the recipe, instead of making it anew first.
        frozen: go by the lock alone; there need be no recipe.
        bundle: an archive of `hubkit.bundle` to read first. Where there is no lock, it brings one.
        allow_base_mismatch: where the lock is made anew: lock adapters of another base; recorded in the lock.
        registry: for references that name none, if not the default registry.
        offline: fetch nothing: everything has to be here.
        progress: of each pull.

    Raises:
        HubkitError: ``HK-LOCK-MISSING`` for what is nowhere to be had, ``HK-LOCK-DRIFT`` for a folder that changed;
            ``HK-LOCK-STALE`` (locked); ``HK-BUNDLE``; ``HK-EXISTS`` for a bundle of another lock than the one that is
            here; what `lock` and pulling raise.
    """
    if locked and frozen:
        what, fix = "a lock cannot be compared with its recipe and taken as it is", "--locked or --frozen"
        raise HubkitError("HK-USAGE", what, fix=fix, status=USAGE)
    recipe, target = _files(Path(project))
    where = Where(registry, offline, progress)
    read = 0
    if bundle is not None:
        read = _unpacked(Path(bundle), target)
        frozen = frozen or not recipe.exists()
    made = None
    if not frozen and not locked:
        done = renewed(recipe, read_recipe(recipe), where, allow=allow_base_mismatch)
        if done.needed:
            done.lock.write(target)
        made = locked_as(target, done, False)
    pinned = Lock.read(target)
    if locked:
        require_fresh(read_recipe(recipe), recipe, pinned, target)
    entries = _found(pinned, target.parent, where)
    remember(pinned, where)
    needed_by(target)
    fetched = read + sum(one.fetched for one in entries)
    return Synced(target, pinned.digest, entries, fetched, made)


def _files(project: Path) -> tuple[Path, Path]:
    """(recipe, lock) of a project; a folder need not be there yet."""
    if project.suffix == ".toml" and not project.is_dir():
        return project, project.with_name(LOCK_NAME)
    if project.is_file() or (project.suffix == ".lock" and not project.is_dir()):
        return project.with_name(RECIPE_NAME), project
    return project / RECIPE_NAME, project / LOCK_NAME


def _unpacked(file: Path, target: Path) -> int:
    """A bundle read into the store, its lock put in place where there is none."""
    archive = open_archive(file)
    if target.exists() and Lock.read(target).digest != archive.lock.digest:
        what, fix = "the bundle was made from another lock than the one here", "read it in another folder"
        have = f"{archive.lock.digest}  ({file})"
        want = f"{Lock.read(target).digest}  ({target})"
        raise HubkitError("HK-EXISTS", what, where=str(target), want=want, have=have, fix=fix)
    read = received(archive)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        archive.lock.write(target)
    return read


def _found(pinned: Lock, folder: Path, where: Where) -> tuple[SyncedEntry, ...]:
    """Every entry; where several are not to be had, all of them are named."""
    made: list[SyncedEntry] = []
    faults: list[tuple[str, HubkitError]] = []
    for name in ("base", *(one.name for one in pinned.adapters)):
        try:
            made.append(
                _base(pinned, folder, where) if not made and not faults else _adapter(pinned, name, folder, where)
            )
        except HubkitError as error:
            if error.code not in ("HK-LOCK-MISSING", "HK-LOCK-DRIFT", "HK-FILES"):
                raise
            faults.append((name, error))
    if len(faults) == 1:
        raise faults[0][1]
    if faults:
        code = "HK-LOCK-MISSING" if any(e.code == "HK-LOCK-MISSING" for _, e in faults) else "HK-LOCK-DRIFT"
        what = f"{len(faults)} entries of the lock are not here as they were locked"
        want = [f"{name}: {line}" for name, error in faults for line in error.want[:1]]
        have = [f"{name}: {line}" for name, error in faults for line in error.have]
        fix = next((error.fix for _, error in faults if error.code == code), "hubkit lock")
        raise HubkitError(code, what, where=str(folder / LOCK_NAME), want=want, have=have, fix=fix)
    return tuple(made)


def _base(pinned: Lock, folder: Path, where: Where) -> SyncedEntry:
    base, found = pinned.base, find_base(pinned.base, folder, where)
    digest = base.fingerprint.weights or base.fingerprint.layout
    return SyncedEntry("base", digest, found.path, found.place, sum(file.size for file in base.files), found.fetched)


def _adapter(pinned: Lock, name: str, folder: Path, where: Where) -> SyncedEntry:
    one: LockedAdapter = next(one for one in pinned.adapters if one.name == name)
    size = sum(file.size for file in one.files)
    if one.revision is not None and (path := stored_files(one)) is not None:
        return SyncedEntry(name, one.digest, path, "store", size, 0)
    adapter, found = find_adapter(one, folder, where)
    fetched = found.fetched
    if adapter.manifest.kind == "mix":
        inside = open_mix(adapter, found.reference, where).adapters
        size += sum(member.size for member in inside)
        fetched += sum(member.fetched for member in inside)
    return SyncedEntry(name, one.digest, found.path, found.place, size, fetched)
