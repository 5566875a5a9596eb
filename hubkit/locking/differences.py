"""What differs between two locks, in words: which entry moved, from which version or commit to which."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.documents.lock import Lock, LockedAdapter, LockedBase
from hubkit.documents.schema import sha256


@dataclass(frozen=True)
class Moved:
    """One difference.

    Args:
        name: ``base``, an adapter's name, ``mix``, ``order``, ``targets.ENGINE``, ``policy`` or ``overrides``.
        what: of an entry: ``added``, ``removed``, ``version``, ``content``, ``commit``, ``source``, ``weight``,
            ``license``; else ``setting``.
        before: as it was; empty for what was not there.
        after: as it is now.
    """

    name: str
    what: str
    before: str
    after: str


def moves(before: Lock, after: Lock) -> tuple[Moved, ...]:
    """Every difference between two locks, the base first, then the adapters in the order of the mix.

    The digest of the recipe is none: a lock may stay what it is while its recipe is written in other words.
    """
    found = [*_entry("base", before.base, after.base)]
    old, new = ({one.name: one for one in lock.adapters} for lock in (before, after))
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in old:
            found.append(Moved(name, "added", "", version_of(new[name])))
        elif name not in new:
            found.append(Moved(name, "removed", version_of(old[name]), ""))
        else:
            found += _entry(name, old[name], new[name])
    common = [[name for name in one if name in other] for one, other in ((old, new), (new, old))]
    settings = [("mix", before.mix, after.mix), ("order", ", ".join(common[0]), ", ".join(common[1]))]
    engines = sorted({*before.targets, *after.targets})
    settings += [(f"targets.{name}", _text(before.targets, name), _text(after.targets, name)) for name in engines]
    settings.append(("policy", _table(before.policy.to_document()), _table(after.policy.to_document())))
    settings.append(("overrides", ", ".join(before.overrides), ", ".join(after.overrides)))
    return (*found, *(Moved(name, "setting", one, other) for name, one, other in settings if one != other))


def version_of(one: LockedAdapter | LockedBase) -> str:
    """What people call the state that an entry pins: its version and commit, or of a folder its version and digest."""
    version = one.version if isinstance(one, LockedAdapter) else None
    digest = one.digest if isinstance(one, LockedAdapter) else one.fingerprint.weights or one.fingerprint.layout
    place = one.revision[:12] if one.revision else digest.removeprefix("sha256:")[:12]
    return f"{version} ({place})" if version else place


def _entry(name: str, before: LockedAdapter | LockedBase, after: LockedAdapter | LockedBase) -> Iterator[Moved]:
    if before.source != after.source:
        yield Moved(name, "source", before.source, after.source)
    one, other = version_of(before), version_of(after)
    same = _content(before) == _content(after)
    if one != other:
        versions = [entry.version if isinstance(entry, LockedAdapter) else None for entry in (before, after)]
        yield Moved(name, "version" if versions[0] != versions[1] else "commit" if same else "content", one, other)
    elif not same:
        yield Moved(name, "content", *(_content(entry)[0].removeprefix("sha256:")[:12] for entry in (before, after)))
    if isinstance(before, LockedAdapter) and isinstance(after, LockedAdapter):
        if before.weight != after.weight:
            yield Moved(name, "weight", _number(before.weight), _number(after.weight))
        if before.license != after.license:
            yield Moved(name, "license", before.license or "", after.license or "")
    elif isinstance(before, LockedBase) and isinstance(after, LockedBase) and before.requested != after.requested:
        yield Moved(name, "revision", before.requested or "", after.requested or "")


def _content(one: LockedAdapter | LockedBase) -> tuple[str, Any]:
    """(a digest that people see, all that an entry says of its content)."""
    files = "".join(sorted(f"{file.path} {file.size} {file.sha256}\n" for file in one.files))
    if isinstance(one, LockedAdapter):
        return one.digest, files
    return sha256(files.encode()), (files, one.fingerprint)


def _number(weight: float) -> str:
    return short if float(short := f"{weight:g}") == weight else repr(weight)


def _text(targets: Mapping[str, Any], name: str) -> str:
    return json.dumps(targets[name], sort_keys=True) if name in targets else ""


def _table(policy: Mapping[str, Any]) -> str:
    return json.dumps(policy, sort_keys=True) if policy else ""
