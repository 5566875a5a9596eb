"""HTTP to one running server: JSON out, JSON in, a deadline for each exchange, and one refusal for each way to fail.

By the HTTP library that huggingface_hub brings. Redirects are not followed; proxies are not used for this machine.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from hubkit.compat import huggingface_hub as client
from hubkit.errors import UNDECIDED, USAGE, HubkitError

TOKEN = "HUBKIT_RUNTIME_TOKEN"
"""The environment's bearer token for servers that ask for one (``vllm serve --api-key``)."""
TIMEOUT = 30.0
"""Seconds that one answer may take."""
MAX_ANSWER = 8 << 20
_ADDRESS = re.compile(r"https?://(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\])(:(?P<port>\d{1,5}))?(/[\w.~/%-]*)?", re.ASCII)
_HERE = re.compile(r"localhost|127(\.\d+){3}|::1|0\.0\.0\.0")


class Server:
    """One server.

    Args:
        url: its address; a ``/v1`` at the end may be there or not.
        timeout: seconds that one answer may take, from the first byte sent to the last one read.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2) for what is no address, or no time.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        self.url = _address(url)
        if not timeout > 0:
            raise HubkitError("HK-OPTIONS", "out of range", want="timeout > 0", have=str(timeout), status=USAGE)
        self.timeout = timeout
        self._session: Any = None

    def get(self, path: str) -> Any:
        """The JSON value at `path`.

        Raises:
            HubkitError: all with status 3: ``HK-RUNTIME-OFFLINE`` where nobody answers, ``HK-RUNTIME-SLOW``,
                ``HK-RUNTIME-REFUSED`` for an HTTP status other than 200, ``HK-RUNTIME-ANSWER`` for what is no JSON.
        """
        return self._exchange("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any], unknown: HubkitError | None = None) -> Any:
        """The JSON answer to a JSON body; refusals as of `get`.

        Args:
            unknown: raised where the server answers that it does not know what the body names (404).
        """
        return self._exchange("POST", path, body, unknown)

    def garbled(self, path: str, what: str, have: object) -> HubkitError:
        """``HK-RUNTIME-ANSWER``: the answer is not what the protocol promises."""
        said = f"the server's answer at {path} is wrong: {what}"
        return HubkitError("HK-RUNTIME-ANSWER", said, where=self.url, have=short(repr(have)), status=UNDECIDED)

    def _exchange(self, method: str, path: str, body: Any, unknown: HubkitError | None = None) -> Any:
        """One exchange on a thread of its own: a server that sends a byte now and then is given up all the same."""
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(self._asked(method, path, body, unknown))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not found:
            raise self._slow(path)
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def _asked(self, method: str, path: str, body: Any, unknown: HubkitError | None) -> Any:
        end = time.monotonic() + self.timeout
        token = os.environ.get(TOKEN)
        headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        if self._session is None:
            self._session = client.plain_session(direct=bool(_HERE.fullmatch(urlsplit(self.url).hostname or "")))
        try:
            with client.exchanged(self._session, method, f"{self.url}/{path}", headers, body, self.timeout) as response:
                data = bytearray()
                for piece in client.pieces(response):
                    data += piece
                    if len(data) > MAX_ANSWER:
                        raise self.garbled(path, "it is too long", f"more than {MAX_ANSWER} bytes")
                    if time.monotonic() > end:
                        raise self._slow(path)
                status = int(response.status_code)
        except client.failures() as error:
            if "timeout" in type(error).__name__.lower():
                raise self._slow(path) from None
            raise self._nobody(error) from None  # the library's errors hold the request with its token
        if status == 404 and unknown is not None:
            raise unknown
        if status != 200:
            raise self._refused(path, status, bytes(data))
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError):
            raise self.garbled(path, "it is no JSON", bytes(data[:80]).decode("utf-8", "replace")) from None

    def _nobody(self, error: BaseException) -> HubkitError:
        have, fix = short(f"{type(error).__name__}: {error}"), "check the address; is it up?"
        what = "no server answers"
        return HubkitError("HK-RUNTIME-OFFLINE", what, where=self.url, have=have, fix=fix, status=UNDECIDED)

    def _slow(self, path: str) -> HubkitError:
        what, want = f"the server does not answer {path} in time", f"{self.timeout:g} seconds at most"
        fix = "--timeout SECONDS; or the server is still loading"
        return HubkitError("HK-RUNTIME-SLOW", what, where=self.url, want=want, fix=fix, status=UNDECIDED)

    def _refused(self, path: str, status: int, data: bytes) -> HubkitError:
        have = short(f"HTTP {status} {' '.join(data.decode('utf-8', 'replace').split())}".strip())
        fix = {401: f"set {TOKEN}", 403: f"set {TOKEN}", 503: "try again: it may still be loading"}.get(status, "")
        what = f"the server refuses {path}"
        return HubkitError("HK-RUNTIME-REFUSED", what, where=self.url, have=have, fix=fix, status=UNDECIDED)


def _address(url: str) -> str:
    made = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    match = _ADDRESS.fullmatch(made)
    if match is None or int(match["port"] or 1) not in range(1, 65536):
        want = "http://HOST:PORT, without a password in it"
        what, fix = "this is no address of a server", f"http://127.0.0.1:8000, say; a token goes into {TOKEN}"
        raise HubkitError("HK-OPTIONS", what, want=want, have=url.rpartition("@")[2][:80], fix=fix, status=USAGE)
    return made


def short(text: str) -> str:
    """A server's words, as much of them as a message needs."""
    return text if len(text) <= 300 else f"{text[:297]}..."
