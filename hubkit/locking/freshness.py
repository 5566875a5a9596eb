"""A lock held against what it was made from: recipe, folders, base. Nobody is asked, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hubkit.artifact.folder import AdapterFolder, open_adapter
from hubkit.documents.lock import Lock
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.documents.recipe import Recipe
from hubkit.errors import HubkitError
from hubkit.locking.pinned_base import base_at, local_files
from hubkit.named.locked import at
from hubkit.named.members import member_reference
from hubkit.registry.reference import Reference, parse_reference


def require_fresh(recipe: Recipe, path: Path, lock: Lock, target: Path) -> None:
    """Refuses a lock that is older than its recipe, or than a folder that it names.

    Args:
        path: the recipe.
        target: the lock.

    Raises:
        HubkitError: ``HK-LOCK-STALE`` with everything that differs.
    """
    if have := [*_of_recipe(recipe, path.name, lock), *_of_folders(lock, path.parent)]:
        what, fix = "the lock is older than what it was made from", "hubkit lock"
        raise HubkitError("HK-LOCK-STALE", what, where=str(target), have=have, fix=fix)


def _of_recipe(recipe: Recipe, name: str, lock: Lock) -> list[str]:
    """Where a recipe asks for something else than what was locked."""
    pairs = [
        ("base: source", recipe.base.source, lock.base.source),
        *([("base: revision", recipe.base.revision, lock.base.requested)] if recipe.digest != lock.recipe else []),
    ]
    wanted, locked = {one.name: one for one in recipe.adapters}, {one.name: one for one in lock.adapters}
    found = [f"{one}: not in the lock" for one in wanted if one not in locked]
    found += [f"{one}: not in {name}" for one in locked if one not in wanted]
    for one in (one for one in wanted if one in locked):
        pairs.append((f"{one}: source", wanted[one].source, locked[one].source))
        pairs.append((f"{one}: weight", f"{wanted[one].weight!r}", f"{locked[one].weight!r}"))
    if not found:
        pairs.append(("order:", ", ".join(wanted), ", ".join(locked)))
    pairs.append(("mix:", recipe.mix, lock.mix))
    for engine in sorted({*recipe.targets, *lock.targets}):
        pairs.append((f"targets.{engine}:", _shown(recipe.targets.get(engine)), _shown(lock.targets.get(engine))))
    pairs.append(("policy:", _shown(recipe.policy.to_document()), _shown(lock.policy.to_document())))
    found += [f"{at} {new or 'none'} in {name}, {old or 'none'} in the lock" for at, new, old in pairs if new != old]
    return found or ([] if recipe.digest == lock.recipe else [f"{name} changed since"])


def _of_folders(lock: Lock, folder: Path) -> Iterator[str]:
    """Where a folder, or a folder that a mix in it names, has other bytes than were locked."""
    yield from _of_base(lock, folder)
    for one in lock.adapters:
        reference = at(folder, parse_reference(one.source))
        if reference.path is None:
            continue
        try:
            adapter = open_adapter(reference.path)
        except HubkitError as error:
            yield from (f"{one.name}: {one.source}: {line}" for line in error.have or [error.what])
            continue
        if adapter.manifest.digest != one.digest:
            yield f"{one.name}: {one.source} changed since"
        yield from _of_members(one.name, adapter, reference)


def _of_base(lock: Lock, folder: Path) -> Iterator[str]:
    if lock.base.revision is not None:
        return
    place = base_at(lock.base, folder, None).path or folder / lock.base.source
    try:
        have = {file.path: file.sha256 for file in local_files(place)}
    except HubkitError as error:
        yield from (f"base: {lock.base.source}: {line}" for line in error.have or [error.what])
        return
    locked = {file.path: file.sha256 for file in lock.base.files}
    for name in sorted({*have, *locked}):
        if have.get(name) != locked.get(name):
            state = "missing" if name not in have else "new" if name not in locked else "changed since"
            yield f"base: {lock.base.source}: {name} {state}"


def _of_members(name: str, adapter: AdapterFolder, origin: Reference, depth: int = 0) -> Iterator[str]:
    """The folders among a mix's members: their digests stand in its manifest."""
    if adapter.manifest.kind != "mix" or depth > 16:
        return
    for label, member in adapter.manifest.mixed(str(origin)).members.items():
        reference = member_reference(origin, member.reference)
        if reference.path is None or not (reference.path / MANIFEST_NAME).is_file():
            continue
        try:
            inner = open_adapter(reference.path)
        except HubkitError as error:
            yield from (f"{name}/{label}: {member.reference}: {line}" for line in error.have or [error.what])
            continue
        if inner.manifest.digest != member.digest:
            yield f"{name}/{label}: {member.reference} changed since"
        yield from _of_members(f"{name}/{label}", inner, reference, depth + 1)


def _shown(value: object) -> str:
    import json

    return json.dumps(value, sort_keys=True) if value else ""
