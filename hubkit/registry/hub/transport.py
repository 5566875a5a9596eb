"""Talking to a Hub over HTTP: bounded, retried, verified, and without giving the token to another host.

The client library's own functions are not used for this: they follow ``Link: rel=next`` and addresses for uploads to
any host with the token, have no time limit, do not repeat a failed read, use an unchecked ETag as a file name and
compare sizes only. Its session is used (proxies, certificates and offline mode as the user configured them), whichever
HTTP library it is built on.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

from hubkit.compat import huggingface_hub as client
from hubkit.documents.files import refusing
from hubkit.documents.threads import Late, within
from hubkit.errors import HubkitError
from hubkit.registry.address import origin
from hubkit.registry.api import Arrived
from hubkit.registry.hub import faults
from hubkit.registry.hub.deadlines import Deadlines, late
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.listing import Expected
from hubkit.registry.hub.transfer import Transfer

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries; a server's Retry-After is obeyed instead where the total deadline leaves room for it."""
MAX_JSON = 16 << 20
MAX_PAGES = 1000
MAX_MOVES = 3
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MOVED = (307, 308)

T = TypeVar("T")
Accept = Callable[[Any, Iterator[bytes]], T]
"""What is made of an answer and the pieces of its body; called once for each try."""
Body = bytes | Callable[[], Any]
"""What is sent: bytes, or what opens a file-like object anew for each try."""


class _Again(Exception):
    """An answer that may be another one in a moment."""

    def __init__(self, refusal: HubkitError, retry_after: str) -> None:
        super().__init__(refusal)
        self.refusal, self.retry_after = refusal, retry_after


class _Moved(Exception):
    """The same request is to be made at another address."""


