"""`lock`: pin a recipe's base and adapters to exact commits, digests and sizes, after proving that they fit together.

Of repositories only listings, headers, manifests and small files are read. An entry whose line in the recipe did not
change keeps its commit: what a lock pins moves only with ``upgrade``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import TENSORS_NAME, open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME, Lock, LockedAdapter, LockedBase, LockedFile
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest
from hubkit.documents.recipe import RECIPE_NAME, Recipe, RecipeAdapter, read_recipe
from hubkit.documents.schema import sha256
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.sources import adapter_source, base_record, base_reference, read_manifest
from hubkit.named.where import Where
from hubkit.registry.api import RemoteFile
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord, TensorDigest


@dataclass(frozen=True, repr=False)
class Locked(Shown):
    """A lock that was written, or found to be up to date.

    Args:
        path: the lock.
        digest: of its content; a deployment quotes it.
        lock: its content.
        changed: what differs from the lock before: ``base``, names of adapters, ``mix``; empty when nothing does.
        dry_run: nothing was written.
    """

    path: Path
    digest: str
    lock: Lock
    changed: tuple[str, ...]
    dry_run: bool


@checked
def lock(
    recipe: Path | str = RECIPE_NAME,
    *,
    check: bool = False,
    upgrade: bool = False,
    allow_base_mismatch: bool = False,
    registry: str | None = None,
    dry_run: bool = False,
) -> Locked:
    """Write ``hubkit.lock`` beside a recipe.

    Args:
        recipe: the recipe or its folder. Folders named in it are relative to it.
        check: write nothing, ask no registry: refuse when the lock is missing or older than the recipe or its folders.
        upgrade: resolve every reference anew.
        allow_base_mismatch: lock adapters of another base; recorded in the lock.
        registry: for references that name none, if not the default registry.
        dry_run: resolve everything, write nothing.

    Raises:
        HubkitError: ``HK-RECIPE``, ``HK-MISSING``; ``HK-LOCK-STALE`` (check); ``HK-NOT-ADAPTER``;
            ``HK-BASE-MISMATCH``; ``HK-BASE-UNPROVEN`` (status 3); what the registry raises.
    """
    path = Path(recipe)
    path = path / RECIPE_NAME if path.is_dir() else path
    wanted, target = read_recipe(path), path.with_name(LOCK_NAME)
    before = Lock.read(target) if check or target.exists() else None
    if check and before is not None:
        _require_fresh(wanted, path, before, target)
        return Locked(target, before.digest, before, (), True)
    made = _Resolver(path.parent, Where(registry), None if upgrade else before, allow_base_mismatch).run(wanted)
    changed = _changes(before, made)
    if not dry_run and (changed or before is None or before.to_bytes() != made.to_bytes()):
        made.write(target)
    return Locked(target, made.digest, made, changed, dry_run)


def at(folder: Path, reference: Reference) -> Reference:
    """A reference as a recipe or lock in `folder` means it: relative paths begin there."""
    return reference if reference.path is None else replace(reference, path=folder / reference.path)


class _Resolver:
    """Turns one recipe into a lock."""

    def __init__(self, folder: Path, where: Where, before: Lock | None, allow: bool) -> None:
        self.folder, self.where, self.before, self.allow = folder, where, before, allow
        self.overrides: list[str] = []

    def run(self, recipe: Recipe) -> Lock:
        base, record = self._base(recipe)
        adapters = tuple(self._adapter(one, record) for one in recipe.adapters)
        return Lock(base, adapters, recipe.mix, recipe.digest, tuple(dict.fromkeys(self.overrides)))

    def _base(self, recipe: Recipe) -> tuple[LockedBase, BaseRecord]:
        source, revision = recipe.base.source, recipe.base.revision
        known = self.before.base if self.before and self.before.recipe == recipe.digest else None
        inside = self.folder / source
        reference = (
            Reference("folder", path=inside)
            if (inside / "config.json").is_file()
            else at(self.folder, base_reference(source, known.revision if known and known.revision else revision))
        )
        if reference.path is not None:
            record = base_record(str(reference.path), None, self.where)
            record = replace(record, fingerprint=replace(record.fingerprint, source=source))
            return LockedBase(source, None, record.fingerprint, _local_base(reference.path)), record
        record = base_record(str(reference), None, self.where)
        commit = record.fingerprint.revision or ""
        return LockedBase(source, commit, record.fingerprint, self._remote_base(reference, commit)), record

    def _remote_base(self, reference: Reference, commit: str) -> tuple[LockedFile, ...]:
        place, repo = self.where.open(reference), reference.repo or ""

        def read(file: RemoteFile) -> bytes:
            return place.read(repo, commit, file.path)

        return _base_files(
            place.files(repo, commit), read, lambda file: file.sha256 or sha256(read(file)), str(reference)
        )

    def _adapter(self, one: RecipeAdapter, record: BaseRecord) -> LockedAdapter:
        reference = at(self.folder, parse_reference(one.source))
        commit = None
        if reference.path is not None:
            manifest = open_adapter(reference.path).manifest
        else:
            commit = self._commit(one, reference)
            reference = replace(reference, revision=commit)
            manifest = self._manifest(reference)
        self._prove(one.name, one.source, reference, manifest, record)
        data = manifest.to_bytes()
        files = sorted((*manifest.files, FileEntry(MANIFEST_NAME, len(data), sha256(data))), key=lambda file: file.path)
        return LockedAdapter(one.name, one.source, commit, manifest.version, manifest.digest, one.weight, tuple(files))

    def _commit(self, one: RecipeAdapter, reference: Reference) -> str:
        for known in self.before.adapters if self.before else ():
            if (known.name, known.source) == (one.name, one.source) and known.revision:
                return known.revision
        place = self.where.open(reference)
        return resolve_revision(place, reference.repo or "", reference.revision).commit

    def _manifest(self, reference: Reference) -> Manifest:
        try:
            return read_manifest(reference, self.where)
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            what = f"there is no {MANIFEST_NAME} here: only packed adapters can be locked"
            fix = "hubkit pack it, then push it"
            raise HubkitError("HK-NOT-ADAPTER", what, where=str(reference), want=MANIFEST_NAME, fix=fix) from None

    def _prove(self, name: str, source: str, reference: Reference, manifest: Manifest, record: BaseRecord) -> None:
        from hubkit.artifact.identity.base_match import require_same_base

        if manifest.kind == "model":
            what, where = f"{name!r} is a merged checkpoint, not an adapter", f"{source}  {MANIFEST_NAME}#/kind"
            raise HubkitError("HK-NOT-ADAPTER", what, where=where, fix="name it as the recipe's [base]")
        assert manifest.base is not None  # neither an adapter nor a mix without one can be read
        try:
            require_same_base(name, source, manifest.base, record.fingerprint, None, record.tensors, False)
        except HubkitError as error:
            if not error.code.startswith("HK-BASE-"):
                raise
            tensors = self._tensors(reference, manifest)
            have = record.fingerprint, tensors, record.tensors
            self.overrides += require_same_base(name, source, manifest.base, *have, self.allow)

    def _tensors(self, reference: Reference, manifest: Manifest) -> tuple[TensorDigest, ...] | None:
        """The base's tensors as the adapter lists them; fetched only to say what differs."""
        if TENSORS_NAME not in {entry.path for entry in manifest.files}:
            return None
        source = adapter_source(str(reference), self.where)
        return open_adapter(source.path, verify=False).base_tensors()


