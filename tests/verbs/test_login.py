"""login: who one is to a registry, from the real server and from what the Hub answers; never the token itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from registry.answering import Answering

from hubkit.errors import HubkitError
from hubkit.verbs.config import config
from hubkit.verbs.login import login

FINE = {
    "type": "user",
    "name": "ana",
    "orgs": [{"name": "acme", "roleInOrg": "write"}],
    "auth": {
        "accessToken": {
            "displayName": "ci",
            "role": "fineGrained",
            "fineGrained": {
                "global": ["discussion.write"],
                "scoped": [
                    {"entity": {"type": "org", "name": "acme"}, "permissions": ["repo.write", "repo.content.read"]}
                ],
            },
        }
    },
}


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering() as made:
        made.routes["/api/whoami-v2"] = (200, {}, FINE)
        yield made


def test_what_a_fine_grained_token_may_do(server: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("HUBKIT_REGISTRY", server.url)
    done = login()
    assert (done.user, done.organizations, done.role) == ("ana", ("acme",), "fineGrained")
    assert (done.source, done.chosen) == ("HUBKIT_TOKEN", "HUBKIT_REGISTRY")
    assert done.may == ("org acme: repo.write, repo.content.read", "everywhere: discussion.write")
    assert "secret" not in repr(done)


@pytest.mark.parametrize(("role", "word"), [("read", "read what ana, acme may read"), ("write", "read and write")])
def test_a_classic_token(server: Answering, monkeypatch: pytest.MonkeyPatch, role: str, word: str) -> None:
    document = {**FINE, "auth": {"accessToken": {"role": role}}}
    server.routes["/api/whoami-v2"] = (200, {}, document)
    assert login(registry=server.url).may[0].startswith(word)


def test_no_token_or_a_wrong_one(server: Answering, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.routes["/api/whoami-v2"] = (401, {"X-Error-Message": "Invalid username or password."}, b"")
    monkeypatch.setenv("HUBKIT_REGISTRY", server.url)
    with pytest.raises(HubkitError) as refusal:
        login()
    assert (refusal.value.code, refusal.value.have) == ("HK-AUTH", ["no token"])
    assert "HUBKIT_TOKEN" in refusal.value.fix
    monkeypatch.setenv("HUBKIT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("ACME_TOKEN", "wrong-one")
    config("set", f"tokens.{server.url}", "ACME_TOKEN")
    with pytest.raises(HubkitError) as refusal:
        login()
    assert (refusal.value.what, refusal.value.have) == (
        "the registry does not accept the token",
        ["a token from ACME_TOKEN"],
    )
    assert "wrong-one" not in refusal.value.render()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(HubkitError) as refusal:
        login(registry="hf")
    assert refusal.value.code == "HK-AUTH"


def test_a_strange_answer(server: Answering) -> None:
    for answer in ({"name": "ana", "orgs": 1, "auth": []}, {"name": "ana", "auth": {}}):
        server.routes["/api/whoami-v2"] = (200, {}, answer)
        assert login(registry=server.url).may == ("the registry does not say",)
    wrong: object
    for wrong in ([], {"name": 3}):
        server.routes["/api/whoami-v2"] = (200, {}, wrong)
        with pytest.raises(HubkitError) as refusal:
            login(registry=server.url)
        assert refusal.value.code == "HK-REGISTRY"


def test_a_directory_asks_nobody(registry: str) -> None:
    done = login()
    assert (done.registry, done.user, done.source) == (f"file://{registry}", None, None)
