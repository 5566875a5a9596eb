"""A lock made anew from its recipe, and both written together: the new state or the old one, never half of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.files import write
from hubkit.documents.lock import LOCK_NAME, Lock, read_bytes
from hubkit.documents.recipe import RECIPE_NAME, Recipe, has_conflicts
from hubkit.errors import USAGE, HubkitError, nearest
from hubkit.locking.conflicts import Pins, rebuilt
from hubkit.locking.differences import Moved, moves
from hubkit.locking.resolver import Resolver
from hubkit.named.locked import needed_by
from hubkit.registry.opening import Where


@dataclass(frozen=True)
class Renewal:
    """A lock that was made and not yet written.

    Args:
        lock: as it is to be.
        before: as it was; None where there was none, or one with merge conflicts.
        moved: every difference between the two.
        lost: of a lock with merge conflicts: pins that the two sides did not agree on.
        needed: it is not what lies there, to the byte.
    """

    lock: Lock
    before: Lock | None
    moved: tuple[Moved, ...]
    lost: tuple[str, ...]
    needed: bool

    @property
    def changed(self) -> tuple[str, ...]:
        """What moved, by name: ``base``, names of adapters, ``mix``, ``order``, ``targets``, ``policy``."""
        if self.before is None:
            return ("base", *(one.name for one in self.lock.adapters))
        settings = {"setting"}
        return tuple(dict.fromkeys(m.name.split(".")[0] if m.what in settings else m.name for m in self.moved))


def recipe_path(place: Path) -> Path:
    """The recipe that is meant by a file or by the folder it is in."""
    return place / RECIPE_NAME if place.is_dir() else place


def renewed(
    path: Path, recipe: Recipe, where: Where, *, upgrade: Collection[str] | bool = False, allow: bool = False
) -> Renewal:
    """The lock of a recipe, with everything kept that it still asks for in the same words.

    Args:
        path: where the recipe is or will be; the lock is beside it.
        upgrade: names of entries to resolve anew, ``base`` for the base; True: all.
        allow: lock adapters of another base.

    Raises:
        HubkitError: ``HK-UNKNOWN-ADAPTER`` (status 2) for a name in `upgrade` that the recipe does not have; what
            reading the lock and `Resolver.run` raise.
    """
    target = path.with_name(LOCK_NAME)
    names = ["base", *(one.name for one in recipe.adapters)]
    asked = names if upgrade is True else list(upgrade or ())
    _require_known(asked, names, path)
    data = read_bytes(target) if target.exists() else None
    before, pins, tidy = _before(data, target)
    lock = Resolver(path.parent, where, before, pins, asked, allow, str(path)).run(recipe)
    moved = moves(before, lock) if before is not None else ()
    needed = before is None or bool(moved) or before.recipe != lock.recipe or not tidy
    return Renewal(lock, before, moved, pins.lost, needed)


def _before(data: bytes | None, target: Path) -> tuple[Lock | None, Pins, bool]:
    """The lock before, what it pins, and whether its layout is that in which it is written."""
    if data is None:
        return None, Pins(), False
    if has_conflicts(data):
        return None, rebuilt(data, str(target)), False
    before = Lock.from_bytes(data, str(target), any_layout=True)
    return before, Pins.of(before), before.is_laid_out(data)


def write_both(path: Path, data: bytes, lock: Lock) -> None:
    """Write a recipe and its lock; where the second cannot be written, the first is as it was.

    Raises:
        HubkitError: ``HK-SECRET``, ``HK-DISK``, ``HK-IO``.
    """
    lock.to_bytes()  # what it refuses, it refuses before anything is written
    old = path.read_bytes() if path.exists() else None
    if data != old:
        write(path, data)
    try:
        lock.write(path.with_name(LOCK_NAME))
    except BaseException:
        if old is None:
            path.unlink(missing_ok=True)
        elif data != old:
            write(path, old)
        raise
    needed_by(path.with_name(LOCK_NAME))


def _require_known(asked: list[str], names: list[str], path: Path) -> None:
    if unknown := [name for name in asked if name not in names]:
        near = nearest(unknown[0], names, 1)
        what = f"the recipe has no entry {', '.join(map(repr, unknown))}"
        fix = f"--upgrade {near[0]}" if near else "--upgrade alone resolves everything anew"
        have = ", ".join(names)
        raise HubkitError("HK-UNKNOWN-ADAPTER", what, where=str(path), have=have, fix=fix, status=USAGE)
