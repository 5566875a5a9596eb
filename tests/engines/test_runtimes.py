"""Running servers, over HTTP: each protocol with a real model behind it, and servers that are no such thing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loopback import PROTOCOLS, Reply, Speaker, loopback, serving
from probing import gentle, key_of, larger, scaled
from variants import refused

from hubkit.engines.runtimes.asking import runtime_at
from hubkit.verbs.verify import verify


def ask(url: str, adapter: Path, **options: Any) -> Any:
    return verify(adapter, runtime=url, **options)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol_tells_healthy_bare_scaled_and_other(
    protocol: str, probed: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    named = tmp_path / key_of(probed).replace("@", "-")
    name = key_of(probed)
    other = gentle(tmp_path / "other", tiny_llama, seed=7)
    wrong = {
        "HK-NOOP": scaled(probed, tmp_path / "noop" / named.name, 0.0),
        "HK-SCALE": scaled(probed, tmp_path / "scale" / named.name, 0.25),
        "HK-PROBE-ADAPTER": scaled(other, tmp_path / "others" / named.name, 1.0),
    }
    with loopback(protocol, tiny_llama, {name: scaled(probed, named, 1.0), "more": other}) as url:
        done = ask(url, probed)
    assert done.base.startswith(f"{protocol} at {url}")
    assert done.base.endswith("(unproven)") == (protocol not in ("vllm", "llamacpp"))
    assert [check.name for check in done.checks] == ["files", "runtime"]
    for code, folder in wrong.items():
        with loopback(protocol, tiny_llama, {name: folder, "more": other}) as url:
            error = refused(code, ask, url, probed)
        assert error.status == 1
        if code == "HK-SCALE":
            assert "scale 0.25, 0.25 times" in error.what
        if code == "HK-PROBE-ADAPTER":
            assert "the bare base is right" in error.have[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_another_base_is_named_as_the_fault(protocol: str, probed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    larger(tiny_llama, tmp_path / "base")
    folder = scaled(probed, tmp_path / key_of(probed).replace("@", "-"), 1.0)
    with loopback(protocol, tmp_path / "base", {key_of(probed): folder}) as url:
        refused("HK-PROBE-BASE", ask, url, probed)


def test_coarser_servers_pass_by_their_dtype(probed: Path, tiny_llama: Path) -> None:
    with loopback("vllm", tiny_llama, {key_of(probed): probed}, "bfloat16") as url:
        assert "--dtype" in refused("HK-PROBE-ROUNDING", ask, url, probed, dtype="f32").fix
        assert ask(url, probed, dtype="bfloat16").checks == ask(url, probed, dtype="bf16").checks
        assert refused("HK-OPTIONS", ask, url, probed, dtype="int3").status == 2


def test_what_the_server_calls_it(probed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with loopback("vllm", tiny_llama, {"mine": probed}) as url:
        refusal = refused("HK-RUNTIME-MODEL", ask, url, probed)
        assert any("mine" in line for line in refusal.have)
        assert ask(url, probed, model="mine").checks
        refused("HK-NOOP", ask, url, probed, model="base")
        refused("HK-RUNTIME-MODEL", ask, url, probed, model="yours")
    with loopback("llamacpp", tiny_llama, {"mine": probed}) as url:
        assert ask(url + "/v1/", probed).checks  # by the name of its folder
        refused("HK-RUNTIME-MODEL", ask, url, probed, model="yours")
    first = gentle(tmp_path / "first", tiny_llama, seed=7)
    with loopback("mlx", tiny_llama, {"first": first, "x": probed}) as url:
        refused("HK-PROBE-ADAPTER", ask, url, probed)  # what it was started with
        assert ask(url, probed, model=str(probed)).checks
        refused("HK-RUNTIME-REFUSED", ask, url, probed, model="/nowhere")


@contextmanager
def raw(data: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that sends these bytes to whatever it is asked, with a pause after each."""
    server = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def answer() -> None:
        while not done.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    for number in range(len(data)):
                        connection.sendall(data[number : number + 1] if pause else data)
                        if not pause or done.wait(pause):
                            break
                except OSError:
                    continue

    threading.Thread(target=answer, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        done.set()
        server.close()


def code_of(url: str, adapter: Path, code: str, **options: Any) -> Any:
    error = refused(code, ask, url, adapter, **options)
    assert error.where.startswith(url.rstrip("/").removesuffix("/v1"))
    return error


def test_a_server_that_is_none_of_them(probed: Path) -> None:
    def shop(path: str, body: Any) -> Reply:
        return (404, b"<html>not here</html>") if "v1" in path else (200, {})

    def openai(path: str, body: Any) -> Reply:
        return 200, {"object": "list", "data": [{"id": "gpt", "object": "model", "owned_by": "somebody"}]}

    for answer, said in ((shop, "HTTP 404"), (openai, "somebody"), (always(200, [1]), "[1]")):
        with serving(answer) as url:
            error = code_of(url, probed, "HK-RUNTIME-UNKNOWN")
            assert error.status == 3
            assert said in error.have[0]


def test_nobody_there_slow_ones_and_garbage(probed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code_of(f"http://127.0.0.1:{port}", probed, "HK-RUNTIME-OFFLINE")
    code_of("http://host.invalid:9", probed, "HK-RUNTIME-OFFLINE")
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    for data, pause in ((head + b" " * 100, 0.1), (b"", 0.0), (head[:40], 0.1)):
        with raw(data or b"H", pause or 5.0) as url:
            began = time.monotonic()
            assert code_of(url, probed, "HK-RUNTIME-SLOW", timeout=0.5).status == 3
            assert time.monotonic() - began < 3
    for data in (b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nab", b"\x00\xff"):
        with raw(data) as url:
            code_of(url, probed, "HK-RUNTIME-OFFLINE", timeout=2.0)
    for said in (b"{", b"\xff\xfe", b"[" * 100_000, b"<html>"):
        with serving(always(200, said)) as url:
            code_of(url, probed, "HK-RUNTIME-ANSWER")


def always(status: int, said: Any) -> Callable[[str, Any], Reply]:
    """A server's answer to whatever it is asked."""
    return lambda path, body: (status, said)


def test_refusals_redirects_and_floods(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (302, 401, 429, 500, 503):
        with serving(always(status, {"error": "no"})) as url:
            assert f"HTTP {status}" in code_of(url, probed, "HK-RUNTIME-REFUSED").have[0]
    with serving(always(200, b" " * (9 << 20))) as url:
        assert "too long" in code_of(url, probed, "HK-RUNTIME-ANSWER").what


def test_addresses_that_are_none(probed: Path) -> None:
    wrong = ["localhost:8000", "ftp://here", "http://", "http://a:b@here:1", "http://here:99999", "http://h/?x=1"]
    for url in [*wrong, "http://[::1", "http://a b", "http://h/\x00", ""]:
        error = refused("HK-OPTIONS", runtime_at, url)
        assert error.status == 2
        assert "b@" not in str(error)
    assert refused("HK-OPTIONS", runtime_at, "http://here", 0.0).status == 2


def test_a_token_goes_along_and_is_never_told(probed: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_RUNTIME_TOKEN", "secret-word")
    seen: list[str] = []
    with raw(b"HTTP/1.1 401 no\r\nContent-Length: 0\r\n\r\n") as url:
        seen.append(str(code_of(url, probed, "HK-RUNTIME-REFUSED")))
    assert "secret-word" not in seen[0]


class Liar(Speaker):
    """vLLM's server with one answer of its own."""

    change: dict[str, Any]

    def vllm(self, path: str, body: Any) -> Reply:
        status, answer = super().vllm(path, body)
        return status, answer if body is None else {**json.loads(json.dumps(answer)), **self.change}


def tops(top: dict[str, float]) -> dict[str, Any]:
    """Choices with these likeliest tokens."""
    return {"choices": [{"index": number, "logprobs": {"top_logprobs": [top]}} for number in range(8)]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "another"}, "HK-RUNTIME-MODEL"),
        ({"choices": []}, "HK-RUNTIME-ANSWER"),
        ({"choices": {"index": 0}}, "HK-RUNTIME-ANSWER"),
        ({"choices": [{"index": 0, "logprobs": None}] * 8}, "HK-RUNTIME-ANSWER"),
        (tops({"the": -1.0}), "HK-RUNTIME-ANSWER"),
        (tops({"token_id:1": 3.0}), "HK-RUNTIME-ANSWER"),
        (tops({f"token_id:{token}": -0.1 for token in range(9)}), "HK-RUNTIME-ANSWER"),
        (tops({"token_id:1": float("nan"), "token_id:2": -1.0}), "HK-RUNTIME-ANSWER"),
    ],
    ids=str,
)
def test_servers_that_lie_or_answer_nonsense(change: dict[str, Any], code: str, probed: Path, tiny_llama: Path) -> None:
    liar = Liar(tiny_llama, {key_of(probed): probed})
    liar.change = change
    with serving(liar.vllm) as url:
        code_of(url, probed, code)


def test_an_adapter_without_probes_is_not_decided(tiny_llama: Path, adapter: Path) -> None:
    assert refused("HK-PROBES-MISSING", ask, "http://127.0.0.1:9", adapter).status == 3
