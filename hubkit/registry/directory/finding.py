"""Searching a directory registry: one look at each repository, and an index of what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from hubkit.errors import HubkitError
from hubkit.registry.catalogue import Catalogue, Row, Stamp
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.searching import Hit, Wanted, described

DOCUMENTS = ("hubkit.json", "adapter_config.json")
MOST = 100
"""Adapters of one repository that are looked at."""
_CARD = 64 << 10
LARGEST = 8 << 20


def search_directory(place: DirectoryRegistry, wanted: Wanted, indexes: Path) -> list[Hit]:
    """The adapters that fit, at the tips of their repositories' default branches, sorted.

    Args:
        indexes: the folder of hubkit's own in which what was read is remembered.

    Raises:
        HubkitError: ``HK-NOT-FOUND`` where there is no directory.
    """
    if not (place.root / "repos").is_dir():
        what, fix = "there is no registry", "--registry WHERE, or HUBKIT_REGISTRY"
        raise HubkitError("HK-NOT-FOUND", what, where=place.name, fix=fix)
    name = hashlib.sha256(place.name.encode()).hexdigest()[:16]
    rows = Catalogue(indexes / f"{name}.json").rows(dict(_seen(place.root / "repos")), lambda repo: _read(place, repo))
    return sorted((Hit.from_row(row) for row in rows if wanted.fits(row)), key=lambda hit: (hit.repo, hit.folder))


def _seen(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Each repository and how the one file looks that changes when anything in it does."""
    for organization in os.scandir(folder):
        for repo in os.scandir(organization.path) if organization.is_dir() else ():
            try:
                info = os.stat(f"{repo.path}/refs.json")
            except OSError:
                continue
            yield f"{organization.name}/{repo.name}", [info.st_mtime_ns, info.st_ino, info.st_size]


def _read(place: DirectoryRegistry, repo: str) -> list[Row]:
    """The adapters of a repository; none where it is damaged: `list` and `pull` say so."""
    try:
        commit = place.resolve(repo, None)
        tree = place.tree(repo, commit)
        folders = sorted({path.rpartition("/")[0] for path in tree if path.rpartition("/")[2] in DOCUMENTS})[:MOST]

        def small(path: str) -> bytes | None:
            entry = tree.get(path)
            return place.read(repo, commit, path) if entry is not None and entry.size <= LARGEST else None

        found = []
        for folder in folders:
            inside = f"{folder}/" if folder else ""
            manifest, peft = (small(inside + name) for name in DOCUMENTS)
            card = small(f"{inside}README.md")
            said = described(manifest, peft, card and card[:_CARD])
            digest = f"sha256:{tree[inside + DOCUMENTS[0]].sha256}" if manifest else ""
            found.append(Hit(repo, folder, commit, place.name, artifact=digest, **said).to_row())
        return found
    except HubkitError:
        return []
