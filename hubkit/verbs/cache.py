"""`cache`: what the local store holds and why, read again byte by byte, and taken out of it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from hubkit.documents.arguments import checked, seconds_of
from hubkit.documents.shown import Shown, Table
from hubkit.errors import USAGE, HubkitError, nearest

if TYPE_CHECKING:
    from hubkit.registry.store.kept import Artifact
    from hubkit.registry.store.store import Store

ACTIONS = ("list", "verify", "prune", "remove")
OLDER = "30d"
"""For how long something was not used that `prune` removes, unless it is said."""
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")


@dataclass(frozen=True, repr=False)
class Examined(Shown):
    """One artifact of the store.

    Args:
        reference: what `pull` takes to get these very bytes again.
        digest: of its content.
        size: bytes of its files.
        damaged: files that are missing, or held other bytes and are in quarantine now.
    """

    reference: str
    digest: str
    size: int
    damaged: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Cached(Shown):
    """One artifact of the store, and what keeps it there.

    Args:
        reference: what `pull` takes to get these very bytes again; the digest where the index knows nothing of it.
        kind: ``adapter`` or ``base``; "" where the index knows nothing of it.
        size: bytes of its files.
        pulled: the day on which it came, ``2026-11-30``.
        used: the day on which a command last named it.
        needed: the locks and deployments that name it: as long as they are there, it stays.
        digest: of its content.
        path: its folder.
        others: further references with the same bytes.
    """

    reference: str
    kind: str
    size: int
    pulled: str
    used: str
    needed: tuple[Path, ...]
    digest: str
    path: Path
    others: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Freed(Shown):
    """What left the store.

    Args:
        removed: the artifacts.
        size: bytes that came free, all in all.
        leftovers: those of them that were no artifacts: downloads that nobody went on with, files in quarantine, and
            what killed processes left.
        dry_run: nothing was removed; the sizes are those that would come free.
    """

    removed: tuple[Cached, ...]
    size: int
    leftovers: int
    dry_run: bool


@overload
def cache(action: Literal["verify"] = "verify") -> tuple[Examined, ...]: ...
@overload
def cache(action: Literal["list"]) -> tuple[Cached, ...]: ...
@overload
def cache(
    action: Literal["prune"],
    *,
    older_than: str | None = None,
    keep: Sequence[Path | str] = (),
    dry_run: bool = False,
) -> Freed: ...
@overload
def cache(action: Literal["remove"], reference: str, *, force: bool = False, dry_run: bool = False) -> Freed: ...
@overload
def cache(
    action: str,
    reference: str | None = None,
    *,
    older_than: str | None = None,
    keep: Sequence[Path | str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> tuple[Examined, ...] | tuple[Cached, ...] | Freed: ...
@checked
def cache(
    action: str = "verify",
    reference: str | None = None,
    *,
    older_than: str | None = None,
    keep: Sequence[Path | str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> tuple[Examined, ...] | tuple[Cached, ...] | Freed:
    """Look after the store.

    Args:
        action: ``list`` says of each artifact when it came, when it was used, and which locks need it; ``verify`` reads
            every byte again, and what is damaged is put into quarantine, so that the next command that names it fetches
            it anew; ``prune`` removes what nobody used for a while and no lock or deployment of this machine needs;
            ``remove`` takes one artifact out.
        reference: to be removed: as `list` shows it, a repository (every commit of it), or a digest.
        older_than: with ``prune``: for how long it was not used, ``30d`` (the default), ``2w``, ``12h``. Uses are noted
            once a day; with less than that, something may go that another command is using just now.
        keep: with ``prune``: further locks, or folders of locks, whose artifacts stay.
        force: with ``remove``: also what a lock needs.
        dry_run: with ``prune`` and ``remove``: only say what would go.

    Raises:
        HubkitError: ``HK-OPTIONS`` for another action, and options of another one; ``HK-CACHE-NEEDED`` for what a lock
            needs; ``HK-MISSING`` for what is not stored; ``HK-REFERENCE``; ``HK-JSON``, ``HK-IO``.
    """
    from hubkit.registry.store.store import Store

    _require_apt(action, reference, older_than, keep, force, dry_run)
    if action == "list":
        return Table(map(_cached, Store().artifacts()))
    if action == "prune":
        return _prune(Store(), seconds_of(older_than or OLDER, "older_than"), [Path(one) for one in keep], dry_run)
    if action == "remove":
        return _remove(Store(), reference or "", force, dry_run)
    return Table(Examined(one.reference, one.digest, one.size, one.damaged) for one in Store().verify())


def _require_apt(
    action: str, reference: str | None, older_than: str | None, keep: Sequence[Path | str], force: bool, dry_run: bool
) -> None:
    """Refuses an unknown action, and what an action does not take."""
    if action not in ACTIONS:
        what = "no such action"
        raise HubkitError("HK-OPTIONS", what, want=", ".join(ACTIONS), have=action, status=USAGE)
    given = {"reference": reference is not None, "force": force, "older_than": older_than is not None}
    given |= {"keep": bool(keep), "dry_run": dry_run}
    takes = {"prune": ("older_than", "keep", "dry_run"), "remove": ("reference", "force", "dry_run")}.get(action, ())
    if strange := [name for name, there in given.items() if there and name not in takes]:
        what, want = f"{action} does not take this", ", ".join(takes) or "no options"
        raise HubkitError("HK-OPTIONS", what, want=want, have=", ".join(strange), status=USAGE)
    if action == "remove" and not reference:
        fix = "hubkit cache list, then hubkit cache remove REFERENCE"
        raise HubkitError("HK-OPTIONS", "what is to be removed", want="a reference", fix=fix, status=USAGE)


def _prune(store: Store, older: float, keep: Sequence[Path], dry_run: bool) -> Freed:
    from hubkit.registry.store.pruning import prune

    done = prune(store, older, keep, dry_run=dry_run)
    size = sum(freed for _, freed in done.artifacts) + done.leftovers
    return Freed(tuple(_cached(one) for one, _ in done.artifacts), size, done.leftovers, dry_run)


def _remove(store: Store, reference: str, force: bool, dry_run: bool) -> Freed:
    from hubkit.registry.store.placing import occupied

    found = _named(store, reference)
    if not force and (needed := sorted({str(path) for one in found for path in one.needed})):
        what, fix = "a lock or deployment of this machine needs it", f"hubkit cache remove {reference} --force"
        have = [f"needed by {path}" for path in needed]
        raise HubkitError("HK-CACHE-NEEDED", what, where=reference, have=have, fix=fix)
    freed = sum(occupied(one.path) if dry_run else store.remove(one.digest) or 0 for one in found)
    return Freed(tuple(map(_cached, found)), freed, 0, dry_run)


def _named(store: Store, text: str) -> list[Artifact]:
    """The artifacts that a reference or digest means."""
    from hubkit.registry.opening import open_registry
    from hubkit.registry.reference import parse_reference

    known = store.artifacts()
    if digest := _DIGEST.fullmatch(text):
        found = [one for one in known if one.digest.startswith(f"sha256:{digest[1]}")]
    else:
        reference = parse_reference(text)
        if reference.repo is None:
            what, want = "a folder is not in the store", "org/name, or a digest"
            raise HubkitError("HK-REFERENCE", what, want=want, have=text, status=USAGE)
        place = open_registry(reference).name if reference.scheme else None
        stored = store.digests(reference.repo, reference.folder, reference.revision, place)
        if len(stored) > 1:
            have = [f"{registry}/{reference.repo}" for registry in sorted(stored)]
            what, fix = "it was pulled from several registries", f"hubkit cache remove {have[0]}"
            raise HubkitError("HK-REFERENCE", what, have=have, fix=fix, status=USAGE)
        found = [one for one in known if one.digest in set().union(*stored.values())]
    if not found:
        near = nearest(text, (name for one in known for name in one.references)) or "hubkit cache list shows it"
        raise HubkitError("HK-MISSING", "it is not in the store", where=text, have=near, fix="hubkit cache list")
    return found


def _cached(one: Artifact) -> Cached:
    first, *others = one.references or (one.digest,)
    days = date.fromtimestamp(one.pulled).isoformat(), date.fromtimestamp(one.used).isoformat()
    return Cached(first, one.kind, one.size, *days, one.needed, one.digest, one.path, tuple(others))
