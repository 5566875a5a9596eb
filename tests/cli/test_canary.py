"""A token that is watched for: in what commands print, in every file they leave, and in what another server is sent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from making import make_adapter

if TYPE_CHECKING:
    from registry.conftest import HubServer

CANARY = "hf_" + "c4n4ry" * 10
pytest_plugins = ["registry.conftest"]


@pytest.fixture
def other() -> Iterator[tuple[str, list[str]]]:
    """(address of another server, the heads and bodies of all requests it got)."""
    got: list[str] = []

    class Listening(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            got.append(f"{self.requestline}\n{self.headers}\n{self.rfile.read(length)!r}")
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()


@pytest.mark.slow
def test_it_is_nowhere(
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer],
    other: tuple[str, list[str]],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    hub = start_server(tmp_path / "registry", {CANARY: "ana"})
    work, elsewhere, got = tmp_path / "work", *other
    make_adapter(work / "chat", tiny_llama, seed=1)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUBKIT_"))}
    kept |= {"HUBKIT_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    kept |= {"HUBKIT_CONFIG": str(tmp_path / "config.toml")}
    ways = (
        {"HUBKIT_REGISTRY": hub.url, "HUBKIT_TOKEN": CANARY},
        {"HF_ENDPOINT": hub.url, "HUBKIT_REGISTRY": "hf", "HF_TOKEN": CANARY},
    )
    lines = [
        "pack ./chat --version 1.0.0 --license mit",
        "push ./chat ana/chat",
        "push ./chat ana/chat",  # its version is there
        "pull ana/chat@v1.0.0 --json",
        "pull ana/none",
        "pull ana/chat@v9.0.0 --json",
        f"pull {elsewhere}/ana/chat",
        f"pull ana/chat --registry {elsewhere}",
        f"copy ana/chat {elsewhere}",
        f"push ./chat ana/chat --registry {elsewhere}",
        f"search --registry {elsewhere}",
        f"pull http://ana:{CANARY}@127.0.0.1:1/ana/chat",
        f"config set registry {CANARY}",
        f"config set tokens.{elsewhere} {CANARY}",
        "config --json",
        "login --json",
        "search chat --json",
        "list --remote",
        "log ana/chat",
        "tag ana/chat 1.0.1",
        "yank ana/chat@1.0.0 --reason worse",
        f"add ana/chat@v1.0.0 --base {tiny_llama}",
        "sync",
        "deploy ./run --engine peft",
        "verify ana/chat@v1.0.0",
        f"users users.toml --add {CANARY}",
        "cache list",
    ]
    statuses = {}
    for way in ways:
        for line in lines:
            command = [sys.executable, "-m", "hubkit", *line.split()]
            done = subprocess.run(command, cwd=work, env=kept | way, capture_output=True, timeout=120)
            statuses[line] = done.returncode
            assert CANARY.encode() not in done.stdout + done.stderr, (line, done.stdout + done.stderr)
    assert statuses["pull ana/chat@v1.0.0 --json"] == statuses["login --json"] == statuses["sync"] == 0
    assert [line for line in lines if elsewhere in line and statuses[line] == 0] == []
    assert got, "the other server was asked"
    assert [text for text in got if CANARY in text] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name] == []
