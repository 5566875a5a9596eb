"""The adapters of a mix: found by their references, proven by their digests, named for one tree.

A member that is in the store already is taken from there by its digest, wherever it came from, and so is a folder
that is not on this machine. A repository that names no registry is looked for in the registry that the mix came from,
so that a mix and its members move together.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubkit.artifact.folder import MANIFEST_NAME, AdapterFolder, open_adapter
from hubkit.artifact.identity.base_match import OVERRIDE, require_same_base
from hubkit.documents.manifest import Manifest
from hubkit.documents.mix import DEEPEST, MixMember, Tree, replaced, require_small, too_large
from hubkit.errors import HubkitError
from hubkit.named.sources import adapter_source, read_manifest
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference


@dataclass(frozen=True)
class MixAdapter:
    """One adapter of a mix, opened and proven to be the one that was mixed.

    Args:
        name: in the tree; unique.
        reference: where it was found.
        folder: the adapter.
        fetched: bytes that were downloaded for it now.
    """

    name: str
    reference: str
    folder: AdapterFolder
    fetched: int = 0

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(entry.size for entry in self.folder.manifest.files)


@dataclass(frozen=True)
class OpenedMix:
    """A mix with everything in it.

    Args:
        tree: of adapters alone; mixes inside the mix are resolved.
        adapters: those the tree names, each once.
        mixes: the mixes inside the mix, each once.
    """

    tree: Tree
    adapters: tuple[MixAdapter, ...]
    mixes: tuple[AdapterFolder, ...] = ()


@dataclass
class Opener:
    """Opens mixes; an adapter or mix that occurs in several places is opened once.

    Args:
        where: where members are looked for that name no registry, in a mix that is a folder.
        taken: names that are in use.
    """

    where: Where
    taken: Collection[str] = ()
    adapters: list[MixAdapter] = field(default_factory=list)
    mixes: list[AdapterFolder] = field(default_factory=list)
    _known: dict[str, Tree | str] = field(default_factory=dict)

    def open(self, folder: AdapterFolder, origin: Reference, level: int = 1) -> Tree:
        """The tree of the mix in `folder`, by the names of the adapters it leads to, which join `adapters`.

        Args:
            origin: what named the mix.

        Raises:
            HubkitError: ``HK-MIX`` for a tree beyond the limits, ``HK-MIX-MEMBER`` for a member that cannot be had
                or is another than the one that was mixed, ``HK-BASE-MISMATCH``.
        """
        where = f"{origin}  {MANIFEST_NAME}#/mix"
        if level > DEEPEST:
            raise too_large(where, f"more than {DEEPEST} mixes inside each other")
        manifest = folder.manifest
        document = manifest.mixed(where)
        made: dict[str, Tree | str] = {}
        for name, member in document.members.items():
            known = self._known.get(member.digest)
            if known is None:
                known = self._known[member.digest] = self._member(folder, origin, name, member, level)
            made[name] = known
        tree = replaced(document.tree, made)
        require_small(tree, where)
        return tree

    def _member(self, mix: AdapterFolder, origin: Reference, name: str, member: MixMember, level: int) -> Tree | str:
        reference, folder, fetched = self._find(mix, origin, name, member)
        wanted, have = mix.manifest.base, folder.manifest.base
        assert wanted is not None
        if have is not None:
            require_same_base(name, str(reference), have, wanted, None, None, OVERRIDE in mix.manifest.overrides)
        if folder.manifest.kind == "mix":
            self.mixes.append(folder)
            return self.open(folder, reference, level + 1)
        if folder.manifest.kind != "adapter":
            what, fix = "is neither an adapter nor a mix", "mix again, of adapters"
            raise _refused(mix, origin, name, member, what, folder.manifest.kind, fix)
        unique = unused(name, {*self.taken, *(one.name for one in self.adapters)})
        self.adapters.append(MixAdapter(unique, str(reference), folder, fetched))
        return unique

    def _find(
        self, mix: AdapterFolder, origin: Reference, name: str, member: MixMember
    ) -> tuple[Reference, AdapterFolder, int]:
        try:
            reference = member_reference(origin, member.reference)
            here = reference.path is not None and (reference.path / MANIFEST_NAME).is_file()
            known = None if here else stored(member.digest)
            if known is not None:
                return reference, known, 0
            source = adapter_source(str(reference), self.where)
            folder = open_adapter(source.path)
        except HubkitError as error:
            have = [f"{error.code}: {error.what}", *error.have]
            raise _refused(mix, origin, name, member, "cannot be had", have, error.fix) from error
        if folder.manifest.digest != member.digest:
            what, have = "is not the one that was mixed", [f"{folder.manifest.digest}  ({reference})"]
            raise _refused(mix, origin, name, member, what, have, "bring that one back, or mix again: hubkit mix")
        return reference, folder, source.stored.fetched if source.stored else 0


def open_mix(folder: AdapterFolder, origin: Reference, where: Where, *, taken: Iterable[str] = ()) -> OpenedMix:
    """A mix with all its adapters, pulled where needed; see `Opener`."""
    opener = Opener(where, tuple(taken))
    tree = opener.open(folder, origin)
    return OpenedMix(tree, tuple(opener.adapters), tuple(opener.mixes))


def member_reference(origin: Reference, text: str) -> Reference:
    """What a member's reference means in the mix that `origin` names: a folder begins at the mix's own folder, a
    repository without a registry is in the registry of the mix.

    Raises:
        HubkitError: ``HK-REFERENCE`` for text that names nothing, and for a folder or ``file://`` in a mix that came
            from a registry: it would be one of the machine where the mix was made.
    """
    found = parse_reference(text)
    if origin.path is not None:
        return found if found.path is None else replace(found, path=_joined(origin.path, found.path))
    if found.path is not None or (found.scheme == "file" and origin.scheme != "file"):
        what = "a mix in a registry names a folder of the machine where it was made"
        fix = "whoever published it: push the member, then mix again with its ORG/NAME"
        raise HubkitError("HK-REFERENCE", what, where=str(origin), have=text, fix=fix)
    return found if found.scheme is not None else replace(found, scheme=origin.scheme, endpoint=origin.endpoint)


def _joined(folder: Path, path: Path) -> Path:
    """``s/../a`` as ``a``, where no link makes these two different."""
    long, short = folder / path, Path(os.path.normpath(folder / path))
    return short if os.path.realpath(short) == os.path.realpath(long) else long


def unused(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number behind it where it is taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def require_published(mix: AdapterFolder, target: Reference, where: Where) -> None:
    """Refuses to publish a mix as `target` while others could not get its members as it names them.

    Raises:
        HubkitError: ``HK-MIX-MEMBER`` with each member that is a folder of this machine, is not in the registry it
            would be looked for in, or has another digest there.
    """
    here = f"{mix.path / MANIFEST_NAME}#/mix/members"
    faults, wanted = [], []
    for name, member in mix.manifest.mixed(here).members.items():
        fault = _unpublished(target, member, where)
        faults += [f"{name}: {fault}"] if fault else []
        wanted += [f"{name}: {member.digest}  ({member.reference})"] if fault else []
    if faults:
        what = "members of the mix are not where others could get them"
        fix = "hubkit push each to an ORG/NAME, then mix again with those references: hubkit mix ... --replace"
        raise HubkitError("HK-MIX-MEMBER", what, where=here, want=wanted, have=faults, fix=fix)


def _unpublished(target: Reference, member: MixMember, where: Where) -> str:
    """Why a member cannot be had from the registry; empty when it can."""
    try:
        found = member_reference(target, member.reference)
        have = read_manifest(found, where).digest
    except HubkitError as error:
        if error.code == "HK-REFERENCE":
            return "a folder of this machine"
        if error.code not in ("HK-NOT-FOUND", "HK-NO-REVISION", "HK-NOT-ADAPTER"):
            raise
        return f"not in the registry: {error.what}"
    return "" if have == member.digest else f"{have} in the registry"


def with_members_from(mix: Mapping[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """The field ``mix`` of a manifest that moves to another folder: its members' folders are where they were."""
    members = {}
    for name, member in mix["members"].items():
        found = parse_reference(member["reference"])
        text = member["reference"] if found.path is None else relative(before / found.path, after)
        members[name] = {**member, "reference": text}
    return {**mix, "members": members}


