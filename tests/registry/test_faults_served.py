"""Faults of the server and of transfers, each named by its number: hangs, costs, and what was said wrongly."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from registry.answering import Answering
from variants import refused

from hubkit.errors import HubkitError
from hubkit.registry.directory import rules
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.directory.objects import git_blob
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.server import read_tokens
from hubkit.registry.store.store import Store

MODEL, COMMIT, OTHER = "/api/models/ana/chat", "1" * 40, "2" * 40
BIG = random.Random(1).randbytes(3 << 20)


def tensors(data: bytes) -> bytes:
    """A safetensors file that holds these bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


LARGE = tensors(BIG)


def ask(server: Any, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, sent)
    reply = connection.getresponse()
    answer = reply.status, reply.headers, reply.read()
    connection.close()
    return answer


def served(server: Answering, files: dict[str, bytes], bodies: dict[str, Any] | None = None) -> None:
    """Let `server` offer a repository ana/chat with these files, or what `bodies` answers in their place."""
    rows = []
    for path, data in files.items():
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
        if len(data) > 1 << 20:
            row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        rows.append(row)
        answer = (bodies or {}).get(path) or ranged(data)
        server.routes[f"/ana/chat/resolve/{COMMIT}/{path}"] = answer
    server.routes[MODEL] = (200, {}, {"sha": COMMIT})
    server.routes[f"{MODEL}/refs"] = (200, {}, {"branches": [{"name": "main", "targetCommit": COMMIT}], "tags": []})
    server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {}, rows)


def ranged(data: bytes, stop_at: int | None = None, held: threading.Event | None = None) -> Callable[[Any], None]:
    """An answer that obeys ranges; up to `stop_at` of the file, where it then breaks off, or hangs while not `held`."""

    def answer(handler: Any) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-").partition("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        handler.wfile.write(data[start : stop_at if held is not None else None])
        handler.wfile.flush()
        if held is not None:
            held.wait(60)
            handler.close_connection = True

    return answer


ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA", "r": 1}', "adapter_model.safetensors": LARGE}


# 10: patterns


NAMES = ["a", "b", "x", "y", "ab", "a.b", ".a", "x y", "ü", "[a]", "a*", "aa", "Z", "0", "a-b", "!a", "#a", "a\\b"]
BITS = [
    *("a", "b", "x", "*", "**", "?", "[ab]", "[!a]", "[^a-c]", "[[:alpha:]]", "[[:digit:]x]", "\\*", "\\a", "ab", "."),
    *("[a-c]", "[]a]", "ü", "[", "a*", "*b", "***", "[a\\-z]", "[z-a]", "[[:foo:]]", "[a-]", "-", "Z", " "),
]


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is the oracle here")
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def told(folder: Path, paths: list[str], *words: str) -> list[str]:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, input="\0".join(paths) + "\0", capture_output=True, text=True, check=False)
    return done.stdout.split("\0")[:-1]


def pattern(chance: random.Random) -> str:
    steps = [
        "".join(chance.choice(BITS) for _ in range(chance.randint(1, 3))) if chance.random() < 0.85 else "**"
        for _ in range(chance.randint(1, 4))
    ]
    return chance.choice(["", "", "/", "!"]) + "/".join(steps) + chance.choice(["", "", "", "/"])


def test_fault_10_ten_thousand_pairs_are_what_git_says(git: Path) -> None:
    chance, pairs = random.Random(10), 0
    while pairs < 10_000:
        drawn = {"/".join(chance.choice(NAMES) for _ in range(chance.randint(1, 4))) for _ in range(100)}
        paths = sorted(p for p in drawn if not any(other.startswith(f"{p}/") for other in drawn))
        patterns = [pattern(chance) for _ in range(chance.randint(1, 3))]
        (git / ".gitignore").write_text("\n".join(patterns) + "\n")
        read = rules.read_ignores("\n".join(patterns) + "\n")
        found = told(git, paths, "check-ignore", "--no-index", "-z", "--stdin")
        assert [p for p in paths if rules.ignored(read, p)] == found, patterns
        text = "".join(f"{p.replace(' ', '_')} filter=lfs\n" for p in patterns if not p.startswith("!"))
        (git / ".gitignore").unlink()
        (git / ".gitattributes").write_text(text)
        rows = told(git, paths, "check-attr", "-z", "--stdin", "filter")
        large = [rows[at] for at in range(0, len(rows), 3) if rows[at + 2] == "lfs"]
        (git / ".gitattributes").unlink()
        assert [p for p in paths if rules.decide(rules.read_attributes(text), p)] == large, text
        pairs += 2 * len(paths)


