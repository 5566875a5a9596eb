"""What a lock names, found by its digest wherever it lies: in its folder, in the store, at its commit, under the tag of
its version, in a mirror (``HUBKIT_MIRRORS``), or wherever the same bytes were pulled from before.

Only the digest decides. A folder that the lock names by its path is the user's own: where it is there and has changed,
that is refused, and nothing else is taken in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import AdapterFolder, open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.lock import LockedAdapter, LockedBase, LockedFile
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.errors import HubkitError
from hubkit.named.members import stored
from hubkit.registry.api import Registry
from hubkit.registry.opening import Where, mirrors
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.store.placing import base_digest
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.registry.store.store import Store, Stored

_ELSEWHERE = ("HK-NOT-FOUND", "HK-NO-REVISION", "HK-OFFLINE", "HK-AUTH", "HK-FORBIDDEN", "HK-GATED", "HK-REGISTRY",
              "HK-BUSY", "HK-FILES", "HK-NOT-ADAPTER", "HK-NOT-MODEL", "HK-MISSING", "HK-JSON", "HK-SCHEMA", "HK-NEWER",
              "HK-NOT-CANONICAL", "HK-YANKED")  # fmt: skip
"""What one place may answer without ending the search at others."""


@dataclass(frozen=True)
class Found:
    """Something locked that lies here, every byte of it as it was locked.

    Args:
        path: its folder.
        reference: where it was found; a mix's members are looked for from there.
        place: ``folder``, ``store``, or the registry it was fetched from.
        fetched: bytes that were downloaded now.
    """

    path: Path
    reference: Reference
    place: str
    fetched: int = 0


def at(folder: Path, reference: Reference) -> Reference:
    """A reference as a recipe or lock in `folder` means it: relative paths begin there."""
    return reference if reference.path is None else replace(reference, path=folder / reference.path)


def find_adapter(one: LockedAdapter, folder: Path, where: Where) -> tuple[AdapterFolder, Found]:
    """The adapter or mix that a lock names.

    Args:
        folder: of the lock: folders that it names begin there.

    Raises:
        HubkitError: ``HK-LOCK-DRIFT`` where its folder has other bytes now; ``HK-LOCK-MISSING`` where its digest is
            found nowhere, with every place that was looked at.
    """
    reference = at(folder, parse_reference(one.source))
    if reference.path is not None and (reference.path / MANIFEST_NAME).is_file():
        return _own_folder(one, reference.path), Found(reference.path, reference, "folder")
    pinned = reference if reference.path is not None else replace(reference, revision=one.revision)
    if (known := stored(one.digest)) is not None:
        _require_listed(one, known)
        return known, Found(known.path, pinned, "store")
    store = _swept(one.digest, where)
    tried = _Tried(one.name, one.source, one.digest, store.references(one.digest))

    def fits(place: Registry, repo: str, commit: str, inside: str | None) -> bool:
        path = f"{inside}/{MANIFEST_NAME}" if inside else MANIFEST_NAME
        return Manifest.from_bytes(place.read(repo, commit, path), str(pinned)).digest == one.digest

    names = [one.revision, f"v{one.version}" if one.version else None]
    found = tried.search(_places(pinned, where, tried), names, reference.revision, fits, store.pull, where)
    if found is None:
        raise tried.refusal(where, f"hubkit sync, where {one.source} can be reached")
    got, fetched = found
    adapter = open_adapter(got.path)
    _require_listed(one, adapter)
    return adapter, fetched


def find_base(base: LockedBase, folder: Path, where: Where) -> Found:
    """The base that a lock names, its weights too.

    Args:
        folder: of the lock.

    Raises:
        HubkitError: ``HK-LOCK-DRIFT`` where its folder has other bytes now; ``HK-LOCK-MISSING`` where it is nowhere,
            with its digest, the names it is known by, and the command that gets it.
    """
    if base.revision is None and (own := folder / base.source).is_dir():
        require_files("base", base.source, own, base.files)
        return Found(own, Reference("folder", path=own), "folder")
    digest = base_digest(base.files)
    reference = Reference("folder", path=folder / base.source)
    if base.revision is not None:
        reference = replace(parse_reference(base.source), revision=base.revision)
    path = _home().use(digest)
    if path.is_dir() and not differing(path, base.files):
        return Found(path, reference, "store")
    store = _swept(digest, where)
    want = [base.fingerprint.weights or digest]
    want += [f"{file.path}: {file.sha256}" for file in base.files if file.path.endswith(".safetensors")]
    tried = _Tried("base", base.source, want, store.references(digest))
    listed = {file.path: file for file in base.files}

    def fits(place: Registry, repo: str, commit: str, inside: str | None) -> bool:
        start = f"{inside}/" if inside else ""
        there = {f.path.removeprefix(start): f for f in place.files(repo, commit) if f.path.startswith(start)}
        pairs = ((there.get(path), file) for path, file in listed.items())
        return all(f and f.size == file.size and f.sha256 in (None, file.sha256) for f, file in pairs)

    found = tried.search(
        _places(reference, where, tried), [base.revision], base.requested, fits, store.pull_base, where
    )
    if found is None:
        named = f"{base.source}@{base.revision}" if base.revision else base.source
        raise tried.refusal(where, f"hubkit pull --base {named}    or    hubkit sync, where it can be reached")
    got, fetched = found
    require_files("base", base.source, got.path, base.files)
    return fetched


def stored_files(one: LockedAdapter) -> Path | None:
    """The folder in the store of an adapter with tensors, where every file that the lock names has its digest.

    Nothing of it is read as a document: a manifest that has its digest was read when it came here.
    """
    path = _home().use(one.digest)
    listed = {file.path: file.sha256 for file in one.files}
    whole = listed.get(MANIFEST_NAME) == one.digest and any(name.endswith(".safetensors") for name in listed)
    return path if whole and path.is_dir() and not differing(path, one.files) else None


def needed_by(*documents: Path) -> None:
    """Remember locks and deployments of this machine: what they name stays in the store as long as they are there."""
    for path in documents:
        _home().needs.register(path)


def require_files(name: str, source: str, folder: Path, files: Iterable[LockedFile]) -> None:
    """Refuses a folder in which a locked file is missing or has other bytes.

    Raises:
        HubkitError: ``HK-LOCK-DRIFT`` with every difference.
    """
    if wrong := differing(folder, files):
        raise drift(name, source, wrong)


def differing(folder: Path, files: Iterable[LockedFile]) -> list[str]:
    """The locked files that are missing in a folder or have other bytes there, a line each."""
    wrong = []
    for entry in files:
        path = folder / entry.path
        have = hash_file(path) if path.is_file() else "missing"
        if have != entry.sha256:
            wrong.append(f"{entry.path}: {have}, not {entry.sha256}")
    return wrong


def drift(name: str, source: str, have: list[str]) -> HubkitError:
    """The refusal of something that is not what was locked."""
    what, fix = f"{name!r} is not what was locked", "hubkit lock, after making sure that the change is wanted"
    return HubkitError("HK-LOCK-DRIFT", what, where=source, have=have, fix=fix)


def gone(name: str, reference: Reference, error: HubkitError) -> HubkitError:
    """The refusal of an entry whose repository a registry does not have any more."""
    what = f"{name!r}: there is no repository {reference.repo}: deleted, renamed, or private"
    remedy = "base in hubkit.toml" if name == "base" else f"source in hubkit.toml, or: hubkit remove {name}"
    return HubkitError(
        "HK-NOT-FOUND", what, where=error.where or str(reference), have=error.have, fix=f"another {remedy}"
    )


class _Tried:
    """One search: which places were looked at, and what they said."""

    def __init__(self, name: str, source: str, want: str | list[str], known: tuple[str, ...]) -> None:
        self.name, self.source, self.want, self.known = name, source, want, known
        self.said: list[str] = []

    def search(
        self,
        places: Iterable[tuple[Registry, Reference]],
        names: list[str | None],
        asked: str | None,
        fits: Callable[[Registry, str, str, str | None], bool],
        pull: Callable[..., Stored],
        where: Where,
    ) -> tuple[Stored, Found] | None:
        """The first place that has what fits, pulled from there.

        Args:
            names: commits and tags to look at first, None passed over; then what was `asked` for.
        """
        for place, reference in () if where.offline else places:
            repo, inside = reference.repo or "", reference.folder
            for revision in dict.fromkeys([*(name for name in names if name), reference.revision, asked]):
                try:
                    commit = resolve_revision(place, repo, revision).commit
                    if not fits(place, repo, commit, inside):
                        self.said.append(f"{place.name}/{repo}@{revision or '(default)'}: another one")
                        continue
                    got = pull(place, repo, commit, folder=inside, progress=where.progress)
                    return got, Found(got.path, replace(reference, revision=commit), place.name, got.fetched)
                except HubkitError as error:
                    if error.code not in _ELSEWHERE:
                        raise
                    self.said.append(f"{place.name}/{repo}@{revision or '(default)'}: {error.code}: {error.what}")
                    if error.code == "HK-OFFLINE":
                        break
        return None

    def refusal(self, where: Where, fix: str) -> HubkitError:
        """That nobody has it."""
        what = f"{self.name!r} is not here" + (", and offline nothing can be fetched" if where.offline else "")
        if not where.offline:
            what = f"{self.name!r} is nowhere to be had as it was locked"
        have = self.said + [f"it was pulled before as {name}" for name in self.known]
        have = have or ["it was never pulled here"]
        return HubkitError("HK-LOCK-MISSING", what, where=self.source, want=self.want, have=have, fix=fix)


def _places(reference: Reference, where: Where, tried: _Tried) -> Iterator[tuple[Registry, Reference]]:
    """Where to look, in order: where the lock says, in each mirror under the same name, under every known name."""
    if reference.path is None:
        yield where.open(reference), reference
        for place in mirrors():
            yield place, replace(reference, **_address(place.name))
    for text in tried.known:
        known = parse_reference(text)
        yield where.open(known), known


def _address(name: str) -> dict[str, Any]:
    """The fields of a reference into the registry of this name."""
    found = parse_reference(f"{name}/x/x")
    return {"scheme": found.scheme, "endpoint": found.endpoint}


def _own_folder(one: LockedAdapter, path: Path) -> AdapterFolder:
    adapter = open_adapter(path)
    if adapter.manifest.digest != one.digest:
        raise drift(one.name, one.source, [f"{MANIFEST_NAME}: {adapter.manifest.digest}, not {one.digest}"])
    _require_listed(one, adapter)
    return adapter


def _require_listed(one: LockedAdapter, adapter: AdapterFolder) -> None:
    """The files that a lock names are those of the manifest, whose bytes were just compared with it."""
    listed = {(file.path, file.size, file.sha256) for file in adapter.manifest.files}
    locked = {(file.path, file.size, file.sha256) for file in one.files if file.path != MANIFEST_NAME}
    if wrong := sorted(f"{path}: {size} bytes, {digest} in one alone" for path, size, digest in listed ^ locked):
        raise drift(one.name, one.source, wrong)


def _home() -> Store:
    from hubkit.registry.store.store import Store

    return Store()


def _swept(digest: str, where: Where) -> Store:
    """The store, without an artifact of this digest whose bytes are not its own: it is about to be fetched again."""
    store = _home()
    if not where.offline and store.path(digest).is_dir():
        store.remove(digest)
    return store
