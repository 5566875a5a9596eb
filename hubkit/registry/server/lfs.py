"""Large objects by Git LFS's batch API, basic transfer (https://github.com/git-lfs/git-lfs/blob/main/docs/api)."""

from __future__ import annotations

import time
from typing import Any, TypeGuard
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory.objects import HEX64, offered_again
from hubkit.registry.server.calls import READ_ONLY, Call, Refusal

MEDIA = "application/vnd.git-lfs+json"
MAX_OBJECTS = 1000
BLOCK = 1 << 20


def _size_of(call: Call, repo: str, oid: str) -> int | None:
    try:
        return call.registry.object(repo, oid).stat().st_size
    except HubkitError:
        return None


def batch(call: Call) -> Response:
    """POST /{id}.git/info/lfs/objects/batch."""
    data = call.json()
    upload = data.get("operation") == "upload"
    if upload and call.server.read_only:
        raise Refusal(403, READ_ONLY)
    repo = call.writable() if upload else call.readable()
    objects = data.get("objects")
    if not isinstance(objects, list) or len(objects) > MAX_OBJECTS:
        raise Refusal(400, f"'objects' must be a list of at most {MAX_OBJECTS}")
    transfers = data.get("transfers")
    if (
        not isinstance(transfers, list | None)
        or "basic" not in (transfers or ["basic"])
        or data.get("hash_algo", "sha256") not in ("sha256", "sha_256")  # the JavaScript client spells it so
    ):
        raise Refusal(400, "This server offers the basic transfer with sha256")
    # one row per object: for two paths of one content a client would send one open file twice at the same time
    rows = {row["oid"]: row for row in (_offer(call, repo, item, upload) for item in objects)}
    if upload:
        call.server.quotas.require(repo, sum(row["size"] for row in rows.values() if "actions" in row))
    body = {"transfer": "basic", "objects": list(rows.values()), "hash_algo": "sha256"}
    return JSONResponse(body, media_type=MEDIA)


def _offer(call: Call, repo: str, item: object, upload: bool) -> dict[str, Any]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not HEX64.fullmatch(oid) or not _is_size(size):
        raise Refusal(400, "each of 'objects' needs a sha256 'oid' and a 'size'")
    row: dict[str, Any] = {"oid": oid, "size": size}
    stored = _size_of(call, repo, oid)
    if not upload:
        return {**row, "error": {"code": 404, "message": "download it by its path: /resolve/"}}
    if stored is not None and stored != size:
        return {**row, "error": {"code": 422, "message": f"size of this object is {stored}"}}
    if size > call.server.limits.large:
        return {**row, "error": {"code": 413, "message": f"at most {call.server.limits.large} bytes"}}
    if stored is not None and offered_again(call.registry.object(repo, oid)):
        return row
    expires = int(time.time()) + call.server.limits.upload_seconds
    user = call.who
    signature = call.server.sign(expires, "put", repo, oid, size, user)
    base = f"{call.origin}/{repo}.git/info/lfs"
    href = f"{base}/objects/{oid}?size={size}&expires={expires}&user={quote(user)}&signature={signature}"
    return {**row, "actions": {"upload": {"href": href}, "verify": {"href": f"{base}/verify"}}}


def _is_size(size: object) -> TypeGuard[int]:
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 62


async def put(call: Call) -> Response:
    """PUT of an object to the address that `batch` gave; the signature in it stands for the login."""
    params = call.request.query_params
    repo, oid = call.repo, call.part("oid")
    try:
        size, expires = int(params.get("size", "")), int(params.get("expires", ""))
    except ValueError:
        raise Refusal(403, "Not an upload address of this server") from None
    user = params.get("user", "")
    good = call.server.signed(params.get("signature", ""), expires, "put", repo, oid, size, user)
    if not good or not call.server.door.still(user, "write", repo):
        raise Refusal(403, "Upload address is not valid or no longer valid")
    call.seen.user, call.seen.details["repo"] = user or None, repo
    # of what is there already nothing comes twice
    more = 0 if await run_in_threadpool(_size_of, call, repo, oid) == size else size
    room = await run_in_threadpool(call.server.quotas.hold, repo, more)
    try:
        await _receive(call, repo, oid, size)
    finally:
        call.server.quotas.release(room)
    return Response(status_code=200, headers={"ETag": f'"{oid}"'})


async def _receive(call: Call, repo: str, oid: str, size: int) -> None:
    with call.registry.receive(repo, size) as incoming:
        held: list[bytes] = []
        count = 0
        async for data in call.request.stream():
            held.append(data)
            count += len(data)
            if count >= BLOCK:
                await run_in_threadpool(incoming.write, b"".join(held))
                held, count = [], 0
        await run_in_threadpool(incoming.write, b"".join(held))
        if incoming.size != size:
            raise Refusal(400, f"Upload has {incoming.size} bytes, announced were {size}")
        await run_in_threadpool(incoming.finish, oid)


def verify(call: Call) -> Response:
    """POST /{id}.git/info/lfs/verify: whether the object is there with this size."""
    repo, data = call.writable(), call.json()
    if not _is_size(data.get("size")) or _size_of(call, repo, call.text(data, "oid")) != data["size"]:
        raise Refusal(404, "Object is not stored, or has another size")
    return JSONResponse({}, media_type=MEDIA)
