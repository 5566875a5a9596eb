"""`search`: find adapters by words, base, method, task, owner or licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.searching import DIGITS, Hit, Wanted

MOST = 50
"""How many are given unless it is said."""
_DIGEST = re.compile(rf"(?:sha256:)?([0-9a-f]{{{DIGITS},64}})")


@dataclass(frozen=True, repr=False)
class Found(Shown):
    """What a search found.

    Args:
        place: the registry that was searched, or the folder of the store.
        hits: what fits; those of a Hub in its order, others sorted by repository.
        more: there is more that fits.
        wanted: what was looked for.
    """

    place: str
    hits: tuple[Hit, ...]
    more: bool
    wanted: Wanted


@checked
def search(
    text: str = "",
    *,
    base: Path | str | None = None,
    method: str | None = None,
    task: str | None = None,
    owner: str | None = None,
    license: str | None = None,
    local: bool = False,
    registry: str | None = None,
    limit: int = MOST,
) -> Found:
    """Find adapters, mixes and merged models; what is given has to fit altogether.

    Args:
        text: words, each of which occurs in the repository's name; in a directory and in the store also in the names of
            adapter, method and base.
        base: what it was made on: a repository's name, ``org/name``; the digest of its weights, 16 digits or more; or a
            base at hand, a folder or a stored ``org/name@revision``, whose digest is looked for then.
        method: as `methods` lists it.
        task: as model cards say it, e.g. ``text-generation``.
        owner: of the repository.
        license: SPDX expression.
        local: search the store, and ask no registry.
        registry: search this one, if not the default registry.
        limit: how many at most.

    Raises:
        HubkitError: ``HK-OPTIONS``, ``HK-REFERENCE``; ``HK-OFFLINE`` for a base at a revision that is not stored; what
            the registry raises.
    """
    if limit < 1 or (local and registry):
        what = "the store is no registry" if limit > 0 else "nothing is to be found"
        want = "local or registry" if limit > 0 else "a limit of at least 1"
        raise HubkitError("HK-OPTIONS", what, want=want, status=USAGE)
    given = {"method": method, "task": task, "owner": owner, "license": license}
    known = {name: value for name, value in given.items() if value}
    wanted = Wanted(tuple(text.casefold().split()), **_base(base), **known)
    place, hits = _searched(wanted, local, registry, limit + 1)
    return Found(place, tuple(hits[:limit]), len(hits) > limit, wanted)


def _searched(wanted: Wanted, local: bool, registry: str | None, most: int) -> tuple[str, list[Hit]]:
    from hubkit.registry.store.store import Store

    store = Store()
    indexes = store.home / "index" / "search"
    if local:
        from hubkit.registry.store.finding import search_store

        return str(store.home), search_store(store, wanted, indexes)
    from hubkit.registry.directory.directory import DirectoryRegistry
    from hubkit.registry.opening import open_registry

    place = open_registry(None, registry)
    if isinstance(place, DirectoryRegistry):
        from hubkit.registry.directory.finding import search_directory

        return place.name, search_directory(place, wanted, indexes)
    from hubkit.registry.hub.finding import search_hub
    from hubkit.registry.hub.reader import HubReader

    assert isinstance(place, HubReader)  # there are two kinds of registries
    return place.name, search_hub(place, wanted, most)


def _base(text: Path | str | None) -> dict[str, str]:
    """The field of `Wanted` that a base means."""
    if text is None:
        return {}
    if isinstance(text, str) and (digest := _DIGEST.fullmatch(text.casefold())):
        return {"digest": digest[1]}
    from hubkit.named.sources import base_reference, base_source
    from hubkit.registry.opening import Where

    reference = base_reference(text)
    if reference.repo is not None and reference.revision is None:
        return {"base": reference.repo}
    from hubkit.artifact.identity.digest import fingerprint_folder

    weights = fingerprint_folder(base_source(text, None, Where(offline=True)).path).fingerprint.weights
    assert weights is not None  # its values were read
    return {"digest": weights.removeprefix("sha256:")}