def test_fault_10_a_request_has_a_budget(open_server: Any) -> None:
    DirectoryRegistry(open_server.root).create("ana/patterns")
    where = "/api/models/ana/patterns/preupload/main"
    paths = ["aabbcc" * 20 + f"/{number}" for number in range(256)]
    files = [{"path": path, "size": 3, "sample": "YQ=="} for path in paths]
    fierce = "\n".join(f"*a*b*c{number}z*" for number in range(1000))
    others: list[float] = []
    ended = threading.Event()

    def meanwhile() -> None:
        while not ended.is_set():
            begun = time.perf_counter()
            ask(open_server, "GET", "/api/whoami-v2")
            others.append(time.perf_counter() - begun)

    beside = threading.Thread(target=meanwhile)
    beside.start()
    begun = time.perf_counter()
    status, _, body = ask(open_server, "POST", where, {"files": files, "gitIgnore": fierce})
    spent = time.perf_counter() - begun
    ended.set()
    beside.join()
    assert (status, "too long" in body.decode()) == (400, True)
    assert spent < 30, "it took minutes"
    assert max(others) < spent / 2, "nobody waits for it"
    twelve = {"files": [{**files[0], "path": "a/" * 30 + "a"}], "gitIgnore": "**/" * 12 + "z"}
    assert ask(open_server, "POST", where, twelve)[0] == 200
    usual = "\n".join(f"*.kind{number}" for number in range(300))
    assert ask(open_server, "POST", where, {"files": files, "gitIgnore": usual})[0] == 200


# 11: deadlines


def dripping(handler: Any) -> None:
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(LARGE)))
    handler.end_headers()
    try:
        for byte in LARGE:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


