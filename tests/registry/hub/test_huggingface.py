"""The Hub's client end: what refusals become, what a hostile or failing server cannot do, where tokens go."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubkit.errors import HubkitError
from hubkit.registry.directory.objects import git_blob
from hubkit.registry.hub import transport
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.hub.streams import SharedFile
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import parse_reference

if TYPE_CHECKING:
    from registry.conftest import HubServer

COMMIT = "1" * 40
OTHER = "2" * 40
CANARY = "hf_canarycanarycanarycanary"
DATA = bytes(range(256)) * 8192  # 2 MiB
MODEL = "/api/models/ana/chat"
FILE = f"/ana/chat/resolve/{COMMIT}/w.safetensors"


class Server:
    """A real HTTP server that says what a test wants: for a path (status, headers, body), a list, or a function."""

    def __init__(self) -> None:
        self.routes: dict[str, Any] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = outer.routes.get(self.path.partition("?")[0], (404, {"X-Error-Code": "EntryNotFound"}, b""))
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if callable(answer):
                    answer(self)
                    return
                status, headers, body = answer
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.answer(status, headers, body)

            do_POST = do_GET

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def file(self, data: bytes = DATA, *, large: bool = True, body: Any = None) -> None:
        """Serve one file, listed by its true digest, with `body` as the answer to its download."""
        row: dict[str, Any] = {"type": "file", "path": "w.safetensors", "size": len(data), "oid": git_blob(data)}
        if large:
            row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        self.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {}, [row, {"type": "directory", "path": "d", "oid": OTHER}])
        self.routes[FILE] = (200, {"X-Repo-Commit": COMMIT}, data) if body is None else body

    def commits(self, *line: str) -> None:
        """Take any commit of a.json and answer that it is COMMIT; `line`: what is on the branch afterwards."""
        self.routes[f"{MODEL}/revision/main"] = (200, {}, {"sha": OTHER})
        taken = {"files": [{"path": "a.json", "uploadMode": "regular", "shouldIgnore": False, "oid": None}]}
        self.routes[f"{MODEL}/preupload/main"] = (200, {}, taken)
        done = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/ana/chat/commit/{COMMIT}"}
        self.routes[f"{MODEL}/commit/main"] = (200, {}, done)
        self.routes[f"{MODEL}/commits/main"] = (200, {}, [{"id": commit} for commit in line])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def other() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def registry(server: Server, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceRegistry:
    monkeypatch.setattr(transport, "WAITS", (0.01, 0.02, 0.03))
    return HuggingFaceRegistry(server.url, token=CANARY)


def refused(code: str, call: Callable[..., Any], *args: Any, **named: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*args, **named)
    text = caught.value.render() + json.dumps(caught.value.as_json()) + repr(caught.value.args)
    assert caught.value.code == code, text
    assert CANARY not in text
    assert caught.value.__cause__ is None or CANARY not in repr(vars(caught.value.__cause__))
    return caught.value


# refusals

REFUSALS = [
    (401, "", "Invalid credentials in Authorization header", "HK-AUTH"),
    (401, "RepoNotFound", "", "HK-AUTH"),
    (403, "", "no", "HK-FORBIDDEN"),
    (403, "GatedRepo", "Access to model ana/chat is restricted", "HK-GATED"),
    (401, "GatedRepo", "", "HK-GATED"),
    (404, "RepoNotFound", "", "HK-NOT-FOUND"),
    (404, "", "", "HK-NOT-FOUND"),
    (400, "", f"bad {CANARY} Bearer {CANARY}", "HK-REGISTRY"),
    (418, "", "", "HK-REGISTRY"),
    (409, "", "", "HK-EXISTS"),
    (412, "", "", "HK-STALE"),
    (413, "", "", "HK-LIMIT"),
    (413, "QuotaExceeded", "the quota of namespace ana is 1 GB", "HK-QUOTA"),
    (507, "", "HK-DISK: no space left for the registry", "HK-QUOTA"),
]


@pytest.mark.parametrize(("status", "code", "message", "wanted"), REFUSALS)
def test_answers_are_refusals_in_reading_and_writing(
    registry: HuggingFaceRegistry, server: Server, status: int, code: str, message: str, wanted: str
) -> None:
    answer = (status, {"X-Error-Code": code, "X-Error-Message": message}, {"error": message})
    server.routes[MODEL] = server.routes[f"{MODEL}/tag/{COMMIT}"] = answer
    refused(wanted, registry.resolve, "ana/chat", None)
    if wanted != "HK-EXISTS":
        refused(wanted, registry.tag, "ana/chat", "v1", COMMIT)


def test_an_unknown_revision_names_the_nearest(registry: HuggingFaceRegistry, server: Server) -> None:
    server.routes[f"{MODEL}/revision/v1.2.1"] = (404, {"X-Error-Code": "RevisionNotFound"}, {})
    refs = {"branches": [{"name": "main", "targetCommit": COMMIT}], "tags": [{"name": "v1.2.0", "targetCommit": OTHER}]}
    server.routes[f"{MODEL}/refs"] = (200, {}, refs)
    assert refused("HK-NO-REVISION", registry.resolve, "ana/chat", "v1.2.1").fix == "ana/chat@v1.2.0"


def test_nobody_there(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        dead = HuggingFaceRegistry(url, token=CANARY)
        refused("HK-OFFLINE", dead.resolve, "ana/chat", None)
        refused("HK-OFFLINE", dead.create, "ana/chat")
        refused("HK-OFFLINE", dead.tag, "ana/chat", "v1", COMMIT)
        refused("HK-OFFLINE", dead.commit, "ana/chat", {"a.json": b"{}"}, [], message="m", parent=None)


def test_a_silent_server_is_not_waited_for(
    registry: HuggingFaceRegistry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_IDLE_TIMEOUT", "0.2")
    monkeypatch.setattr(transport, "WAITS", (0.01,))
    hang = threading.Event()
    server.routes[MODEL] = lambda handler: hang.wait(10)
    refused("HK-OFFLINE", registry.resolve, "ana/chat", None)
    hang.set()
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_reads_are_tried_again_a_few_times(registry: HuggingFaceRegistry, server: Server, status: int) -> None:
    busy = (status, {"Retry-After": "0"}, b"")
    good: tuple[int, dict[str, str], object] = (200, {}, {"sha": COMMIT})
    server.routes[MODEL] = [busy, busy, good]
    assert registry.resolve("ana/chat", None) == COMMIT
    server.seen.clear()
    server.routes[MODEL] = busy
    refused("HK-BUSY" if status == 429 else "HK-OFFLINE", registry.resolve, "ana/chat", None)
    assert len(server.seen) == 4


OFFLINE = """
import sys
from hubkit.errors import HubkitError
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
registry = HuggingFaceRegistry(sys.argv[1])
for call in (lambda: registry.resolve("ana/chat", None), lambda: registry.create("ana/chat")):
    try:
        call()
    except HubkitError as fault:
        print(fault.code, fault.what)
