"""The lock, ``hubkit.lock``: what a recipe resolved to, so that what was tested is what runs.

Indented and sorted JSON, one entry per block, LF: two people's changes merge line by line. Same lock, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.documents.files import read, write
from hubkit.documents.manifest import BaseFingerprint, FileEntry
from hubkit.documents.names import check_names
from hubkit.documents.recipe import MixKind
from hubkit.documents.schema import MAX_BYTES, canonical, check, parse, refuse_secrets, sha256
from hubkit.errors import HubkitError

LOCK_NAME = "hubkit.lock"
SCHEMA = "hubkit/lock/1"
LockedFile = FileEntry
"""One locked file: path, size in bytes, digest."""


@dataclass(frozen=True)
class LockedBase:
    """The base a lock pins.

    Args:
        source: as the recipe names it.
        revision: the resolved commit, None for a folder.
        fingerprint: its identity.
        files: its files.
    """

    source: str
    revision: str | None
    fingerprint: BaseFingerprint
    files: tuple[LockedFile, ...]


@dataclass(frozen=True)
class LockedAdapter:
    """One adapter a lock pins.

    Args:
        name: its name in the recipe.
        source: its reference there.
        revision: the resolved commit, None for a folder.
        version: from its manifest.
        digest: of its manifest: its identity.
        weight: in the mix.
        files: its files.
    """

    name: str
    source: str
    revision: str | None
    version: str | None
    digest: str
    weight: float
    files: tuple[LockedFile, ...]


@dataclass(frozen=True)
class Lock:
    """``hubkit.lock``.

    Args:
        base: the base.
        adapters: in the order of the mix.
        mix: ``sum`` or ``stack``.
        recipe: digest of the recipe's content; when the recipe's is another, the lock is stale.
        overrides: the named overrides in force when it was made.
    """

    base: LockedBase
    adapters: tuple[LockedAdapter, ...]
    mix: MixKind
    recipe: str
    overrides: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """The JSON object; what is None is left out."""
        base = {**vars(self.base), "fingerprint": self.base.fingerprint.to_document(), "files": _files(self.base.files)}
        adapters = [{**vars(one), "weight": float(one.weight), "files": _files(one.files)} for one in self.adapters]
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "base": _known(base),
            "adapters": [_known(one) for one in adapters],
            "mix": self.mix,
            **({"overrides": list(self.overrides)} if self.overrides else {}),
        }

    def to_bytes(self) -> bytes:
        """The bytes of ``hubkit.lock``.

        Raises:
            HubkitError: ``HK-SECRET`` when it would hold a token, ``HK-JSON`` for values JSON cannot hold.
        """
        return pretty(self.to_document(), "lock")

    @property
    def digest(self) -> str:
        """Digest of the content, whatever its layout; a deployment quotes it."""
        return sha256(canonical(self.to_document()))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = LOCK_NAME) -> Lock:
        """Read the bytes of a lock.

        Raises:
            HubkitError: ``HK-JSON`` (also for a merge with conflicts left in it), ``HK-SCHEMA``, ``HK-NEWER``;
                ``HK-NAME`` for a file that would be outside its folder: what is locked is copied by these names.
        """
        if b"\n<<<<<<< " in b"\n" + data:
            fix = "resolve hubkit.toml, then write the lock anew: hubkit lock"
            raise HubkitError("HK-JSON", "the lock holds unresolved merge conflicts", where=where, fix=fix)
        document = parse(data, where)
        check(document, "lock", where)
        base, adapters = document["base"], document["adapters"]
        names = [one["name"] for one in adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise HubkitError("HK-SCHEMA", "an adapter is locked twice", where=f"{where}#/adapters", have=twice)
        for at, one in (("base", base), *((f"adapters/{number}", one) for number, one in enumerate(adapters))):
            check_names([file["path"] for file in one["files"]], f"{where}#/{at}/files")
        return cls(
            base=LockedBase(
                source=base["source"],
                revision=base.get("revision"),
                fingerprint=BaseFingerprint.from_document(base["fingerprint"]),
                files=_entries(base),
            ),
            adapters=tuple(_adapter(one) for one in adapters),
            mix=document["mix"],
            recipe=document["recipe"],
            overrides=tuple(document.get("overrides", ())),
        )

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock; `path` is the file or the folder it is in.

        Raises:
            HubkitError: as ``from_bytes``; ``HK-MISSING``, ``HK-IO``.
        """
        path = path / LOCK_NAME if path.is_dir() else path
        try:
            data = read(path, MAX_BYTES)
        except FileNotFoundError:
            raise HubkitError("HK-MISSING", "there is no lock", where=str(path), fix="hubkit lock") from None
        return cls.from_bytes(data, str(path))

    def write(self, path: Path) -> None:
        """Write the lock atomically; `path` is the file or the folder it goes to.

        Raises:
            HubkitError: as ``to_bytes``; ``HK-DISK``, ``HK-IO``.
        """
        write(path / LOCK_NAME if path.is_dir() else path, self.to_bytes())


def pretty(document: Mapping[str, Any], kind: str) -> bytes:
    """A document for people and merges: two spaces, sorted keys, LF, a newline at the end.

    Raises:
        HubkitError: ``HK-SECRET``, ``HK-JSON``, and ``HK-SCHEMA`` rather than write what could not be read.
    """
    refuse_secrets(document, kind)
    plain = parse(canonical(document), kind)  # refuses what JSON cannot hold; 1.0 and 1 are one number
    check(plain, kind, kind)
    return (json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _adapter(document: Mapping[str, Any]) -> LockedAdapter:
    return LockedAdapter(
        name=document["name"],
        source=document["source"],
        revision=document.get("revision"),
        version=document.get("version"),
        digest=document["digest"],
        weight=float(document["weight"]),
        files=_entries(document),
    )


def _files(files: tuple[LockedFile, ...]) -> list[dict[str, Any]]:
    return [one.to_document() for one in sorted(files, key=lambda one: one.path)]


def _entries(document: Mapping[str, Any]) -> tuple[LockedFile, ...]:
    return tuple(map(LockedFile.from_document, document["files"]))


def _known(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}
