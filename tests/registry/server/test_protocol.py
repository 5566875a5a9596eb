"""The server's answers byte by byte: who may do what, ranges, errors, limits, hostile requests."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest

from hubkit.registry.directory.directory import DirectoryRegistry

if TYPE_CHECKING:
    from registry.conftest import HubServer

BIG = bytes(range(256)) * 50
Body = Mapping[str, object] | bytes | None


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: HubServer, method: str, path: str, body: Body = None, user: str | None = "ana", **headers: str
) -> Answer:
    """One request; `user` None is anonymous; dicts go as JSON."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    sent = {k.replace("_", "-"): v for k, v in headers.items()}
    if user is not None and "Authorization" not in sent:
        sent["Authorization"] = f"Bearer {server.tokens.get(user, user)}"
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, sent)
    reply = connection.getresponse()
    answer = Answer(reply.status, reply.headers, reply.read())
    connection.close()
    return answer


def lines(*items: tuple[str, Mapping[str, object]]) -> bytes:
    return b"\n".join(json.dumps({"key": k, "value": v}).encode() for k, v in items)


def file_line(path: str, data: bytes) -> tuple[str, dict[str, object]]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


HEADER = ("header", {"summary": "s", "description": "d"})


@pytest.fixture(scope="module")
def repo(hub_server: HubServer) -> str:
    registry = DirectoryRegistry(hub_server.root)
    registry.create("ana/proto")
    files = {"w.safetensors": BIG, "sub/ü & b.json": b'{"a": 1}', "README.md": b"---\nlicense: mit\n---\n"}
    registry.commit("ana/proto", files, (), message="first\n\nmore", parent=None)
    registry.create("ana/veiled", private=True)
    registry.commit("ana/veiled", {"f.txt": b"hidden"}, (), message="m", parent=None)
    return "ana/proto"