"""


def test_hf_hub_offline_is_obeyed(server: Server) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", OFFLINE, server.url], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == ["HK-OFFLINE HF_HUB_OFFLINE forbids the network"] * 2
    assert server.seen == []


# hostile and failing servers


@pytest.mark.parametrize("sha", ["1" * 39, "../../x", None, 5, "G" * 40, OTHER])
def test_a_commit_must_be_one_and_the_one_asked_for(registry: HuggingFaceRegistry, server: Server, sha: Any) -> None:
    server.routes[f"{MODEL}/revision/{COMMIT}"] = (200, {}, {"sha": sha})
    refused("HK-REGISTRY", registry.resolve, "ana/chat", COMMIT)


@pytest.mark.parametrize(
    "rows",
    [
        {},
        [1],
        [{"type": "file"}],
        [{"type": "file", "path": "a", "size": -1, "oid": OTHER}],
        [{"type": "file", "path": "a", "size": True, "oid": OTHER}],
        [{"type": "file", "path": "a", "size": 1, "oid": "x"}],
        [{"type": "file", "path": "a", "size": 1, "oid": OTHER, "lfs": {"oid": "../" * 21 + "x", "size": 1}}],
        [{"type": "file", "path": 7, "size": 1, "oid": OTHER}],
        b"<html>",
        b"[" * 100_000,
    ],
)
def test_listings_are_checked(registry: HuggingFaceRegistry, server: Server, rows: Any) -> None:
    server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {}, rows)
    refused("HK-REGISTRY", registry.files, "ana/chat", COMMIT)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"branches": []},
        {"branches": 1, "tags": []},
        {"branches": [1], "tags": []},
        {"branches": [{}], "tags": []},
        {"branches": [{"name": [], "targetCommit": COMMIT}], "tags": []},
        {"branches": [], "tags": [{"name": "v1", "targetCommit": "v1"}]},
        {"branches": [{"name": "main", "targetCommit": None}], "tags": []},
        {"branches": [{"name": 5, "targetCommit": COMMIT}], "tags": []},
    ],
)
def test_refs_are_checked(registry: HuggingFaceRegistry, server: Server, answer: Any) -> None:
    server.routes[f"{MODEL}/refs"] = (200, {}, answer)
    refused("HK-REGISTRY", registry.refs, "ana/chat")


def test_only_commits_are_asked_for_files(registry: HuggingFaceRegistry, server: Server) -> None:
    for name in ("main", "../../x", COMMIT[:-1]):
        refused("HK-NOT-FOUND", registry.files, "ana/chat", name)
    assert server.seen == []


def test_endless_answers_end(registry: HuggingFaceRegistry, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_JSON", 1000)
    server.routes[MODEL] = (200, {}, json.dumps({"sha": COMMIT}).encode().ljust(1000))
    assert registry.resolve("ana/chat", None) == COMMIT
    server.routes[MODEL] = (200, {}, json.dumps({"sha": COMMIT}).encode().ljust(1001))
    refused("HK-LIMIT", registry.resolve, "ana/chat", None)


@pytest.mark.parametrize("answer", [b"<html>", b"", {}, [], {"url": 5}, None])
def test_answers_that_the_client_cannot_use(registry: HuggingFaceRegistry, server: Server, answer: Any) -> None:
    server.routes["/api/repos/create"] = (200, {}, answer)
    refused("HK-REGISTRY", registry.create, "ana/chat")


@pytest.mark.parametrize("answer", [b"<html>", {}, [], {"commitOid": 5}, {"commitOid": "x"}, None])
def test_a_commit_of_which_the_client_learns_nothing(
    registry: HuggingFaceRegistry, server: Server, answer: Any
) -> None:
    server.commits()
    server.routes[f"{MODEL}/commit/main"] = (200, {}, answer)
    refused("HK-REGISTRY", registry.commit, "ana/chat", {"a.json": b"{}"}, [], message="m", parent=OTHER)


@pytest.mark.parametrize(
    ("line", "code"),
    [([], "HK-REGISTRY"), ([OTHER], "HK-REGISTRY"), ([COMMIT], "HK-STALE"), ([COMMIT, "3" * 40, OTHER], "HK-STALE")],
)
def test_a_commit_must_be_on_the_branch_above_its_parent(
    registry: HuggingFaceRegistry, server: Server, line: list[str], code: str
) -> None:
    server.commits(*line)
    refused(code, registry.commit, "ana/chat", {"a.json": b"{}"}, [], message="m", parent=OTHER)


@pytest.mark.parametrize("line", [{}, [1], "x", None])
def test_a_list_of_commits_must_be_one(registry: HuggingFaceRegistry, server: Server, line: Any) -> None:
    server.commits()
    server.routes[f"{MODEL}/commits/main"] = (200, {}, line)
    refused("HK-REGISTRY", registry.commit, "ana/chat", {"a.json": b"{}"}, [], message="m", parent=OTHER)


def test_a_commit_that_is_as_it_was_sent(registry: HuggingFaceRegistry, server: Server) -> None:
    """What the refusals above rest on."""
    server.commits(COMMIT, OTHER)
    row = {"type": "file", "path": "a.json", "size": 2, "oid": git_blob(b"{}")}
    server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {}, [row])
    made = registry.commit("ana/chat", {"a.json": b"{}"}, [], message="m", parent=OTHER)
    assert made == COMMIT


def test_pages_are_followed_on_the_same_host_only(registry: HuggingFaceRegistry, server: Server, other: Server) -> None:
    row = {"type": "file", "path": "a", "size": 0, "oid": git_blob(b"")}
    link = {"Link": f'<{server.url}/page2?x=1>; rel="next"'}
    server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, link, [row])
    server.routes["/page2"] = (200, {}, [{**row, "path": "b"}])
    assert [file.path for file in registry.files("ana/chat", COMMIT)] == ["a", "b"]
    server.routes[f"{MODEL}/tree/{OTHER}"] = (200, {"Link": f'<{other.url}/page2>; rel="next"'}, [row])
    refused("HK-REGISTRY", registry.files, "ana/chat", OTHER)
    assert other.seen == []


def test_endless_lists_end(registry: HuggingFaceRegistry, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_PAGES", 5)
    row = {"type": "file", "path": "a", "size": 0, "oid": git_blob(b"")}
    server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {"Link": f'<{MODEL}/tree/{COMMIT}?x>; rel="next"'}, [row])
    refused("HK-LIMIT", registry.files, "ana/chat", COMMIT)
    assert len(server.seen) == 5


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize(
    "body",
    [b"x" * len(DATA), DATA[:-1], DATA + b"x", b"", DATA[:-1] + b"x"],
    ids=["other", "short", "long", "none", "bit"],
)
def test_other_bytes_are_refused_after_a_second_try(
    registry: HuggingFaceRegistry, server: Server, tmp_path: Path, large: bool, body: bytes
) -> None:
    server.file(large=large, body=(200, {"ETag": '"../../../../pwn"', "X-Repo-Commit": "../.."}, body))
    counts: list[int] = []
    refused("HK-FILES", registry.download, "ana/chat", COMMIT, "w.safetensors", tmp_path / "f", counts.append)
    assert list(tmp_path.rglob("*")) == []
    assert sum(1 for path, _ in server.seen if path == FILE) == 2
    assert sum(counts) <= len(DATA)
    if len(body) == len(DATA):
        refused("HK-FILES", registry.read, "ana/chat", COMMIT, "w.safetensors")


def test_a_second_try_may_succeed(registry: HuggingFaceRegistry, server: Server, tmp_path: Path) -> None:
    server.file(body=[(200, {}, b"x" * len(DATA)), (200, {}, DATA)])
    counts: list[int] = []
    registry.download("ana/chat", COMMIT, "w.safetensors", tmp_path / "f", counts.append)
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(counts) == len(DATA)


def _breaking(at: int, *, ranges: bool) -> Callable[[Any], None]:
    """An answer that breaks off after `at` bytes, and then goes on where it is asked to, or begins anew."""
    tries = []

    def answer(handler: Any) -> None:
        tries.append(1)
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-")) if ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(DATA) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        handler.end_headers()
        handler.wfile.write(DATA[start : start + at] if len(tries) < 3 else DATA[start:])
        handler.wfile.flush()
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(registry: HuggingFaceRegistry, server: Server, tmp_path: Path, ranges: bool) -> None:
    server.file(body=_breaking(700_000, ranges=ranges))
    counts: list[int] = []
    registry.download("ana/chat", COMMIT, "w.safetensors", tmp_path / "f", counts.append)
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(counts) == len(DATA)
    asked = [headers.get("range") for path, headers in server.seen if path == FILE]
    assert len(asked) == 3


def test_ranges_are_used_where_the_server_has_them_and_not_needed(
    registry: HuggingFaceRegistry, server: Server
) -> None:
    server.file()
    assert registry.read("ana/chat", COMMIT, "w.safetensors", 100, 200) == DATA[100:200]
    server.routes[FILE] = (206, {}, DATA[100:200])
    assert registry.read("ana/chat", COMMIT, "w.safetensors", 100, 200) == DATA[100:200]
    assert server.seen[-1][1]["range"] == "bytes=100-199"
    server.routes[FILE] = (206, {}, DATA[100:150])
    refused("HK-REGISTRY", registry.read, "ana/chat", COMMIT, "w.safetensors", 100, 200)


# tokens


def test_the_token_does_not_follow_a_redirect_to_another_host(
    registry: HuggingFaceRegistry, server: Server, other: Server, tmp_path: Path
) -> None:
    server.file(body=(302, {"Location": f"{other.url}/cdn?signature=1", "X-Repo-Commit": COMMIT}, b""))
    other.routes["/cdn"] = (200, {}, DATA)
    registry.download("ana/chat", COMMIT, "w.safetensors", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.seen[-1][1]["authorization"] == f"Bearer {CANARY}"
    assert CANARY not in json.dumps(other.seen)


def _tokens_seen(server: Server, text: str, registry: str | None = None) -> set[str | None]:
    server.seen.clear()
    server.routes[MODEL] = (200, {}, {"sha": COMMIT})
    open_registry(parse_reference(text), registry).resolve("ana/chat", None)
    return {headers.get("authorization") for _, headers in server.seen}


def test_each_server_gets_only_its_own_token(server: Server, other: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HUBKIT_TOKEN", "mine")
    monkeypatch.delenv("HUBKIT_REGISTRY", raising=False)
    address = f"{server.url}/ana/chat"
    # a server that only a reference names gets none: the reference may be a stranger's
    assert _tokens_seen(server, address) == {None}
    # the one the user configured gets the one meant for it, never the Hub's
    assert _tokens_seen(server, "ana/chat", server.url) == {"Bearer mine"}
    assert _tokens_seen(server, address, server.url) == {"Bearer mine"}
    assert _tokens_seen(server, address, other.url) == {None}
    monkeypatch.setenv("HUBKIT_REGISTRY", server.url + "/")
    assert _tokens_seen(server, address) == {"Bearer mine"}
    monkeypatch.delenv("HUBKIT_TOKEN")
    assert _tokens_seen(server, address) == {None}
    # where the user says that this is the Hub, it gets the Hub's
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert _tokens_seen(server, address) == {f"Bearer {CANARY}"}
    assert _tokens_seen(server, "ana/chat", "hf") == {f"Bearer {CANARY}"}


# writing, against the real server


def test_several_files_are_one_commit_without_xet_and_without_noise(
    hub_server: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["ana"])
    registry.create("ana/one-commit")
    parent = registry.resolve("ana/one-commit", None)
    for number in range(3):
        (tmp_path / f"{number}.safetensors").write_bytes(os.urandom(300_000))
    add: dict[str, Path | bytes] = {path.name: path for path in tmp_path.iterdir()}
    commit = registry.commit("ana/one-commit", {**add, "README.md": b"# card"}, [], message="all", parent=parent)
    rows = registry._reader.json("/api/models/ana/one-commit/commits/main", registry._asked("ana/one-commit"))
    assert [row["id"] for row in rows] == [commit, parent]
    assert capfd.readouterr().err == ""


def test_a_read_only_token_and_a_stranger_cannot_write(hub_server: HubServer) -> None:
    HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["ana"]).create("ana/guarded")
    for user, code in (("ana:read", "HK-FORBIDDEN"), ("bob", "HK-FORBIDDEN"), (None, "HK-AUTH")):
        token = hub_server.tokens[user] if user else ""
        registry = HuggingFaceRegistry(hub_server.url, token=token)
        refused(code, registry.commit, "ana/guarded", {"a.json": b"{}"}, [], message="m", parent=None)
        refused(code, registry.create, "ana/other")
        refused(code, registry.tag, "ana/guarded", "v1.0.0", registry.resolve("ana/guarded", None))


def test_private_repositories_are_hidden(hub_server: HubServer) -> None:
    HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["ana"]).create("ana/secret", private=True)
    refused("HK-AUTH", HuggingFaceRegistry(hub_server.url, token="").resolve, "ana/secret", None)
    bob = HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["bob"])
    refused("HK-NOT-FOUND", bob.resolve, "ana/secret", None)
    assert "ana/secret" not in bob.repos("ana")


class _Forgetful(HuggingFaceRegistry):
    """Loses the answer to a commit that was made, as a connection may that breaks at that moment."""

    def _send(self, *args: Any) -> str:
        super()._send(*args)
        raise HubkitError("HK-OFFLINE", "the registry does not answer")


def test_a_commit_whose_answer_was_lost_is_found(hub_server: HubServer) -> None:
    registry = _Forgetful(hub_server.url, token=hub_server.tokens["ana"])
    registry.create("ana/lost")
    parent = registry.resolve("ana/lost", None)
    commit = registry.commit("ana/lost", {"a.json": b"{}"}, [], message="m", parent=parent)
    assert registry.resolve("ana/lost", None) == commit != parent


class _Swapping(HuggingFaceRegistry):
    """A server that stores other bytes than it was sent is the same to the client as one that was sent others."""

    def _send(self, asked: Any, files: Any, removed: Any, message: str, parent: str | None) -> str:
        return super()._send(asked, {path: SharedFile(b"other") for path in files}, removed, message, parent)


def test_a_success_is_not_believed(hub_server: HubServer) -> None:
    registry = _Swapping(hub_server.url, token=hub_server.tokens["ana"])
    registry.create("ana/swapped")
    fault = refused("HK-FILES", registry.commit, "ana/swapped", {"a.json": b"{}"}, [], message="m", parent=None)
    assert fault.have == ["a.json"]
