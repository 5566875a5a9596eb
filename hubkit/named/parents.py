"""The adapters that a merged checkpoint was made from, found again by the digests of their manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hubkit.artifact.folder import MANIFEST_NAME, AdapterFolder
from hubkit.documents.manifest import Manifest, Parent
from hubkit.errors import UNDECIDED, HubkitError
from hubkit.named.members import stored
from hubkit.named.sources import Source, adapter_source
from hubkit.named.terms import Term, open_sources
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference


def open_parents(merged: AdapterFolder, named: Iterable[Path | str], where: Where) -> list[Term]:
    """The parents of `merged` as the terms that were merged, in order.

    Each is looked for among `named`, in the store, and where its reference says: in a folder, seen from the working
    folder and from beside the merged checkpoint, or in a registry.

    Raises:
        HubkitError: ``HK-MERGE-UNPROVEN`` (status 3) with every parent that is nowhere, and why; what opening raises.
    """
    given = {Manifest.read(source.path).digest: source for source in (adapter_source(text, where) for text in named)}
    sources: list[tuple[Source, float]] = []
    absent: list[str] = []
    for parent in merged.manifest.parents:
        try:
            sources.append((given.get(parent.digest) or _found(parent, merged.path, where), parent.weight))
        except HubkitError as error:
            absent.append(f"{parent.reference}: {error.code}: {error.what}, want {parent.digest}")
    if absent or not sources:
        raise HubkitError(
            "HK-MERGE-UNPROVEN",
            "the merge cannot be made again: what it was made from is not here",
            where=f"{merged.path / MANIFEST_NAME}#/parents",
            have=absent or "no parents",
            fix="hubkit verify DIR --parent DIR-OR-ORG/NAME, once for each",
            status=UNDECIDED,
        )
    return open_sources(sources, where)


def _found(parent: Parent, merged: Path, where: Where) -> Source:
    if (known := stored(parent.digest)) is not None:
        return Source(known.path, parent.reference)
    for folder in _folders(parent.reference, merged):
        if (folder / MANIFEST_NAME).is_file() and Manifest.read(folder).digest == parent.digest:
            return Source(folder, str(Reference("folder", path=folder)))
    source = adapter_source(parent.reference, where)
    if Manifest.read(source.path).digest != parent.digest:
        raise HubkitError("HK-NOT-FOUND", "it is another adapter by now")
    return source


def _folders(reference: str, merged: Path) -> Iterator[Path]:
    """What a reference may be as a folder; of one outside the working folder a manifest keeps its own name alone."""
    try:
        found = parse_reference(reference).path
    except HubkitError:
        found = Path(reference)
    if found is not None:
        yield from (found, merged.resolve().parent / found)
