"""`inspect`: what an adapter is, read from its manifest and its header; of a repository nothing else is downloaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hubkit.artifact.folder import WEIGHTS_NAME, open_adapter
from hubkit.artifact.identity.header import TensorInfo, header_length, parse_header
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

PREFIX = 8
"""Bytes of a safetensors file that say how long its header is."""


@dataclass(frozen=True, repr=False)
class Inspected(Shown):
    """What an adapter is.

    Args:
        reference: the folder as given, or the repository at its commit.
        digest: the adapter's identity: the sha256 of its ``hubkit.json``.
        manifest: what it says of itself; the files are not compared with it (`verify` does).
        size: bytes of the files it lists.
        tensors: how many tensors it has.
        parameters: how many numbers they hold.
        dtypes: of its tensors, sorted.
    """

    reference: str
    digest: str
    manifest: Manifest
    size: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]


@checked
def inspect(reference: Path | str, *, registry: str | None = None) -> Inspected:
    """Describe the adapter that `reference` names.

    Args:
        reference: a folder or a repository, at a revision or not.
        registry: where, if not the default registry.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` where there is no ``hubkit.json``; what the manifest, the header and the
            registry raise.
    """
    found = parse_reference(reference)
    if found.path is not None:
        adapter = open_adapter(found.path, verify=False)
        header = adapter.header() if _has_tensors(adapter.manifest) else {}
        return _inspected(str(found), adapter.manifest, header)
    return _remote(found, registry)


def _remote(reference: Reference, registry: str | None) -> Inspected:
    place, repo = open_registry(reference, registry), reference.repo or ""
    commit = resolve_revision(place, repo, reference.revision).commit
    at = str(replace(reference, revision=commit))
    inside = f"{reference.folder}/" if reference.folder else ""
    try:
        data = place.read(repo, commit, inside + MANIFEST_NAME)
    except HubkitError as error:
        if error.code != "HK-NOT-FOUND":
            raise
        what = f"there is no {MANIFEST_NAME} here"
        fix = f"hubkit pull {reference}, then hubkit pack the folder that it names, with --base and --out"
        raise HubkitError("HK-NOT-ADAPTER", what, where=at, want=MANIFEST_NAME, fix=fix) from None
    manifest = Manifest.from_bytes(data, f"{at}  {MANIFEST_NAME}")
    sizes = {entry.path: entry.size for entry in manifest.files}
    header: Mapping[str, TensorInfo] = {}
    if _has_tensors(manifest):
        path, where = inside + WEIGHTS_NAME, f"{at}  {WEIGHTS_NAME}"
        length = header_length(place.read(repo, commit, path, 0, PREFIX), where)
        header = parse_header(place.read(repo, commit, path, 0, PREFIX + length), sizes[WEIGHTS_NAME], where)
    return _inspected(at, manifest, header)


def _has_tensors(manifest: Manifest) -> bool:
    return WEIGHTS_NAME in {entry.path for entry in manifest.files}


def _inspected(reference: str, manifest: Manifest, header: Mapping[str, TensorInfo]) -> Inspected:
    return Inspected(
        reference=reference,
        digest=manifest.digest,
        manifest=manifest,
        size=sum(entry.size for entry in manifest.files),
        tensors=len(header),
        parameters=sum(math.prod(tensor.shape) for tensor in header.values()),
        dtypes=tuple(sorted({tensor.dtype for tensor in header.values()})),
    )
