"""The bundle's table of contents, ``bundle.json``: which artifacts an archive holds, each file with size and digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hubkit.documents.lock import LOCK_NAME, pretty
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.names import check_names
from hubkit.documents.schema import check, parse
from hubkit.errors import HubkitError

BUNDLE_NAME = "bundle.json"
SCHEMA = "hubkit/bundle/1"


@dataclass(frozen=True)
class BundledArtifact:
    """One adapter, mix or base in a bundle.

    Args:
        kind: ``adapter`` (mixes, too) or ``base``.
        digest: of its content, by which the store names it.
        folder: in the archive.
        license: SPDX identifier from its manifest; None where it names none.
        files: its files, sorted by path.
    """

    kind: Literal["adapter", "base"]
    digest: str
    folder: str
    license: str | None
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Bundle:
    """``bundle.json``.

    Args:
        lock: the file ``hubkit.lock``.
        artifacts: sorted by folder.
    """

    lock: FileEntry
    artifacts: tuple[BundledArtifact, ...]

    def members(self) -> tuple[FileEntry, ...]:
        """Every file of the archive after ``bundle.json``, in its order, by its name there."""
        inside = ((one.folder, file) for one in self.artifacts for file in one.files)
        return (self.lock, *(FileEntry(f"{folder}/{file.path}", file.size, file.sha256) for folder, file in inside))

    def to_bytes(self) -> bytes:
        """The bytes of ``bundle.json``.

        Raises:
            HubkitError: ``HK-SECRET``, ``HK-SCHEMA``.
        """
        artifacts: list[dict[str, Any]] = []
        for one in self.artifacts:
            terms = {"license": one.license} if one.license else {}
            files = [file.to_document() for file in one.files]
            artifacts.append({"kind": one.kind, "digest": one.digest, "folder": one.folder, **terms, "files": files})
        return pretty({"schema": SCHEMA, "lock": self.lock.to_document(), "artifacts": artifacts}, "bundle")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Bundle:
        """Read the bytes of a ``bundle.json``.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-NEWER``; ``HK-NAME`` for a file outside its folder, or two
                that would be one; ``HK-BUNDLE`` for what contradicts itself.
        """
        document = parse(data, where)
        check(document, "bundle", where)
        artifacts = tuple(
            BundledArtifact(
                one["kind"],
                one["digest"],
                one["folder"],
                one.get("license"),
                tuple(map(FileEntry.from_document, one["files"])),
            )
            for one in document["artifacts"]
        )
        made = cls(FileEntry.from_document(document["lock"]), artifacts)
        check_names([BUNDLE_NAME, *(file.path for file in made.members())], where)
        wrong = [] if made.lock.path == LOCK_NAME else [f"lock: {made.lock.path}, not {LOCK_NAME}"]
        for one in artifacts:
            digests = {file.path: file.sha256 for file in one.files}
            if one.kind == "adapter" and digests.get(MANIFEST_NAME) != one.digest:
                wrong.append(f"{one.folder}: its digest is not that of its {MANIFEST_NAME}")
        folders = [one.folder for one in artifacts]
        if folders != sorted(set(folders)):
            wrong.append("its folders are not in order")
        if data != made.to_bytes():
            wrong.append("it is not written as hubkit writes it")
        if wrong:
            raise bad_bundle(f"{where}  {BUNDLE_NAME}", wrong)
        return made


def bad_bundle(where: str, have: str | list[str]) -> HubkitError:
    """The refusal of an archive that is not what `hubkit bundle` writes."""
    what, fix = "this is not a whole bundle of hubkit's", "copy it again from where it was made: hubkit bundle"
    return HubkitError("HK-BUNDLE", what, where=where, have=have, fix=fix)
