"""The application: every route of the protocol, and the one wrapper all of them share."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hubkit.errors import HubkitError
from hubkit.registry.server import commit, health, lfs, repos, resolve, tree, xet
from hubkit.registry.server.auth import Account
from hubkit.registry.server.calls import READ_ONLY, Call, Limits, Refusal, Server, refusal
from hubkit.registry.server.watch import HEALTH, Watch, seen_of

Plain = Callable[[Call], Response]
Streaming = Callable[[Call], Awaitable[Response]]
MODEL = "/api/models/{org}/{name}"
GIT = "/{org}/{name}.git/info/lfs"
READS = ("GET", "HEAD")
LOOPBACK = ("127.0.0.1", "localhost", "::1")

PLAIN: tuple[tuple[str, str, Plain], ...] = (
    ("GET", HEALTH, health.healthz),
    ("GET", "/metrics", health.metrics),
    ("GET", "/api/whoami-v2", repos.whoami),
    ("POST", "/api/repos/create", repos.create),
    ("DELETE", "/api/repos/delete", repos.delete),
    ("POST", "/api/repos/move", repos.move),
    ("POST", "/api/validate-yaml", commit.validate_yaml),
    ("GET", "/api/models", repos.listing),
    ("GET", MODEL, repos.info),
    ("GET", MODEL + "/revision/{rev}", repos.info),
    ("PUT", MODEL + "/settings", repos.settings),
    ("GET", MODEL + "/tree/{rev}", tree.tree),
    ("GET", MODEL + "/tree/{rev}/{path:path}", tree.tree),
    ("POST", MODEL + "/paths-info/{rev}", tree.paths_info),
    ("GET", MODEL + "/refs", tree.refs),
    ("GET", MODEL + "/commits/{rev}", tree.commits),
    ("POST", MODEL + "/tag/{rev}", tree.create_tag),
    ("DELETE", MODEL + "/tag/{rev}", tree.delete_tag),
    ("POST", MODEL + "/branch/{rev}", tree.create_branch),
    ("DELETE", MODEL + "/branch/{rev}", tree.delete_branch),
    ("POST", MODEL + "/super-squash/{rev}", tree.squash),
    ("POST", MODEL + "/preupload/{rev}", commit.preupload),
    ("GET", MODEL + "/xet-write-token/{rev}", xet.write_token),
    ("GET", MODEL + "/xet-read-token/{rev}", xet.read_token),
    ("GET", "/xet/{session}/v1/chunks/{prefix}/{hash}", xet.unknown_chunk),
    ("POST", GIT + "/objects/batch", lfs.batch),
    ("POST", GIT + "/verify", lfs.verify),
    ("GET", "/{org}/{name}/resolve/{rev}/{path:path}", resolve.resolve),
)
STREAMING: tuple[tuple[str, str, Streaming], ...] = (
    ("POST", MODEL + "/commit/{rev}", commit.commit),
    ("PUT", GIT + "/objects/{oid}", lfs.put),
    ("POST", "/xet/{session}/v1/xorbs/{prefix}/{hash}", xet.put_xorb),
    ("POST", "/xet/{session}/v1/shards", xet.put_shard),
)
HARMLESS = (commit.validate_yaml, tree.paths_info, lfs.batch)
"""Handlers that change nothing, whatever their method; of a batch that is seen by what it asks for."""
OWN_LOGIN = (lfs.put, xet.put_xorb, xet.put_shard, xet.unknown_chunk, health.healthz)
"""Handlers whose address or token is the proof: the ``Authorization`` header is not an account's. Health is for all."""
COSTLY = (commit.preupload,)
"""Handlers that may compute for a second: one at a time, and those that wait hold no thread."""
ACTIONS: dict[Plain | Streaming, str] = {
    repos.create: "create",
    repos.delete: "delete",
    repos.move: "move",
    repos.settings: "settings",
    commit.commit: "commit",
    lfs.put: "upload",
    xet.put_shard: "upload",
    tree.create_tag: "tag",
    tree.delete_tag: "delete-tag",
    tree.create_branch: "branch",
    tree.delete_branch: "delete-branch",
    tree.squash: "squash",
}
"""What changes something, as the log calls it."""


async def _body(request: Request, limits: Limits) -> bytes:
    pieces, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for data in request.stream():
                pieces.append(data)
                size += len(data)
                if size > limits.body:
                    raise Refusal(413, f"at most {limits.body} bytes")
    except TimeoutError:
        raise Refusal(408, f"The request was not sent within {limits.body_seconds:g} seconds") from None
    return b"".join(pieces)


Endpoint = Callable[[Request], Awaitable[Response]]


def _plain(server: Server, handler: Plain) -> Endpoint:
    """A handler that wants the whole body and runs beside the event loop."""
    turn = asyncio.Semaphore(1)

    async def endpoint(request: Request) -> Response:
        account = _account(server, request, handler)
        body = b"" if request.scope["method"] in READS else await _body(request, server.limits)
        call = Call(request, server, account, body)
        if handler not in COSTLY:
            return await run_in_threadpool(handler, call)
        async with turn:
            return await run_in_threadpool(handler, call)

    return _refusing(endpoint)


