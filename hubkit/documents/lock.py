"""The lock, ``hubkit.lock``: what a recipe resolved to, so that what was tested is what runs.

Indented and sorted JSON, one entry per block, LF: two people's changes merge line by line. Same lock, same bytes, and
no others: each entry, and what stands outside the entries, carries the digest of its own content (``seal``), so that
one changed byte is seen by whoever reads the lock. Locks of earlier releases have no seals and are read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit.documents.files import read, write
from hubkit.documents.manifest import MANIFEST_NAME, BaseFingerprint, FileEntry
from hubkit.documents.names import check_names
from hubkit.documents.recipe import MixKind, Policy, has_conflicts
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
        requested: the branch, tag or commit that the recipe asked for; None: the default branch.
    """

    source: str
    revision: str | None
    fingerprint: BaseFingerprint
    files: tuple[LockedFile, ...]
    requested: str | None = None


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
        license: SPDX identifier, where the recipe's policy looks at licences; None elsewhere.
    """

    name: str
    source: str
    revision: str | None
    version: str | None
    digest: str
    weight: float
    files: tuple[LockedFile, ...]
    license: str | None = None


@dataclass(frozen=True)
class Lock:
    """``hubkit.lock``.

    Args:
        base: the base.
        adapters: in the order of the mix.
        mix: ``sum`` or ``stack``.
        recipe: digest of the recipe's content; when the recipe's is another, the lock is stale.
        overrides: the named overrides in force when it was made.
        targets: engine -> its settings, as the recipe has them: a deployment needs no recipe.
        policy: the recipe's policy that every adapter passed.
    """

    base: LockedBase
    adapters: tuple[LockedAdapter, ...]
    mix: MixKind
    recipe: str
    overrides: tuple[str, ...] = ()
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)

    def to_document(self) -> dict[str, Any]:
        """The JSON object; what is None or empty is left out, so that older locks keep their digests."""
        policy = self.policy.to_document()
        base = {**vars(self.base), "fingerprint": self.base.fingerprint.to_document(), "files": _files(self.base.files)}
        adapters = [{**vars(one), "weight": float(one.weight), "files": _files(one.files)} for one in self.adapters]
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "base": _known(base),
            "adapters": [_known(one) for one in adapters],
            "mix": self.mix,
            **({"overrides": list(self.overrides)} if self.overrides else {}),
            **({"targets": {name: dict(settings) for name, settings in self.targets.items()}} if self.targets else {}),
            **({"policy": policy} if policy else {}),
        }

    def to_bytes(self) -> bytes:
        """The bytes of ``hubkit.lock``: the document with its seals.

        Raises:
            HubkitError: ``HK-SECRET`` when it would hold a token, ``HK-JSON`` for values JSON cannot hold.
        """
        return pretty(_sealed(self.to_document()), "lock")

    def is_laid_out(self, data: bytes) -> bool:
        """Whether `data` are this lock in the one layout that hubkit writes, with its seals or, as before, without."""
        document = self.to_document()
        form = _sealed(document) if b'"seal"' in data else document
        return _laid_out(parse(canonical(form), LOCK_NAME)) == data

    @property
    def digest(self) -> str:
        """Digest of the content, whatever its layout; a deployment quotes it."""
        return sha256(canonical(self.to_document()))

    @classmethod
    def from_bytes(
        cls, data: bytes, where: str = LOCK_NAME, *, any_layout: bool = False, entries_only: bool = False
    ) -> Lock:
        """Read the bytes of a lock.

        Args:
            any_layout: take the content in another layout than that of `to_bytes`, too: it is about to be written anew.
            entries_only: hold the seals of the entries alone: one side of a merge conflict.

        Raises:
            HubkitError: ``HK-JSON`` (also for a merge with conflicts left in it), ``HK-SCHEMA``, ``HK-NEWER``;
                ``HK-LOCK-EDITED`` for one that somebody changed; ``HK-NAME`` for a file that would be outside its
                folder: what is locked is copied by these names.
        """
        if has_conflicts(data):
            what, fix = "the lock holds unresolved merge conflicts", "hubkit lock rebuilds it from both sides"
            raise HubkitError("HK-JSON", what, where=where, fix=fix)
        document = parse(data, where)
        check(document, "lock", where)
        seals = _unsealed(document)
        made = cls._from_document(document, where)
        if entries_only and "" in seals:
            seals[""] = _seal(_parts(made.to_document())[""])
        _require_untouched(made, seals, where)
        if not any_layout and not made.is_laid_out(data):
            raise _laid_out_otherwise(data, made, where)
        return made

    @classmethod
    def _from_document(cls, document: dict[str, Any], where: str) -> Lock:
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
                requested=base.get("requested"),
            ),
            adapters=tuple(_adapter(one) for one in adapters),
            mix=document["mix"],
            recipe=document["recipe"],
            overrides=tuple(document.get("overrides", ())),
            targets=document.get("targets", {}),
            policy=Policy.from_document(document.get("policy", {})),
        )

    @classmethod
    def read(cls, path: Path, *, any_layout: bool = False) -> Lock:
        """Read a lock; `path` is the file or the folder it is in.

        Args:
            any_layout: as in `from_bytes`.

        Raises:
            HubkitError: as ``from_bytes``; ``HK-MISSING``, ``HK-IO``.
        """
        path = path / LOCK_NAME if path.is_dir() else path
        return cls.from_bytes(read_bytes(path), str(path), any_layout=any_layout)

    def write(self, path: Path) -> None:
        """Write the lock atomically; `path` is the file or the folder it goes to.

        Raises:
            HubkitError: as ``to_bytes``; ``HK-DISK``, ``HK-IO``.
        """
        write(path / LOCK_NAME if path.is_dir() else path, self.to_bytes())


def read_bytes(path: Path) -> bytes:
    """The bytes of the lock at `path`, whatever they are.

    Raises:
        HubkitError: ``HK-MISSING``, ``HK-IO``.
    """
    try:
        return read(path, MAX_BYTES)
    except FileNotFoundError:
        raise HubkitError("HK-MISSING", "there is no lock", where=str(path), fix="hubkit lock") from None


def pretty(document: Mapping[str, Any], kind: str) -> bytes:
    """A document for people and merges: two spaces, sorted keys, LF, a newline at the end.

    Raises:
        HubkitError: ``HK-SECRET``, ``HK-JSON``, and ``HK-SCHEMA`` rather than write what could not be read.
    """
    refuse_secrets(document, kind)
    plain = parse(canonical(document), kind)  # refuses what JSON cannot hold; 1.0 and 1 are one number
    check(plain, kind, kind)
    return _laid_out(plain)


def _laid_out(plain: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _parts(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What carries a seal, by name: each entry, and "" for all that stands outside the entries."""
    entries = {f"adapters/{one['name']}": one for one in document["adapters"]}
    around = {name: value for name, value in document.items() if name not in ("base", "adapters", "seal")}
    return {"base": document["base"], **entries, "": {**around, "names": [one["name"] for one in document["adapters"]]}}


