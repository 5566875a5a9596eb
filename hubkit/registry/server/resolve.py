"""GET and HEAD of files: ``/{id}/resolve/{rev}/{path}``, answered directly, with single byte ranges."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import BinaryIO
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from hubkit.registry.directory.objects import Entry, open_regular
from hubkit.registry.server.calls import Call, Refusal

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
BLOCK = 1 << 17
"""Bytes read at a time: so much, twice over, waits in memory for each client that is slow to take it."""


def resolve(call: Call) -> Response:
    """The file with its digest as ETag: sha256 for a large object, git's sha1 otherwise; 206 and 416 for ranges."""
    repo = call.readable()
    commit = call.commit(repo)
    path = call.seen.details["path"] = call.part("path")
    entry = call.registry.tree(repo, commit).get(path)
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
    headers = _headers(commit, path, entry)
    if _unchanged(call.request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    start, stop, status = _range(call, entry.size, headers)
    headers["Content-Length"] = str(stop - start)
    media = "application/octet-stream" if entry.large else "text/plain; charset=utf-8"
    if call.request.scope["method"] == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media)
    source = open_regular(call.registry.object(repo, entry.sha256))
    body = _blocks(source, start, stop)
    return StreamingResponse(body, status, headers, media, BackgroundTask(source.close))


def _headers(commit: str, path: str, entry: Entry) -> dict[str, str]:
    etag = f'"{entry.sha256 if entry.large else entry.oid}"'
    headers = {
        "X-Repo-Commit": commit,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1], safe='')}",
    }
    if entry.large:
        headers.update({"X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)})
    return headers


def _unchanged(known: str, etag: str) -> bool:
    """Whether the client has this very file (RFC 9110, 13.1.2)."""
    return known.strip() == "*" or etag in [one.strip().removeprefix("W/") for one in known.split(",")]


def _range(call: Call, size: int, headers: dict[str, str]) -> tuple[int, int, int]:
    """Start, stop and status; a range that is not understood, or several, mean the whole file (RFC 9110, 14.2)."""
    found = RANGE.fullmatch(call.request.headers.get("range", "").replace(" ", ""))
    if call.request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        found = None  # the client has the beginning of another file (RFC 9110, 13.1.5)
    if found is None or found.group() == "bytes=-" or call.request.scope["method"] == "HEAD":
        return 0, size, 200
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return 0, size, 200
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise Refusal(416, "Range is beyond the end", None, {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return start, stop, 206


async def _blocks(source: BinaryIO, start: int, stop: int) -> AsyncIterator[bytes]:
    try:
        source.seek(start)
        while start < stop:
            data = await run_in_threadpool(source.read, min(BLOCK, stop - start))
            if not data:
                return
            start += len(data)
            yield data
    finally:
        source.close()
