"""What a lock names, put together for a bundle, and taken out of one into the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.folder import AdapterFolder
from hubkit.documents.bundle import Bundle, BundledArtifact, bad_bundle
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest
from hubkit.documents.schema import sha256
from hubkit.named.locked import Found, differing
from hubkit.named.members import unused
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.store.archive import Archive
from hubkit.registry.store.placing import base_digest
from hubkit.registry.store.store import Store
from hubkit.registry.versions import is_range, parse_version


@dataclass(frozen=True)
class Gathered:
    """What goes into a bundle.

    Args:
        bundle: its table of contents.
        lock: the bytes of the lock.
        sources: folder in the archive -> folder here.
    """

    bundle: Bundle
    lock: bytes
    sources: dict[str, Path]


def gathered(lock: Lock, adapters: list[tuple[str, AdapterFolder]], base: Found | None) -> Gathered:
    """The contents of a bundle of these artifacts, each once.

    Args:
        adapters: (name, folder) of every adapter and mix, those in mixes, too.
        base: None: it is left out.
    """
    found: dict[str, tuple[BundledArtifact, Path]] = {}
    for name, adapter in adapters:
        digest = adapter.manifest.digest
        folder = f"adapters/{name}-{digest.removeprefix('sha256:')[:12]}"
        if digest not in {one.digest for one, _ in found.values()}:
            files = _files(adapter.manifest)
            one = BundledArtifact("adapter", digest, folder, adapter.manifest.license, files)
            found[folder] = one, adapter.path
    if base is not None:
        files = tuple(sorted(lock.base.files, key=lambda file: file.path))
        manifest = Manifest.read(base.path) if MANIFEST_NAME in {file.path for file in files} else None
        terms = manifest.license if manifest else None
        found["base"] = BundledArtifact("base", base_digest(files), "base", terms, files), base.path
    data = lock.to_bytes()
    bundle = Bundle(FileEntry(LOCK_NAME, len(data), sha256(data)), tuple(one for _, (one, _) in sorted(found.items())))
    return Gathered(bundle, data, {folder: path for folder, (_, path) in found.items()})


def received(archive: Archive) -> int:
    """Everything of a bundle brought into the store; the bytes that were not there.

    Raises:
        HubkitError: what `Store.pull` refuses.
    """
    store, total = Store(), 0
    for one in archive.bundle.artifacts:
        if store.path(one.digest).is_dir() and differing(store.path(one.digest), one.files):
            store.remove(one.digest)  # damaged
        name, commit = one.folder.rpartition("/")[2], one.digest.removeprefix("sha256:")[:40]
        got = store.receive(one.kind, archive.view(one), name, commit)
        if got.digest != one.digest:
            raise bad_bundle(str(archive.path), f"{one.folder}: {got.digest}, not {one.digest}")
        total += got.fetched
    return total


def remember(lock: Lock, where: Where) -> None:
    """Note under which references and commits a lock knows what is stored: offline it is found by those."""
    store = Store()
    listed = {one.digest: one.files for one in lock.adapters} | {base_digest(lock.base.files): lock.base.files}
    kinds = {base_digest(lock.base.files): "base"}
    for digest, (reference, revision, names) in _origins(lock):
        if reference.repo is not None and revision is not None and store.path(digest).is_dir():
            place = where.open(reference).name
            kind = kinds.get(digest, "adapter")
            store.remember(kind, place, reference.repo, reference.folder, revision, digest, listed[digest], names)


Origin = tuple[Reference, str | None, tuple[str | None, ...]]


def _origins(lock: Lock) -> Iterator[tuple[str, Origin]]:
    """(digest, where a lock has it from: reference, commit, what else means the commit) of what is in registries."""
    if lock.base.revision is not None:
        reference = parse_reference(lock.base.source)
        asked = reference.revision or lock.base.requested
        yield base_digest(lock.base.files), (reference, lock.base.revision, (asked,))
    for one in lock.adapters:
        if one.revision is not None:
            reference = parse_reference(one.source)
            asked = reference.revision
            by_version = asked is not None and (is_range(asked) or parse_version(asked.removeprefix("v")) is not None)
            names = (asked, *([f"v{one.version}"] if by_version and one.version else []))
            yield one.digest, (reference, one.revision, names)


def named(adapters: list[tuple[str, AdapterFolder]]) -> list[tuple[str, AdapterFolder]]:
    """The same with names of which none occurs twice."""
    taken: set[str] = set()
    made = []
    for name, adapter in adapters:
        chosen = unused(name, taken)
        taken.add(chosen)
        made.append((chosen, adapter))
    return made


def _files(manifest: Manifest) -> tuple[FileEntry, ...]:
    data = manifest.to_bytes()
    entries = [*manifest.files, FileEntry(MANIFEST_NAME, len(data), sha256(data))]
    plain = (FileEntry(entry.path, entry.size, entry.sha256) for entry in entries)
    return tuple(sorted(plain, key=lambda entry: entry.path))
