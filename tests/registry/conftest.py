"""A running `hubkit serve` for the tests of this folder: a process of its own, as clients meet it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from canary import CANARY

START = """
import sys, json
from pathlib import Path
from hubkit.registry.server import run_server
root, tokens = sys.argv[1:]
run_server(Path(root), "127.0.0.1", 0, tokens=json.loads(tokens), ready=lambda url: print(url, flush=True))
"""
TOKENS = {f"{CANARY}-{user.replace(':', '-')}": user for user in ("ana", "bob", "ana:read", "root:admin")}


@dataclass(frozen=True)
class HubServer:
    """A server: its address, its directory, and its tokens by user (``ana``, ``bob``, ``ana:read``, ``root:admin``)."""

    url: str
    root: Path
    tokens: Mapping[str, str]
    process: subprocess.Popen[str]

    def environment(self, home: Path, user: str | None = "ana") -> dict[str, str]:
        """Environment for a real client in a subprocess; nothing of this machine's settings enters."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "HUBKIT_"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
        return kept | ({"HF_TOKEN": self.tokens[user]} if user is not None and self.tokens else {})


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[[Path, Mapping[str, str] | None], HubServer]]:
    """Starts servers; they end with the session."""
    running: list[subprocess.Popen[str]] = []

    def start(root: Path, tokens: Mapping[str, str] | None = None) -> HubServer:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(root), json.dumps(tokens)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url
        return HubServer(url, root, {user: token for token, user in (tokens or {}).items()}, process)

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(20)


@pytest.fixture(scope="session")
def hub_server(
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer], tmp_path_factory: pytest.TempPathFactory
) -> HubServer:
    """A server with tokens; use a repository name of your own in it."""
    return start_server(tmp_path_factory.mktemp("hub") / "registry", TOKENS)


@pytest.fixture(scope="session")
def open_server(
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer], tmp_path_factory: pytest.TempPathFactory
) -> HubServer:
    """A server without tokens: everybody on this machine may write."""
    return start_server(tmp_path_factory.mktemp("open") / "registry", None)
