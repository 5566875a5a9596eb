"""A recipe turned into a lock. An entry moves only when it was asked to: what the recipe still asks for in the same
words keeps its commit, its digest and its files, whatever was published since.

Of repositories only listings, headers, manifests and small files are read; of what is stored nothing is asked at all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import TENSORS_NAME, open_adapter
from hubkit.artifact.identity.base_match import OVERRIDE, require_same_base
from hubkit.documents.lock import Lock, LockedAdapter, LockedBase
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest
from hubkit.documents.recipe import Recipe, RecipeAdapter
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.locking.conflicts import Pins
from hubkit.locking.pinned_base import base_at, pin_base
from hubkit.locking.policy import license_of, refused, violations
from hubkit.named.locked import at, gone
from hubkit.named.members import stored, stored_manifest
from hubkit.named.sources import adapter_source, base_record, read_manifest
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord, TensorDigest


@dataclass
class Resolver:
    """Turns one recipe into a lock.

    Args:
        folder: of the recipe: folders that it names begin there.
        where: where repositories are looked for that name no registry.
        before: the lock before; None: there is none.
        pins: what is kept where the recipe still asks for it.
        upgrade: names of entries that are resolved anew all the same; ``base`` is the base.
        allow: lock adapters of another base.
        path: the recipe, for messages.
    """

    folder: Path
    where: Where
    before: Lock | None
    pins: Pins
    upgrade: Collection[str]
    allow: bool
    path: str
    overrides: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    _record: BaseRecord | None = None

    def run(self, recipe: Recipe) -> Lock:
        """The lock of a recipe.

        Raises:
            HubkitError: ``HK-NOT-ADAPTER``, ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN`` (status 3), ``HK-POLICY`` with
                every adapter that the recipe's policy does not allow; what the registry raises.
        """
        base = self._base(recipe)
        adapters = tuple(self._adapter(one, base, recipe) for one in recipe.adapters)
        if self.refusals:
            raise refused(recipe.policy, self.path, self.refusals)
        overrides = tuple(dict.fromkeys(self.overrides))
        return Lock(base, adapters, recipe.mix, recipe.digest, overrides, recipe.targets, recipe.policy)

    def _base(self, recipe: Recipe) -> LockedBase:
        wanted, known = recipe.base, self.pins.base
        if known is not None and known.revision and "base" not in self.upgrade and known.source == wanted.source:
            same = known.requested == wanted.revision or (
                self.before is not None and self.before.recipe == recipe.digest
            )
            if same and base_at(wanted, self.folder, known.revision).path is None:
                return known
        base, self._record = pin_base(wanted, self.folder, self.where)
        return base

    def _adapter(self, one: RecipeAdapter, base: LockedBase, recipe: Recipe) -> LockedAdapter:
        reference = at(self.folder, parse_reference(one.source))
        known = self.pins.adapters.get((one.name, one.source)) if one.name not in self.upgrade else None
        if known is not None and known.revision and self._needs_no_look(base, recipe):
            return replace(known, weight=one.weight)
        commit = None
        if reference.path is not None:
            manifest = open_adapter(reference.path).manifest
        elif known is not None and known.revision and (have := stored_manifest(known.digest)) is not None:
            commit, manifest = known.revision, have
            reference = replace(reference, revision=commit)
        else:
            commit, manifest = self._remote(one, reference, known.revision if known else None)
            reference = replace(reference, revision=commit)
        let = known is not None and known.digest == manifest.digest and self._let_pass(base)
        self._prove(one.name, one.source, reference, manifest, base, self.allow or let)
        self.refusals += violations(recipe.policy, one.name, manifest, reference, self.where)
        terms = license_of(manifest, reference, self.where) if recipe.policy.licenses else None
        data = manifest.to_bytes()
        files = sorted((*manifest.files, FileEntry(MANIFEST_NAME, len(data), sha256(data))), key=lambda file: file.path)
        names = one.name, one.source, commit, manifest.version, manifest.digest, one.weight
        return LockedAdapter(*names, tuple(files), terms)

    def _needs_no_look(self, base: LockedBase, recipe: Recipe) -> bool:
        """Whether what is pinned was proven before: on this base, under these rules, and nothing was let pass."""
        before = self.before
        return before is not None and before.base == base and before.policy == recipe.policy and not before.overrides

    def _let_pass(self, base: LockedBase) -> bool:
        """Whether the lock says that adapters of another base were let pass on this one."""
        return self.before is not None and self.before.base == base and OVERRIDE in self.before.overrides

    def _remote(self, one: RecipeAdapter, reference: Reference, commit: str | None) -> tuple[str, Manifest]:
        """(commit, manifest) of an adapter in a registry: at its commit, or at the one that it means now."""
        if self.where.offline:
            found = adapter_source(str(replace(reference, revision=commit or reference.revision)), self.where)
            return found.commit or "", Manifest.read(found.path)
        from hubkit.registry.store.store import Store

        place, repo = self.where.open(reference), reference.repo or ""
        try:
            if commit is None:
                now = resolve_revision(place, repo, reference.revision)
                Store().require_unmoved("adapter", place, repo, reference.folder, now)
                commit = now.commit
        except HubkitError as error:
            raise gone(one.name, reference, error) if error.code == "HK-NOT-FOUND" else error from None
        here = Store().at("adapter", place.name, repo, reference.folder, commit)
        if here is not None and (manifest := stored_manifest(here.digest)) is not None:
            return commit, manifest
        reference = replace(reference, revision=commit)
        try:
            return commit, read_manifest(reference, self.where)
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            try:
                place.refs(repo)
            except HubkitError as fault:
                raise gone(one.name, reference, fault) if fault.code == "HK-NOT-FOUND" else fault from None
            what = f"there is no {MANIFEST_NAME} here: only packed adapters can be locked"
            fix = "hubkit pack it, then push it"
            raise HubkitError("HK-NOT-ADAPTER", what, where=str(reference), want=MANIFEST_NAME, fix=fix) from None

    def _prove(
        self, name: str, source: str, reference: Reference, manifest: Manifest, base: LockedBase, allow: bool
    ) -> None:
        if manifest.kind == "model":
            what, where = f"{name!r} is a merged checkpoint, not an adapter", f"{source}  {MANIFEST_NAME}#/kind"
            raise HubkitError("HK-NOT-ADAPTER", what, where=where, fix="name it as the recipe's [base]")
        assert manifest.base is not None  # neither an adapter nor a mix without one can be read
        try:
            require_same_base(name, source, manifest.base, base.fingerprint)
        except HubkitError as error:
            if not error.code.startswith("HK-BASE-"):
                raise
            tensors = self._tensors(reference, manifest)
            have = base.fingerprint, tensors, self._base_tensors(base) if tensors else None
            self.overrides += require_same_base(name, source, manifest.base, *have, allow)

    def _tensors(self, reference: Reference, manifest: Manifest) -> tuple[TensorDigest, ...] | None:
        """The base's tensors as the adapter lists them; fetched only to say what differs."""
        if TENSORS_NAME not in {entry.path for entry in manifest.files}:
            return None
        known = stored(manifest.digest) if reference.path is None else None
        path = known.path if known is not None else adapter_source(str(reference), self.where).path
        return open_adapter(path, verify=False).base_tensors()

    def _base_tensors(self, base: LockedBase) -> tuple[TensorDigest, ...] | None:
        """Those of the base at hand; of one that was pinned before they are looked up, if they can be."""
        if self._record is None:
            try:
                self._record = base_record(str(base_at(base, self.folder, base.revision)), None, self.where)
            except HubkitError:
                return None
        return self._record.tensors
