"""Reading from a Hub over HTTP: bounded, retried, verified, and without giving the token to another host.

The client library's own readers are not used for this: they follow ``Link: rel=next`` to any host with the token,
have no time limit, do not repeat a failed read, use an unchecked ETag as a file name and compare sizes only.
Its session is used (proxies, certificates and offline mode as the user configured them), whichever HTTP library
it is built on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin

from hubkit.compat import huggingface_hub as client
from hubkit.documents.files import refusing
from hubkit.errors import HubkitError
from hubkit.registry.address import origin
from hubkit.registry.api import Arrived
from hubkit.registry.hub import faults
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.listing import Expected

TIMEOUT = 30.0
"""Seconds to wait for the next bytes."""
CONNECT = 10.0
"""Seconds to wait for a connection."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries of a read; a server's Retry-After of up to `MAX_WAIT` is obeyed instead."""
MAX_WAIT = 60.0
MAX_JSON = 64 << 20
MAX_PAGES = 1000
CHUNK = 1 << 20
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class Reader:
    """GET requests to one server.

    Args:
        endpoint: the server's address.
        headers: gives the headers of a request, the token's among them.
    """

    def __init__(self, endpoint: str, headers: Callable[[], Mapping[str, str]]) -> None:
        self.endpoint = endpoint
        self._headers = headers

    def json(self, path: str, asked: Asked) -> Any:
        """The JSON value at `path`."""
        return self._get(f"{self.endpoint}{path}", {}, asked, lambda response: _json(response, asked))

    def pages(self, path: str, asked: Asked, limit: int) -> Iterator[dict[str, Any]]:
        """The objects of a paginated list; HK-LIMIT beyond `limit`, HK-REGISTRY for a next page on another host."""
        url: str | None = f"{self.endpoint}{path}"
        count = 0
        for _ in range(MAX_PAGES):
            if url is None:
                return
            here = url
            rows, link = self._get(here, {}, asked, lambda r: (_json(r, asked), r.links.get("next", {}).get("url")))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise faults.malformed("not a list of objects", asked)
            count += len(rows)
            if count > limit:
                break
            yield from rows
            url = urljoin(here, link) if link else None
            if url is not None and origin(url) != origin(self.endpoint):
                raise faults.malformed("the next page is on another host", asked, have=url)
        raise HubkitError("HK-LIMIT", "the registry's list is too long", where=asked.where, want=f"at most {limit}")

    def read(self, path: str, asked: Asked, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, by a range request; a server that ignores ranges costs the bytes before."""

        def accept(response: Any) -> bytes:
            skip = 0 if response.status_code == 206 else start
            out = bytearray()
            for piece in client.pieces(response, CHUNK):
                out += piece
                if len(out) >= skip + stop - start:
                    break
            return bytes(out[skip : skip + stop - start])

        data = self._get(f"{self.endpoint}{path}", {"Range": f"bytes={start}-{stop - 1}"}, asked, accept)
        if len(data) != stop - start:
            raise faults.malformed("fewer bytes than asked for", asked, have=f"{len(data)} of {stop - start}")
        return data

    def download(self, path: str, asked: Asked, dest: Path, want: Expected, progress: Arrived | None) -> None:
        """Stream a file to `dest` (which must not exist), continue after a broken connection, and check its digest.

        Raises:
            HubkitError: HK-FILES for other bytes than the listing promised (after a second try); nothing is left.
        """
        with refusing(dest):
            try:
                out = open(dest, "xb")  # noqa: SIM115 - closed below; only a file made here may be removed here
            except FileExistsError:
                raise HubkitError("HK-EXISTS", "file is already there", where=str(dest)) from None
        try:
            with out, refusing(dest):
                self._transfer(path, asked, _Transfer(out, want, progress))
        except BaseException:
            with suppress(OSError):
                os.unlink(dest)
            raise

    def _transfer(self, path: str, asked: Asked, transfer: _Transfer) -> None:
        for last in (False, True):
            transfer.restart()
            self._get(f"{self.endpoint}{path}", transfer.headers, asked, transfer.accept)
            fault = transfer.fault()
            if fault is None:
                return
            if last:
                what, (want, have) = "a file is not what the registry's list says", fault
                raise HubkitError("HK-FILES", what, where=asked.where, want=want, have=have, fix="try again later")

    def _get(
        self,
        url: str,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]],
        asked: Asked,
        accept: Callable[[Any], T],
    ) -> T:
        """One GET, tried again on 429, 5xx and broken connections; `accept` may be called once for each try."""
        waits = iter(WAITS)
        while True:
            base = dict(self._headers())
            asked = replace(asked, known="authorization" in (name.lower() for name in base))
            extra = headers() if callable(headers) else headers
            wait = next(waits, None)
            try:
                sent = {**base, "Accept-Encoding": "identity", **extra}
                with client.streamed(url, sent, CONNECT, TIMEOUT) as response:
                    if response.status_code < 300:
                        return accept(response)
                    if wait is None or response.status_code not in _TRY_AGAIN:
                        raise _refusal(response, asked)
                    wait = _delay(response.headers.get("Retry-After", ""), wait)
            except client.failures() as error:
                if wait is None or faults.is_hopeless(error):
                    # `from None`: the library's errors hold the request with its token
                    raise faults.offline(error, asked) from None
            time.sleep(wait * random.uniform(0.75, 1.25))


class _Transfer:
    """The bytes of one file on their way to disk, hashed as they arrive; `accept` may be called again to go on."""

    def __init__(self, out: IO[bytes], want: Expected, progress: Arrived | None) -> None:
        self._out = out
        self._want = want
        self._progress = progress or (lambda count: None)
        self._size = 0

    def restart(self) -> None:
        """Begin anew; progress that was reported is taken back."""
        if self._size:
            self._progress(-min(self._size, self._want.size))
        self._out.seek(0)
        self._out.truncate()
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % self._want.size, usedforsecurity=False)

    def headers(self) -> dict[str, str]:
        """Ask for the rest when some of it is here."""
        return {"Range": f"bytes={self._size}-"} if 0 < self._size < self._want.size else {}

    def accept(self, response: Any) -> None:
        """Take what one answer brings."""
        begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not (response.status_code == 206 and begins and int(begins[1]) == self._size):
            self.restart()
        for piece in client.pieces(response, CHUNK):
            self._size += len(piece)
            if self._size > self._want.size:
                return  # `fault` tells; a server must not fill the disk
            self._out.write(piece)
            self._sha256.update(piece)
            self._blob.update(piece)
            self._progress(len(piece))

    def fault(self) -> tuple[str, str] | None:
        """What was wanted and what came, when they differ; otherwise the file is made durable."""
        want = self._want
        if self._size != want.size:
            more = "more than " if self._size > want.size else ""
            return f"{want.size} bytes", f"{more}{min(self._size, want.size)} bytes"
        if want.sha256 is not None and self._sha256.hexdigest() != want.sha256:
            return f"sha256:{want.sha256}", f"sha256:{self._sha256.hexdigest()}"
        if want.oid is not None and self._blob.hexdigest() != want.oid:
            return f"git blob {want.oid}", f"git blob {self._blob.hexdigest()}"
        self._out.flush()
        os.fsync(self._out.fileno())
        return None


def _json(response: Any, asked: Asked) -> Any:
    body = bytearray()
    for piece in client.pieces(response, CHUNK):
        body += piece
        if len(body) > MAX_JSON:
            raise HubkitError("HK-LIMIT", "the registry's answer is too long", where=asked.where)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise faults.malformed("not JSON", asked, have=bytes(body[:80]).decode("utf-8", "replace")) from None


def _refusal(response: Any, asked: Asked) -> HubkitError:
    if response.status_code < 400:
        return faults.malformed("a redirect that leads nowhere", asked)
    code, message = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
    return faults.from_status(response.status_code, code, message, asked)


def _delay(retry_after: str, wait: float) -> float:
    return min(float(retry_after), MAX_WAIT) if re.fullmatch(r"\d{1,5}", retry_after) else wait