def test_fault_11_a_trickle_is_as_good_as_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBKIT_IDLE_TIMEOUT", "1")
    with Answering() as server:
        served(server, ADAPTER, {"adapter_model.safetensors": dripping})
        fault = refused("HK-OFFLINE", Store(tmp_path).pull, HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert "HUBKIT_IDLE_TIMEOUT" in fault.fix
        assert fault.want == ["further bytes within 1 s"]


@pytest.mark.parametrize("call", ["resolve", "create", "tag", "commit"])
def test_fault_11_the_whole_has_a_deadline_in_reading_and_writing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_TOTAL_TIMEOUT", "1")
    held = threading.Event()

    def headers_that_never_end(handler: Any) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not held.wait(0.05):
                handler.wfile.write(b"X: y\r\n")
                handler.wfile.flush()
        except OSError:
            pass
        handler.close_connection = True

    with Answering() as server:
        registry = HuggingFaceRegistry(server.url, token="")
        for path in (MODEL, f"{MODEL}/revision/main", "/api/repos/create", f"{MODEL}/tag/{COMMIT}"):
            server.routes[path] = headers_that_never_end
        begun = time.monotonic()
        calls: dict[str, Callable[[], object]] = {
            "resolve": lambda: registry.resolve("ana/chat", None),
            "create": lambda: registry.create("ana/chat"),
            "tag": lambda: registry.tag("ana/chat", "v1.0.0", COMMIT),
            "commit": lambda: registry.commit("ana/chat", {"a.json": b"{}"}, [], message="m", parent=None),
        }
        fault = refused("HK-OFFLINE", calls[call])
        held.set()
        assert time.monotonic() - begun < 10
        assert "HUBKIT_TOTAL_TIMEOUT" in fault.fix


def test_fault_11_an_upload_that_nobody_takes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_IDLE_TIMEOUT", "0.3")
    monkeypatch.setattr("hubkit.registry.hub.transport.WAITS", (0.01,))
    held = threading.Event()
    with Answering() as server:
        server.routes[f"{MODEL}/revision/main"] = (200, {}, {"sha": OTHER})
        modes = [{"path": "w.safetensors", "uploadMode": "lfs"}]
        server.routes[f"{MODEL}/preupload/main"] = (200, {}, {"files": modes})
        row = {"oid": hashlib.sha256(LARGE).hexdigest(), "actions": {"upload": {"href": f"{server.url}/put"}}}
        server.routes["/ana/chat.git/info/lfs/objects/batch"] = (200, {}, {"objects": [row]})
        server.routes["/put"] = lambda handler: held.wait(20)
        registry = HuggingFaceRegistry(server.url, token="")
        fault = refused(
            "HK-OFFLINE", registry.commit, "ana/chat", {"w.safetensors": LARGE}, [], message="m", parent=None
        )
        held.set()
        assert "HUBKIT_IDLE_TIMEOUT" in fault.fix


def test_fault_11_retry_after_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_TOTAL_TIMEOUT", "5")
    with Answering() as server:
        server.routes[MODEL] = (429, {"Retry-After": "60"}, b"")
        begun = time.monotonic()
        refused("HK-BUSY", HuggingFaceRegistry(server.url, token="").resolve, "ana/chat", None)
        assert time.monotonic() - begun < 5
        assert len(server.seen) == 1


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e99"])
def test_fault_11_a_deadline_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_TOTAL_TIMEOUT", text)
    assert refused("HK-OPTIONS", HuggingFaceRegistry("http://127.0.0.1:9", token="").resolve, "a/b", None).status == 2


# 13: limits before the cost


@pytest.mark.parametrize("count", [200_000, 40_000])
def test_fault_13_a_manifest_of_very_many_files_costs_little(count: int, tmp_path: Path) -> None:
    from hubkit.documents.manifest import Manifest

    rows = ",".join(f'{{"path":"f{n:06}.json","sha256":"sha256:{n:064}","size":1}}' for n in range(count))
    data = (
        f'{{"files":[{rows}],"kind":"adapter","name":"chat","schema":"hubkit/manifest/1","version":"0.1.0"}}'.encode()
    )
    with Answering() as server:
        served(server, {"hubkit.json": data}, {"hubkit.json": (200, {}, data)})
        begun = time.process_time()
        refused("HK-LIMIT", Store(tmp_path).pull, HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert time.process_time() - begun < 3
    if count == 40_000:
        refused("HK-LIMIT", Manifest.from_bytes, data)


# 14: Ctrl-C


def test_fault_14_ctrl_c_ends_a_stalled_pull_at_once(tmp_path: Path) -> None:
    held = threading.Event()
    with Answering() as server:
        served(server, ADAPTER, {"adapter_model.safetensors": ranged(LARGE, 2 << 20, held)})
        command = [sys.executable, "-m", "hubkit", "pull", "ana/chat", "--registry", server.url]
        kept = {**os.environ, "HUBKIT_HOME": str(tmp_path / "home"), "HUBKIT_IDLE_TIMEOUT": "60"}
        process = subprocess.Popen(command, env=kept, stderr=subprocess.PIPE, text=True)
        grown = tmp_path / "home" / "partial" / hashlib.sha256(LARGE).hexdigest()
        deadline = time.monotonic() + 60
        while not (grown.exists() and grown.stat().st_size > 1 << 20) and time.monotonic() < deadline:
            time.sleep(0.02)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - begun < 8, "150 s, and a second Ctrl-C"
        held.set()
        assert process.stderr is not None
        assert "HK-INTERRUPTED" in process.stderr.read()
        assert [path for path in (tmp_path / "home" / "staging").iterdir() if path.is_dir()] == []


# 15: a pull goes on


PULL = """
import sys
from pathlib import Path
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.store.store import Store
Store(Path(sys.argv[1])).pull(HuggingFaceRegistry(sys.argv[2], token=""), "ana/chat")
"""


def killed_pull(server: Answering, home: Path, at: int) -> Path:
    """Pull in a process that is killed when `at` bytes have come; where they lie."""
    held = threading.Event()
    served(server, ADAPTER, {"adapter_model.safetensors": ranged(LARGE, at, held)})
    process = subprocess.Popen([sys.executable, "-c", PULL, str(home), server.url])
    grown = home / "partial" / hashlib.sha256(LARGE).hexdigest()
    deadline = time.monotonic() + 60
    while not (grown.exists() and grown.stat().st_size >= at - (512 << 10)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    held.set()
    server.seen.clear()
    served(server, ADAPTER)
    return grown


def asked_from(server: Answering) -> list[str | None]:
    return [headers.get("range") for path, headers, _ in server.seen if path.endswith(".safetensors")]


def test_fault_15_a_killed_pull_goes_on(tmp_path: Path) -> None:
    with Answering() as server:
        grown = killed_pull(server, tmp_path, len(LARGE) * 9 // 10)
        had = grown.stat().st_size
        assert (grown.stat().st_mode & 0o777) == 0o600
        assert LARGE.startswith(grown.read_bytes())
        done = Store(tmp_path).pull(HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert asked_from(server) == [f"bytes={had}-"]
        assert len(LARGE) * 9 // 10 - had <= 1 << 20, "what came before the kill is not fetched again"
        assert done.fetched == len(LARGE) - had + len(ADAPTER["adapter_config.json"])
        assert (done.path / "adapter_model.safetensors").read_bytes() == LARGE
        assert list((tmp_path / "partial").iterdir()) == []


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.store.store import Store

home, url, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance, hit = random.Random(seed), 0

def grown():
    try:
        return max((path.stat().st_size for path in (home / "partial").iterdir()), default=0)
    except OSError:
        return 0

while True:
    child = os.fork()
    if not child:
        Store(home).pull(HuggingFaceRegistry(url, token=""), "ana/chat")
        os._exit(0)
    early = chance.random() < 0.2
    end = time.monotonic() + (chance.uniform(0.0, 0.8) if early and hit < kills else 600)
    further = grown() + chance.randint(0, 2 << 20) if hit < kills else 1 << 62
    while time.monotonic() < end and grown() <= further:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            print(hit)
            sys.exit(0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hit += 1
"""


@pytest.mark.slow
def test_fault_15_kills_cost_a_megabyte_each_at_most(tmp_path: Path) -> None:
    data = tensors(random.Random(2).randbytes(24 << 20))

    def slow(handler: Any) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-").partition("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        at = start
        try:
            while at < len(data):
                handler.wfile.write(data[at : at + (64 << 10)])
                handler.wfile.flush()
                at += 64 << 10
                time.sleep(0.01)
        except OSError:
            handler.close_connection = True
        sent.append((start, at))

    sent: list[tuple[int, int]] = []
    with Answering() as server:
        served(server, {**ADAPTER, "adapter_model.safetensors": data}, {"adapter_model.safetensors": slow})
        command = [sys.executable, "-c", KILLED, str(tmp_path), server.url, "20", "7"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        kills = int(done.stdout)
    asked = sorted(sent)
    again = [end - start for (_, end), (start, _) in itertools.pairwise(asked)]
    assert max(again) <= 1 << 20, "bytes fetched twice, by one kill"
    assert asked[-1][1] >= len(data)
    found = Store(tmp_path).pull(HuggingFaceRegistry(server.url, token=""), "ana/chat", offline=True)
    assert (found.path / "adapter_model.safetensors").read_bytes() == data
    assert kills >= 5
    assert not any(path.is_dir() for path in (tmp_path / "staging").iterdir())


@pytest.mark.parametrize("edit", ["byte", "longer", "whole", "all wrong"])
def test_fault_15_what_lies_there_is_proven(tmp_path: Path, edit: str) -> None:
    with Answering() as server:
        served(server, ADAPTER)
        grown = tmp_path / "partial" / hashlib.sha256(LARGE).hexdigest()
        grown.parent.mkdir(parents=True)
        lies = {"byte": b"x" + LARGE[1:2000], "longer": LARGE + b"x", "whole": LARGE, "all wrong": b"x" * len(LARGE)}
        grown.write_bytes(lies[edit])
        counts: list[int] = []
        registry = HuggingFaceRegistry(server.url, token="")
        done = Store(tmp_path).pull(registry, "ana/chat", progress=lambda now, total: counts.append(now))
        assert (done.path / "adapter_model.safetensors").read_bytes() == LARGE
        wanted = {"byte": ["bytes=2000-", None], "longer": [None], "whole": [], "all wrong": [None]}
        assert asked_from(server) == wanted[edit]
        assert counts[-1] == len(LARGE) + len(ADAPTER["adapter_config.json"])


def test_fault_15_a_server_without_ranges_begins_anew(tmp_path: Path) -> None:
    with Answering() as server:
        killed_pull(server, tmp_path, 2 << 20)
        server.routes[f"/ana/chat/resolve/{COMMIT}/adapter_model.safetensors"] = (200, {}, LARGE)
        done = Store(tmp_path).pull(HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert (done.path / "adapter_model.safetensors").read_bytes() == LARGE


def test_fault_15_a_file_that_changed_meanwhile_is_another_file(tmp_path: Path) -> None:
    with Answering() as server:
        grown = killed_pull(server, tmp_path, 2 << 20)
        changed = tensors(BIG[::-1])
        served(server, {**ADAPTER, "adapter_model.safetensors": changed})
        done = Store(tmp_path).pull(HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert (done.path / "adapter_model.safetensors").read_bytes() == changed
        assert grown.exists(), "the other one may still be wanted"
        os.utime(grown, (0, 0))
        server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {}, [])
        Store(tmp_path).remove(done.digest)
        served(server, ADAPTER)
        Store(tmp_path).pull(HuggingFaceRegistry(server.url, token=""), "ana/chat")
        assert list((tmp_path / "partial").iterdir()) == []


# 16: what nobody names


def test_fault_16_objects_that_no_commit_names_are_collected(tmp_path: Path) -> None:
    place = DirectoryRegistry(tmp_path / "registry")
    place.create("ana/chat")
    first = place.commit("ana/chat", {"w.safetensors": b"one"}, [], message="one", parent=None)
    place.commit("ana/chat", {"w.safetensors": b"two"}, [], message="two", parent=None)
    squashed = place.squash("ana/chat", "main", "all")
    entry = place.put("ana/chat", {"lost.json": b"lost"})["lost.json"]
    assert place.collect().objects == 0, "it may belong to a commit under way"
    for path in place.root.glob("repos/*/*/objects/??/*"):
        os.utime(path, (0, 0))
    done = place.collect()
    assert (done.objects, done.size) == (1, 4)
    refused("HK-NOT-FOUND", place.object, "ana/chat", entry.sha256)
    assert place.read("ana/chat", first, "w.safetensors") == b"one", "a lock may name it"
    assert place.read("ana/chat", squashed, "w.safetensors") == b"two"

    def edit(tree: Any) -> None:
        tree["lost.json"] = entry

    refused("HK-FILES", place.change, "ana/chat", edit, message="m", parent=None)
    again = place.put("ana/chat", {"lost.json": b"lost"})
    assert again["lost.json"] == entry
    place.change("ana/chat", edit, message="m", parent=None)


def test_fault_16_what_is_offered_again_is_young(open_server: Any) -> None:
    place = DirectoryRegistry(open_server.root)
    place.create("ana/young")
    oid = place.put("ana/young", {"w.safetensors": b"data"})["w.safetensors"].sha256
    path = place.object("ana/young", oid)
    os.utime(path, (0, 0))
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": 4}]}
    status, _, body = ask(open_server, "POST", "/ana/young.git/info/lfs/objects/batch", batch)
    assert (status, "actions" in json.loads(body)["objects"][0]) == (200, False)
    assert place.collect().objects == 0
    assert path.exists()


def test_fault_16_no_lock_file_outlives_the_next_writer(tmp_path: Path) -> None:
    """What a writer leaves that is killed behind its last rename."""
    from hubkit.artifact.staging import staged

    left, waits = tmp_path / f".merged.{'0' * 16}.lock", tmp_path / f".other.{'1' * 16}.lock"
    left.touch()
    waits.touch()
    (tmp_path / f".other.{'1' * 16}.old").mkdir()
    with staged(tmp_path / "new") as stage:
        (stage / "a").touch()
    assert not left.exists()
    assert waits.exists(), "a folder waits to be put back"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["new"]


# 17: answers and questions of any shape


@pytest.mark.parametrize(
    "answer", [[], None, {}, {"objects": 1}, {"objects": [{}]}, {"objects": [[]]}, b"<html>", "address"]
)
def test_fault_17_any_answer_about_large_objects_is_refused_as_the_registrys(answer: Any) -> None:
    with Answering() as server:
        server.routes[f"{MODEL}/revision/main"] = (200, {}, {"sha": OTHER})
        modes = [{"path": "w.safetensors", "uploadMode": "lfs"}]
        server.routes[f"{MODEL}/preupload/main"] = (200, {}, {"files": modes})
        if answer == "address":
            oid = hashlib.sha256(LARGE).hexdigest()
            answer = {"objects": [{"oid": oid, "actions": {"upload": {"href": "http://[x:port"}}}]}
        server.routes["/ana/chat.git/info/lfs/objects/batch"] = (200, {}, answer)
        registry = HuggingFaceRegistry(server.url, token="")
        commit = registry.commit
        fault = refused("HK-REGISTRY", commit, "ana/chat", {"w.safetensors": LARGE}, [], message="m", parent=OTHER)
        assert fault.status == 3


@pytest.mark.parametrize("answer", [[], None, {}, {"files": 1}, {"files": [{}]}, {"files": []}, {"files": [1]}])
def test_fault_17_nor_is_any_answer_about_files_taken(answer: Any) -> None:
    with Answering() as server:
        server.routes[f"{MODEL}/revision/main"] = (200, {}, {"sha": OTHER})
        server.routes[f"{MODEL}/preupload/main"] = (200, {}, answer)
        registry = HuggingFaceRegistry(server.url, token="")
        refused("HK-REGISTRY", registry.commit, "ana/chat", {"a.json": b"{}"}, [], message="m", parent=OTHER)


@pytest.mark.parametrize("link", ["<http://[>", "<http://x:port/>", "<//[::1>"])
def test_fault_17_a_broken_link_is_the_registrys(link: str) -> None:
    with Answering() as server:
        row = {"type": "file", "path": "a", "size": 0, "oid": git_blob(b"")}
        server.routes[f"{MODEL}/tree/{COMMIT}"] = (200, {"Link": f'{link}; rel="next"'}, [row])
        refused("HK-REGISTRY", HuggingFaceRegistry(server.url, token="").files, "ana/chat", COMMIT)


STRANGE: list[tuple[str, str, object]] = [
    ("POST", "/ana/odd.git/info/lfs/objects/batch", {"operation": "upload", "transfers": None, "objects": []}),
    ("POST", "/ana/odd.git/info/lfs/objects/batch", {"operation": "upload", "transfers": 5, "objects": []}),
    ("POST", "/ana/odd.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{"oid": "a", "size": True}]}),
    ("POST", "/ana/odd.git/info/lfs/verify", {"oid": "\ud800", "size": 1}),
    ("POST", "/api/models/ana/odd/preupload/main", {"files": [{"path": "\ud800", "size": 1, "sample": ""}]}),
    ("POST", "/api/models/ana/odd/preupload/main", {"files": [{"path": "a", "size": 1, "sample": "ü"}]}),
    ("POST", "/api/models/ana/odd/tag/main", {"tag": "tab\tcr\r end "}),
    ("POST", "/api/models/ana/odd/tag/main", {"tag": "\udcff"}),
    ("POST", "/api/models/ana/odd/branch/x", {"startingPoint": "a\tb "}),
    ("POST", "/api/repos/create", {"name": "x\t ", "organization": "\ud800"}),
    ("POST", "/api/repos/create", {"name": "x \r\n", "organization": "ana"}),
    ("POST", "/api/validate-yaml", {"content": "---\na: [\t\n---\n"}),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"header","value":{"summary":"s","parentCommit":12345}}'),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"header","value":null}'),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"header","value":{"summary":"\\ud800"}}'),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"deletedFile","value":{"path":"\\udcff"}}'),
    (
        "POST",
        "/api/models/ana/odd/commit/main",
        b'{"key":"file","value":{"path":"a\\t","content":"","encoding":"utf-8"}}',
    ),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"file","value":{"path":"a","content":5,"encoding":"base64"}}'),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":"lfsFile","value":{"path":"a","oid":5,"size":1}}'),
    ("POST", "/api/models/ana/odd/commit/main", b'{"key":["a"],"value":{"path":"a"}}'),
    ("PUT", "/api/models/ana/odd/settings", {"visibility": ["\ud800"]}),
]


@pytest.mark.parametrize(("method", "path", "body"), STRANGE, ids=[str(n) for n in range(len(STRANGE))])
def test_fault_17_any_question_gets_an_answer(open_server: Any, method: str, path: str, body: object) -> None:
    DirectoryRegistry(open_server.root).create("ana/odd")
    status, headers, data = ask(open_server, method, path, body)
    assert status in (200, 400, 404, 409), data
    said = headers["X-Error-Message"] or ""
    assert said == said.strip()
    assert said.isprintable()
    json.loads(data)


# 20: HTTP


@pytest.fixture
def files(open_server: Any) -> str:
    place = DirectoryRegistry(open_server.root)
    if not place.exists("ana/files"):
        place.create("ana/files")
        place.commit("ana/files", {"w.safetensors": BIG, "a.json": b"{}"}, [], message="m", parent=None)
    return "/ana/files/resolve/main/w.safetensors"


def test_fault_20_an_unknown_address_is_no_missing_repository(open_server: Any, files: str) -> None:
    for path in ("/api/models/ana/files/nope", "/api/nope", "/nope"):
        status, headers, body = ask(open_server, "GET", path)
        assert (status, headers["X-Error-Code"]) == (404, None), path
        assert json.loads(body)["error"] == "No such address"
    for path in ("/api/models/gpt2", "/api/models/ana/none", "/gpt2/resolve/main/config.json", "/api/datasets/a/b"):
        assert ask(open_server, "GET", path)[1]["X-Error-Code"] == "RepoNotFound", path


def test_fault_20_another_files_range_is_not_joined(open_server: Any, files: str) -> None:
    etag = f'"{hashlib.sha256(BIG).hexdigest()}"'
    assert ask(open_server, "GET", files, Range="bytes=5-9", If_Range=etag)[0] == 206
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        status, _, body = ask(open_server, "GET", files, Range="bytes=5-9", If_Range=other)
        assert (status, body) == (200, BIG), other


def test_fault_20_what_the_client_has_is_not_sent(open_server: Any, files: str) -> None:
    etag = f'"{hashlib.sha256(BIG).hexdigest()}"'
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        for method in ("GET", "HEAD"):
            status, headers, body = ask(open_server, method, files, If_None_Match=known)
            assert (status, body, headers["ETag"]) == (304, b"", etag), known
    assert ask(open_server, "GET", files, If_None_Match='"other"')[0] == 200


def test_fault_20_a_moved_repository_is_found_under_its_old_name(open_server: Any, tmp_path: Path) -> None:
    place = DirectoryRegistry(open_server.root)
    place.create("ana/old")
    commit = place.commit("ana/old", ADAPTER, [], message="m", parent=None)
    place.move("ana/old", "ana/between")
    place.move("ana/between", "ana/new")
    status, headers, _ = ask(open_server, "GET", "/api/models/ana/old/tree/main?recursive=true")
    assert (status, headers["Location"]) == (307, "/api/models/ana/new/tree/main?recursive=true")
    remote = HuggingFaceRegistry(open_server.url, token="")
    assert remote.resolve("ana/old", None) == commit
    assert Store(tmp_path).pull(remote, "ana/old").commit == commit
    second = remote.commit("ana/old", {"b.json": b"{}", "w.safetensors": LARGE}, [], message="more", parent=commit)
    assert place.resolve("ana/new") == second
    with pytest.raises(HubkitError) as caught:
        place.resolve("ana/old")
    assert caught.value.fix == "it is called ana/new now"
    place.create("ana/old")
    assert remote.resolve("ana/old", None) not in (commit, second)


def test_fault_20_a_private_ones_new_name_is_not_told(hub_server: Any) -> None:
    place = DirectoryRegistry(hub_server.root)
    place.create("ana/hidden-old", private=True)
    place.move("ana/hidden-old", "ana/hidden-new")
    assert ask(hub_server, "GET", "/api/models/ana/hidden-old")[0] == 401
    mine = {"Authorization": f"Bearer {hub_server.tokens['ana']}"}
    assert ask(hub_server, "GET", "/api/models/ana/hidden-old", **mine)[0] == 307


# 21: permissions


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_fault_21_locks_are_for_the_group_that_files_are_for(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nos.umask(0o002)\n"
        "from hubkit.registry.directory.directory import DirectoryRegistry\n"
        "from hubkit.registry.store.store import Store\n"
        "place = DirectoryRegistry(Path(sys.argv[1]) / 'registry')\nplace.create('ana/chat')\n"
        "files = {'adapter_config.json': b'{}', 'adapter_model.safetensors': bytes.fromhex(sys.argv[2])}\n"
        "place.commit('ana/chat', files, [], message='m', parent=None)\n"
        "Store(Path(sys.argv[1]) / 'home').pull(place, 'ana/chat')\n"
        "from hubkit.documents.drafts import locked\n"
        "with locked(Path(sys.argv[1]) / 'a.lock'):\n"
        "    assert (Path(sys.argv[1]) / 'a.lock').stat().st_mode & 0o777 == 0o664\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), tensors(b"ab").hex()], check=True)
    # releases of filelock differ in whether a lock's file stays
    for path in [*tmp_path.rglob("*.lock"), *(tmp_path / "home" / "index").rglob("*.json")]:
        assert path.stat().st_mode & 0o777 == 0o664, path


def test_fault_21_tokens_that_everybody_reads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text('{"s3cret": "ana"}')
    path.chmod(0o644)
    fault = refused("HK-OPTION", read_tokens, path)
    assert fault.fix == f"chmod o= {path}"
    path.chmod(0o640)
    assert set(read_tokens(path)) == {"s3cret"}


def test_fault_21_private_repositories_are_closed_to_others(tmp_path: Path) -> None:
    place = DirectoryRegistry(tmp_path / "registry")
    place.create("ana/open")
    place.create("ana/closed", private=True)
    folders = {name: place.root / "repos" / "ana" / name for name in ("open", "closed")}
    shown = folders["open"].stat().st_mode & 0o007
    assert folders["closed"].stat().st_mode & 0o007 == 0
    place.set_private("ana/open", True)
    place.set_private("ana/closed", False)
    assert folders["open"].stat().st_mode & 0o007 == 0
    assert folders["closed"].stat().st_mode & 0o007 == shown
