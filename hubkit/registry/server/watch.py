"""What is seen of every request: it is counted for the metrics, and logged when somebody changes or reads something.

Outermost of all, so that nothing passes unseen. A server that is about to end answers 503 here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hubkit.documents import files
from hubkit.registry.server.metrics import Numbers

if TYPE_CHECKING:
    from hubkit.registry.server.auth import Account

KEY = "hubkit.seen"
HEALTH = "/healthz"
RETRY_SECONDS = 5
_log = logging.getLogger("hubkit.serve")


@dataclass
class Seen:
    """One request.

    Args:
        route: which handler answers, ``tree.refs``; ``none`` where there is none.
        action: what it would change, ``commit``; "" for one that reads.
        user: who asks; None for somebody without a token.
        refused: it came with a token that is unknown.
        private: it is about a repository that is hidden from strangers, and answered.
        details: what else the log says: ``repo``, ``commit``, ``path``, ``tag``, ``to``.
        id: ``X-Request-Id`` of the answer.
        received: bytes of its body.
        sent: bytes of the answer's body.
        status: HTTP status; 500 when no answer was begun.
    """

    route: str = "none"
    action: str = ""
    user: str | None = None
    refused: bool = False
    private: bool = False
    details: dict[str, str] = field(default_factory=dict)
    id: str = ""
    received: int = 0
    sent: int = 0
    status: int = 500

    def by(self, account: Account | None) -> None:
        """Say who asks."""
        self.user = account.user if account is not None else None

    @property
    def event(self) -> str:
        """What the log calls it; "" for what is not logged: reading what is public."""
        if self.refused:
            return "login"
        if self.action or self.status == 403:
            return self.action or "read"
        return "read" if self.private and self.status < 400 else ""


class Audit:
    """A file that lines are appended to; opened anew when it was moved away, as log rotation does.

    What cannot be written is counted, and said once: a full disk stops no server.

    Args:
        path: the file; made with access for its owner alone.

    Raises:
        HubkitError: HK-IO where it cannot be opened now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        """Lines that could not be written."""
        self._lock = threading.Lock()
        self._torn = False
        with files.refusing(path):
            self._handle = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, row: Mapping[str, object]) -> None:
        """Append one event."""
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._follow()
                # a line that was cut off by a full disk must not take the next one with it
                data = b"\n" + line if self._torn else line
                self._torn = os.write(self._handle, data) != len(data)
                done = not self._torn
            except OSError:
                done = False
            if not done:
                self.lost += 1
            if not done and self.lost == 1:
                _log.warning("%s: an event could not be logged; serving goes on", self.path)

    def _follow(self) -> None:
        """See that the handle is the file of this name still."""
        mine = os.fstat(self._handle)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev):
            new = self._open()
            os.close(self._handle)
            self._handle, self._torn = new, False


@dataclass
class State:
    """What a server does at this moment.

    Args:
        numbers: requests so far.
        audit: the log; None without one.
        under_way: requests that are being answered.
        stopping: it is about to end: nothing new is begun.
    """

    numbers: Numbers = field(default_factory=Numbers)
    audit: Audit | None = None
    under_way: int = 0
    stopping: bool = False


def seen_of(scope: Mapping[str, object]) -> Seen:
    """What is seen of the request with this scope."""
    found = scope.get(KEY)
    return found if isinstance(found, Seen) else Seen()


class Watch:
    """The middleware."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._state.stopping and scope["path"] != HEALTH:
            await _busy(send)
            return
        seen, began = Seen(), time.perf_counter()

        async def coming() -> Message:
            message = await receive()
            seen.received += len(message.get("body", b""))
            return message

        async def going(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            seen.sent += len(message.get("body", b""))
            await send(message)

        counted = scope["path"] != HEALTH  # asking whether it ends must not keep it from that
        self._state.under_way += counted
        try:
            await self._app({**scope, KEY: seen}, coming, going)
        finally:
            self._state.under_way -= counted
            seconds = time.perf_counter() - began
            self._state.numbers.count(seen.route, scope["method"], seen.status, seconds, seen.received, seen.sent)
            if self._state.audit is not None and seen.event:
                self._state.audit.write(_row(seen, scope, seconds))


def _row(seen: Seen, scope: Scope, seconds: float) -> dict[str, object]:
    now = time.time()
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return {
        "time": f"{when}.{int(now * 1000) % 1000:03d}Z",
        "user": seen.user,
        "address": (scope.get("client") or ("",))[0],
        "action": seen.event,
        **{key: value[:300] for key, value in seen.details.items() if value},
        "status": seen.status,
        "received": seen.received,
        "sent": seen.sent,
        "seconds": round(seconds, 3),
        "route": seen.route,
        "request": seen.id,
    }


async def _busy(send: Send) -> None:
    text = b"This server is about to end"
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"retry-after", str(RETRY_SECONDS).encode()),
        (b"connection", b"close"),
        (b"x-error-message", text),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": text})
