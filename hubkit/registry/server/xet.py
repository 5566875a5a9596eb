"""Uploads by the Xet protocol, which current clients use for every large file and do not negotiate.

A client asks for a write token, sends xorbs and then a shard to the address that comes with it, and commits the
file by its sha256 as with LFS. Here each token gets an address of its own, a session: its xorbs are scratch, files are
put together and verified when the shard arrives, and no chunk is shared between sessions, so that a client's
cache never refers to what is gone. Downloads need no Xet: clients take the plain address when a file has no Xet hash.
Protocol: https://github.com/huggingface/xet-core/blob/main/openapi/cas.openapi.yaml.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubkit.documents.drafts import scratch
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.server import xorb
from hubkit.registry.server.calls import Call, Refusal
from hubkit.registry.server.xorb import FileParts, Xorb

TOKEN_SECONDS = 3600
IDLE_SECONDS = 2 * TOKEN_SECONDS
DONE_SECONDS = 600
"""How long a session is kept after its last shard: another shard may refer to the same xorbs."""
MAX_OPENED = 3
"""Xorbs in memory at once while a file is put together; each may have 64 MiB."""
XORB_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass
class Session:
    """One upload: the repository it is for, who sends it, the scratch folder of its xorbs, and the bytes in it."""

    repo: str
    user: str
    folder: Path
    stack: ExitStack
    good_until: float
    size: int = 0


@dataclass
class Sessions:
    """The uploads under way; those idle for long are dropped with their scratch."""

    open_sessions: dict[str, Session] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, registry: DirectoryRegistry, repo: str, user: str) -> str:
        """A new session; its name, which nobody can guess."""
        stack = ExitStack()
        folder = stack.enter_context(scratch(registry.root / "scratch"))
        name = secrets.token_hex(16)
        with self.lock:
            over = [n for n, s in self.open_sessions.items() if s.good_until < time.time()]
            dropped = [self.open_sessions.pop(n) for n in over]
            self.open_sessions[name] = Session(repo, user, folder, stack, time.time() + IDLE_SECONDS)
        for session in dropped:
            session.stack.close()
        return name

    def find(self, name: str) -> Session | None:
        """A session by name, good for some time from now."""
        with self.lock:
            found = self.open_sessions.get(name)
            if found is not None:
                found.good_until = time.time() + IDLE_SECONDS
            return found

    def close(self) -> None:
        """Drop them all."""
        with self.lock:
            dropped, self.open_sessions = list(self.open_sessions.values()), {}
        for session in dropped:
            session.stack.close()


def available() -> bool:
    """Whether chunks can be unpacked here (package lz4, in the extra `serve`)."""
    return importlib.util.find_spec("lz4") is not None


def write_token(call: Call) -> Response:
    """GET /api/models/{id}/xet-write-token/{rev}."""
    repo = call.writable()
    if not available():
        raise Refusal(404, "This server has no Xet storage (package lz4 is missing): set HF_HUB_DISABLE_XET=1")
    name = _sessions(call).start(call.registry, repo, call.who)
    expires = int(time.time()) + TOKEN_SECONDS
    token = f"{expires}.{call.server.sign(expires, 'xet', repo)}"
    address = f"{call.origin}/xet/{name}"
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": address, "accessToken": token, "exp": expires}, headers=headers)


def read_token(call: Call) -> Response:
    """GET /api/models/{id}/xet-read-token/{rev}: there is nothing to read by Xet."""
    call.readable()
    raise Refusal(404, "Files of this server are downloaded by their plain address")


def _sessions(call: Call) -> Sessions:
    found: Sessions = call.request.app.state.sessions
    return found


def _session(call: Call) -> Session:
    session = _sessions(call).find(call.part("session"))
    expires, _, signature = call.request.headers.get("authorization", "").removeprefix("Bearer ").partition(".")
    if session is None or not expires.isdecimal():
        raise Refusal(401, "Not a Xet token of this server")
    good = call.server.signed(signature, int(expires[:15]), "xet", session.repo)
    if not good or not call.server.door.still(session.user, "write", session.repo):
        raise Refusal(401, "Xet token is not valid or no longer valid")
    call.seen.user, call.seen.details["repo"] = session.user or None, session.repo
    return session


async def _body(call: Call, limit: int) -> bytes:
    pieces, size = [], 0
    async for data in call.request.stream():
        pieces.append(data)
        size += len(data)
        if size > limit:
            raise Refusal(413, f"at most {limit} bytes")
    return b"".join(pieces)


async def put_xorb(call: Call) -> Response:
    """POST <session>/v1/xorbs/default/{hash}: kept until the shard that refers to it."""
    session, name = _session(call), call.part("hash")
    if not XORB_NAME.fullmatch(name):
        raise Refusal(400, "Not a xorb's hash")
    data = await _body(call, xorb.MAX_XORB)
    await run_in_threadpool(_keep, call, session, session.folder / name, data)
    return JSONResponse({"was_inserted": True})


def _keep(call: Call, session: Session, path: Path, data: bytes) -> None:
    session.size += 0 if path.exists() else len(data)  # a client that got no answer sends it again
    call.server.quotas.require(session.repo, session.size)
    path.write_bytes(data)


async def put_shard(call: Call) -> Response:
    """POST <session>/v1/shards: put every file of it together and store it, verified."""
    session = _session(call)
    data = await _body(call, xorb.MAX_SHARD)
    await run_in_threadpool(_store, call, session, data)
    session.good_until = time.time() + DONE_SECONDS
    return JSONResponse({"result": 1})


def _store(call: Call, session: Session, shard: bytes) -> None:
    files = list(xorb.read_shard(shard))
    new = [one for one in files if one.sha256 is None or not call.registry.holds(session.repo, one.sha256)]
    with call.server.quotas.holding(session.repo, sum(segment.size for one in new for segment in one.segments)):
        for parts in files:
            with call.registry.receive(session.repo, call.server.limits.large) as incoming:
                for data in _chunks(session, parts):
                    incoming.write(data)
                incoming.finish(parts.sha256)


def _chunks(session: Session, parts: FileParts) -> Iterator[bytes]:
    opened: dict[str, Xorb] = {}
    for segment in parts.segments:
        if segment.xorb not in opened:
            path = session.folder / segment.xorb
            if not path.is_file():
                raise Refusal(400, f"Shard refers to a xorb that was not uploaded: {segment.xorb}")
            if len(opened) >= MAX_OPENED:
                del opened[next(iter(opened))]
            opened[segment.xorb] = Xorb(path)
        yield from opened[segment.xorb].read(segment)


def unknown_chunk(call: Call) -> Response:
    """GET <session>/v1/chunks/...: nothing is shared between sessions."""
    _session(call)
    raise Refusal(404, "Chunk is not known")
