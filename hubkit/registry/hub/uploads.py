"""Large objects on their way to a Hub, by Git LFS's batch API: each that the server does not have, sent once.

The addresses to send to come from the server, and may be anybody's: the token goes to the registry's own origin only.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.documents.threads import at_once
from hubkit.errors import HubkitError
from hubkit.registry.hub import faults
from hubkit.registry.hub.deadlines import Deadlines
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.streams import SharedFile, Slice
from hubkit.registry.hub.transport import Reader, joined

MEDIA = "application/vnd.git-lfs+json"
BATCH = 200
"""Objects that are offered at once."""
WORKERS = 4
MAX_PARTS = 10_000


@dataclass(frozen=True)
class Upload:
    """One object: its sha256 (64 hex digits), its bytes, their number."""

    oid: str
    file: SharedFile
    size: int


def send(reader: Reader, asked: Asked, uploads: Mapping[str, Upload]) -> None:
    """Send those of these objects (by `oid`) that the repository does not have.

    Raises:
        HubkitError: ``HK-LIMIT`` and ``HK-REGISTRY`` with the server's words for an object that it does not take; what
            `Reader.ask` raises.
    """
    oids = sorted(uploads)
    for at in range(0, len(oids), BATCH):
        rows = _offered(reader, asked, [uploads[oid] for oid in oids[at : at + BATCH]])
        wanted = [(uploads[oid], actions) for oid, actions in rows if "upload" in actions]
        at_once(lambda one: _sent(reader, asked, *one), wanted, WORKERS, threading.Event())


def _offered(reader: Reader, asked: Asked, uploads: list[Upload]) -> list[tuple[str, dict[str, Any]]]:
    """What the server wants of each: (oid, its actions), none for what it has."""
    known = {one.oid for one in uploads}
    document = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "hash_algo": "sha256",
        "objects": [{"oid": one.oid, "size": one.size} for one in uploads],
        "ref": {"name": asked.revision or "main"},
    }
    answer = reader.post(f"/{asked.repo}.git/info/lfs/objects/batch", document, asked, media=MEDIA)
    rows = answer.get("objects") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("oid") in known for row in rows):
        raise faults.malformed("not what was asked about large objects", asked)
    found = []
    for row in rows:
        if error := row.get("error"):
            code, said = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
            raise faults.from_status(code if isinstance(code, int) and code >= 400 else 400, "", str(said), asked)
        actions = row.get("actions") or {}
        if not isinstance(actions, dict) or not all(map(_is_action, actions.values())):
            raise faults.malformed("an upload without an address", asked)
        found.append((row["oid"], actions))
    return found


def _is_action(action: object) -> bool:
    return isinstance(action, dict) and isinstance(action.get("href"), str)


def _sent(reader: Reader, asked: Asked, upload: Upload, actions: Mapping[str, Any]) -> None:
    action = actions["upload"]
    href, header = joined(reader.endpoint, action["href"], asked), action.get("header")
    if isinstance(header, dict) and header.get("chunk_size"):
        _parts(reader, asked, upload, href, header)
    else:
        _put(reader, asked, href, upload.file, 0, upload.size)
    if "verify" in actions:
        place = joined(reader.endpoint, actions["verify"]["href"], asked)
        body = b'{"oid":"%s","size":%d}' % (upload.oid.encode(), upload.size)
        reader.ask("POST", place, asked, lambda *_: None, {"Content-Type": MEDIA, "Accept": MEDIA}, body=body)


def _parts(reader: Reader, asked: Asked, upload: Upload, href: str, header: Mapping[str, Any]) -> None:
    """Each part to an address of its own, then the list of them to `href`."""
    numbered = {int(key): value for key, value in header.items() if re.fullmatch(r"\d{1,9}", key)}
    size = int(header["chunk_size"]) if re.fullmatch(r"\d{1,18}", str(header["chunk_size"])) else 0
    count = -(-upload.size // size) if size else 0
    sound = all(isinstance(numbered.get(number), str) for number in range(1, min(count, MAX_PARTS) + 1))
    if not 0 < count <= MAX_PARTS or not sound:
        raise faults.malformed("an upload in parts without their addresses", asked)
    parts = []
    for number in range(1, count + 1):
        start, stop = (number - 1) * size, min(number * size, upload.size)
        place = joined(reader.endpoint, numbered[number], asked)
        etag = _put(reader, asked, place, upload.file, start, stop)
        if not etag:
            raise faults.malformed("a part was taken without an ETag", asked)
        parts.append({"partNumber": number, "etag": etag})
    body = json.dumps({"oid": upload.oid, "parts": parts}).encode()
    reader.ask("POST", href, asked, lambda *_: None, {"Content-Type": MEDIA, "Accept": MEDIA}, body=body)


def _put(reader: Reader, asked: Asked, place: str, file: SharedFile, start: int, stop: int) -> str:
    """Send bytes ``[start, stop)`` of a file; the ETag of the answer.

    The address is the proof that they may be sent: no token goes with them.
    """
    size = stop - start
    headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    total = Deadlines.read().for_bytes(size)
    try:
        return reader.ask(
            "PUT",
            place,
            asked,
            lambda r, _: str(r.headers.get("ETag", "")),
            headers,
            body=lambda: Slice(file, start, stop),
            total=total,
            token=False,
        )
    except HubkitError as fault:
        if fault.code != "HK-AUTH":
            raise
        raise faults.malformed("the upload's address is not good", asked, have="; ".join(fault.have)) from None