def test_resolve_tells_commit_digest_and_size(hub_server: HubServer, repo: str) -> None:
    commit = DirectoryRegistry(hub_server.root).resolve(repo)
    for method in ("HEAD", "GET"):
        large = ask(hub_server, method, f"/{repo}/resolve/main/w.safetensors", user=None)
        assert large.status == 200
        assert large.headers["X-Repo-Commit"] == commit
        assert large.headers["ETag"] == large.headers["X-Linked-Etag"] == f'"{hashlib.sha256(BIG).hexdigest()}"'
        assert large.headers["X-Linked-Size"] == large.headers["Content-Length"] == str(len(BIG))
        assert large.headers["Accept-Ranges"] == "bytes"
        assert large.body == (BIG if method == "GET" else b"")
    small = ask(hub_server, "GET", f"/{repo}/resolve/{commit}/" + quote("sub/ü & b.json"))
    assert small.body == b'{"a": 1}'
    assert small.headers["ETag"] == f'"{hashlib.sha1(b"blob 8" + bytes(1) + small.body).hexdigest()}"'
    assert small.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        *[("0-0", 0, 1), ("5-9", 5, 10), ("100-99999", 100, 12800), ("0-", 0, 12800)],
        *[("12799-", 12799, 12800), ("-3", 12797, 12800), ("-99999", 0, 12800)],
    ],
)
def test_ranges(hub_server: HubServer, repo: str, wanted: str, start: int, stop: int) -> None:
    answer = ask(hub_server, "GET", f"/{repo}/resolve/main/w.safetensors", Range=f"bytes={wanted}")
    assert answer.status == 206
    assert answer.body == BIG[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/12800"
    assert answer.headers["Content-Length"] == str(stop - start)


@pytest.mark.parametrize("wanted", ["bytes=12800-", "bytes=99999-100000", "bytes=-0"])
def test_ranges_beyond_the_end(hub_server: HubServer, repo: str, wanted: str) -> None:
    answer = ask(hub_server, "GET", f"/{repo}/resolve/main/w.safetensors", Range=wanted)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == "bytes */12800"


@pytest.mark.parametrize("wanted", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,5-6", "bytes=a-b"])
def test_ranges_that_mean_nothing_give_the_whole(hub_server: HubServer, repo: str, wanted: str) -> None:
    answer = ask(hub_server, "GET", f"/{repo}/resolve/main/w.safetensors", Range=wanted)
    assert (answer.status, answer.body) == (200, BIG)


def test_what_is_missing_is_named(hub_server: HubServer, repo: str) -> None:
    commit = DirectoryRegistry(hub_server.root).resolve(repo)
    entry = ask(hub_server, "HEAD", f"/{repo}/resolve/main/none.json")
    assert (entry.status, entry.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert entry.headers["X-Repo-Commit"] == commit
    revision = ask(hub_server, "GET", f"/api/models/{repo}/revision/nope")
    assert (revision.status, revision.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    for path in ("/api/models/ana/none", "/api/models/gpt2", "/gpt2/resolve/main/config.json", "/api/datasets/a/b"):
        missing = ask(hub_server, "GET", path)
        assert (missing.status, missing.headers["X-Error-Code"]) == (404, "RepoNotFound"), path


def test_private_and_absent_look_the_same(hub_server: HubServer, repo: str) -> None:
    paths = "/api/models/{}", "/{}/resolve/main/f.txt", "/api/models/{}/refs", "/api/models/{}/tree/main"
    for path in paths:
        for user, status in ((None, 401), ("bob", 404)):
            hidden = ask(hub_server, "GET", path.format("ana/veiled"), user=user)
            absent = ask(hub_server, "GET", path.format("ana/absent"), user=user)
            assert hidden.status == absent.status == status
            assert hidden.body == absent.body
            assert hidden.headers["X-Error-Code"] == absent.headers["X-Error-Code"] == "RepoNotFound"
        for user in ("ana", "ana:read", "root:admin"):
            assert ask(hub_server, "GET", path.format("ana/veiled"), user=user).status == 200
    names = {row["id"] for row in ask(hub_server, "GET", "/api/models?author=ana", user="bob").json}
    assert "ana/veiled" not in names
    assert repo in names
    assert "ana/veiled" in {row["id"] for row in ask(hub_server, "GET", "/api/models?author=ana").json}


WRITES = [
    ("POST", "/api/repos/create", {"name": "x", "organization": "ana"}),
    ("DELETE", "/api/repos/delete", {"name": "proto", "organization": "ana"}),
    ("POST", "/api/repos/move", {"fromRepo": "ana/proto", "toRepo": "ana/other"}),
    ("PUT", "/api/models/ana/proto/settings", {"visibility": "private"}),
    ("POST", "/api/models/ana/proto/tag/main", {"tag": "v1"}),
    ("POST", "/api/models/ana/proto/branch/b", {}),
    ("POST", "/api/models/ana/proto/preupload/main", {"files": []}),
    ("POST", "/api/models/ana/proto/super-squash/main", {}),
    ("POST", "/api/models/ana/proto/commit/main", {"key": "header", "value": {"summary": "s"}}),
    ("GET", "/api/models/ana/proto/xet-write-token/main", None),
    ("POST", "/ana/proto.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}),
]


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_writes_need_a_writer_of_the_namespace(
    hub_server: HubServer, repo: str, method: str, path: str, body: dict[str, object] | None
) -> None:
    assert ask(hub_server, method, path, body, user=None).status == 401
    assert ask(hub_server, method, path, body, user="bob").status == 403
    assert ask(hub_server, method, path, body, user="ana:read").status == 403
    unknown = ask(hub_server, method, path, body, user="stranger")
    assert (unknown.status, unknown.headers["X-Error-Message"]) == (401, "Invalid credentials in Authorization header")


def test_move_into_a_foreign_namespace_is_refused(hub_server: HubServer, repo: str) -> None:
    body = {"fromRepo": repo, "toRepo": "bob/taken"}
    assert ask(hub_server, "POST", "/api/repos/move", body).status == 403


@pytest.mark.parametrize(
    "path",
    [
        "/ana/proto/resolve/main/../../../../registry.json",
        "/ana/proto/resolve/main/%2e%2e/%2e%2e/refs.json",
        "/../../etc/passwd",
        "/ana/..%2f..%2fx/resolve/main/f",
        "/ana/proto/resolve/..%2f..%2frefs.json/x",
        "/ana/proto/resolve/main/",
        "/ana/proto/resolve/main/sub",
        "/ana/proto",
        "/repos/ana/proto/refs.json",
        "/ana/proto/resolve/main/%00",
        "/ana/proto/resolve/main/%ff",
        "/ana%00/proto/resolve/main/README.md",
    ],
)
def test_nothing_but_files_of_commits_is_served(hub_server: HubServer, repo: str, path: str) -> None:
    answer = ask(hub_server, "GET", path)
    assert answer.status in (400, 404)
    assert b"branches" not in answer.body
    assert b"hubkit/registry" not in answer.body


def test_a_slash_in_a_revision_is_part_of_it(hub_server: HubServer, repo: str) -> None:
    assert ask(hub_server, "POST", f"/api/models/{repo}/branch/try%2Fx", {}).status == 200
    assert ask(hub_server, "GET", f"/api/models/{repo}/revision/try%2Fx").status == 200
    assert ask(hub_server, "GET", f"/{repo}/resolve/try%2Fx/README.md").status == 200
    assert ask(hub_server, "POST", f"/api/models/{repo}/branch/try%2Fx", {}).status == 409
    assert ask(hub_server, "DELETE", f"/api/models/{repo}/branch/try%2Fx").status == 200
    assert ask(hub_server, "DELETE", f"/api/models/{repo}/branch/try%2Fx").status == 404


def commit(server: HubServer, repo: str, *items: tuple[str, Mapping[str, object]], user: str = "ana") -> Answer:
    return ask(server, "POST", f"/api/models/{repo}/commit/main", lines(*items), user=user)


def test_commits_apply_in_order_or_not_at_all(hub_server: HubServer) -> None:
    repo = "ana/order"
    assert ask(hub_server, "POST", "/api/repos/create", {"name": "order", "organization": None}).status == 200
    first = commit(hub_server, repo, HEADER, file_line("d/a", b"1"), file_line("d/b", b"2"), file_line("k", b"3"))
    assert first.status == 200
    second = commit(hub_server, repo, HEADER, ("deletedFolder", {"path": "d/"}), file_line("d/c", b"4"))
    assert [r["path"] for r in ask(hub_server, "GET", f"/api/models/{repo}/tree/main?recursive=true").json] == [
        "d",
        "d/c",
        "k",
    ]
    bad = commit(hub_server, repo, HEADER, file_line("new", b"5"), ("deletedFile", {"path": "absent"}))
    assert (bad.status, bad.headers["X-Error-Code"]) == (404, "EntryNotFound")
    stale = ("header", {"summary": "s", "parentCommit": first.json["commitOid"]})
    answer = commit(hub_server, repo, stale, file_line("new", b"5"))
    assert answer.status == 412
    assert answer.json["error"] == "A commit has happened since. Please refresh and try again."
    log = ask(hub_server, "GET", f"/api/models/{repo}/commits/main").json
    assert [row["id"] for row in log[:2]] == [second.json["commitOid"], first.json["commitOid"]]
    assert (log[0]["title"], log[0]["message"], log[0]["authors"]) == ("s", "d", [{"user": "ana"}])


@pytest.mark.parametrize(
    "item",
    [
        file_line("../evil", b"x"),
        file_line("con.txt", b"x"),
        file_line("a\u202eb", b"x"),
        ("lfsFile", {"path": "a", "algo": "sha256", "oid": "0" * 64, "size": 3}),
        ("lfsFile", {"path": "a", "algo": "sha256", "oid": "../../refs.json", "size": 3}),
        ("file", {"path": "a", "content": "not base64!", "encoding": "base64"}),
        ("file", {"path": 5, "content": ""}),
        ("mystery", {"path": "a"}),
        ("header", {"summary": "s", "parentCommit": "main"}),
    ],
)
def test_bad_operations_are_refused_whole(
    hub_server: HubServer, repo: str, item: tuple[str, dict[str, object]]
) -> None:
    before = DirectoryRegistry(hub_server.root).resolve(repo)
    assert commit(hub_server, repo, HEADER, file_line("fine", b"x"), item).status == 400
    assert ask(hub_server, "POST", f"/api/models/{repo}/commit/main", b"{not json\n").status == 400
    assert DirectoryRegistry(hub_server.root).resolve(repo) == before


def test_preupload_decides_and_tells_what_is_there(hub_server: HubServer, repo: str) -> None:
    def item(path: str, size: int, sample: bytes) -> dict[str, object]:
        return {"path": path, "size": size, "sample": base64.b64encode(sample).decode()}

    files = [
        item("w.safetensors", len(BIG), BIG[:512]),
        item("README.md", 5, b"hello"),
        item("big.txt", 20_000_000, b"hello"),
        item("raw", 9, b"\0\1"),
        item("drop.me", 3, b"abc"),
    ]
    body = {"files": files, "gitIgnore": "*.me\n"}
    rows = {r["path"]: r for r in ask(hub_server, "POST", f"/api/models/{repo}/preupload/main", body).json["files"]}
    modes = {path: row["uploadMode"] for path, row in rows.items()}
    assert modes == {
        "w.safetensors": "lfs",
        "README.md": "regular",
        "big.txt": "lfs",
        "raw": "lfs",
        "drop.me": "regular",
    }
    assert [p for p, row in rows.items() if row["shouldIgnore"]] == ["drop.me"]
    assert rows["w.safetensors"]["oid"] == hashlib.sha256(BIG).hexdigest()
    entry = DirectoryRegistry(hub_server.root).tree(repo, DirectoryRegistry(hub_server.root).resolve(repo))["README.md"]
    assert rows["README.md"]["oid"] == entry.oid
    assert "oid" not in rows["raw"]


def offer(server: HubServer, repo: str, data: bytes, size: int | None = None) -> Any:
    oid = hashlib.sha256(data).hexdigest()
    body = {
        "operation": "upload",
        "transfers": ["basic", "multipart", "xet"],
        "objects": [{"oid": oid, "size": len(data) if size is None else size}],
        "hash_algo": "sha256",
    }
    answer = ask(server, "POST", f"/{repo}.git/info/lfs/objects/batch", body)
    assert answer.status == 200
    assert answer.json["transfer"] == "basic"
    return answer.json["objects"][0]


def path_of(href: str) -> str:
    parts = urlsplit(href)
    return f"{parts.path}?{parts.query}"


def test_large_objects_are_verified_and_stored_once(hub_server: HubServer, repo: str) -> None:
    data = b"large object" * 1000
    offered = offer(hub_server, repo, data)
    href = path_of(offered["actions"]["upload"]["href"])
    wrong = ask(hub_server, "PUT", href, data[:-1] + b"!", user=None)
    assert wrong.status == 400
    assert ask(hub_server, "PUT", href, data[:-1], user=None).status == 400
    assert ask(hub_server, "PUT", href, data + b"!", user=None).status == 413
    assert ask(hub_server, "PUT", href.replace("size=", "size=1"), data, user=None).status == 403
    assert ask(hub_server, "PUT", href.replace("ana/proto", "ana/order"), data, user=None).status == 403
    verify = {"oid": offered["oid"], "size": len(data)}
    assert ask(hub_server, "POST", f"/{repo}.git/info/lfs/verify", verify).status == 404
    assert ask(hub_server, "PUT", href, data, user=None).status == 200
    assert ask(hub_server, "POST", f"/{repo}.git/info/lfs/verify", verify).status == 200
    assert "actions" not in offer(hub_server, repo, data)
    assert "error" in offer(hub_server, repo, data, size=5)
    pointer = ("lfsFile", {"path": "l.bin", "algo": "sha256", **verify})
    assert commit(hub_server, repo, HEADER, pointer).status == 200
    assert ask(hub_server, "GET", f"/{repo}/resolve/main/l.bin").body == data


def test_two_paths_of_one_content_are_one_upload(hub_server: HubServer, repo: str) -> None:
    item = {"oid": hashlib.sha256(b"twice\0").hexdigest(), "size": 6}
    body = {"operation": "upload", "transfers": ["basic"], "objects": [item, item], "hash_algo": "sha256"}
    answer = ask(hub_server, "POST", f"/{repo}.git/info/lfs/objects/batch", body)
    assert [row["oid"] for row in answer.json["objects"]] == [item["oid"]]


def test_a_digest_of_another_repository_gives_nothing(hub_server: HubServer, repo: str) -> None:
    secret = hashlib.sha256(b"hidden").hexdigest()
    assert ask(hub_server, "POST", "/api/repos/create", {"name": "thief"}, user="bob").status == 200
    pointer = ("lfsFile", {"path": "f", "algo": "sha256", "oid": secret, "size": 6})
    assert commit(hub_server, "bob/thief", HEADER, pointer, user="bob").status == 400


def test_listing_pages_and_paths(hub_server: HubServer) -> None:
    registry = DirectoryRegistry(hub_server.root)
    registry.create("ana/many")
    files: dict[str, Any] = {f"d{n % 3}/f {n:04}.txt": b"x" for n in range(1100)}
    registry.commit("ana/many", files, (), message="m", parent=None)
    path, seen = "/api/models/ana/many/tree/main?recursive=true", []
    while path:
        page = ask(hub_server, "GET", path)
        seen += [row["path"] for row in page.json if row["type"] == "file"]
        link = page.headers["Link"] or ""
        path = path_of(link[1:].split(">")[0]) if link else ""
    assert seen == sorted(files)
    assert {r["type"] for r in ask(hub_server, "GET", "/api/models/ana/many/tree/main/").json} == {"directory"}
    below = ask(hub_server, "GET", "/api/models/ana/many/tree/main/d1").json
    assert len(below) == len([f for f in files if f.startswith("d1/")])
    assert ask(hub_server, "GET", "/api/models/ana/many/tree/main/d9").headers["X-Error-Code"] == "EntryNotFound"
    form = "paths=" + quote("d1/f 0001.txt") + "&paths=none&paths=d2&expand=True"
    for body, kind in (
        (form.encode(), "application/x-www-form-urlencoded"),
        (json.dumps({"paths": ["d1/f 0001.txt", "none", "d2"], "expand": True}).encode(), "application/json"),
    ):
        rows = ask(hub_server, "POST", "/api/models/ana/many/paths-info/main", body, Content_Type=kind).json
        assert [(r["path"], r["type"]) for r in rows] == [("d1/f 0001.txt", "file"), ("d2", "directory")]
        assert rows[0]["lastCommit"]["title"] == "m"


def test_models_are_found_by_author_words_and_tags(hub_server: HubServer) -> None:
    registry = DirectoryRegistry(hub_server.root)
    card = b"---\nlibrary_name: peft\nbase_model: meta/llama\ntags: [hubkit]\nlicense: mit\n---\n"
    registry.create("zoe/find-me")
    registry.commit("zoe/find-me", {"README.md": card, "adapter_config.json": b"{}"}, (), message="m", parent=None)
    registry.create("zoe/other")

    def found(query: str) -> list[str]:
        return [row["id"] for row in ask(hub_server, "GET", f"/api/models?{query}").json]

    assert found("author=zoe") == ["zoe/find-me", "zoe/other"]
    assert found("search=FIND") == ["zoe/find-me"]
    assert found("filter=base_model:adapter:meta/llama") == found("filter=hubkit&filter=peft") == ["zoe/find-me"]
    assert found("author=zoe&filter=gguf") == []
    page = ask(hub_server, "GET", "/api/models?author=zoe&limit=1")
    assert [r["id"] for r in page.json] == ["zoe/find-me"]
    assert 'rel="next"' in page.headers["Link"]
    expanded = ask(hub_server, "GET", "/api/models/zoe/find-me?expand=sha&expand=tags").json
    assert set(expanded) == {"_id", "id", "modelId", "sha", "tags"}


@pytest.mark.parametrize(
    ("front", "status"),
    [("license: mit", 200), ("a: [", 400), ("a: &x [1]\nb: *x", 400), ("- list", 400), ("", 200)],
)
def test_cards_are_validated(hub_server: HubServer, front: str, status: int) -> None:
    body = {"content": f"---\n{front}\n---\n# Title", "repoType": "model"}
    answer = ask(hub_server, "POST", "/api/validate-yaml", body)
    assert answer.status == status
    assert set(answer.json) == {"errors", "warnings"}


def test_bodies_are_limited_and_must_be_json(hub_server: HubServer) -> None:
    assert ask(hub_server, "POST", "/api/repos/create", b"[]").status == 400
    assert ask(hub_server, "POST", "/api/repos/create", b"{" * 100_000).status == 400
    assert ask(hub_server, "POST", "/api/repos/create", {"name": "../x"}).status == 403
    assert ask(hub_server, "POST", "/api/repos/create", {"name": "a--b"}).status == 400
    assert ask(hub_server, "POST", "/api/repos/create", {"name": "x", "type": "dataset"}).status == 400


def test_browsers_of_other_sites_are_kept_out(open_server: HubServer) -> None:
    body = {"name": "web", "organization": "ana"}
    assert ask(open_server, "POST", "/api/repos/create", body, user=None, Origin="https://evil.example").status == 403
    assert ask(open_server, "GET", "/api/models", user=None, Host="evil.example:80").status == 403
    assert ask(open_server, "POST", "/api/repos/create", body, user=None).status == 200


def test_an_open_server_takes_any_token(open_server: HubServer) -> None:
    assert ask(open_server, "GET", "/api/whoami-v2", user="whatever").json["name"] == "local"
    assert ask(open_server, "POST", "/api/repos/create", {"name": "mine"}, user="whatever").status == 200


def test_races_over_http(hub_server: HubServer) -> None:
    registry = DirectoryRegistry(hub_server.root)
    registry.create("ana/race")
    parent = registry.resolve("ana/race")
    statuses: list[int] = []

    def work(n: int) -> None:
        header = ("header", {"summary": "s", "parentCommit": parent})
        statuses.append(commit(hub_server, "ana/race", header, file_line("f", str(n).encode())).status)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, *[412] * 5]
