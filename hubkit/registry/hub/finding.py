"""Searching a Hub, or a server that speaks its protocol: by the names and tags that its list of models knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from hubkit.documents.manifest import BASE_TAG, METHOD_TAG
from hubkit.registry.address import is_repo
from hubkit.registry.hub.reader import HubReader
from hubkit.registry.searching import DIGITS, Hit, Wanted

OURS, THEIRS = "hubkit", "peft"
"""Tags of what hubkit can pull: adapters of its own, and those of PEFT, which the Hub marks by their files."""
_PAGE = 1000


def search_hub(place: HubReader, wanted: Wanted, most: int) -> list[Hit]:
    """Adapters that fit: those with tags of hubkit's first, then others in PEFT's form, each in the server's order.

    A Hub finds words in names of repositories alone. What only hubkit writes into tags, the base's digest and the
    method, is asked of adapters of hubkit's alone.

    Args:
        most: so many are enough.

    Raises:
        HubkitError: what the server refuses; ``HK-OFFLINE``.
    """
    tags = [f"base_model:{wanted.base}"] if wanted.base else []
    tags += [f"license:{wanted.license.casefold()}"] if wanted.license else []
    own = [f"{METHOD_TAG}{wanted.method}"] if wanted.method else []
    own += [BASE_TAG + wanted.digest[:DIGITS]] if wanted.digest else []
    asked: dict[str, str | Sequence[str]] = {"search": " ".join(wanted.words), "author": wanted.owner}
    asked |= {"pipeline_tag": wanted.task, "limit": str(min(most, _PAGE))}
    found: dict[str, Hit] = {}
    for kind in (OURS,) if own else (OURS, THEIRS):
        rows = place.models({**asked, "filter": [kind, *tags, *own]})
        hits = (_hit(row, place.name) for row in rows if is_repo(str(row.get("id"))))
        fresh = (hit for hit in hits if hit.repo not in found)
        found |= {hit.repo: hit for hit in islice(fresh, most - len(found))}
    return list(found.values())


def _hit(row: Mapping[str, Any], registry: str) -> Hit:
    """What a row says, by its tags."""
    listed = row.get("tags")
    tags = [str(tag) for tag in listed] if isinstance(listed, list) else []

    def said(*starts: str) -> str:
        return next((tag.removeprefix(start) for start in starts for tag in tags if tag.startswith(start)), "")

    commit, task = row.get("sha"), row.get("pipeline_tag")
    return Hit(
        repo=str(row["id"]),
        commit=commit if isinstance(commit, str) else "",
        registry=registry,
        method=said(METHOD_TAG),
        base=said("base_model:adapter:", "base_model:merge:", "base_model:"),
        digest=said(BASE_TAG),
        task=task if isinstance(task, str) else "",
        license=said("license:"),
    )
