"""Large objects by Git LFS's batch API, basic transfer (https://github.com/git-lfs/git-lfs/blob/main/docs/api)."""

from __future__ import annotations

import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory.objects import HEX64
from hubkit.registry.server.calls import Call, Refusal

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
    repo = call.writable() if upload else call.readable()
    objects = data.get("objects")
    if not isinstance(objects, list) or len(objects) > MAX_OBJECTS:
        raise Refusal(400, f"'objects' must be a list of at most {MAX_OBJECTS}")
    if "basic" not in data.get("transfers", ["basic"]) or data.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "This server offers the basic transfer with sha256")
    # one row per object: for two paths of one content a client would send one open file twice at the same time
    rows = {row["oid"]: row for row in (_offer(call, repo, item, upload) for item in objects)}
    body = {"transfer": "basic", "objects": list(rows.values()), "hash_algo": "sha256"}
    return JSONResponse(body, media_type=MEDIA)


def _offer(call: Call, repo: str, item: object, upload: bool) -> dict[str, Any]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not HEX64.fullmatch(oid) or not isinstance(size, int) or size < 0:
        raise Refusal(400, "each of 'objects' needs a sha256 'oid' and a 'size'")
    row: dict[str, Any] = {"oid": oid, "size": size}
    stored = _size_of(call, repo, oid)
    if not upload:
        return {**row, "error": {"code": 404, "message": "download it by its path: /resolve/"}}
    if stored is not None and stored != size:
        return {**row, "error": {"code": 422, "message": f"size of this object is {stored}"}}
    if size > call.server.limits.large:
        return {**row, "error": {"code": 413, "message": f"at most {call.server.limits.large} bytes"}}
    if stored is not None:
        return row
    expires = int(time.time()) + call.server.limits.upload_seconds
    signature = call.server.sign(expires, "put", repo, oid, size)
    base = f"{call.origin}/{repo}.git/info/lfs"
    href = f"{base}/objects/{oid}?size={size}&expires={expires}&signature={signature}"
    return {**row, "actions": {"upload": {"href": href}, "verify": {"href": f"{base}/verify"}}}


async def put(call: Call) -> Response:
    """PUT of an object to the address that `batch` gave; the signature in it stands for the login."""
    params = call.request.query_params
    repo, oid = call.repo, call.part("oid")
    try:
        size, expires = int(params.get("size", "")), int(params.get("expires", ""))
    except ValueError:
        raise Refusal(403, "Not an upload address of this server") from None
    if not call.server.signed(params.get("signature", ""), expires, "put", repo, oid, size):
        raise Refusal(403, "Upload address is not valid or no longer valid")
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
    return Response(status_code=200, headers={"ETag": f'"{oid}"'})


def verify(call: Call) -> Response:
    """POST /{id}.git/info/lfs/verify: whether the object is there with this size."""
    repo, data = call.writable(), call.json()
    if _size_of(call, repo, call.text(data, "oid")) != data.get("size"):
        raise Refusal(404, "Object is not stored, or has another size")
    return JSONResponse({}, media_type=MEDIA)
