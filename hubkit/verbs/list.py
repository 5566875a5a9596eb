"""`list`: what the local store holds, or what a registry offers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import WEIGHTS_NAME
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.shown import Shown, Table
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.address import is_repo
from hubkit.registry.opening import open_registry
from hubkit.registry.versions import sorted_versions

if TYPE_CHECKING:
    from hubkit.documents.manifest import BaseFingerprint
    from hubkit.registry.store.store import StoredEntry

FEW = 20
"""Up to so many repositories are listed with their versions: that is one request each."""


@dataclass(frozen=True, repr=False)
class Listed(Shown):
    """One line.

    Args:
        reference: what `pull` takes: a repository at its commit (store) or a repository (registry).
        kind: ``adapter``, ``base`` or ``mix: <its tree>`` in the store; None for a repository not yet looked into.
        versions: names that mean it: branches, tags and ranges asked for (store), version tags (registry).
        digest: of what is stored.
        size: bytes of what is stored.
        path: where it is stored.
        pulled: the day on which it came into the store, ``2026-11-30``.
        fits: whether it was made on the base that was asked about, of a mix all its adapters; None where nobody asked,
            where it is no adapter, and where that is not known.
    """

    reference: str
    kind: str | None
    versions: tuple[str, ...]
    digest: str | None = None
    size: int | None = None
    path: Path | None = None
    pulled: str | None = None
    fits: bool | None = None


@checked
def list(
    prefix: str = "", *, remote: bool = False, registry: str | None = None, base: Path | str | None = None
) -> tuple[Listed, ...]:
    """What there is.

    Args:
        prefix: only repositories that begin with it: ``ana``, ``ana/ch``.
        remote: look into the registry instead of the store.
        registry: which registry; implies `remote`.
        base: say of each stored adapter whether it fits this base: a folder, or a repository whose files are looked at
            where it lives, or, where that does not answer, in the store.

    Raises:
        HubkitError: ``HK-OPTIONS`` for a base beside a registry, which `search` asks by base; what that raises.
    """
    if not remote and not registry:
        return _stored(prefix, base)
    if base is not None:
        what, fix = "what fits a base is said of the store alone", f"hubkit search --base {base}"
        raise HubkitError("HK-OPTIONS", what, have="base, with a registry", fix=fix, status=USAGE)
    return _remote(prefix, registry)


def _stored(prefix: str, base: Path | str | None) -> tuple[Listed, ...]:
    from hubkit.registry.store.store import Store

    wanted = None if base is None else _fingerprint(base)
    return Table(
        Listed(
            *(entry.reference, _kind(entry), entry.names, entry.digest, entry.size, entry.path, _day(entry.path)),
            fits=None if wanted is None or entry.kind == "base" else _fits(entry.path, wanted),
        )
        for entry in Store().list()
        if entry.repo.startswith(prefix)
    )


def _fingerprint(base: Path | str) -> BaseFingerprint:
    from hubkit.artifact.identity.digest import fingerprint_folder
    from hubkit.named.sources import base_record, base_source
    from hubkit.registry.opening import Where

    try:
        return base_record(base, None, Where()).fingerprint
    except HubkitError as fault:
        if fault.code != "HK-OFFLINE":
            raise
        return fingerprint_folder(base_source(base, None, Where(offline=True)).path).fingerprint


def _fits(folder: Path, base: BaseFingerprint) -> bool | None:
    """Whether an adapter was made on a base; of a mix, whether all its members were."""
    from hubkit.artifact.identity.base_match import proven

    try:
        manifest = Manifest.read(folder)
    except HubkitError:
        return None  # another tool's, which names no digest; or damaged
    found = [None if manifest.base is None else proven(manifest.base, base)]
    if manifest.kind == "mix":
        inside = [folder.with_name(one.digest.removeprefix("sha256:")) for one in manifest.mixed().members.values()]
        found += [_fits(one, base) for one in inside]
    return None if None in found and False not in found else all(found)


def _day(path: Path) -> str:
    return date.fromtimestamp(path.stat().st_mtime).isoformat()


def _kind(entry: StoredEntry) -> str:
    """How it was pulled; of a mix, which has no tensors, its tree."""
    if (entry.path / WEIGHTS_NAME).is_file() or not (entry.path / MANIFEST_NAME).is_file():
        return entry.kind
    try:
        manifest = Manifest.read(entry.path)
    except HubkitError:
        return entry.kind  # somebody has been in the store: `verify` says so
    return f"mix: {manifest.mixed().tree}" if manifest.kind == "mix" else entry.kind


def _remote(prefix: str, registry: str | None) -> tuple[Listed, ...]:
    place = open_registry(None, registry)
    found = place.repos(prefix or None)
    repos = (prefix,) if is_repo(prefix) and prefix in found else found
    few = len(repos) <= FEW
    return Table(Listed(repo, None, tuple(sorted_versions(place.refs(repo).tags)) if few else ()) for repo in repos)
