"""`log`: the versions of an adapter in its registry, newest first, and what changed from one to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.documents.shown import Shown, Table
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.api import CommitInfo, Registry
from hubkit.registry.opening import Where
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import resolve_revision, sorted_versions
from hubkit.verbs.diff import Differing, differing

MOST = 20
"""How many are given unless it is said."""
_FIELDS = ("kind", "name", "method", "config", "license", "overrides", "vocabulary")
_OF_BASE = ("source", "revision", "weights", "layout", "codec")


@dataclass(frozen=True, repr=False)
class Logged(Shown):
    """One version.

    Args:
        versions: its tags that are versions, the highest first; none for a commit without one.
        commit: 40 hexadecimal digits.
        date: when it was made, as ISO 8601 in UTC; "" where the registry does not say.
        title: first line of its message; "" where the registry does not say.
        author: "" where the registry does not say.
        fields: what differs in its manifest from the version before: method, configuration, base, licence.
        files: files that differ from the version before; on a Hub, small ones that no manifest lists, such as the card,
            only where their sizes do.
        first: there is no version before, so nothing is compared.
    """

    versions: tuple[str, ...]
    commit: str
    date: str
    title: str
    author: str
    fields: tuple[Differing, ...] = ()
    files: tuple[Differing, ...] = ()
    first: bool = False


@checked
def log(reference: str, *, every: bool = False, registry: str | None = None, limit: int = MOST) -> tuple[Logged, ...]:
    """The versions of an adapter.

    Args:
        reference: a repository; at a revision: from there on into the past; with a folder: of the adapter there.
        every: every commit, those without a version, too.
        registry: for a reference that names none, if not the default registry.
        limit: how many at most.

    Raises:
        HubkitError: ``HK-REFERENCE`` for a folder of this machine; ``HK-OPTIONS``; what the registry raises.
    """
    found = parse_reference(reference)
    if found.repo is None:
        what, want = "a folder has no versions", "org/name"
        raise HubkitError("HK-REFERENCE", what, want=want, have=reference, status=USAGE)
    if limit < 1:
        raise HubkitError("HK-OPTIONS", "nothing is to be listed", want="a limit of at least 1", status=USAGE)
    place, repo = Where(registry).open(found), found.repo
    start = resolve_revision(place, repo, found.revision).commit
    named: dict[str, list[str]] = {}
    tags = place.refs(repo).tags
    for tag in sorted_versions(tags)[::-1]:
        named.setdefault(tags[tag], []).append(tag)
    chosen = _line(place, repo, start, named if found.revision is None else {}, named, every)
    folder = f"{found.folder}/" if found.folder else ""
    return Table(_compared(place, repo, folder, chosen, named, limit))


def _line(
    place: Registry,
    repo: str,
    start: str,
    aside: Mapping[str, list[str]],
    named: Mapping[str, list[str]],
    every: bool,
) -> list[CommitInfo]:
    """The commits to show, newest first; behind them versions that the line does not lead to, the highest first.

    Args:
        aside: commits with a version that are shown wherever they are.
    """
    line = list(place.log(repo, start))
    known = {one.commit for one in line}
    alone = [commit for commit in aside if commit not in known]
    line += [one for commit in alone for one in place.log(repo, commit)[:1]]
    return [one for one in line if every or one.commit in named]


def _compared(
    place: Registry, repo: str, folder: str, line: list[CommitInfo], named: Mapping[str, list[str]], limit: int
) -> Iterator[Logged]:
    """Each commit with what differs from the next older one that is shown."""
    states = (_state(place, repo, one.commit, folder) for one in line)
    after = next(states, None)
    for at, one in enumerate(line[:limit]):
        before = next(states, None)
        fields: tuple[Differing, ...] = ()
        files: tuple[Differing, ...] = ()
        if after is not None and before is not None:
            fields, files = (tuple(differing(old, new)) for old, new in zip(before, after, strict=True))
        versions = tuple(named.get(one.commit, ()))
        told = one.commit, one.date, one.title, one.author
        yield Logged(versions, *told, fields, files, first=at + 1 == len(line))
        after = before


def _state(place: Registry, repo: str, commit: str, folder: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of the manifest, file -> what it is known by) at a commit; the manifest knows digests of all files."""
    files = {
        file.path.removeprefix(folder): file.sha256 or f"{file.size} bytes"
        for file in place.files(repo, commit)
        if file.path.startswith(folder)
    }
    document: Any = None
    if MANIFEST_NAME in files:
        try:
            document = json.loads(place.read(repo, commit, folder + MANIFEST_NAME))
        except (ValueError, RecursionError):
            document = None
    if not isinstance(document, dict):
        return {}, files
    base = document.get("base")
    fields = {name: document[name] for name in _FIELDS if name in document}
    if isinstance(base, dict):
        fields["base"] = {name: base[name] for name in _OF_BASE if name in base}
    listed = document.get("files")
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    said = {str(one.get("path")): str(one.get("sha256")) for one in entries}
    left = {path: value for path, value in files.items() if path not in (MANIFEST_NAME, ".gitattributes")}
    return fields, {**left, **{path: digest for path, digest in said.items() if path in files}}
