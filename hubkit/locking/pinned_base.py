"""The base of a recipe as a lock pins it: of a folder by its bytes, of a repository by its listing and headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.lock import LockedBase, LockedFile
from hubkit.documents.recipe import RecipeBase
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.named.locked import at, gone
from hubkit.named.sources import base_record, base_reference, base_source
from hubkit.registry.api import RemoteFile
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord


def base_at(base: RecipeBase | LockedBase, folder: Path, revision: str | None) -> Reference:
    """What a recipe or lock in `folder` means by its base: a folder, or a repository at `revision`."""
    inside = folder / base.source
    if (inside / "config.json").is_file():
        return Reference("folder", path=inside)
    return at(folder, base_reference(base.source, revision))


def pin_base(base: RecipeBase, folder: Path, where: Where) -> tuple[LockedBase, BaseRecord]:
    """The base that a recipe names, resolved now.

    Raises:
        HubkitError: what the registry raises, ``HK-NOT-FOUND`` in the words of a recipe; what is wrong with its files.
    """
    reference = base_at(base, folder, base.revision)
    if reference.path is not None:
        record = base_record(str(reference.path), None, where)
        record = replace(record, fingerprint=replace(record.fingerprint, source=base.source))
        return LockedBase(base.source, None, record.fingerprint, local_files(reference.path)), record
    if where.offline:
        return _stored_base(base, reference, where)
    from hubkit.registry.store.store import Store

    place, repo = where.open(reference), reference.repo or ""
    try:
        now = resolve_revision(place, repo, reference.revision)
        Store().require_unmoved("base", place, repo, reference.folder, now)
        commit = now.commit
    except HubkitError as error:
        raise gone("base", reference, error) if error.code == "HK-NOT-FOUND" else error from None
    record = base_record(str(replace(reference, revision=commit)), None, where)

    def read(file: RemoteFile) -> bytes:
        return place.read(repo, commit, file.path)

    files = _files(place.files(repo, commit), read, lambda file: file.sha256 or sha256(read(file)), str(reference))
    return LockedBase(base.source, commit, record.fingerprint, files, base.revision), record


def local_files(folder: Path) -> tuple[LockedFile, ...]:
    """The files of a model in a folder, and no others, with digests."""
    listing = [
        RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return _files(
        listing,
        lambda file: (folder / file.path).read_bytes(),
        lambda file: hash_file(folder / file.path),
        str(folder),
    )


def _stored_base(base: RecipeBase, reference: Reference, where: Where) -> tuple[LockedBase, BaseRecord]:
    """Offline: what was pulled, described as its listing would describe it, so that the lock has the same bytes."""
    from hubkit.artifact.identity.digest import fingerprint_folder

    found = base_source(str(reference), None, where)
    record = fingerprint_folder(found.path, source=reference.repo, revision=found.commit)
    record = replace(record, fingerprint=replace(record.fingerprint, weights=None))
    files = found.stored.files if found.stored else ()
    return LockedBase(base.source, found.commit, record.fingerprint, files, base.revision), record


def _files(
    listing: Iterable[RemoteFile], read: Callable[[RemoteFile], bytes], digest: Callable[[RemoteFile], str], where: str
) -> tuple[LockedFile, ...]:
    from hubkit.registry.store.selection import CARD, select_base

    chosen = {path: file for path, file in select_base(listing, None, read, where).files.items() if path != CARD}
    return tuple(LockedFile(path, file.size, digest(file)) for path, file in sorted(chosen.items()))
