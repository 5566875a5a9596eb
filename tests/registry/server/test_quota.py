"""Quotas: what does not fit is refused before it is sent, whatever the protocol, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from registry.conftest import HubServer
from registry.server.test_protocol import HEADER, ask, file_line, lines
from registry.server.test_users import code_of, serving

import hubkit
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.directory.usage import Usage
from hubkit.registry.hub.huggingface import HuggingFaceRegistry

HF = str(Path(sys.executable).with_name("hf"))


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[HubServer]:
    """100 kB for acme, 1 MB in all."""
    users = tmp_path / "users.toml"
    token = hubkit.users(users, add="ana", rights=["*:admin"]).token or ""
    users.write_text(users.read_text() + '\n[quotas]\nacme = "100kB"\n')
    DirectoryRegistry(tmp_path / "registry").create("acme/a")
    with serving(tmp_path / "registry", "--users", users, "--quota", "1MB") as (url, process):
        yield HubServer(url, tmp_path / "registry", {"ana": token}, process)


def stored(server: HubServer) -> dict[str, int]:
    """What lies in the registry, scratch included."""
    paths = [*server.root.glob("repos/*/*/objects/??/*"), *server.root.glob("scratch/*/*")]
    return {path.name: path.stat().st_size for path in paths}


def offer(server: HubServer, repo: str, *contents: bytes) -> tuple[int, list[str]]:
    """(status, upload addresses) of an LFS batch."""
    rows = [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)} for data in contents]
    body = {"operation": "upload", "objects": rows, "transfers": ["basic"]}
    answer = ask(server, "POST", f"/{repo}.git/info/lfs/objects/batch", body)
    rows = answer.json.get("objects", [])
    return answer.status, [row["actions"]["upload"]["href"] for row in rows if "actions" in row]


def send(server: HubServer, address: str, data: bytes) -> int:
    split = urlsplit(address)
    return ask(server, "PUT", f"{split.path}?{split.query}", data, user=None).status


def test_what_does_not_fit_is_refused_before_it_is_sent(limited: HubServer) -> None:
    assert offer(limited, "acme/a", os.urandom(60_000), os.urandom(60_000)) == (413, [])
    status, (address,) = offer(limited, "acme/a", data := os.urandom(60_000))
    assert (status, send(limited, address, data)) == (200, 200)
    body = lines(HEADER, file_line("x.txt", os.urandom(50_000)))
    answer = ask(limited, "POST", "/api/models/acme/a/commit/main", body)
    assert answer.status == 413
    assert answer.headers["X-Error-Code"] == "QuotaExceeded"
    assert answer.json["error"] == "the quota of namespace acme is 100 kB, 60 kB are used: 50 kB more do not fit"
    files = {"files": [{"path": "w.bin", "size": 50_000, "sample": ""}]}
    assert ask(limited, "POST", "/api/models/acme/a/preupload/main", files).status == 413
    assert offer(limited, "acme/a", data) == (200, []), "what is there takes no more room"
    assert list(stored(limited).values()) == [60_000]


def test_a_commit_that_is_refused_leaves_nothing(limited: HubServer) -> None:
    before = stored(limited)
    body = lines(HEADER, *(file_line(f"{number}.txt", os.urandom(30_000)) for number in range(5)))
    assert ask(limited, "POST", "/api/models/acme/a/commit/main", body).status == 413
    assert stored(limited) == before
    fine = lines(HEADER, *(file_line(f"{number}.txt", os.urandom(30_000)) for number in range(3)))
    assert ask(limited, "POST", "/api/models/acme/a/commit/main", fine).status == 200


def test_uploads_at_the_same_time_do_not_share_their_room(limited: HubServer) -> None:
    contents = [os.urandom(40_000) for _ in range(6)]
    addresses = [offer(limited, "acme/a", data)[1][0] for data in contents]
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda a=a, d=d: found.append(send(limited, a, d)))
        for a, d in zip(addresses, contents, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count(200) <= 2
    assert set(found) == {200, 413}
    assert sum(stored(limited).values()) <= 100_000


def test_deleting_and_collecting_make_room(limited: HubServer) -> None:
    _, (address,) = offer(limited, "acme/a", data := os.urandom(90_000))
    assert send(limited, address, data) == 200
    assert offer(limited, "acme/a", os.urandom(20_000))[0] == 413
    for path in limited.root.glob("repos/acme/a/objects/??/*"):
        old = time.time() - 3 * 24 * 3600
        os.utime(path, (old, old))
    done = hubkit.serve(limited.root, gc=True)
    assert done is not None
    assert done.size == 90_000
    assert offer(limited, "acme/a", os.urandom(20_000))[0] == 200


def test_the_server_as_a_whole(limited: HubServer) -> None:
    registry = DirectoryRegistry(limited.root)
    for name in ("x/a", "y/a"):
        registry.create(name)
        registry.commit(name, {"w.bin": os.urandom(450_000)}, (), message="m", parent=None)
    answer = ask(limited, "POST", "/api/models/y/a/commit/main", lines(HEADER, file_line("x.txt", os.urandom(150_000))))
    assert answer.status == 413
    assert "this server" in answer.json["error"]
    removal = lines(HEADER, ("deletedFile", {"path": "w.bin"}))
    assert ask(limited, "POST", "/api/models/y/a/commit/main", removal).status == 200
    assert ask(limited, "DELETE", "/api/repos/delete", {"name": "a", "organization": "x"}).status == 200
    answer = ask(limited, "POST", "/api/models/y/a/commit/main", lines(HEADER, file_line("x.txt", os.urandom(150_000))))
    assert answer.status == 200


def test_hubkit_says_so(limited: HubServer) -> None:
    registry = HuggingFaceRegistry(limited.url, token=limited.tokens["ana"])
    for name in ("w.safetensors", "x.txt"):  # large and regular
        data = os.urandom(200_000)
        assert code_of(lambda: registry.commit("acme/a", {name: data}, (), message="m", parent=None)) == "HK-QUOTA"  # noqa: B023
    assert stored(limited) == {}


@pytest.mark.parametrize("xet", [True, False])
def test_hf_shows_the_words(limited: HubServer, tmp_path: Path, xet: bool) -> None:
    (tmp_path / "w.safetensors").write_bytes(os.urandom(300_000))
    environment = limited.environment(tmp_path / "home") | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})
    command = [HF, "upload", "acme/a", str(tmp_path / "w.safetensors"), "w.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "the quota of namespace acme is 100 kB" in " ".join((done.stdout + done.stderr).split())
    assert stored(limited) == {}


@pytest.mark.parametrize("xet", [True, False])
def test_what_gets_past_the_first_question_is_refused_at_the_next(
    limited: HubServer, tmp_path: Path, xet: bool
) -> None:
    """A file of a size that is there already may be that one, as far as is known before its digest."""
    environment = limited.environment(tmp_path / "home") | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})
    for number, succeeds in ((1, True), (2, False)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(os.urandom(60_000))
        command = [HF, "upload", "acme/a", str(path), path.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) is succeeds, done.stderr
        if not succeeds:
            assert "413" in done.stdout + done.stderr
    assert [size for size in stored(limited).values() if size == 60_000] == [60_000]


def test_what_is_counted_is_what_lies_there(tmp_path: Path) -> None:
    """By another process, too, and in folders that were counted a moment before."""
    usage, registry = Usage(tmp_path), DirectoryRegistry(tmp_path)
    assert usage.all() == {}
    for number in range(30):
        name = f"{'ab'[number % 2]}/r{number % 3}"
        registry.create(name)
        registry.commit(name, {f"{number}.bin": os.urandom(1000 + number)}, (), message="m", parent=None)
        if number % 7 == 6:
            registry.delete(name)
        found = dict.fromkeys(usage.all(), 0)
        for path in tmp_path.glob("repos/*/*/objects/??/*"):
            found[path.relative_to(tmp_path).parts[1]] += path.stat().st_size
        assert usage.all() == found
    assert usage.of("a") == found["a"]


FULL = """
import hashlib, json, os, subprocess, sys
from pathlib import Path
from registry.conftest import HubServer
from registry.server.test_protocol import ask
from registry.server.test_users import serving
root = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", root], check=True)
with serving(root, "--audit", root / ".log") as (url, process):
    server = HubServer(url, root, {}, process)
    ask(server, "POST", "/api/repos/create", {"organization": "a", "name": "b"})
    data = os.urandom(5_000_000)
    row = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    body = {"operation": "upload", "objects": [row], "transfers": ["basic"]}
    (offered,) = ask(server, "POST", "/a/b.git/info/lfs/objects/batch", body).json["objects"]
    put = ask(server, "PUT", offered["actions"]["upload"]["href"].removeprefix(url), data)
    left = [path.name for path in [*root.glob("repos/*/*/objects/??/*"), *root.glob("scratch/*/*")]]
    with (root / ".fill").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    reads = [ask(server, "GET", path).status for path in ("/api/models/a/b", "/healthz", "/metrics")]
    tag = ask(server, "POST", "/api/models/a/b/tag/main", {"tag": "v1"}).status
    (root / ".fill").unlink()
    again = ask(server, "POST", "/api/models/a/b/tag/main", {"tag": "v2"}).status
    process.terminate()
    said = [put.status, put.json["error"], left, reads, tag, again, process.wait(20)]
print(json.dumps(said))
"""


def test_a_full_disk_is_said_and_stops_nothing(tmp_path: Path) -> None:
    """On a file system of 3 MB, where this machine lets us make one."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file systems of one's own here")
    command = [*space, sys.executable, "-c", FULL, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    status, text, left, reads, tag, again, ended = json.loads(done.stdout.splitlines()[-1])
    assert (status, text) == (507, "HK-DISK: no space left for the registry")
    assert left == []
    assert reads == [200, 200, 200]
    assert tag in (200, 507), "a page may be left for the few bytes of it"
    assert (again, ended) == (200, 0)
