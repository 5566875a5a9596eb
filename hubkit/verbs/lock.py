"""`lock`: pin a recipe's base and adapters to exact commits, digests and sizes, after proving that they fit together.

An entry whose line in the recipe did not change keeps its commit: what a lock pins moves only when it was asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.recipe import RECIPE_NAME, read_recipe
from hubkit.documents.shown import Shown
from hubkit.locking.differences import Moved, moves
from hubkit.locking.freshness import require_fresh
from hubkit.locking.renewal import Renewal, recipe_path, renewed
from hubkit.named.locked import at, needed_by
from hubkit.registry.opening import Where

__all__ = ["Locked", "at", "lock", "locked_as"]


@dataclass(frozen=True, repr=False)
class Locked(Shown):
    """A lock that was written, or found to be up to date.

    Args:
        path: the lock.
        digest: of its content; a deployment quotes it.
        lock: its content.
        changed: what differs from the lock before, by name: ``base``, names of adapters, ``mix``, ``order``,
            ``targets``, ``policy``; empty when nothing does.
        dry_run: nothing was written.
        moved: each difference: of what, from which version or commit to which.
        lost: of a lock with merge conflicts: what the two sides did not agree on, and so was resolved anew.
    """

    path: Path
    digest: str
    lock: Lock
    changed: tuple[str, ...]
    dry_run: bool
    moved: tuple[Moved, ...] = ()
    lost: tuple[str, ...] = ()


@checked
def lock(
    recipe: Path | str = RECIPE_NAME,
    *,
    check: bool = False,
    upgrade: bool | Sequence[str] = False,
    diff: Path | str | None = None,
    allow_base_mismatch: bool = False,
    registry: str | None = None,
    offline: bool = False,
    dry_run: bool = False,
) -> Locked:
    """Write ``hubkit.lock`` beside a recipe.

    A lock in which git left merge conflicts is rebuilt from what both sides pin.

    Args:
        recipe: the recipe or its folder. Folders named in it are relative to it.
        check: write nothing, ask no registry: refuse when the lock is missing, edited, or older than the recipe or the
            folders it names.
        upgrade: resolve every reference anew; or names of entries, ``base`` for the base: those alone.
        diff: another lock, or the folder of one: write nothing, say what differs from it to the lock that is there.
        allow_base_mismatch: lock adapters of another base; recorded in the lock.
        registry: for references that name none, if not the default registry.
        offline: resolve what has to be resolved among what was pulled before.
        dry_run: resolve everything, write nothing.

    Raises:
        HubkitError: ``HK-RECIPE``, ``HK-MISSING``; ``HK-LOCK-STALE`` (check); ``HK-LOCK-EDITED``; ``HK-POLICY``;
            ``HK-NOT-ADAPTER``; ``HK-BASE-MISMATCH``; ``HK-BASE-UNPROVEN`` (status 3); what the registry raises.
    """
    path = recipe_path(Path(recipe))
    target = path.with_name(LOCK_NAME)
    if diff is not None:
        old, new = Lock.read(Path(diff)), Lock.read(target)
        return locked_as(target, Renewal(new, old, moves(old, new), (), False), True)
    wanted = read_recipe(path)
    if check:
        before = Lock.read(target)
        require_fresh(wanted, path, before, target)
        return Locked(target, before.digest, before, (), True)
    done = renewed(path, wanted, Where(registry, offline), upgrade=upgrade, allow=allow_base_mismatch)
    if done.needed and not dry_run:
        done.lock.write(target)
    if not dry_run:
        needed_by(target)
    return locked_as(target, done, dry_run)


def locked_as(target: Path, done: Renewal, dry_run: bool) -> Locked:
    """What `lock` says of a lock that was made anew."""
    return Locked(target, done.lock.digest, done.lock, done.changed, dry_run, done.moved, done.lost)
