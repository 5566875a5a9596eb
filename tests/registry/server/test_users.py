"""A server for a team: who may do what by the file of users, and what is hidden from whom on every route there is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from making import make_adapter
from registry.conftest import HubServer
from registry.server.test_protocol import Answer, ask

import hubkit
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.server import build_app
from hubkit.registry.server.users import read_users, right_of

RIGHTS = {
    "ana": ["ana:admin", "acme:write"],
    "bob": ["acme:read"],
    "cy": ["acme/exp-*:write", "lab:admin"],
    "eve": ["eve:admin"],
    "boss": ["*:admin"],
}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A server with a file of users, which tests may edit, and a private repository of acme's."""
    folder = tmp_path_factory.mktemp("team")
    users = folder / "users.toml"
    tokens = {name: hubkit.users(users, add=name, rights=rights).token or "" for name, rights in RIGHTS.items()}
    registry = DirectoryRegistry(folder / "registry")
    for repo, private in (("acme/open", False), ("acme/secret", True), ("acme/exp-1", True), ("lab/gone", True)):
        registry.create(repo, private=private)
        registry.commit(repo, {"f.txt": b"hidden", "d/w.safetensors": bytes(2000)}, (), message="m", parent=None)
    registry.move("lab/gone", "lab/here")
    with serving(folder / "registry", "--users", users) as (url, process):
        yield HubServer(url, folder / "registry", tokens, process)


class serving:
    """``hubkit serve`` as a process of its own, for a ``with``: its address and the process."""

    def __init__(self, root: Path, *options: object) -> None:
        root.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "hubkit", "serve", str(root), "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> tuple[str, subprocess.Popen[str]]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving "), line + (self.process.stderr.read() if self.process.stderr else "")
        return line.split()[-1], self.process

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(HubkitError) as caught:
        action()
    return caught.value.code


# rights


def test_the_levels_of_a_right() -> None:
    cy = next(one for one in _known(RIGHTS).users if one.user == "cy")
    may = {
        (level, repo): cy.may(level, repo)
        for level in ("read", "write", "admin")
        for repo in ("acme/exp-1", "acme/exp", "acme/open", "lab/x", "labs/x")
    }
    assert [key for key, value in may.items() if value] == [
        *[("read", "acme/exp-1"), ("read", "lab/x"), ("write", "acme/exp-1"), ("write", "lab/x"), ("admin", "lab/x")]
    ]
    assert not cy.sees_all
    assert _known({"a": ["*:read"]}).users[0].sees_all


def _known(rights: dict[str, list[str]]) -> Any:
    from hubkit.registry.server.users import _known

    users = {
        name: {"token": f"sha256:{number:064x}", "rights": own} for number, (name, own) in enumerate(rights.items())
    }
    return _known({"users": users}, Path("users.toml"))


@pytest.mark.parametrize("text", ["", "acme", ":read", "acme:", "acme:wrte", "a/b/c:read", "ac me:read", "a[b]:read"])
def test_what_is_no_right(text: str) -> None:
    with pytest.raises(ValueError, match="no right"):
        right_of(text)


def test_a_user_is_added_renewed_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "users.toml"
    first = hubkit.users(path, add="ana")
    assert first.token is not None
    assert len(first.token) >= 43
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.token not in path.read_text(), "only its digest is kept"
    path.write_text(path.read_text().replace("[users.ana]", "# our first\n[users.ana]"))
    hubkit.users(path, add="bob", rights=["acme:write", "*:read"])
    second = hubkit.users(path, renew="ana")
    assert second.token not in (None, first.token)
    assert "# our first" in path.read_text(), "comments stay"
    assert [(one.name, one.rights) for one in second.users] == [
        ("ana", ("ana:admin",)),
        ("bob", ("acme:write", "*:read")),
    ]
    assert [one.name for one in hubkit.users(path, remove="ana").users] == ["bob"]
    assert code_of(lambda: hubkit.users(path, add="bob")) == "HK-EXISTS"
    assert code_of(lambda: hubkit.users(path, remove="bo")) == "HK-NOT-FOUND"
    assert code_of(lambda: hubkit.users(path, add="x/y")) == "HK-NAME"
    assert code_of(lambda: hubkit.users(path, add="cy", rights=["acme:all"])) == "HK-OPTIONS"
    assert code_of(lambda: hubkit.users(path, add="cy", remove="bob")) == "HK-OPTIONS"
    assert code_of(lambda: hubkit.users(tmp_path / "none.toml")) == "HK-OPTION"
    assert [one.name for one in hubkit.users(path).users] == ["bob"], "nothing has changed"


