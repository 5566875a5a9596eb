"""`remove`: take adapters out of the recipe and of its lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME
from hubkit.documents.recipe import RECIPE_NAME, parse_recipe, read_bytes
from hubkit.documents.shown import Shown
from hubkit.locking.editing import without_adapters
from hubkit.locking.renewal import recipe_path, renewed, write_both
from hubkit.registry.opening import Where
from hubkit.verbs.lock import Locked, locked_as


@dataclass(frozen=True, repr=False)
class Removed(Shown):
    """Adapters that are neither in the recipe nor in its lock any more.

    Args:
        recipe: the recipe's file.
        names: of the adapters.
        locked: the lock that was made without them.
    """

    recipe: Path
    names: tuple[str, ...]
    locked: Locked


@checked
def remove(
    names: str | Sequence[str],
    *,
    recipe: Path | str = RECIPE_NAME,
    registry: str | None = None,
    offline: bool = False,
    dry_run: bool = False,
) -> Removed:
    """Remove adapters from a recipe, and lock it without them. Nothing else in the lock moves; what was pulled stays.

    Args:
        names: in the recipe.
        recipe: the recipe or its folder.
        registry: for references that name none, if not the default registry.
        offline: look only at what was pulled before.
        dry_run: write nothing.

    Raises:
        HubkitError: ``HK-UNKNOWN-ADAPTER`` (status 2) with the nearest name; ``HK-RECIPE``; what `lock` raises.
    """
    path = recipe_path(Path(recipe))
    gone = (names,) if isinstance(names, str) else tuple(names)
    made = without_adapters(read_bytes(path), str(path), gone)
    done = renewed(path, parse_recipe(made, str(path)), Where(registry, offline))
    if not dry_run:
        write_both(path, made, done.lock)
    return Removed(path, gone, locked_as(path.with_name(LOCK_NAME), done, dry_run))
