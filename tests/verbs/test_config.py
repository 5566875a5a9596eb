"""config: one place decides which registry is asked and who gets which token; the file never holds one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from projects import publish_base, ship
from registry.answering import Answering

from hubkit.errors import HubkitError
from hubkit.registry.opening import choose, open_named, open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.settings import read_settings
from hubkit.verbs.config import config
from hubkit.verbs.pull import pull

COMMIT = "1" * 40


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file, which is not there yet."""
    path = tmp_path / "settings" / "config.toml"
    monkeypatch.setenv("HUBKIT_CONFIG", str(path))
    return path


def put(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def source(text: str, registry: str | None = None) -> str:
    return choose(parse_reference(text), registry).source


def test_what_says_it_most_exactly_is_obeyed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(parse_reference("acme/chat")).source == "default"
    put(file, 'registry = "/srv/all"\n[namespaces]\nacme = "/srv/acme"\n')
    assert source("ana/chat") == "registry"
    monkeypatch.setenv("HUBKIT_REGISTRY", "/srv/other")
    assert source("ana/chat") == "HUBKIT_REGISTRY"
    assert source("acme/chat") == "namespaces.acme"
    assert source("acme/chat", "/srv/flag") == "--registry"
    assert source("hf://acme/chat", "/srv/flag") == "the reference"
    assert choose(parse_reference("acme/chat")).place == "/srv/acme"


def test_a_base_from_one_registry_and_adapters_from_another(file: Path, registry: str, tmp_path: Path) -> None:
    publish_base("labs/base", str(tmp_path / "hub"))
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    config("set", "namespaces.labs", str(tmp_path / "hub"))
    assert (pull("labs/base", base=True).path / "config.json").is_file()
    assert pull("ana/chat@^1").revision == "v1.0.0"
    config("unset", "namespaces.labs")
    with pytest.raises(HubkitError) as refusal:
        pull("labs/base@main", base=True)
    assert refusal.value.code == "HK-NOT-FOUND"


@pytest.fixture
def servers() -> Iterator[tuple[Answering, Answering]]:
    with Answering() as one, Answering() as two:
        for server in (one, two):
            server.routes["/api/models/ana/chat"] = (200, {}, {"sha": COMMIT})
            server.routes["/api/models/acme/chat"] = (200, {}, {"sha": COMMIT})
        yield one, two


def asked(server: Answering, text: str, registry: str | None = None) -> str | None:
    """The token that a server is sent for a reference."""
    server.seen.clear()
    reference = parse_reference(text)
    open_registry(reference, registry).resolve(reference.repo or "", None)
    return server.seen[0][1].get("authorization")


def test_a_token_goes_to_the_server_it_was_set_for(
    file: Path, servers: tuple[Answering, Answering], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers
    monkeypatch.setenv("HF_TOKEN", "of-the-hub")
    monkeypatch.setenv("HUBKIT_TOKEN", "of-the-default")
    put(file, f'registry = "{one.url}"\n[namespaces]\nacme = "{two.url}"\n')
    assert asked(one, "ana/chat") == "Bearer of-the-default"
    assert asked(two, "acme/chat") is None  # HUBKIT_TOKEN is for the default registry alone
    assert asked(two, f"{two.url}/ana/chat") is None
    assert asked(two, "ana/chat", two.url) is None  # not even if a flag names another one
    assert asked(one, "ana/chat", one.url) == "Bearer of-the-default"
    monkeypatch.setenv("HUBKIT_REGISTRY", two.url)
    assert asked(one, f"{one.url}/ana/chat") is None  # another one is the default now
    monkeypatch.delenv("HUBKIT_REGISTRY")
    with file.open("a") as end:
        end.write(f'[tokens]\n"{two.url}" = "ACME_TOKEN"\n')
    assert asked(two, "acme/chat") is None  # named, but not set: never another one in its place
    monkeypatch.setenv("ACME_TOKEN", "of-acme")
    assert asked(two, "acme/chat") == "Bearer of-acme"
    assert asked(one, "ana/chat") == "Bearer of-the-default"
    assert asked(two, "ana/chat", two.url) == "Bearer of-acme"


def test_a_server_that_is_copied_to_gets_no_token_of_another(
    file: Path, servers: tuple[Answering, Answering], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers
    monkeypatch.setenv("HUBKIT_TOKEN", "of-the-default")
    monkeypatch.setenv("HUBKIT_REGISTRY", one.url)
    for server, token in ((one, "Bearer of-the-default"), (two, None)):
        open_named(server.url).resolve("ana/chat", None)
        assert server.seen[0][1].get("authorization") == token


def test_settings_that_are_written_at_once_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: config("set", f"namespaces.owner{number}", "hf"), range(8)))
    assert {f"namespaces.owner{number}" for number in range(8)} <= {one.name for one in config()}


def test_set_and_unset_keep_comments(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(file, "# mine\n[namespaces]  # of others\nlabs = 'hf'   # the Hub\n")
    monkeypatch.chdir(tmp_path)
    rows = config("set", "registry", "./adapters")
    assert [(one.value, one.source) for one in rows if one.name == "registry"] == [(f"{tmp_path}/adapters", "file")]
    config("set", "namespaces.acme", "https://hub.acme.example")
    config("set", "tokens.https://hub.acme.example", "ACME_TOKEN")
    text = file.read_text()
    assert all(comment in text for comment in ("# mine", "# of others", "labs = 'hf'   # the Hub"))
    for key in ("registry", "namespaces.acme", "tokens.https://hub.acme.example"):
        config("unset", key)
    assert [one.name for one in config() if one.source == "file"] == ["namespaces.labs"]
    with pytest.raises(HubkitError) as refusal:
        config("unset", "registry")
    assert (refusal.value.code, refusal.value.have) == ("HK-CONFIG", ["namespaces.labs"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("registri = 'hf'", "did you mean registry?"),
        ("[namespace]\na = 'hf'", "did you mean namespaces?"),
        ("registry = 3", "int"),
        ("registry = './here'", "./here"),
        ("namespaces = 'hf'", "a table"),
        ("[namespaces]\n'a/b' = 'hf'", "a/b"),
        ("[tokens]\n'https://host/path' = 'ACME'", "host/path"),
        ("registry = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_refused(file: Path, text: str, said: str) -> None:
    put(file, text)
    with pytest.raises(HubkitError) as refusal:
        open_registry(parse_reference("ana/chat"))
    assert (refusal.value.code, refusal.value.status) == ("HK-CONFIG", 2)
    assert said in refusal.value.render()


@pytest.mark.parametrize(
    "text",
    [
        "[tokens]\n'https://host' = 'hf_abcdefghijklmnop'",
        "[tokens]\n'https://host' = 'a1b2c3d4e5'",
        "# hf_abcdefghijklmnop",
        "registry = 'https://ana:abcdefgh@host'",
    ],
)
def test_a_token_in_the_file_is_refused_and_not_shown(file: Path, text: str) -> None:
    put(file, text)
    with pytest.raises(HubkitError) as refusal:
        config()
    assert refusal.value.code == "HK-SECRET"
    assert "abcdefgh" not in refusal.value.render()
    assert "a1b2" not in refusal.value.render()


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HUBKIT_CONFIG")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert read_settings().default == "hf"
    with pytest.raises(HubkitError) as refusal:
        config("set", "registry", "hf")
    assert (refusal.value.code, "HUBKIT_CONFIG" in refusal.value.fix) == ("HK-CONFIG", True)


def test_every_setting_says_where_it_comes_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_IDLE_TIMEOUT", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    rows = {one.name: (one.value, one.source) for one in config()}
    assert rows["registry"] == ("hf", "default")
    assert rows["idle timeout"] == ("7 s for further bytes", "HUBKIT_IDLE_TIMEOUT")
    assert rows["home"] == (os.environ["HUBKIT_HOME"], "HUBKIT_HOME")
    assert rows["token"] == ("from HF_TOKEN", "HF_TOKEN")
    assert "secretsecret" not in repr(config())
    assert not file.exists()
