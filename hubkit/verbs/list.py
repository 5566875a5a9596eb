"""`list`: what the local store holds, or what a registry offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import WEIGHTS_NAME
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.shown import Shown, Table
from hubkit.errors import HubkitError
from hubkit.registry.address import is_repo
from hubkit.registry.opening import open_registry
from hubkit.registry.versions import sorted_versions

if TYPE_CHECKING:
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
    """

    reference: str
    kind: str | None
    versions: tuple[str, ...]
    digest: str | None = None
    size: int | None = None
    path: Path | None = None


@checked
def list(prefix: str = "", *, remote: bool = False, registry: str | None = None) -> tuple[Listed, ...]:
    """What there is.

    Args:
        prefix: only repositories that begin with it: ``ana``, ``ana/ch``.
        remote: look into the registry instead of the store.
        registry: which registry; implies `remote`.

    Raises:
        HubkitError: what the registry raises.
    """
    return _remote(prefix, registry) if remote or registry else _stored(prefix)


def _stored(prefix: str) -> tuple[Listed, ...]:
    from hubkit.registry.store.store import Store

    return Table(
        Listed(entry.reference, _kind(entry), entry.names, entry.digest, entry.size, entry.path)
        for entry in Store().list()
        if entry.repo.startswith(prefix)
    )


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
