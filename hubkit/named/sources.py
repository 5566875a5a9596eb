"""What a reference on a command line stands for: a folder here, or an artifact brought into the store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.manifest import MANIFEST_NAME, BaseFingerprint, Manifest
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.named.outline import Outline
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
        outline: that its weights were not pulled: the folder holds their headers.
    """

    path: Path
    reference: str
    stored: Stored | None = None
    outline: Outline | None = None

    @property
    def commit(self) -> str | None:
        """The 40-hex commit, None for a folder."""
        found = self.stored or self.outline
        return found.commit if found else None


@contextmanager
def doubted(source: Source) -> Iterator[None]:
    """Where something is refused inside, the bytes that came out of the store are read again: was it those?

    Raises:
        HubkitError: ``HK-FILES`` in place of the refusal where they are damaged; the next pull fetches them anew.
    """
    try:
        yield
    except HubkitError as fault:
        if source.stored is None:
            raise
        from hubkit.registry.store.store import Store

        found = [path for one in Store().verify(source.stored.digest) for path in one.damaged]
        if not found:
            raise
        have = [f"{path}: missing or damaged" for path in found]
        what, fix = "files in the store are not what was pulled", f"hubkit pull {source.reference}"
        raise HubkitError("HK-FILES", what, where=str(source.path), have=have, fix=fix) from fault


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


def base_with_record(
    text: Path | str, revision: str | None, where: Where, at_most: int | None = None
) -> tuple[Source, BaseRecord]:
    """The folder of the base that `text` names, and its identity under the name that people know it by.

    Args:
        at_most: bytes of the base to read for digests, see `fingerprint_folder`; one that is not here yet is not pulled
            then, but outlined.

    Raises:
        HubkitError: as `base_source`; what is wrong with the base's files.
    """
    from hubkit.artifact.identity.digest import fingerprint_folder
    from hubkit.named.outline import outline

    reference = base_reference(text, revision)
    made = None if at_most is None or reference.path is not None or where.offline else outline(reference, where)
    if made is not None:
        source, at_most = Source(made.path, str(replace(reference, revision=made.commit)), outline=made), 0
    else:
        source = base_source(text, revision, where)
    named = base_reference(text, revision).repo or source.reference
    return source, fingerprint_folder(source.path, source=named, revision=source.commit, at_most=at_most)


def under_its_name(source: Source, record: BaseRecord, declared: Reference | None = None) -> BaseRecord:
    """The identity of a base that lies in a folder of this machine, under a name by which others can get it.

    That is the repository and commit from which the store has the same weights; else nothing is proven, and what
    another tool's configuration says of it is kept as its word.

    Args:
        source: where the base is.
        declared: the repository that the adapter's own configuration names.
    """
    if source.stored is not None:
        return record
    from hubkit.registry.store.store import Store

    found = Store().base_of(record.fingerprint.files)
    if found is not None:
        return replace(record, fingerprint=replace(record.fingerprint, source=found[0], revision=found[1]))
    said = str(declared) if declared is not None and declared.repo else None
    return replace(record, fingerprint=replace(record.fingerprint, declared=said))


def named_base(
    base: Path | str | None, revision: str | None, origin: BaseFingerprint | None
) -> tuple[Path | str, str | None]:
    """The base that is named, or the one that a manifest names, and its revision.

    Raises:
        HubkitError: ``HK-BASE-NEEDED`` (status 2) where neither says where one is.
    """
    if base:
        return base, revision
    if origin is None or not origin.source or (origin.revision is None and not Path(origin.source).is_dir()):
        have = f"the adapter's manifest says {origin.source!r}" if origin and origin.source else ""
        raise HubkitError("HK-BASE-NEEDED", "no base is named", have=have, fix="--base DIR-OR-ORG/NAME", status=USAGE)
    return origin.source, revision or origin.revision


@contextmanager
def naming_digest(origin: BaseFingerprint | None) -> Iterator[None]:
    """Adds to the refusal of a base that is not here, and cannot be fetched, by which digest anybody may know it.

    Args:
        origin: the base as an adapter's manifest has it.
    """
    try:
        yield
    except HubkitError as error:
        if error.code == "HK-OFFLINE" and origin is not None and not error.want:
            named = f"  ({origin.source} @ {origin.revision})" if origin.source and origin.revision else ""
            error.want = [f"{origin.weights or origin.layout}{named}"]
            error.want += [f"{name}: {digest}" for name, digest in sorted(origin.files.items())]
        raise


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
    stored = pull(
        place,
        repo,
        reference.revision,
        folder=folder,
        offline=where.offline,
        progress=where.progress,
        allow_moved=where.allow_moved,
    )
    return Source(stored.path, str(replace(reference, revision=stored.commit)), stored)


def _repo(reference: Reference) -> str:
    assert reference.repo is not None  # what is no folder names one
    return reference.repo
