"""A base of a registry by its headers alone: what it holds is planned with before anything large is pulled.

Small files are fetched, of the weights their headers; the rest of a weight file is a hole of the right size (a sparse
file), so that whatever opens a base's folder opens this one. Its values are zeros that nobody may read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hubkit.artifact.identity.header import header_length
from hubkit.errors import HubkitError
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference
from hubkit.registry.versions import resolve_revision

if TYPE_CHECKING:
    from hubkit.registry.api import Registry, RemoteFile

SUFFIX = ".safetensors"
SMALL = 64 << 20
"""Bytes of a file beside the weights that is fetched; a larger one is no tokenizer, and a hole, too."""


@dataclass(frozen=True)
class Outline:
    """A base's folder without values.

    Args:
        folder: it goes with this object.
        commit: what was read.
    """

    folder: TemporaryDirectory[str]
    commit: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder.name)


def outline(reference: Reference, where: Where) -> Outline | None:
    """The outline of a base in a registry; None where its values are needed, too, to know what it holds, or are here.

    Raises:
        HubkitError: what the registry raises; what is wrong with the base's files.
    """
    from hubkit.registry.store.selection import select_base

    assert reference.repo is not None, "a folder is here already"
    place, repo = where.open(reference), reference.repo
    commit = resolve_revision(place, repo, reference.revision).commit
    if _stored(place, reference, commit):
        return None
    chosen = select_base(
        place.files(repo, commit), reference.folder, lambda file: place.read(repo, commit, file.path), str(reference)
    ).files
    config = json.loads(place.read(repo, commit, chosen["config.json"].path))
    if not isinstance(config, dict) or "quantization_config" in config:
        return None  # packed weights say in their values what they are
    made = Outline(TemporaryDirectory(prefix="hubkit-", ignore_cleanup_errors=True), commit)
    for name, file in chosen.items():
        target = made.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_beginning(place, repo, commit, file))
        with target.open("r+b") as opened:
            opened.truncate(file.size)
    return made


def _beginning(place: Registry, repo: str, commit: str, file: RemoteFile) -> bytes:
    """A file, or the header of a weight file."""
    if not file.path.endswith(SUFFIX):
        return place.read(repo, commit, file.path) if file.size <= SMALL else b""
    head = place.read(repo, commit, file.path, 0, min(file.size, 1 << 16))
    length = 8 + header_length(head[:8], file.path)
    return head + place.read(repo, commit, file.path, len(head), length) if len(head) < length else head[:length]


def _stored(place: Registry, reference: Reference, commit: str) -> bool:
    """Whether the store has the base at this commit."""
    from hubkit.registry.store.store import Store

    try:
        Store().pull_base(place, reference.repo or "", commit, folder=reference.folder, offline=True)
    except HubkitError as error:
        if error.code != "HK-OFFLINE":
            raise
        return False
    return True
