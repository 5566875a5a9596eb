"""What every handler gets, and how refusals become the Hub's error answers."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.directory.quota import Quotas
from hubkit.registry.server.auth import Account, Door
from hubkit.registry.server.watch import Seen, State, seen_of

STATUS = {
    "HK-AUTH": 401,
    "HK-FORBIDDEN": 403,
    "HK-NOT-FOUND": 404,
    "HK-EXISTS": 409,
    "HK-VERSION-EXISTS": 409,
    "HK-STALE": 412,
    "HK-LIMIT": 413,
    "HK-QUOTA": 413,
    "HK-DISK": 507,
    "HK-IO": 500,
    "HK-REGISTRY": 500,
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
READ_ONLY = "This server is read-only at the moment: nothing can be changed here"
STALE = "A commit has happened since. Please refresh and try again."


@dataclass(frozen=True)
class Limits:
    """Bytes and counts a client may send.

    Args:
        body: bytes of a JSON body.
        body_seconds: how long such a body may take to come.
        regular: bytes of one file inside a commit's body.
        commit: bytes of a commit's body.
        large: bytes of one large object.
        upload_seconds: how long an upload address stays good.
    """

    body: int = 8 << 20
    body_seconds: float = 60.0
    regular: int = 64 << 20
    commit: int = 1 << 30
    large: int = 256 << 30
    upload_seconds: int = 24 * 3600


@dataclass
class Server:
    """State of one application.

    Args:
        registry: what is served.
        door: who is known.
        limits: what a client may send.
        quotas: what may be stored.
        public_url: the address that clients use; None: the one they say.
        read_only: nothing can be changed.
        state: what it does at this moment.
        connections: how many there are.
        counting: held while `counted` is made.
        counted: when the store was counted for the metrics, and the lines about it.
        secret: signs what only this process hands out.
    """

    registry: DirectoryRegistry
    door: Door
    limits: Limits
    quotas: Quotas
    public_url: str | None = None
    read_only: bool = False
    state: State = field(default_factory=State)
    connections: Callable[[], int] = lambda: 0
    counting: threading.Lock = field(default_factory=threading.Lock)
    counted: tuple[float, list[str]] = (float("-inf"), [])
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def sign(self, *parts: object) -> str:
        """A keyed digest that binds `parts`; dies with the process."""
        return hmac.new(self.secret, "\n".join(map(str, parts)).encode(), sha256).hexdigest()

    def signed(self, signature: str, expires: int, *parts: object) -> bool:
        """Whether `signature` was made for `parts` and `expires`, seconds since 1970, is not over."""
        return expires > time.time() and hmac.compare_digest(self.sign(expires, *parts), signature)


class Refusal(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        message: shown to the user by the client.
        code: ``X-Error-Code`` of the Hub: RepoNotFound, RevisionNotFound, EntryNotFound; our own: QuotaExceeded.
        headers: further headers.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})

    def response(self) -> Response:
        """The Hub's form: JSON body, message and code also in headers."""
        message = self.message.encode("utf-8", "replace").decode()  # half a character cannot be sent
        # a header holds neither control characters nor blanks at its ends
        text = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in " ".join(message.split()))[:1000]
        headers = {"X-Error-Message": text.strip(), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="hubkit"'
        return JSONResponse({"error": message}, self.status, headers)


def refusal(error: HubkitError) -> Refusal:
    """The answer to what the registry refused."""
    if error.code == "HK-STALE":
        return Refusal(412, STALE)
    status = STATUS.get(error.code, 400)
    if status >= 500:  # paths of this machine are none of the client's business
        return Refusal(status, f"{error.code}: {error.what}")
    details = [line for line in (*error.have, *error.want) if line][:20]
    code = "QuotaExceeded" if error.code == "HK-QUOTA" else None
    return Refusal(status, ": ".join([error.what, "; ".join(details)]) if details else error.what, code)


@dataclass
class Call:
    """One request, with its body where the route reads one."""

    request: Request
    server: Server
    account: Account | None
    body: bytes = b""

    @property
    def registry(self) -> DirectoryRegistry:
        """The registry served."""
        return self.server.registry

    @property
    def seen(self) -> Seen:
        """What the log and the metrics learn of it."""
        return seen_of(self.request.scope)

    @property
    def who(self) -> str:
        """Name of the caller; "" for one without a token."""
        return "" if self.account is None else self.account.user

    @property
    def author(self) -> str:
        """Name of the caller for a commit; "" on an open server."""
        return "" if self.server.door.open else self.who

    @property
    def origin(self) -> str:
        """``scheme://host`` under which the client reached the server."""
        return self.server.public_url or str(self.request.base_url).rstrip("/")

    def part(self, name: str) -> str:
        """One decoded piece of the path; may contain ``/`` where the client escaped one."""
        return str(self.request.path_params.get(name, "")).replace("\0", "/")

    @property
    def repo(self) -> str:
        """``org/name`` of the path; not checked yet."""
        return f"{self.part('org')}/{self.part('name')}" if "org" in self.request.path_params else self.part("name")

    def json(self) -> dict[str, Any]:
        """The body, a JSON object (an empty body is an empty one), else 400."""
        try:
            data = whole(json.loads(self.body or b"{}"), self.body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise Refusal(400, "body must be a JSON object")
        return data

    def fields(self) -> dict[str, list[str]]:
        """A form-encoded or JSON body as lists of strings."""
        if "json" in self.request.headers.get("content-type", ""):
            data = self.json()
            return {k: [str(x) for x in v] if isinstance(v, list) else [str(v)] for k, v in data.items()}
        try:
            return parse_qs(self.body.decode(), max_num_fields=10_000)
        except ValueError:
            raise Refusal(400, "body must be a form") from None

    def flag(self, name: str) -> bool:
        """A boolean of the query."""
        return self.request.query_params.get(name, "").lower() in ("1", "true", "yes", "on")

    def text(self, data: Mapping[str, Any], name: str) -> str:
        """A string of a JSON body, else 400."""
        value = data.get(name)
        if not isinstance(value, str):
            raise Refusal(400, f"'{name}' must be a string")
        return value

    def readable(self) -> str:
        """The repository of the path when the caller may see it; else the answer that does not tell which it is."""
        repo = self.repo
        try:
            known = self.registry.exists(repo)
        except HubkitError:
            known = False
        if not known:
            self._moved(repo)
        self.seen.details["repo"] = repo
        if not known or not self.sees(repo):
            raise self.hidden()
        self.seen.private = self.registry.private(repo)
        return repo

    def _moved(self, repo: str) -> None:
        """Lead to the name that a repository has now, those who may know of it."""
        try:
            now = self.registry.moved(repo)
        except HubkitError:
            now = None
        if now is not None and self.sees(now):
            raw = self.request.scope["raw_path"].decode("ascii").split("?")[0]
            query = self.request.url.query
            place = raw.replace(f"/{repo}", f"/{now}", 1) + (f"?{query}" if query else "")
            raise Refusal(307, f"This repository is called {now} now", None, {"Location": place})

    def hidden(self) -> Refusal:
        """Absent and private look the same: 401 for the anonymous, 404 for others."""
        if self.account is None:
            return Refusal(401, "Repository not found, or it is private and you are not logged in", "RepoNotFound")
        return Refusal(404, "Repository not found", "RepoNotFound")

    def sees(self, repo: str) -> bool:
        """Whether the caller may know of a repository that exists."""
        if self.account is not None and self.account.may("read", repo):
            return True
        return not self.registry.private(repo)

    def writable(self, level: str = "write") -> str:
        """The repository of the path when the caller may change it; 401, 403 or 404."""
        repo = self.readable()
        self.require(repo, level)
        return repo

    def require(self, repo: str, level: str = "write") -> None:
        """401 or 403 unless the caller may write there, or ``admin``: delete, move, hide and show."""
        if self.account is None:
            raise Refusal(401, "You must be logged in to write")
        if not self.account.may(level, repo):
            raise Refusal(403, f"You have no {level} access to {repo}")

    def commit(self, repo: str, revision: str | None = None) -> str:
        """The commit that the path's (or this) revision means; 404 RevisionNotFound."""
        wanted = revision if revision is not None else (self.part("rev") or None)
        try:
            found = self.registry.resolve(repo, wanted)
            self.seen.details["commit"] = found
            return found
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            raise Refusal(404, f"Invalid rev id: {wanted}", "RevisionNotFound") from None


def whole(document: Any, source: bytes) -> Any:
    """`document` itself, unless its text, read from `source`, holds half a character.

    Raises:
        ValueError: it does.
    """
    if _SURROGATE.search(source):
        json.dumps(document, ensure_ascii=False).encode()
    return document


def iso(seconds: float) -> str:
    """A time as the Hub writes it."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def window(call: Call, size: int) -> tuple[int, int]:
    """Where the page that is asked for begins, and how many rows it has, at most `size`."""
    params = call.request.query_params
    try:
        return max(0, int(params.get("cursor", "0"))), min(size, max(1, int(params.get("limit", size))))
    except ValueError:
        raise Refusal(400, "'cursor' and 'limit' must be numbers") from None


def paged(call: Call, rows: list[dict[str, Any]], size: int) -> JSONResponse:
    """One page of `rows`, with the address of the next in the ``Link`` header."""
    params = call.request.query_params
    start, size = window(call, size)
    headers = {}
    if start + size < len(rows):
        rest = [(k, v) for k, v in params.multi_items() if k != "cursor"]
        query = "&".join(f"{quote(k)}={quote(v, safe='')}" for k, v in [*rest, ("cursor", str(start + size))])
        path = call.request.scope["raw_path"].decode("ascii")  # as it came: `path` is decoded
        headers["Link"] = f'<{call.origin}{path}?{query}>; rel="next"'
    return JSONResponse(rows[start : start + size], headers=headers)
