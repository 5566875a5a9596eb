"""`add`: put an adapter into the recipe and lock it, or change nothing at all."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME
from hubkit.documents.recipe import RECIPE_NAME, Recipe, parse_recipe, read_bytes
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.locking.editing import new_recipe, with_adapter
from hubkit.locking.renewal import recipe_path, renewed, write_both
from hubkit.named.locked import at
from hubkit.named.members import relative
from hubkit.named.sources import chosen_name
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference
from hubkit.verbs.lock import Locked, locked_as


@dataclass(frozen=True, repr=False)
class Added(Shown):
    """An adapter that is in the recipe and in its lock now.

    Args:
        recipe: the recipe's file.
        name: of the adapter there.
        source: its reference there.
        weight: in the mix.
        created: the recipe was made.
        locked: the lock that was made with it.
    """

    recipe: Path
    name: str
    source: str
    weight: float
    created: bool
    locked: Locked


@checked
def add(
    reference: Path | str,
    *,
    name: str | None = None,
    weight: float | None = None,
    recipe: Path | str = RECIPE_NAME,
    base: Path | str | None = None,
    allow_base_mismatch: bool = False,
    registry: str | None = None,
    offline: bool = False,
    dry_run: bool = False,
) -> Added:
    """Add an adapter to a recipe, or change the reference of one that is there, and lock it.

    Comments and layout of the recipe stay. Nothing else in the lock moves. Where it cannot be locked, the recipe is as
    it was.

    Args:
        reference: of the adapter: ``org/name@^1.2``, a folder, ...
        name: in the recipe; by default that of the repository or folder.
        weight: in the mix; by default 1, or what it has there.
        recipe: the recipe or its folder.
        base: makes a recipe of this base where there is none.
        allow_base_mismatch: lock an adapter of another base; recorded in the lock.
        registry: for references that name none, if not the default registry.
        offline: look only at what was pulled before.
        dry_run: write nothing.

    Raises:
        HubkitError: ``HK-MISSING`` without a recipe; ``HK-EXISTS`` for another adapter of that name or another base;
            ``HK-NAME`` (status 2); ``HK-RECIPE``; what `lock` raises.
    """
    path = recipe_path(Path(recipe))
    data, created = _recipe(path, base)
    before = parse_recipe(data, str(path))
    found = parse_reference(reference)
    source = _from_recipe(found.path, path) if found.path is not None else str(reference)
    chosen = name or _name_of(found)
    chosen = chosen_name(chosen, Path(chosen))
    _require_free(before, chosen, source, path)
    made = with_adapter(data, str(path), chosen, source, weight)
    wanted = parse_recipe(made, str(path))
    done = renewed(path, wanted, Where(registry, offline), allow=allow_base_mismatch)
    if not dry_run:
        write_both(path, made, done.lock)
    (entry,) = (one for one in wanted.adapters if one.name == chosen)
    locked = locked_as(path.with_name(LOCK_NAME), done, dry_run)
    return Added(path, chosen, source, entry.weight, created, locked)


def _recipe(path: Path, base: Path | str | None) -> tuple[bytes, bool]:
    """The recipe's bytes, and whether they are of one that is to be made."""
    source = None
    if base is not None:
        folder = isinstance(base, Path) or (Path(base) / "config.json").is_file()
        source = _from_recipe(Path(base), path) if folder else str(base)
    if not path.exists() and source is not None:
        return new_recipe(source), True
    try:
        data = read_bytes(path)
    except HubkitError as error:
        if error.code == "HK-MISSING":
            error.fix = "hubkit add REFERENCE --base ORG/NAME    makes one"
        raise
    have = parse_recipe(data, str(path)).base.source
    if source not in (None, have):
        what, fix = "the recipe has another base", "leave --base out, or change [base] in the recipe"
        raise HubkitError("HK-EXISTS", what, where=str(path), want=source or "", have=have, fix=fix)
    return data, False


def _from_recipe(folder: Path, path: Path) -> str:
    """The reference of a folder as the recipe at `path` names it, links on the way kept."""
    plain = os.path.relpath(folder.absolute(), path.absolute().parent)
    if os.path.realpath(path.absolute().parent / plain) != os.path.realpath(folder):
        return relative(folder, path.parent)
    return str(Reference("folder", path=Path(Path(plain).as_posix())))


def _name_of(reference: Reference) -> str:
    """What an adapter is called where nobody says: like its folder or repository, in letters that a name may have."""
    if reference.path is not None:
        text = reference.path.resolve().name
    else:
        text = (reference.folder or reference.repo or "").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or text


def _require_free(recipe: Recipe, name: str, source: str, path: Path) -> None:
    """The name is free, or that of the same adapter at another revision."""
    for one in recipe.adapters:
        if one.name != name or _place(one.source, path) == _place(source, path):
            continue
        what = f"the recipe has another adapter named {name!r}"
        fix = "--name NAME"
        raise HubkitError("HK-EXISTS", what, where=str(path), want=source, have=one.source, fix=fix, status=USAGE)


def _place(source: str, path: Path) -> Reference:
    found = at(path.parent, parse_reference(source))
    return replace(found, revision=None, path=found.path and found.path.resolve())