def _streaming(server: Server, handler: Streaming) -> Endpoint:
    """A handler that reads the body itself."""

    async def endpoint(request: Request) -> Response:
        return await handler(Call(request, server, _account(server, request, handler)))

    return _refusing(endpoint)


def _account(server: Server, request: Request, handler: Plain | Streaming) -> Account | None:
    """Who asks, once it is clear that they may ask this at all."""
    method, seen = request.scope["method"], seen_of(request.scope)
    seen.route = f"{handler.__module__.rpartition('.')[2]}.{handler.__name__}"
    seen.action = ACTIONS.get(handler, "")
    if server.read_only and (handler is xet.write_token or (method not in READS and handler not in HARMLESS)):
        raise Refusal(403, READ_ONLY)
    if handler in OWN_LOGIN:
        return None
    try:
        account = server.door.account(request.headers.get("authorization"))
    except HubkitError:
        seen.refused = True
        raise
    seen.by(account)
    if account is None and not server.door.anonymous:
        raise Refusal(401, "This server answers to those who are logged in")
    return account


def _refusing(inner: Endpoint) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        try:
            return await inner(request)
        except HubkitError as error:
            return refusal(error).response()
        except Refusal as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)

    return endpoint


def _missing(request: Request, _: Exception) -> Response:
    path = request.scope["path"]
    # what would be a repository with a name that has no owner; clients ask for such
    named = re.fullmatch(r"/api/(models/[^/]+|(datasets|spaces)/.*)|/[^/]+/resolve/.*", path) is not None
    return Refusal(
        404, "Repository not found" if named else "No such address", "RepoNotFound" if named else None
    ).response()


async def _agents(_: Request) -> Response:
    return JSONResponse({"standardEnvVars": [], "harnesses": {}})


async def _front(_: Request) -> Response:
    return PlainTextResponse("hubkit serve: set HF_ENDPOINT to this address\n")


def make_app(server: Server) -> Starlette:
    """The application for a server's state."""
    routes = [Route("/", _front), Route("/api/agent-harnesses", _agents)]
    for method, path, plain in PLAIN:
        routes.append(Route(path, _plain(server, plain), methods=[method]))
    for method, path, stream in STREAMING:
        routes.append(Route(path, _streaming(server, stream), methods=[method]))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        app.state.sessions.close()

    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Watch, state=server.state),
            Middleware(Gate, open_door=server.door.open, public_url=server.public_url),
        ],
        exception_handlers={404: _missing},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.sessions = xet.Sessions()
    app.state.server = server
    return app


class Gate:
    """Before routing: decode the path piece by piece, keep browsers of other sites out; after: common headers.

    An escaped ``/`` belongs to its piece (branch ``a/b`` is ``a%2Fb``), so it becomes NUL until the handler reads it;
    a real NUL is refused. On a server without tokens a page from elsewhere must not act for the user: a ``Host`` that
    is no loopback name (DNS rebinding) and writes with a foreign ``Origin`` are refused.
    """

    def __init__(self, app: ASGIApp, open_door: bool, public_url: str | None) -> None:
        self._app, self._open, self._public = app, open_door, public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        name = _printable(headers.get("x-request-id", "")) or secrets.token_hex(8).encode()
        seen_of(scope).id = name.decode("ascii")
        common = [
            (b"x-request-id", name),
            (b"x-content-type-options", b"nosniff"),
            (b"content-security-policy", b"default-src 'none'; sandbox"),
        ]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *common]
            await send(message)

        problem = self._problem(scope, headers)
        if problem is not None:
            await problem.response()(scope, receive, answer)
            return
        raw = scope["raw_path"].split(b"?")[0].decode("ascii")
        path = "/".join(unquote(piece).replace("/", "\0") for piece in raw.split("/"))
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/")
        await self._app({**scope, "path": path, "root_path": ""}, receive, answer)

    def _problem(self, scope: Scope, headers: dict[str, str]) -> Refusal | None:
        if b"%00" in scope["raw_path"] or not scope["raw_path"].isascii() or "\ufffd" in scope["path"]:
            return Refusal(400, "Malformed path")
        host = headers.get("host", "")
        if self._open and self._public is None and (urlsplit(f"//{host}").hostname or "") not in LOOPBACK:
            bound = (scope.get("server") or ("", 0))[0]
            if bound in LOOPBACK:
                return Refusal(403, "This server without tokens answers to loopback names only")
        origin = headers.get("origin")
        if origin and scope["method"] not in READS and urlsplit(origin).netloc != host:
            return Refusal(403, "Writes from pages of other origins are refused")
        return None


def _printable(text: str) -> bytes:
    return text[:100].encode("ascii", "ignore") if text.isascii() and text.isprintable() else b""
