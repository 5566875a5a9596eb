"""Starting the server: what it refuses, what it imports, its tokens, its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hubkit.errors import HubkitError
from hubkit.registry.server import Account, build_app, read_tokens, run_server
from hubkit.registry.server.run import _listen

if TYPE_CHECKING:
    from registry.conftest import HubServer


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(HubkitError) as caught:
        action()
    assert "s3cret" not in caught.value.render()
    return caught.value.code


def test_nothing_heavy_is_imported_before_it_runs() -> None:
    code = (
        "import sys, hubkit.registry.server, hubkit.registry.directory.directory\n"
        "print([m for m in ('starlette', 'uvicorn', 'huggingface_hub', 'torch', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_tokens_only_on_loopback(tmp_path: Path) -> None:
    assert code_of(lambda: run_server(tmp_path, "0.0.0.0", 0)) == "HK-OPEN-SERVER"


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert code_of(lambda: run_server(tmp_path, "127.0.0.1", taken.getsockname()[1])) == "HK-PORT"


def test_packets_are_not_held_back() -> None:
    """Nagle's algorithm against delayed acknowledgements costs 40 ms a call."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_tokens_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"a": "ana", "b": "bob:read", "c": {"user": "cy", "organizations": ["acme"]}}))
    path.chmod(0o600)
    tokens = read_tokens(path)
    assert tokens == {"a": Account("ana"), "b": Account("bob", "read"), "c": Account("cy", "write", ("acme",))}
    assert tokens["c"].owns("acme/x")
    assert not tokens["a"].owns("acme/x")
    build_app(tmp_path / "registry", tokens=tokens)
    assert not (tmp_path / "registry").exists(), "nothing is made before the first write"


@pytest.mark.parametrize("text", ["", "[]", '{"s3cret": 5}', '{"s3cret": {"role": "read"}}', '{"s3cret": "ana:boss"}'])
def test_bad_tokens_are_refused_without_showing_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    assert code_of(lambda: read_tokens(tmp_path / "t")) == "HK-OPTION"
    assert code_of(lambda: read_tokens(tmp_path / "absent")) == "HK-OPTION"


def test_ctrl_c_ends_it_in_order(
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "registry", None)
    assert urllib.request.urlopen(server.url, timeout=20).status == 200
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
