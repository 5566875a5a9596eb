"""A lock with merge conflicts in it: both sides taken out of the file that git left, and what of them agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hubkit.documents.lock import Lock, LockedAdapter, LockedBase
from hubkit.errors import HubkitError
from hubkit.locking.differences import version_of

_OURS, _BASE, _MIDDLE, _THEIRS = b"<<<<<<<", b"|||||||", b"=======", b">>>>>>>"


@dataclass(frozen=True)
class Pins:
    """What locks pinned before, to be kept where the recipe still asks for it.

    Args:
        base: the base; None where nothing is known of it.
        adapters: (name, source) -> what it was resolved to.
        lost: of a lock with conflicts: what was not taken over, a line each.
    """

    base: LockedBase | None = None
    adapters: Mapping[tuple[str, str], LockedAdapter] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    @classmethod
    def of(cls, lock: Lock) -> Pins:
        """Everything a lock pins."""
        return cls(lock.base, {(one.name, one.source): one for one in lock.adapters})


def rebuilt(data: bytes, where: str) -> Pins:
    """The pins that both sides of a merge conflict agree on, and those that only one of them has.

    Args:
        data: the lock as git left it, two sides or three (``merge.conflictStyle = diff3``).
        where: named in the refusal.

    Raises:
        HubkitError: ``HK-JSON`` where the markers are incomplete, or neither side is a lock.
    """
    sides: list[tuple[str, Lock]] = []
    lost: list[str] = []
    faults: list[str] = []
    for label, side in _sides(data, where):
        try:
            sides.append((label, _read(side, where)))
        except HubkitError as error:
            faults.append(f"{label}: {error.code}: {error.what}")
            lost.append(f"{label}: is no lock ({error.what}); what it pinned is lost")
    if not sides:
        what, fix = "neither side of the merge conflict is a lock", "remove it: hubkit lock resolves everything anew"
        raise HubkitError("HK-JSON", what, where=where, have=faults, fix=fix)
    (ours, mine), (theirs, other) = sides[0], sides[-1]
    base: LockedBase | None = mine.base
    if (mine.base.source, mine.base.requested) == (other.base.source, other.base.requested) and _differ(
        mine.base, other.base
    ):
        lost.append(f"base: {version_of(mine.base)} in {ours}, {version_of(other.base)} in {theirs}")
        base = None
    pins = dict(Pins.of(mine).adapters)
    for key, one in Pins.of(other).adapters.items():
        known = pins.get(key)
        if known is not None and _differ(known, one):
            lost.append(f"{one.name}: {version_of(known)} in {ours}, {version_of(one)} in {theirs}")
            del pins[key]
        else:
            pins[key] = known or one
    return Pins(base, pins, tuple(lost))


def _differ(one: LockedAdapter | LockedBase, other: LockedAdapter | LockedBase) -> bool:
    """Whether two entries pin something else; weights are the recipe's."""
    return (one.revision, getattr(one, "digest", None), one.files) != (
        other.revision, getattr(other, "digest", None), other.files)  # fmt: skip


def _read(side: bytes, where: str) -> Lock:
    """One side. What stands outside the entries may be of both, so that only the entries' own seals can hold."""
    try:
        return Lock.from_bytes(side, where, any_layout=True)
    except HubkitError as error:
        if error.code != "HK-LOCK-EDITED" or len(error.have) > 1 or not error.have[0].startswith("what stands"):
            raise
        return Lock.from_bytes(side, where, any_layout=True, entries_only=True)


def _sides(data: bytes, where: str) -> list[tuple[str, bytes]]:
    """(label, bytes) of both sides: what is common, and what each has where they differ."""
    sides: dict[bytes, list[bytes]] = {_OURS: [], _THEIRS: []}
    labels = {_OURS: "ours", _THEIRS: "theirs"}
    state, order = b"", {_OURS: (b"",), _BASE: (_OURS,), _MIDDLE: (_OURS, _BASE), _THEIRS: (_MIDDLE,)}
    for line in data.splitlines(keepends=True):
        mark = line[:7] if line[:7] in order and (line[7:8] in (b" ", b"\r", b"\n", b"")) else b""
        if mark:
            if state not in order[mark]:
                raise _incomplete(where)
            state = b"" if mark == _THEIRS else mark
            if mark in labels and line[8:].strip():
                labels[mark] = line[8:].strip().decode("utf-8", "replace")[:80]
        else:
            for side, at in ((_OURS, _OURS), (_THEIRS, _MIDDLE)):
                if state in (b"", at):
                    sides[side].append(line)
    if state:
        raise _incomplete(where)
    return [(labels[side], b"".join(lines)) for side, lines in sides.items()]


def _incomplete(where: str) -> HubkitError:
    what = "the marks of a merge conflict are incomplete"
    fix = "git checkout --merge puts them back; or remove the lock: hubkit lock resolves everything anew"
    return HubkitError("HK-JSON", what, where=where, want="<<<<<<<, =======, >>>>>>>", fix=fix)
