"""What a reference on a command line stands for: a folder here, or an artifact brought into the store."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.errors import USAGE, HubkitError
from hubkit.named.where import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.registry.store.store import Stored

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
"""Names that a manifest can hold, as its schema has it."""


@dataclass(frozen=True)
class Source:
    """An adapter or base that lies in a folder now.

    Args:
        path: the folder.
        reference: what names it for people: the folder as given, or the repository at its commit.
        stored: how it came into the store; None for a folder that was there.
    """

    path: Path
    reference: str
    stored: Stored | None = None

    @property
    def commit(self) -> str | None:
        """The 40-hex commit, None for a folder."""
        return self.stored.commit if self.stored else None


def adapter_source(text: Path | str, where: Where) -> Source:
    """The folder of the adapter that `text` names; pulled unless it is a folder already.

    Raises:
        HubkitError: ``HK-REFERENCE``, what pulling raises.
    """
    return _source(parse_reference(text), False, where)


def base_source(text: Path | str, revision: str | None, where: Where) -> Source:
    """The folder of the base that `text` names; pulled unless it is a folder already.

    Args:
        text: reference of a base; a folder that holds a ``config.json`` needs no ``./``.
        revision: instead of the default branch, where `text` names no revision.

    Raises:
        HubkitError: ``HK-REFERENCE``, what pulling raises.
    """
    return _source(base_reference(text, revision), True, where)


def base_with_record(text: Path | str, revision: str | None, where: Where) -> tuple[Source, BaseRecord]:
    """The folder of the base that `text` names, and its identity under the name that people know it by.

    Raises:
        HubkitError: as `base_source`; what is wrong with the base's files.
    """
    from hubkit.artifact.identity.digest import fingerprint_folder

    source = base_source(text, revision, where)
    named = base_reference(text, revision).repo or source.reference
    return source, fingerprint_folder(source.path, source=named, revision=source.commit)


def chosen_name(name: str | None, folder: Path) -> str:
    """The name of what is about to be written to `folder`: the one given, else the folder's own.

    Raises:
        HubkitError: ``HK-NAME`` (status 2) for one that a manifest cannot hold.
    """
    chosen = name or folder.resolve().name
    if not re.fullmatch(NAME, chosen, re.ASCII):
        raise HubkitError(
            "HK-NAME",
            "this cannot be the name of an adapter",
            want="up to 96 of A-Z a-z 0-9 . _ -, a letter or digit first",
            have=chosen,
            fix="--name NAME",
            status=USAGE,
        )
    return chosen


def base_reference(text: Path | str, revision: str | None = None) -> Reference:
    """The parsed reference of a base, see `base_source`."""
    if isinstance(text, Path) or (Path(text) / "config.json").is_file():
        return Reference("folder", path=Path(text))
    found = parse_reference(text)
    return replace(found, revision=found.revision or revision) if found.kind == "repo" else found


def base_record(text: Path | str, revision: str | None, where: Where) -> BaseRecord:
    """The identity of the base that `text` names: of a folder by its bytes, of a repository by its listing and headers.

    Nothing but headers and small files is downloaded.

    Raises:
        HubkitError: ``HK-REFERENCE``, what the registry raises, what is wrong with the base's files.
    """
    from hubkit.artifact.identity.digest import fingerprint_folder, fingerprint_listing

    reference = base_reference(text, revision)
    if reference.path is not None:
        return fingerprint_folder(reference.path, source=str(reference))
    place, repo = where.open(reference), _repo(reference)
    commit = resolve_revision(place, repo, reference.revision).commit
    files = {file.path: (file.size, file.sha256) for file in place.files(repo, commit)}

    def read(path: str, start: int, stop: int | None) -> bytes:
        return place.read(repo, commit, path, start, stop)

    return fingerprint_listing(files, read, source=repo, revision=commit)


def read_manifest(reference: Reference, where: Where) -> Manifest:
    """The manifest of the adapter that `reference` names; of a repository nothing else is read.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` for a folder without one, ``HK-NOT-FOUND`` for a repository without one; what
            the manifest and the registry raise.
    """
    if reference.path is not None:
        return Manifest.read(reference.path)
    place, repo = where.open(reference), _repo(reference)
    commit = resolve_revision(place, repo, reference.revision).commit
    inside = f"{reference.folder}/" if reference.folder else ""
    data = place.read(repo, commit, inside + MANIFEST_NAME)
    return Manifest.from_bytes(data, f"{replace(reference, revision=commit)}  {MANIFEST_NAME}")


def _source(reference: Reference, base: bool, where: Where) -> Source:
    from hubkit.registry.store.store import Store

    if reference.path is not None:
        return Source(reference.path, str(reference))
    place, repo, store = where.open(reference), _repo(reference), Store()
    pull, folder = store.pull_base if base else store.pull, reference.folder
    stored = pull(place, repo, reference.revision, folder=folder, offline=where.offline, progress=where.progress)
    return Source(stored.path, str(replace(reference, revision=stored.commit)), stored)


def _repo(reference: Reference) -> str:
    assert reference.repo is not None  # what is no folder names one
    return reference.repo
