"""`yank`: take a version back, so that no range chooses it any more; whoever pinned it keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.publishing import retrying
from hubkit.registry.api import Registry
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import no_revision, parse_version
from hubkit.registry.yanked import MAX_REASON, NO_REASON, UNREADABLE, YANKED, read_yanked, yanked_bytes


@dataclass(frozen=True, repr=False)
class Yanked(Shown):
    """A version that was taken back, or given again.

    Args:
        repo: ``org/name``.
        registry: its name, without credentials.
        version: which.
        reason: that whoever names it exactly is told; None: it is not yanked now.
        commit: that says so, on the default branch; None: it was so already.
        yanked: every version of the repository that is yanked now.
    """

    repo: str
    registry: str
    version: str
    reason: str | None
    commit: str | None
    yanked: tuple[str, ...]


@checked
def yank(reference: str, *, reason: str | None = None, undo: bool = False, registry: str | None = None) -> Yanked:
    """Take a version back: ranges no longer choose it, exact references and locks go on working. Nothing is deleted.

    Args:
        reference: ``org/name@1.2.0``.
        reason: one line for those who use it all the same.
        undo: give it again.
        registry: where, if not the default registry.

    Raises:
        HubkitError: ``HK-REFERENCE`` (status 2) without an exact version; ``HK-NO-REVISION`` for one that is not
            published; ``HK-OPTIONS`` (status 2) for a reason that is too long, or one with `undo`; ``HK-NEWER`` for a
            list of a newer hubkit; ``HK-STALE`` when others keep committing; what the registry raises.
    """
    target = parse_reference(reference)
    version = parse_version((target.revision or "").removeprefix("v"))
    if target.repo is None or version is None or target.folder:
        what, want = "yank needs one version of a repository", "org/name@1.2.0"
        raise HubkitError("HK-REFERENCE", what, want=want, have=reference, status=USAGE)
    words = " ".join((reason or "").split())
    if len(words) > MAX_REASON or (words and undo):
        what = "--undo gives no reason" if undo else "the reason is too long"
        want = f"at most {MAX_REASON} characters"
        raise HubkitError("HK-OPTIONS", what, want=want, have=f"{len(words)} characters", status=USAGE)
    place, repo, tag = open_registry(target, registry), target.repo, f"v{version}"
    return retrying(lambda: _yanked(place, repo, tag, words, undo))


def _yanked(place: Registry, repo: str, tag: str, words: str, undo: bool) -> Yanked:
    """One attempt: what is yanked now, with one version more or less, as one commit."""
    refs = place.refs(repo)
    if tag not in refs.tags:
        raise no_revision(place.name, repo, tag, refs.tags)
    try:
        before = read_yanked(place, repo, refs)
    except HubkitError as fault:
        if fault.code not in UNREADABLE or fault.code == "HK-NEWER":
            raise
        before = {}  # it says nothing, and is written anew
    after = {name: why for name, why in before.items() if name != tag}
    if not undo:
        after[tag] = words or before.get(tag, NO_REASON)
    commit, version = None, tag.removeprefix("v")
    if after != before:
        message = f"{'give again' if undo else 'yank'} {version}" + (f"\n\n{words}" if words else "")
        content = {YANKED: yanked_bytes(after)}
        commit = place.commit(repo, content, [], message=message, parent=refs.branches.get("main"))
    known = tuple(name.removeprefix("v") for name in sorted(after))
    return Yanked(repo, place.name, version, after.get(tag), commit, known)