def _local_base(folder: Path) -> tuple[LockedFile, ...]:
    listing = [
        RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return _base_files(
        listing,
        lambda file: (folder / file.path).read_bytes(),
        lambda file: hash_file(folder / file.path),
        str(folder),
    )


def _base_files(
    listing: Iterable[RemoteFile], read: Callable[[RemoteFile], bytes], digest: Callable[[RemoteFile], str], where: str
) -> tuple[LockedFile, ...]:
    """The files that make up a model, and no others, with digests."""
    from hubkit.registry.store.selection import select_base

    chosen = select_base(listing, None, read, where).files
    return tuple(LockedFile(path, file.size, digest(file)) for path, file in sorted(chosen.items()))


def _require_fresh(recipe: Recipe, path: Path, before: Lock, target: Path) -> None:
    have = [] if before.recipe == recipe.digest else [f"{path.name} changed since"]
    for one in before.adapters:
        reference = at(path.parent, parse_reference(one.source))
        if reference.path is not None and Manifest.read(reference.path).digest != one.digest:
            have.append(f"{one.source} changed since")
    if have:
        what, fix = "the lock is older than what it was made from", "hubkit lock"
        raise HubkitError("HK-LOCK-STALE", what, where=str(target), have=have, fix=fix)


def _changes(before: Lock | None, after: Lock) -> tuple[str, ...]:
    """What moved, by name."""
    old = {one.name: one for one in before.adapters} if before else {}
    new = {one.name: one for one in after.adapters}
    found = [] if before and before.base == after.base else ["base"]
    found += [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return (*found, "mix") if before and before.mix != after.mix else tuple(found)
