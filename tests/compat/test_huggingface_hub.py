"""huggingface_hub still is what `hubkit.compat.huggingface_hub` takes it for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hubkit.compat import huggingface_hub as client

BODY = bytes(range(256)) * 40


@pytest.fixture
def address() -> Iterator[str]:
    """A server: ``/file`` answers with `BODY`, ``/moved`` leads there, everything else is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/file": 200, "/moved": 302}.get(self.path, 403)
            self.send_response(status)
            self.send_header("Location", "/file")
            self.send_header("X-Seen", self.headers.get("X-Mine", ""))
            body = BODY if status == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/file", "/moved"])
def test_an_answer_comes_in_pieces(path: str, address: str) -> None:
    with client.streamed(address + path, {"X-Mine": "yes"}, 5, 5) as response:
        assert response.status_code == 200
        assert response.headers["X-Seen"] == "yes"
        pieces = list(client.pieces(response))
    assert b"".join(pieces) == BODY
    with client.streamed(f"{address}/other", {}, 5, 5) as response:
        assert response.status_code == 403


def test_what_goes_wrong_on_the_way_is_among_the_failures() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(client.failures()) as caught, client.streamed(f"http://127.0.0.1:{port}/", {}, 5, 5):
        pass
    assert not client.is_forbidden(caught.value)
    assert not isinstance(ValueError(), client.failures())


def test_nobody_there_in_time() -> None:
    """A socket that listens and whose queue is full: further connections are left waiting."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with pytest.raises(client.failures()) as caught, client.streamed(f"http://127.0.0.1:{address[1]}/", {}, 0.2, 5):
            pass
        for one in waiting:
            one.close()
    assert client.is_connect_timeout(caught.value)


OFFLINE = """
from hubkit.compat import huggingface_hub as client
try:
    with client.streamed("http://127.0.0.1:1/", {}, 1, 1):
        pass
except client.failures() as error:
    print(client.is_forbidden(error))
"""


def test_offline_mode_is_told_from_a_network_that_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_headers_carry_the_token_that_is_given() -> None:
    headers = client.helpers().build_hf_headers(token="hf_secret", library_name="hubkit", library_version="1")
    assert headers["authorization"] == "Bearer hf_secret"
    assert "hubkit/1" in headers["user-agent"]
    assert "authorization" not in client.helpers().build_hf_headers(token=False)


@pytest.mark.parametrize("direct", [True, False])
def test_a_session_without_the_clients_hooks(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends no token, works in offline mode, and passes a proxy by where it is told to."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            data = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x"
    session = client.plain_session(direct=direct)
    try:
        if not direct:
            with pytest.raises(client.failures()), client.exchanged(session, "POST", url, {}, {"a": 1}, 5.0):
                pass
            return
        with client.exchanged(session, "POST", url, {"x-own": "y"}, {"a": 1}, 5.0) as response:
            assert response.status_code == 302
            assert json.loads(b"".join(client.pieces(response))) == {"a": 1}
    finally:
        server.shutdown()
        server.server_close()
    assert (seen[0]["x-own"], "authorization" in seen[0], len(seen)) == ("y", False, 1)