class Reader:
    """Requests to one server.

    Args:
        endpoint: the server's address.
        headers: gives the headers of a request, the token's among them.
    """

    def __init__(self, endpoint: str, headers: Callable[[], Mapping[str, str]]) -> None:
        self.endpoint = endpoint
        self._headers = headers

    def json(self, path: str, asked: Asked) -> Any:
        """The JSON value at `path`."""
        return self.ask("GET", f"{self.endpoint}{path}", asked, lambda _, pieces: read_json(pieces, asked))

    def post(self, path: str, document: Any, asked: Asked, *, tries: bool = True, media: str = "") -> Any:
        """The JSON answer to a JSON document, or to bytes, sent to `path`.

        Args:
            tries: send it again after an answer that asks for it, or none: where twice is as good as once.
            media: the kind of what is sent and accepted; ``application/json`` by default.
        """
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        headers = {"Content-Type": media or "application/json"} | ({"Accept": media} if media else {})
        accept = lambda _, pieces: read_json(pieces, asked)  # noqa: E731
        return self.ask("POST", f"{self.endpoint}{path}", asked, accept, headers, body=body, tries=tries)

    def pages(self, path: str, asked: Asked, limit: int) -> Iterator[dict[str, Any]]:
        """The objects of a paginated list; HK-LIMIT beyond `limit`, HK-REGISTRY for a next page on another host."""
        url: str | None = f"{self.endpoint}{path}"
        count = 0
        for _ in range(MAX_PAGES):
            if url is None:
                return
            rows, url = self.ask("GET", url, asked, partial(_page, url, asked))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise faults.malformed("not a list of objects", asked)
            count += len(rows)
            if count > limit:
                break
            yield from rows
            if url is not None and origin(url) != origin(self.endpoint):
                raise faults.malformed("the next page is on another host", asked, have=url)
        raise HubkitError("HK-LIMIT", "the registry's list is too long", where=asked.where, want=f"at most {limit}")

    def read(self, path: str, asked: Asked, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, by a range request; a server that ignores ranges costs the bytes before."""

        def accept(response: Any, pieces: Iterator[bytes]) -> bytes:
            skip = 0 if response.status_code == 206 else start
            out = bytearray()
            for piece in pieces:
                out += piece
                if len(out) >= skip + stop - start:
                    break
            return bytes(out[skip : skip + stop - start])

        data = self.ask(
            "GET",
            f"{self.endpoint}{path}",
            asked,
            accept,
            {"Range": f"bytes={start}-{stop - 1}"},
            total=Deadlines.read().for_bytes(stop - start),
        )
        if len(data) != stop - start:
            raise faults.malformed("fewer bytes than asked for", asked, have=f"{len(data)} of {stop - start}")
        return data

    def download(
        self, path: str, asked: Asked, dest: Path, want: Expected, progress: Arrived | None, resume: bool = False
    ) -> str:
        """Stream a file to `dest`, continue after a broken connection, and check its digest; ``sha256:...`` of it.

        Args:
            dest: must not exist, unless `resume`: then what is there is taken for the beginning, and what has arrived
                stays there when the registry, or whoever waits, gives up.

        Raises:
            HubkitError: HK-FILES for other bytes than the listing promised (after a second try); nothing is left.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | (0 if resume else os.O_EXCL)
        with refusing(dest):
            try:
                out = os.fdopen(os.open(dest, flags, 0o600), "r+b", buffering=0)
            except FileExistsError:
                raise HubkitError("HK-EXISTS", "file is already there", where=str(dest)) from None
        try:
            with out, refusing(dest):
                transfer = Transfer(out, want, progress)
                try:
                    return self._transfer(path, asked, transfer, want)
                finally:
                    transfer.end()
        except BaseException as error:
            if not resume or (isinstance(error, HubkitError) and error.code in ("HK-FILES", "HK-DISK")):
                with suppress(OSError):
                    os.unlink(dest)
            raise

    def _transfer(self, path: str, asked: Asked, transfer: Transfer, want: Expected) -> str:
        def accept(response: Any, pieces: Iterator[bytes]) -> None:
            transfer.accept(response.status_code, response.headers.get("Content-Range", ""), pieces)

        total = Deadlines.read().for_bytes(want.size)
        for last in (False, True):
            if not transfer.complete:
                self.ask("GET", f"{self.endpoint}{path}", asked, accept, transfer.headers, total=total)
            fault = transfer.fault()
            if fault is None:
                return transfer.digest
            if last:
                what, (wanted, have) = "a file is not what the registry's list says", fault
                raise HubkitError("HK-FILES", what, where=asked.where, want=wanted, have=have, fix="try again later")
            transfer.restart()
        raise AssertionError("unreachable")

    def ask(
        self,
        verb: str,
        url: str,
        asked: Asked,
        accept: Accept[T],
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        *,
        body: Body | None = None,
        total: float | None = None,
        tries: bool = True,
        token: bool = True,
    ) -> T:
        """One request within its deadlines, tried again on 429, 5xx and broken connections.

        The token goes to this registry's own origin only, whatever address the registry names.

        Args:
            headers: of this request, beside the usual ones; asked for anew with each try when it is a function.
            total: seconds for all tries; the user's setting by default.
            tries: False to send it once.
            token: False to send none in any case.

        Raises:
            HubkitError: what the answer means; HK-OFFLINE for none, or none in time.
        """
        limits, waits, moves = Deadlines.read(), iter(WAITS if tries else ()), 0
        total = total or limits.total
        end = time.monotonic() + total
        while True:
            base = dict(self._headers())
            if not token or origin(url) != origin(self.endpoint):
                base = {name: value for name, value in base.items() if name.lower() != "authorization"}
            asked = replace(asked, known="authorization" in (name.lower() for name in base))
            sent = {**base, "Accept-Encoding": "identity", **((headers() if callable(headers) else headers) or {})}
            try:
                once = _once(verb, url, sent, asked, accept, body, limits)
                return within(max(end - time.monotonic(), 0.001), once)
            except Late:
                raise late("total", total, asked) from None
            except _Moved as moved:
                url, moves = str(moved), moves + 1
                if moves > MAX_MOVES or origin(url) != origin(self.endpoint):
                    raise faults.malformed("a redirect that leads nowhere", asked) from None
                continue
            except _Again as again:
                fault, wait = again.refusal, _delay(again.retry_after, next(waits, None))
            except client.failures() as error:
                fault = limits.refusal(error, asked) or faults.offline(error, asked)
                wait = None if faults.is_hopeless(error) else next(waits, None)
            if wait is None or time.monotonic() + wait > end:
                raise fault from None  # the library's errors hold the request with its token
            time.sleep(wait * random.uniform(0.75, 1.0))


def _once(
    verb: str, url: str, headers: Mapping[str, str], asked: Asked, accept: Accept[T], body: Body | None, to: Deadlines
) -> Callable[[], T]:
    """One try, to be run in a thread of its own."""

    def run() -> T:
        content = body() if callable(body) else body
        with client.streamed(url, headers, to.connect, to.idle, verb, content) as response:
            if response.status_code < 300:
                return accept(response, to.pieces(response, asked))
            place = response.headers.get("Location", "")
            if response.status_code in _MOVED and verb != "GET" and place:
                raise _Moved(joined(url, place, asked))
            refusal = _refusal(response, asked)
            if response.status_code in _TRY_AGAIN:
                raise _Again(refusal, response.headers.get("Retry-After", ""))
            raise refusal

    return run


def read_json(pieces: Iterator[bytes], asked: Asked) -> Any:
    """The JSON value of a body.

    Raises:
        HubkitError: ``HK-LIMIT``, ``HK-REGISTRY``.
    """
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > MAX_JSON:
            raise HubkitError("HK-LIMIT", "the registry's answer is too long", where=asked.where)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise faults.malformed("not JSON", asked, have=bytes(body[:80]).decode("utf-8", "replace")) from None


def _page(here: str, asked: Asked, response: Any, pieces: Iterator[bytes]) -> tuple[Any, str | None]:
    """One page of a list, and the address of the next."""
    return read_json(pieces, asked), _next(response, here, asked)


def _next(response: Any, here: str, asked: Asked) -> str | None:
    """The address of the next page, from the ``Link`` header."""
    found = re.search(r'<([^<>]*)>[^<]*;\s*rel="?next"?(?:[;,\s]|$)', response.headers.get("Link", ""))
    return joined(here, found[1], asked) if found else None


def joined(here: str, there: str, asked: Asked) -> str:
    """An address that a registry names, beside the one that it was found at.

    Raises:
        HubkitError: ``HK-REGISTRY`` when it is none.
    """
    try:
        url = urljoin(here, there)
        origin(url)  # a port that is none is found here
    except ValueError:
        raise faults.malformed("an address that is none", asked, have=there) from None
    return url


def _refusal(response: Any, asked: Asked) -> HubkitError:
    if response.status_code < 400:
        return faults.malformed("a redirect that leads nowhere", asked)
    code, message = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
    return faults.from_status(response.status_code, code, message, asked)


def _delay(retry_after: str, wait: float | None) -> float | None:
    return float(retry_after) if wait is not None and re.fullmatch(r"\d{1,5}", retry_after) else wait
