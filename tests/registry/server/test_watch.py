"""What a keeper sees of a server: the log of events, the metrics, its health, and how it ends."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from registry.conftest import HubServer
from registry.server.test_protocol import HEADER, ask, file_line, lines
from registry.server.test_users import serving, soon, status

import hubkit
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.server.watch import Audit

HF = str(Path(sys.executable).with_name("hf"))


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[HubServer]:
    """A server with a log, ``audit.jsonl`` beside its registry; ana owns acme, bob reads everything, eve nothing."""
    users = tmp_path / "users.toml"
    rights = {"ana": ["acme:admin"], "bob": ["*:read"], "eve": ["eve:admin"]}
    tokens = {name: hubkit.users(users, add=name, rights=own).token or "" for name, own in rights.items()}
    DirectoryRegistry(tmp_path / "registry").create("acme/secret", private=True)
    users.write_text(users.read_text() + '\n[quotas]\nacme = "1GB"\n')
    options = ("--users", users, "--audit", tmp_path / "audit.jsonl")
    with serving(tmp_path / "registry", *options) as (url, process):
        yield HubServer(url, tmp_path / "registry", tokens, process)


def logged(server: HubServer, count: int) -> list[dict[str, Any]]:
    """The events, once there are so many."""
    path = server.root.parent / "audit.jsonl"
    assert soon(lambda: path.read_bytes().count(b"\n") >= count), path.read_text()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == count, rows
    return rows


def short(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["user"], row["action"], row.get("repo"), row["status"]


def test_each_event_is_one_line(watched: HubServer) -> None:
    commit = "/api/models/acme/secret/commit/main"
    done = ask(watched, "POST", commit, lines(HEADER, file_line("f.txt", b"text"))).json["commitOid"]
    assert status(watched, "POST", commit, "bob", {}) == 403
    assert status(watched, "POST", commit, "eve", {}) == 404
    assert status(watched, "POST", "/api/models/acme/secret/tag/main", "ana", {"tag": "v1.0.0"}) == 200
    assert status(watched, "GET", "/acme/secret/resolve/main/f.txt", "bob") == 200
    assert status(watched, "GET", "/acme/secret/resolve/main/f.txt", "eve") == 404
    assert status(watched, "GET", "/api/models", "bob") == 200
    assert status(watched, "GET", "/api/models", "hf_madeup") == 401
    create = {"organization": "acme", "name": "open"}
    assert status(watched, "POST", "/api/repos/create", "ana", create) == 200
    assert status(watched, "GET", "/api/models/acme/open", "ana") == 200, "reading what is public is no event"
    move = {"fromRepo": "acme/open", "toRepo": "acme/other"}
    assert status(watched, "POST", "/api/repos/move", "ana", move) == 200
    gone = {"organization": "acme", "name": "other"}
    assert status(watched, "DELETE", "/api/repos/delete", "ana", gone) == 200
    rows = logged(watched, 9)
    assert [short(row) for row in rows] == [
        ("ana", "commit", "acme/secret", 200),
        ("bob", "commit", "acme/secret", 403),
        ("eve", "commit", "acme/secret", 404),
        ("ana", "tag", "acme/secret", 200),
        ("bob", "read", "acme/secret", 200),
        (None, "login", None, 401),
        ("ana", "create", "acme/open", 200),
        ("ana", "move", "acme/open", 200),
        ("ana", "delete", "acme/other", 200),
    ]
    assert rows[0]["commit"] == rows[3]["commit"] == rows[4]["commit"] == done
    assert (rows[3]["tag"], rows[4]["path"], rows[4]["sent"], rows[7]["to"]) == ("v1.0.0", "f.txt", 4, "acme/other")
    assert {row["address"] for row in rows} == {"127.0.0.1"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"]) for row in rows)


def test_no_token_is_logged(watched: HubServer, tmp_path: Path) -> None:
    """Not even where a client puts one into an address; uploads have the name of whoever asked for the address."""
    (tmp_path / "w.safetensors").write_bytes(os.urandom(50_000))
    for number, extra in enumerate(({}, {"HF_HUB_DISABLE_XET": "1"})):
        environment = watched.environment(tmp_path / "home") | extra
        command = [HF, "upload", "acme/secret", str(tmp_path / "w.safetensors"), f"{number}.safetensors"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        (tmp_path / "w.safetensors").write_bytes(os.urandom(50_000))
    assert status(watched, "GET", f"/api/models/acme/secret?token={watched.tokens['ana']}", "bob") == 200
    text = (tmp_path / "audit.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [short(row) for row in rows if row["action"] == "upload"] == [("ana", "upload", "acme/secret", 200)] * 2
    assert sum(row["action"] == "commit" for row in rows) == 2
    assert not any(token in text for token in watched.tokens.values())
    assert "signature" not in text


def test_a_proxy_says_who_asks(watched: HubServer) -> None:
    assert ask(watched, "GET", "/api/models/acme/secret/refs", user="bob", X_Forwarded_For="10.1.2.3").status == 200
    assert logged(watched, 1)[0]["address"] == "10.1.2.3"


def test_the_log_is_opened_anew_when_it_was_rotated(watched: HubServer) -> None:
    path, tag = watched.root.parent / "audit.jsonl", "/api/models/acme/secret/tag/main"
    assert path.stat().st_mode & 0o777 == 0o600
    for number in range(3):
        assert status(watched, "POST", tag, "ana", {"tag": f"v{number}"}) == 200
        assert soon(lambda: path.exists() and path.read_bytes().count(b"\n") == 1)
        path.rename(path.with_suffix(f".{number}"))
    assert [json.loads(path.with_suffix(f".{n}").read_text())["tag"] for n in range(3)] == ["v0", "v1", "v2"]


def test_a_full_disk_stops_no_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    audit = Audit(path)
    audit.write({"a": 1})
    audit.write({"a": 2})
    assert audit.lost == 2
    path.unlink()
    audit.write({"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


def test_lines_of_two_processes_do_not_mix(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hubkit.registry.server.watch import Audit\n"
        "log = Audit(Path(sys.argv[1]))\n"
        "for number in range(500): log.write({'who': sys.argv[2], 'number': number, 'text': 'x' * 500})"
    )
    path = tmp_path / "log"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for who in "ab":
        assert [row["number"] for row in rows if row["who"] == who] == list(range(500))


# metrics


LINE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"(?:\{(?P<labels>(?:[a-zA-Z_][a-zA-Z0-9_]*=\"(?:[^\"\\\n]|\\[\\n\"])*\",?)*)\})?"
    r" (?P<value>[+-]?(?:Inf|NaN|[0-9.eE+-]+))(?: (?P<time>-?\d+))?"
)


def exposition(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The text format 0.0.4 read strictly: samples by name, each family together and after its HELP and TYPE."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    current, over = "", set[str]()
    for line in text.splitlines():
        if line.startswith("# "):
            _, word, name, rest = line.split(" ", 3)
            if word == "HELP":
                assert name not in helped
                helped.add(name)
                over.add(current)
                current = name
            else:
                assert word == "TYPE"
                assert name == current
                assert rest in ("counter", "gauge", "histogram", "summary", "untyped")
                kinds[name] = rest
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        name = match["name"]
        base = re.sub(r"_(bucket|sum|count)$", "", name) if kinds[current] == "histogram" else name
        assert base == current
        assert base not in over
        labels = dict(re.findall(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"', match["labels"] or ""))
        rows = found.setdefault(name, [])
        assert labels not in [known for known, _ in rows], "each sample once"
        rows.append((labels, float(match["value"])))
    for name, kind in kinds.items():
        if kind == "counter":
            assert name.endswith("_total")
        for labels, total in found.get(f"{name}_count", []):
            mine = [(row["le"], value) for row, value in found[f"{name}_bucket"] if row["route"] == labels["route"]]
            assert [value for _, value in mine] == sorted(value for _, value in mine)
            assert mine[-1] == ("+Inf", total)
    return found


def test_metrics(watched: HubServer) -> None:
    assert (
        status(watched, "POST", "/api/models/acme/secret/commit/main", "ana", lines(HEADER, file_line("f", b"12345")))
        == 200
    )
    for _ in range(3):
        assert status(watched, "GET", "/acme/secret/resolve/main/f", "ana") == 200
    assert status(watched, "GET", "/acme/secret/resolve/main/none", "ana") == 404
    assert status(watched, "BREW", "/coffee", "ana") == 404
    assert [status(watched, "GET", "/metrics", user) for user in (None, "eve", "ana", "bob")] == [401, 403, 403, 200]
    answer = ask(watched, "GET", "/metrics", user="bob")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = exposition(answer.body.decode())
    if importlib.util.find_spec("prometheus_client") is not None:  # Prometheus' own reader, where it is installed
        parser = importlib.import_module("prometheus_client.parser")
        families = parser.text_string_to_metric_families(answer.body.decode())
        theirs = [(sample.name, str(sample.labels), sample.value) for one in families for sample in one.samples]
        ours = [(name, str(labels), value) for name, rows in found.items() for labels, value in rows]
        assert sorted(theirs) == sorted(ours)
    requests = {(row["route"], row["method"], row["status"]): n for row, n in found["hubkit_requests_total"]}
    assert requests["resolve.resolve", "GET", "200"] == 3
    assert requests["resolve.resolve", "GET", "404"] == 1
    assert requests["none", "other", "404"] == 1
    assert requests["commit.commit", "POST", "200"] == 1
    assert found["hubkit_repositories"] == [({}, 1)]
    assert found["hubkit_objects_bytes"] == [({}, 5)]
    assert found["hubkit_quota_bytes"] == [({"of": "namespace acme"}, 1e9)]
    assert found["hubkit_quota_used_bytes"] == [({"of": "namespace acme"}, 5)]
    assert found["hubkit_requests_under_way"] == [({}, 1)]
    assert found["hubkit_connections"][0][1] >= 1
    assert found["hubkit_sent_bytes_total"][0][1] > 15
    assert found["hubkit_received_bytes_total"][0][1] > 5
    assert found["hubkit_users_sound"] == [({}, 1)]
    assert b"secret" not in answer.body


def test_the_reader_of_this_test_is_strict() -> None:
    good = "# HELP a_total x\n# TYPE a_total counter\na_total 1\n"
    assert exposition(good) == {"a_total": [({}, 1.0)]}
    for bad in (good[:-1], good + "a_total 2\n", good.replace(" 1", ' {l="a"b"} 1'), good.replace("a_total 1", "b 1")):
        with pytest.raises(AssertionError):
            exposition(bad)


# health, and the end


def health(server: HubServer) -> tuple[int, str]:
    answer = ask(server, "GET", "/healthz", user=None)
    return answer.status, answer.json["status"]


def test_health(watched: HubServer) -> None:
    assert health(watched) == (200, "ok")
    away = watched.root.with_name("away")
    watched.root.rename(away)
    assert health(watched) == (503, "broken")
    away.rename(watched.root)
    assert health(watched) == (200, "ok")
    marker = watched.root / "registry.json"
    good = marker.read_bytes()
    marker.write_bytes(b"{")
    assert health(watched) == (503, "broken")
    marker.write_bytes(good)
    assert health(watched) == (200, "ok")


class Upload:
    """An upload of which only the beginning was sent."""

    def __init__(self, server: HubServer, size: int = 2_000_000) -> None:
        self.data = os.urandom(size)
        row = {"oid": hashlib.sha256(self.data).hexdigest(), "size": size}
        body = {"operation": "upload", "objects": [row], "transfers": ["basic"]}
        offered = ask(server, "POST", "/acme/secret.git/info/lfs/objects/batch", body).json
        address = urlsplit(offered["objects"][0]["actions"]["upload"]["href"])
        self.connection = http.client.HTTPConnection(address.netloc, timeout=30)
        self.connection.putrequest("PUT", f"{address.path}?{address.query}")
        self.connection.putheader("Content-Length", str(size))
        self.connection.endheaders(self.data[: size // 2])

    def finish(self) -> int:
        self.connection.send(self.data[len(self.data) // 2 :])
        return self.connection.getresponse().status


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_is_under_way_is_finished(watched: HubServer, stop: signal.Signals) -> None:
    upload = Upload(watched)
    time.sleep(0.2)
    watched.process.send_signal(stop)
    assert soon(lambda: health(watched) == (503, "stopping"))
    late = ask(watched, "GET", "/api/models", user="ana")
    assert (late.status, late.headers["Connection"]) == (503, "close")
    assert upload.finish() == 200
    assert watched.process.wait(10) == 0
    found = DirectoryRegistry(watched.root).object("acme/secret", hashlib.sha256(upload.data).hexdigest())
    assert found.read_bytes() == upload.data
    with pytest.raises(ConnectionRefusedError):
        ask(watched, "GET", "/healthz", user=None)


def test_with_nothing_under_way_it_ends_at_once(watched: HubServer) -> None:
    idle = socket.create_connection(("127.0.0.1", urlsplit(watched.url).port or 0))
    kept = http.client.HTTPConnection(urlsplit(watched.url).netloc)
    kept.request("GET", "/healthz")
    kept.getresponse().read()
    began = time.monotonic()
    watched.process.terminate()
    assert watched.process.wait(10) == 0
    assert time.monotonic() - began < 2
    idle.close()


def test_the_second_signal_ends_it_at_once(watched: HubServer) -> None:
    upload = Upload(watched)
    time.sleep(0.2)
    watched.process.terminate()
    assert soon(lambda: health(watched) == (503, "stopping"))
    watched.process.terminate()
    assert watched.process.wait(2) != 0
    upload.connection.close()
    registry = DirectoryRegistry(watched.root)
    registry.commit("acme/secret", {"x.txt": b"x"}, (), message="m", parent=None)
    assert registry.check().damaged == (), "the next one finds it in order"


def test_what_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    DirectoryRegistry(tmp_path / "registry").create("acme/secret")
    with serving(tmp_path / "registry", "--grace", "0.5") as (url, process):
        upload = Upload(HubServer(url, tmp_path / "registry", {}, process))
        time.sleep(0.2)
        began = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
        assert 0.4 < time.monotonic() - began < 4
        upload.connection.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not list((tmp_path / "registry").glob("scratch/*/*"))