def _seal(part: Mapping[str, Any]) -> str:
    return sha256(canonical(part))


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the seal of each part in it."""
    base = {**document["base"], "seal": _seal(document["base"])}
    adapters = [{**one, "seal": _seal(one)} for one in document["adapters"]]
    return {**document, "seal": _seal(_parts(document)[""]), "base": base, "adapters": adapters}


def _unsealed(document: dict[str, Any]) -> dict[str, str]:
    """Takes the seals out of a checked document: part -> its seal."""
    holders = {"": document, "base": document["base"]} | {f"adapters/{o['name']}": o for o in document["adapters"]}
    return {at: holder.pop("seal") for at, holder in holders.items() if "seal" in holder}


def _require_untouched(made: Lock, seals: Mapping[str, str], where: str) -> None:
    """Refuses a lock whose content is not what its seals say, or that contradicts itself."""
    parts = _parts(made.to_document())
    found = [f"{at or 'what stands outside the entries'}: not what its seal says" for at, seal in sorted(seals.items())
             if _seal(parts[at]) != seal]  # fmt: skip
    if seals:
        found += [f"{at or 'what stands outside the entries'}: no seal" for at in sorted(parts.keys() - seals.keys())]
    for one in made.adapters:
        listed = {file.path: file.sha256 for file in one.files}
        if listed.get(MANIFEST_NAME, one.digest) != one.digest:
            found.append(f"adapters/{one.name}: its digest is not that of its {MANIFEST_NAME}")
    listed = {file.path: file.sha256 for file in made.base.files}
    weights = made.base.fingerprint.files.items()
    if any(listed.get(name, digest) != digest for name, digest in weights):
        found.append("base: its fingerprint and its files name different weights")
    if found:
        what = "the lock was edited by hand, or merged wrongly"
        fix = "take it back from version control; or remove it, and hubkit lock resolves everything anew"
        raise HubkitError("HK-LOCK-EDITED", what, where=where, have=list(dict.fromkeys(found)), fix=fix)


def _laid_out_otherwise(data: bytes, lock: Lock, where: str) -> HubkitError:
    have, fix = "the same content in another layout", "hubkit lock writes it anew"
    if lock.is_laid_out(data.replace(b"\r\n", b"\n")):
        have = "lines that end in CRLF"
        fix += "; the line 'hubkit.lock -text' in .gitattributes keeps git from changing it"
    return HubkitError("HK-LOCK-EDITED", "the lock is not written as hubkit writes it", where=where, have=have, fix=fix)


def _adapter(document: Mapping[str, Any]) -> LockedAdapter:
    return LockedAdapter(
        name=document["name"],
        source=document["source"],
        revision=document.get("revision"),
        version=document.get("version"),
        digest=document["digest"],
        weight=float(document["weight"]),
        files=_entries(document),
        license=document.get("license"),
    )


def _files(files: tuple[LockedFile, ...]) -> list[dict[str, Any]]:
    return [one.to_document() for one in sorted(files, key=lambda one: one.path)]


def _entries(document: Mapping[str, Any]) -> tuple[LockedFile, ...]:
    return tuple(map(LockedFile.from_document, document["files"]))


def _known(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}
