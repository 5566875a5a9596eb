"""Versions that their publisher took back: a small document on the default branch, which ranges of versions obey.

A yanked version stays where it is: references that name it exactly, and locks, go on working::

    .hubkit/yanked.json   {"schema": "hubkit/yanked/1", "versions": {"1.2.0": {"reason": "trained on the test set"}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hubkit.documents.schema import parse, refuse_secrets
from hubkit.errors import HubkitError
from hubkit.registry.api import Refs, Registry

YANKED = ".hubkit/yanked.json"
_KIND = "hubkit/yanked/"
SCHEMA = f"{_KIND}1"
MAX_BYTES = 1 << 20
MAX_REASON = 300
NO_REASON = "no reason was given"
UNREADABLE = ("HK-JSON", "HK-SCHEMA", "HK-LIMIT", "HK-NEWER")
"""Codes of a document that says nothing."""


def read_yanked(registry: Registry, repo: str, refs: Refs) -> dict[str, str]:
    """Version tag -> reason, of every yanked version; where none ever was, one listing is asked for.

    Args:
        refs: of the repository, read before.

    Raises:
        HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-LIMIT``, ``HK-NEWER`` for a document that cannot be read: which
            versions may be chosen is not known then; what the registry raises.
    """
    tip = refs.branches.get("main")
    if tip is None:
        return {}
    where = f"{registry.name}/{repo}@{tip[:12]}  {YANKED}"
    try:
        data = registry.read(repo, tip, YANKED, 0, MAX_BYTES + 1)
    except HubkitError as fault:
        if fault.code != "HK-NOT-FOUND":
            raise
        return {}
    return parse_yanked(data, where)


def parse_yanked(data: bytes, where: str) -> dict[str, str]:
    """Version tag -> reason, as a document says; fields that are not known are passed over.

    Raises:
        HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-LIMIT``, ``HK-NEWER``.
    """
    if len(data) > MAX_BYTES:
        raise HubkitError("HK-LIMIT", "a document is too large", where=where, want=f"at most {MAX_BYTES} bytes")
    document = parse(data, where)
    schema, versions = document.get("schema"), document.get("versions")
    if isinstance(schema, str) and schema.startswith(_KIND) and schema != SCHEMA:
        what, fix = "the list of yanked versions is of a newer hubkit", "name an exact version, or update hubkit"
        raise HubkitError("HK-NEWER", what, where=where, want=SCHEMA, have=schema[:80], fix=fix)
    sound = schema == SCHEMA and isinstance(versions, dict)
    if not sound or not all(isinstance(entry, dict) for entry in (versions or {}).values()):
        want = f'{{"schema": "{SCHEMA}", "versions": {{"1.2.0": {{"reason": "..."}}}}}}'
        what = "the list of yanked versions is not one"
        fix = "name an exact version; its publisher writes the list anew with hubkit yank"
        raise HubkitError("HK-SCHEMA", what, where=where, want=want, fix=fix)
    return {f"v{version}": _reason(entry) for version, entry in (versions or {}).items()}


def _reason(entry: Mapping[str, Any]) -> str:
    text = entry.get("reason")
    return " ".join(text.split())[:MAX_REASON] if isinstance(text, str) and text.strip() else NO_REASON


def yanked_bytes(yanked: Mapping[str, str]) -> bytes:
    """The document, sorted; see `parse_yanked`.

    Raises:
        HubkitError: ``HK-SECRET`` for a token in a reason.
    """
    versions = {tag.removeprefix("v"): {"reason": reason} for tag, reason in sorted(yanked.items())}
    document = {"schema": SCHEMA, "versions": versions}
    refuse_secrets(document, "list of yanked versions")
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