def test_a_file_in_json(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    token = hubkit.users(path, add="ana").token
    assert json.loads(path.read_text())["users"]["ana"]["rights"] == ["ana:admin"]
    assert token is not None
    assert token not in path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "not toml [",
        "anonymous = true",
        "users = 5",
        "[user.ana]\n",
        '[users.ana]\ntoken = "hf_thetokenitself"\nrights = ["*:read"]',
        f'[users.ana]\ntoken = "sha256:{"0" * 64}"\nrights = ["*:wirte"]',
        f'[users.ana]\ntoken = "sha256:{"0" * 64}"\n',
        f'[users.ana]\ntoken = "sha256:{"0" * 64}"\nrights = ["*:read"]\nrole = "admin"',
        f'[users."a/b"]\ntoken = "sha256:{"0" * 64}"\nrights = ["*:read"]',
        "".join(f'[users.{n}]\ntoken = "sha256:{"0" * 64}"\nrights = ["*:read"]\n' for n in "ab"),
        '[quotas]\nacme = "much"',
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "users.toml"
    path.write_text(text)
    path.chmod(0o600)
    assert code_of(lambda: read_users(path)) == "HK-OPTION"


def test_a_file_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "users.toml"
    hubkit.users(path, add="ana")
    path.chmod(0o644)
    assert code_of(lambda: read_users(path)) == "HK-OPTION"


# a server that runs


def status(server: HubServer, method: str, path: str, user: str | None, body: Any = None) -> int:
    return ask(server, method, path, body, user=user).status


def test_who_may_do_what(team: HubServer) -> None:
    me = ask(team, "GET", "/api/whoami-v2", user="ana").json
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("ana", "write")
    assert [(one["name"], one["roleInOrg"]) for one in me["orgs"]] == [("acme", "write")]
    assert ask(team, "GET", "/api/whoami-v2", user="bob").json["auth"]["accessToken"]["role"] == "read"
    assert status(team, "GET", "/api/whoami-v2", "made-up") == 401
    tag = "/api/models/acme/secret/tag/main"
    assert [status(team, "POST", tag, user, {"tag": "v1"}) for user in (None, "eve", "cy", "bob", "ana")] == [
        *[401, 404, 404, 403, 200]
    ]
    assert status(team, "DELETE", "/api/models/acme/secret/tag/v1", "bob") == 403
    settings = "/api/models/acme/secret/settings"
    assert [status(team, "PUT", settings, user, {"private": True}) for user in ("eve", "bob", "ana", "boss")] == [
        *[404, 403, 403, 200]
    ]
    create = {"name": "exp-2", "organization": "acme", "private": True}
    assert [status(team, "POST", "/api/repos/create", user, create) for user in (None, "eve", "bob", "cy")] == [
        *[401, 403, 403, 200]
    ]
    delete = {"name": "exp-2", "organization": "acme"}
    assert [status(team, "DELETE", "/api/repos/delete", user, delete) for user in (None, "eve", "cy", "boss")] == [
        *[401, 404, 403, 200]
    ]


def test_what_the_client_is_told(team: HubServer) -> None:
    """hubkit's own client: a token that is unknown, one that may only read, a repository that is hidden."""

    def told(user: str, repo: str) -> str:
        registry = HuggingFaceRegistry(team.url, token=team.tokens.get(user, user))
        return code_of(lambda: registry.commit(repo, {"x.txt": b"x"}, (), message="m", parent=None))

    assert told("made-up", "acme/secret") == "HK-AUTH"
    assert told("bob", "acme/secret") == "HK-FORBIDDEN"
    assert told("eve", "acme/secret") == "HK-NOT-FOUND"


def test_the_command(tmp_path: Path) -> None:
    def say(*arguments: str) -> str:
        command = [sys.executable, "-m", "hubkit", "users", str(tmp_path / "users.toml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    token = say("--add", "ana", "--right", "acme:write").strip()
    assert len(token.split()) == 1, "so that a script can take it as it is"
    assert say() == "ana  acme:write\nwithout a token: what is public\n"
    assert json.loads(say("--json"))["users"] == [{"name": "ana", "rights": ["acme:write"], "tokens": 1}]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    users = tmp_path / "users.toml"
    hubkit.users(users, add="ana")
    (tmp_path / "tokens.json").write_text("{}")
    root = tmp_path / "registry"
    root.mkdir()
    assert code_of(lambda: hubkit.serve(root, users=users, tokens=tmp_path / "tokens.json")) == "HK-OPTIONS"
    assert code_of(lambda: hubkit.serve(root, gc=True, check=True)) == "HK-OPTIONS"
    assert code_of(lambda: hubkit.serve(root, quota="much")) == "HK-OPTIONS"
    assert code_of(lambda: hubkit.serve(root, users=tmp_path / "none.toml")) == "HK-OPTION"
    assert code_of(lambda: hubkit.serve(root, audit=tmp_path / "none" / "log")) == "HK-IO"
    assert code_of(lambda: hubkit.serve(root, host="0.0.0.0")) == "HK-OPEN-SERVER"


# privacy: every route


def walk() -> list[tuple[str, str]]:
    """(method, path with ``{...}``) of every route that the application has."""
    found = []
    for route in build_app(Path("unused")).routes:
        for method in sorted(getattr(route, "methods", None) or ()):
            found.append((method, str(getattr(route, "path"))))  # noqa: B009
    return found


NOT_OF_A_REPOSITORY = ("/", "/healthz", "/metrics", "/api/agent-harnesses", "/api/whoami-v2", "/api/validate-yaml")
SIGNED = "/xet/"
"""Addresses that hold a name nobody can guess."""
BODIES: dict[str, dict[str, object]] = {
    "/api/repos/create": {"organization": "acme", "name": "{name}", "private": True},
    "/api/repos/delete": {"organization": "acme", "name": "{name}"},
    "/api/repos/move": {"fromRepo": "acme/{name}", "toRepo": "eve/{name}"},
    "paths-info": {"paths": ["f.txt"]},
    "tag": {"tag": "v9"},
    "preupload": {"files": [{"path": "x", "size": 1, "sample": ""}]},
    "batch": {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 1}], "transfers": ["basic"]},
    "verify": {"oid": "0" * 64, "size": 1},
}


def shot(server: HubServer, method: str, path: str, name: str, user: str | None, refs: str = "main") -> Answer:
    """One request of a route about ``acme/<name>``."""
    filled = path.replace("{org}", "acme").replace("{name}", name).replace("{rev}", refs)
    filled = filled.replace("{path:path}", "f.txt").replace("{oid}", "0" * 64)
    body = next((value for key, value in BODIES.items() if key in path), {})
    if method in ("GET", "HEAD"):
        return ask(server, method, filled, user=user)
    return ask(server, method, filled, json.loads(json.dumps(body).replace("{name}", name)), user=user)


@pytest.mark.parametrize("user", [None, "eve"])
def test_no_route_tells_of_a_private_repository(team: HubServer, user: str | None) -> None:
    """What is private and what is not there get the same answer, to the byte, from every route of the application."""
    seen = 0
    for method, path in walk():
        if path in NOT_OF_A_REPOSITORY or path.startswith(SIGNED) or ("{" not in path and "/repos/" not in path):
            continue
        hidden, absent = (shot(team, method, path, name, user) for name in ("secret", "secre1"))
        assert hidden.status == absent.status in (401, 403, 404), (method, path, hidden.status, absent.status)
        assert hidden.body.replace(b"secret", b"secre1") == absent.body, (method, path)
        for key in ("X-Error-Code", "X-Error-Message", "X-Repo-Commit", "ETag", "Location", "Content-Length"):
            assert (hidden.headers[key] or "").replace("secret", "secre1") == (absent.headers[key] or ""), (
                method,
                path,
            )
        seen += 1
    assert seen >= 20
    listed = ask(team, "GET", "/api/models?full=true", user=user)
    assert {row["id"] for row in listed.json} == {"acme/open"}
    assert b"secret" not in listed.body
    old = ask(team, "GET", "/api/models/lab/gone", user=user)
    assert old.status in (401, 404), "where a private repository moved to is hidden, too"


def test_those_who_may_read_it_see_it(team: HubServer) -> None:
    for user in ("ana", "bob", "boss"):
        assert status(team, "GET", "/api/models/acme/secret/tree/main", user) == 200
        assert ask(team, "GET", "/acme/secret/resolve/main/f.txt", user=user).body == b"hidden"
        assert "acme/secret" in {row["id"] for row in ask(team, "GET", "/api/models", user=user).json}
    assert {row["id"] for row in ask(team, "GET", "/api/models", user="cy").json} == {
        *("acme/open", "acme/exp-1", "lab/here")
    }


# the file changes while the server runs


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_the_file_is_read_again_and_a_damaged_one_changes_nothing(tmp_path: Path) -> None:
    users = tmp_path / "users.toml"
    token = hubkit.users(users, add="ana").token or ""
    DirectoryRegistry(tmp_path / "registry").create("ana/veiled", private=True)
    with serving(tmp_path / "registry", "--users", users) as (url, process):
        server = HubServer(url, tmp_path / "registry", {"ana": token}, process)
        path = "/api/models/ana/veiled"
        assert status(server, "GET", path, "ana") == 200
        newcomer = hubkit.users(users, add="dan", rights=["*:read"]).token or ""
        assert status(server, "GET", path, newcomer) == 200, "without a restart"
        good = users.read_text()
        users.write_text(good[: len(good) // 2] + "[[[")
        assert [status(server, "GET", path, one) for one in ("ana", newcomer, "made-up")] == [200, 200, 401]
        users.write_text(good)
        users.chmod(0o644)
        assert [status(server, "GET", path, one) for one in ("ana", newcomer)] == [200, 200]
        users.chmod(0o600)
        hubkit.users(users, remove="dan")
        assert [status(server, "GET", path, one) for one in ("ana", newcomer)] == [200, 401]
        os.unlink(users)
        assert status(server, "GET", path, "ana") == 200
        hubkit.users(users, add="eve")
        assert status(server, "GET", path, "ana") == 401
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
        assert "counts on" in said
        assert "can read the tokens" in said
        assert token not in said


def test_without_a_token_nothing(tmp_path: Path) -> None:
    users = tmp_path / "users.toml"
    token = hubkit.users(users, add="ana").token or ""
    users.write_text(users.read_text().replace('anonymous = "read"', 'anonymous = "none"'))
    DirectoryRegistry(tmp_path / "registry").create("acme/open")
    with serving(tmp_path / "registry", "--users", users) as (url, process):
        server = HubServer(url, tmp_path / "registry", {"ana": token}, process)
        for method, path in walk():
            if path in ("/", "/api/agent-harnesses", "/healthz"):
                continue
            answer = shot(server, method, path, "open", None)
            signed = path.startswith(SIGNED) or path.endswith("/objects/{oid}")
            assert answer.status in ((401, 403) if signed else (401,)), (method, path)
        assert status(server, "GET", "/api/models/acme/open", "ana") == 200


def test_an_upload_address_of_somebody_who_is_gone(tmp_path: Path) -> None:
    users = tmp_path / "users.toml"
    token = hubkit.users(users, add="ana").token or ""
    DirectoryRegistry(tmp_path / "registry").create("ana/a")
    with serving(tmp_path / "registry", "--users", users) as (url, process):
        server = HubServer(url, tmp_path / "registry", {"ana": token}, process)
        data = b"data"
        row = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        body = {"operation": "upload", "objects": [row], "transfers": ["basic"]}
        offered = ask(server, "POST", "/ana/a.git/info/lfs/objects/batch", body).json
        address = urlsplit(offered["objects"][0]["actions"]["upload"]["href"])
        path = f"{address.path}?{address.query}"
        assert ask(server, "PUT", path.replace("user=ana", "user=bob"), data, user=None).status == 403
        hubkit.users(users, remove="ana")
        assert ask(server, "PUT", path, data, user=None).status == 403
        hubkit.users(users, add="ana")
        assert ask(server, "PUT", path, data, user=None).status == 200


HF = str(Path(sys.executable).with_name("hf"))


def test_hf_logs_in(team: HubServer, tmp_path: Path) -> None:
    environment = team.environment(tmp_path / "home", None)

    def hf(*arguments: str) -> str:
        done = subprocess.run([HF, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    hf("auth", "login", "--token", team.tokens["ana"])
    assert {"ana", "acme"} <= set(re.findall(r"\w+", hf("auth", "whoami")))


# read-only


def test_a_read_only_server_refuses_every_write(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path / "registry")
    registry.create("acme/open")
    commit = registry.commit("acme/open", {"f.txt": b"text"}, (), message="m", parent=None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "registry").rglob("*")}
    with serving(tmp_path / "registry", "--read-only") as (url, process):
        server = HubServer(url, tmp_path / "registry", {}, process)
        reads = 0
        for method, path in walk():
            answer = shot(server, method, path, "open", None)
            harmless = path == "/api/validate-yaml" or "paths-info" in path
            if (method in ("GET", "HEAD") and "write-token" not in path) or harmless:
                reads += answer.status == 200
                assert answer.status != 403 or path.startswith(SIGNED), (method, path)
            else:
                assert answer.status == 403, (method, path)
                assert "read-only" in answer.headers["X-Error-Message"]
        assert reads > 8
        assert ask(server, "GET", "/healthz").json == {"status": "ok", "read_only": True}
        assert ask(server, "GET", "/acme/open/resolve/main/f.txt").body == b"text"
        own = HuggingFaceRegistry(url, token="")
        assert code_of(lambda: own.commit("acme/open", {"x": b"x"}, (), message="m", parent=None)) == "HK-FORBIDDEN"
        command = [HF, "upload", "acme/open", __file__, "x.py"]
        environment = server.environment(tmp_path / "home") | {"HF_TOKEN": "any"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "This server is read-only at the moment" in " ".join((done.stdout + done.stderr).split())
    assert registry.resolve("acme/open") == commit
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "registry").rglob("*")} == before


@pytest.mark.slow
def test_a_team_with_hubkit(tiny_llama: Path, tmp_path: Path) -> None:
    """One publishes in private, one may read it, one may not know of it, and the room runs out."""
    users, log = tmp_path / "users.toml", tmp_path / "audit.jsonl"
    rights = {"ana": ["acme:admin"], "bob": ["acme:read"], "eve": ["eve:admin"]}
    tokens = {name: hubkit.users(users, add=name, rights=own).token or "" for name, own in rights.items()}
    users.write_text(users.read_text() + '\n[quotas]\nacme = "40kB"\n')
    make_adapter(tmp_path / "chat", tiny_llama)

    with serving(tmp_path / "registry", "--users", users, "--audit", log) as (url, _):

        def say(user: str, *arguments: str) -> str:
            """What is printed; the code of the refusal, where it is one."""
            kept = {key: value for key, value in os.environ.items() if not key.startswith("HUBKIT_")}
            mine = {"HUBKIT_REGISTRY": url, "HUBKIT_HOME": str(tmp_path / user), "HUBKIT_TOKEN": tokens[user]}
            command = [sys.executable, "-m", "hubkit", *arguments]
            done = subprocess.run(command, env={**kept, **mine}, capture_output=True, text=True, cwd=tmp_path)
            found = re.search(r"error\[([\w-]+)\]", done.stderr)
            return found[1] if found else done.stdout

        assert say("ana", "push", "./chat", "acme/chat", "--private").startswith("pushed acme/chat 0.1.0")
        assert say("bob", "pull", "acme/chat@0.1.0").strip()
        assert say("eve", "pull", "acme/chat") == "HK-NOT-FOUND"
        assert "acme/chat" in say("bob", "list", "--remote")
        assert "acme/chat" not in say("eve", "list", "--remote")
        assert say("eve", "push", "./chat", "acme/tune") == "HK-FORBIDDEN"
        assert say("bob", "push", "./chat", "acme/tune") == "HK-FORBIDDEN"
        said = [say("ana", "push", "./chat", f"acme/chat{number}") for number in range(5)]
        assert said[-1] == "HK-QUOTA", said
    actions = [row["action"] for row in map(json.loads, log.read_text().splitlines()) if row["user"] == "ana"]
    assert actions[:1] == ["create"]
    assert {"commit", "tag", "upload"} <= set(actions)
