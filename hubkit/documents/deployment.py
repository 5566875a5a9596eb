"""The deployment, ``deployment.json``: a lock made runnable for one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit.documents.files import read, write
from hubkit.documents.lock import pretty
from hubkit.documents.manifest import BaseFingerprint, FileEntry
from hubkit.documents.names import check_names
from hubkit.documents.schema import MAX_BYTES, canonical, check, parse, sha256
from hubkit.errors import HubkitError

DEPLOYMENT_NAME = "deployment.json"
SCHEMA = "hubkit/deployment/1"


@dataclass(frozen=True)
class Deployment:
    """``deployment.json``.

    Args:
        engine: name of the engine.
        lock: digest of the lock it was made from.
        base: the identity of the base it runs on.
        adapters: name -> digest of the adapter's manifest.
        files: the files written for the engine, with size and digest.
        command: the command that runs it, one argument each; paths relative to the folder of ``deployment.json``.
        settings: the recipe's settings for this engine.
        overrides: the named overrides in force when it was made.
        version: of the engine that what was written is made for; empty where it was not recorded.
        unproven: nobody has run deployments for it, of that version, with hubkit.
    """

    engine: str
    lock: str
    base: BaseFingerprint
    adapters: Mapping[str, str]
    files: tuple[FileEntry, ...]
    command: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    version: str = ""
    unproven: bool = False

    def to_document(self) -> dict[str, Any]:
        """The JSON object; what is empty is left out."""
        return {
            "schema": SCHEMA,
            "engine": self.engine,
            "lock": self.lock,
            "base": self.base.to_document(),
            "adapters": dict(self.adapters),
            "files": [one.to_document() for one in sorted(self.files, key=lambda one: one.path)],
            "command": list(self.command),
            **({"settings": dict(self.settings)} if self.settings else {}),
            **({"overrides": list(self.overrides)} if self.overrides else {}),
            **({"version": self.version} if self.version else {}),
            **({"unproven": True} if self.unproven else {}),
        }

    def to_bytes(self) -> bytes:
        """The bytes of ``deployment.json``: indented, sorted, LF.

        Raises:
            HubkitError: ``HK-SECRET`` when it would hold a token, ``HK-SCHEMA``, ``HK-JSON``.
        """
        return pretty(self.to_document(), "deployment")

    @property
    def digest(self) -> str:
        """Digest of the content, whatever its layout."""
        return sha256(canonical(self.to_document()))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = DEPLOYMENT_NAME) -> Deployment:
        """Read the bytes of a deployment.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-NEWER``; ``HK-NAME`` for a file outside its folder.
        """
        document = parse(data, where)
        check(document, "deployment", where)
        check_names([file["path"] for file in document["files"]], f"{where}#/files")
        return cls(
            engine=document["engine"],
            lock=document["lock"],
            base=BaseFingerprint.from_document(document["base"]),
            adapters=document["adapters"],
            files=tuple(map(FileEntry.from_document, document["files"])),
            command=tuple(document["command"]),
            settings=document.get("settings", {}),
            overrides=tuple(document.get("overrides", ())),
            version=document.get("version", ""),
            unproven=document.get("unproven", False),
        )

    @classmethod
    def read(cls, path: Path) -> Deployment:
        """Read a deployment; `path` is the file or the folder it is in.

        Raises:
            HubkitError: as ``from_bytes``; ``HK-MISSING``, ``HK-IO``.
        """
        path = path / DEPLOYMENT_NAME if path.is_dir() else path
        try:
            data = read(path, MAX_BYTES)
        except FileNotFoundError:
            what, fix = "there is no deployment", "hubkit deploy"
            raise HubkitError("HK-MISSING", what, where=str(path), fix=fix) from None
        return cls.from_bytes(data, str(path))

    def write(self, path: Path) -> None:
        """Write the deployment atomically; `path` is the file or the folder it goes to.

        Raises:
            HubkitError: as ``to_bytes``; ``HK-DISK``, ``HK-IO``.
        """
        write(path / DEPLOYMENT_NAME if path.is_dir() else path, self.to_bytes())
