"""What leaves the store: what nobody used for a while and no lock needs, and what was left lying about."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.drafts import leftovers
from hubkit.documents.files import refusing
from hubkit.registry.store.kept import Artifact
from hubkit.registry.store.partials import OLD
from hubkit.registry.store.placing import occupied
from hubkit.registry.store.store import Store


@dataclass(frozen=True)
class Swept:
    """What left the store.

    Args:
        artifacts: each with the bytes that came free.
        leftovers: bytes of downloads that nobody went on with, of files in quarantine, and of what processes left that
            were killed.
    """

    artifacts: tuple[tuple[Artifact, int], ...]
    leftovers: int


def prune(store: Store, older: float, keep: Iterable[Path] = (), *, dry_run: bool = False) -> Swept:
    """Remove what was not used for `older` seconds, unless a lock or deployment needs it.

    What a pull takes up meanwhile stays: under the lock of the store it is looked at once more.

    Args:
        keep: further locks, or folders of locks.
        dry_run: remove nothing, and say what would go.

    Raises:
        HubkitError: ``HK-MISSING`` for one of `keep`, ``HK-JSON``, ``HK-IO``: nothing is removed where it is not known
            what is needed.
    """
    since, gone = time.time() - older, []
    for one in store.artifacts(keep):
        if one.needed or one.used > since:
            continue
        freed = occupied(one.path) if dry_run else store.remove(one.digest, unused_since=since)
        if freed is not None:
            gone.append((one, freed))
    rest = store.partials.sweep(min(older, OLD), dry_run=dry_run)
    with refusing(store.home):
        rest += _staging(store.home / "staging", dry_run) + _quarantine(store.home / "quarantine", since, dry_run)
    if not dry_run:
        store.needs.forget_gone()
    return Swept(tuple(gone), rest)


def _staging(area: Path, dry_run: bool) -> int:
    """What killed processes left of their work; the bytes."""
    total = 0
    for left in leftovers(area) if area.is_dir() else ():
        total += occupied(left.path) if left.path.exists() else 0
        if not dry_run:
            shutil.rmtree(left.path, ignore_errors=True)
        left.end(swept=not dry_run)
    return total


def _quarantine(area: Path, since: float, dry_run: bool) -> int:
    """Files that were put away before `since`; the bytes."""
    total = 0
    for place, _, names in os.walk(area, topdown=False):
        for path in (Path(place) / name for name in names):
            if path.lstat().st_ctime > since:  # when it was moved there
                continue
            total += occupied(path)
            if not dry_run:
                path.unlink()
        if not dry_run:
            with suppress(OSError):
                os.rmdir(place)  # only where nothing is left in it
    return total