def relative(folder: Path, start: Path) -> str:
    """The reference of a folder as a mix in the folder `start` names it."""
    path = Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(start)))
    return str(Reference("folder", path=Path(path.as_posix())))


def stored(digest: str) -> AdapterFolder | None:
    """The artifact of this digest, where it is in the store, whole."""
    from hubkit.registry.store.store import Store

    path = Store().use(digest)
    if not (path / MANIFEST_NAME).is_file():
        return None
    try:
        folder = open_adapter(path)
    except HubkitError:
        return None  # damaged: it is pulled again
    return folder if folder.manifest.digest == digest else None


def stored_manifest(digest: str) -> Manifest | None:
    """The manifest of this digest, where it is in the store; its files are not looked at."""
    from hubkit.registry.store.store import Store

    path = Store().path(digest)
    try:
        manifest = Manifest.read(path) if (path / MANIFEST_NAME).is_file() else None
    except HubkitError:
        return None  # damaged
    return manifest if manifest is not None and manifest.digest == digest else None


def _refused(
    mix: AdapterFolder, origin: Reference, name: str, member: MixMember, what: str, have: str | list[str], fix: str
) -> HubkitError:
    return HubkitError(
        "HK-MIX-MEMBER",
        f"the member {name!r} of the mix {mix.manifest.name!r} {what}",
        where=f"{origin}  {MANIFEST_NAME}#/mix/members/{name}",
        want=f"{member.digest}  ({member.reference})",
        have=have,
        fix=fix,
    )
