"""References: every form, every refusal, and no token in any message."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import Reference, parse_reference
from hubkit.registry.versions import resolve_revision

HEX = "9f31c2e4b5a697887766554433221100ffeeddcc"
FORMS = [
    ("./dir", Reference("folder", path=Path("./dir"))),
    ("../a/b", Reference("folder", path=Path("../a/b"))),
    ("/abs/dir@x:y", Reference("folder", path=Path("/abs/dir@x:y"))),
    (".", Reference("folder", path=Path())),
    ("org/name", Reference("repo", repo="org/name")),
    ("org/name@v1.2.0", Reference("repo", repo="org/name", revision="v1.2.0")),
    (f"org/name@{HEX}", Reference("repo", repo="org/name", revision=HEX)),
    ("org/name@^1.2", Reference("repo", repo="org/name", revision="^1.2")),
    ("org/name@>=1,<2", Reference("repo", repo="org/name", revision=">=1,<2")),
    ("org/name@refs/pr/3", Reference("repo", repo="org/name", revision="refs/pr/3")),
    ("org/name@main:sub/chat", Reference("repo", repo="org/name", revision="main", folder="sub/chat")),
    ("org/name:chat", Reference("repo", repo="org/name", folder="chat")),
    ("hf://org/name@main", Reference("repo", scheme="hub", repo="org/name", revision="main")),
    (
        "https://host/org/name@v1.0.0",
        Reference("repo", scheme="http", endpoint="https://host", repo="org/name", revision="v1.0.0"),
    ),
    (
        "http://127.0.0.1:8000/org/name",
        Reference("repo", scheme="http", endpoint="http://127.0.0.1:8000", repo="org/name"),
    ),
    (
        "https://host/hub/v2/org/name@main:chat",
        Reference(
            "repo", scheme="http", endpoint="https://host/hub/v2", repo="org/name", revision="main", folder="chat"
        ),
    ),
    ("http://[::1]:8000/org/name", Reference("repo", scheme="http", endpoint="http://[::1]:8000", repo="org/name")),
    (
        "file:///srv/hub/org/name@v1.0.0",
        Reference("repo", scheme="file", endpoint="/srv/hub", repo="org/name", revision="v1.0.0"),
    ),
    (
        "file:///srv/a%40b%20c/org/name@v1.0.0",
        Reference("repo", scheme="file", endpoint="/srv/a@b c", repo="org/name", revision="v1.0.0"),
    ),
]


@pytest.mark.parametrize(("text", "wanted"), FORMS)
def test_forms(text: str, wanted: Reference) -> None:
    found = parse_reference(text)
    assert found == wanted
    assert parse_reference(str(found)) == wanted


def test_a_local_adapter_needs_no_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_reference("ana/chat").kind == "repo"
    (tmp_path / "ana" / "chat").mkdir(parents=True)
    assert parse_reference("ana/chat").kind == "repo"
    (tmp_path / "ana" / "chat" / "hubkit.json").write_bytes(b"{}")
    found = parse_reference("ana/chat")
    assert found == Reference("folder", path=Path("ana/chat"))
    assert str(found) == "./ana/chat"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "gpt2",
        "a/b/c",
        "org/",
        "org//name",
        "org/name@",
        "org/name@v1 ",
        "org/name@^q",
        "org/name@a..b",
        "org/name@main:",
        "org/name@main:../up",
        "org/name@main:/abs",
        "org/name@main:a\\b",
        "org/na me",
        "örg/name",
        "-org/name",
        "org/name.git",
        "org/a--b",
        "org/name@main\n",
        "org/name@\x1b[31m",
        "ftp://host/org/name",
        "https://host/name",
        "https:///org/name",
        "https://host:99999/org/name",
        "file://server/dir/org/name",
        "hf://org/name/extra",
        "https://huggingface.co/org/name/tree/main",
        "https://host/org/name?token=hf_secretsecret",
        "https://host/org/name#x",
        "https://user:hf_secretsecret@host/org/name",
        "http://hf_secretsecret@host/org/name@main",
        "org/name@" + "x" * 300,
        "o" * 5000,
        "x" * 300 + "/" + "y" * 300,
        "org/name@main:con.txt",
        "@main",
        ":folder",
    ],
)
def test_refusals_show_the_forms_and_no_secret(text: str) -> None:
    with pytest.raises(HubkitError) as caught:
        parse_reference(text)
    fault = caught.value
    assert fault.code == "HK-REFERENCE"
    assert fault.status == 2
    assert fault.want
    assert "hf_secret" not in fault.render()
    assert "\x1b" not in fault.render()


def test_a_browser_address_is_turned_into_a_reference() -> None:
    with pytest.raises(HubkitError) as caught:
        parse_reference("https://huggingface.co/org/name/tree/main")
    assert caught.value.fix == "https://huggingface.co/org/name@main"


@given(st.text(st.sampled_from("./@:^~=<>,%?#[]\\ -_v1ahx\x00é"), max_size=30) | st.text(max_size=40))
def test_any_text_is_a_reference_that_reads_back_or_a_refusal(text: str) -> None:
    for start in ("", "org/name@", "https://", "file://", "hf://org/", "https://host/org/name"):
        found = _parsed(start + text)
        if isinstance(found, Reference):
            assert parse_reference(str(found)) == found
            assert found.kind == "folder" or (found.repo or "").count("/") == 1
        else:
            assert found == "HK-REFERENCE"


def _parsed(text: str) -> Reference | str:
    try:
        return parse_reference(text)
    except HubkitError as fault:
        return fault.code


NAME = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)


@given(
    NAME,
    NAME,
    st.sampled_from([None, "main", "v1.0.0", "^1.2", ">=1,<2", "1.x", HEX]),
    st.none() | NAME.map("x-{}".format),
)
def test_built_references_read_back(owner: str, name: str, revision: str | None, folder: str | None) -> None:
    places: list[tuple[Literal["hub", "http", "file"] | None, str | None]] = [
        (None, None),
        ("hub", None),
        ("http", "https://h:1/p"),
        ("file", "/a b/@/%41"),
    ]
    for scheme, endpoint in places:
        made = Reference("repo", None, scheme, endpoint, f"{owner}/{name}", revision, folder)
        assert parse_reference(str(made)) == made


def test_open_registry_by_reference_flag_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUBKIT_REGISTRY", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    plain = parse_reference("org/name")
    assert open_registry().name == "https://huggingface.co"
    assert open_registry(plain).name == "https://huggingface.co"
    assert open_registry(plain, "http://127.0.0.1:1/").name == "http://127.0.0.1:1"
    monkeypatch.setenv("HUBKIT_REGISTRY", str(tmp_path))
    assert open_registry(plain).name == tmp_path.as_uri()
    assert isinstance(open_registry(plain), DirectoryRegistry)
    assert isinstance(open_registry(plain, "hf"), HuggingFaceRegistry)
    assert open_registry(plain, f"file://{tmp_path}/x%20y").name == (tmp_path / "x y").as_uri()
    assert open_registry(parse_reference("hf://org/name")).name == "https://huggingface.co"
    assert open_registry(parse_reference("https://h/p/org/name")).name == "https://h/p"
    assert open_registry(parse_reference("file:///srv/a%25b/org/name")).name == "file:///srv/a%25b"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:2")
    assert open_registry(plain, "hf").name == "http://127.0.0.1:2"


@pytest.mark.parametrize(
    "text", ["nowhere", "https://user:hf_secretsecret@host", "s3://bucket", "file://host/x", "https://"]
)
def test_what_is_no_registry_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubkitError) as caught:
        open_registry(registry=text)
    assert caught.value.code == "HK-REFERENCE"
    assert "hf_secret" not in caught.value.render()


def test_references_resolve_in_their_registry(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path / "hub")
    registry.create("ana/chat")
    commit = registry.commit("ana/chat", {"a.json": b"{}"}, [], message="m", parent=None)
    registry.tag("ana/chat", "v1.2.3", commit)
    reference = parse_reference(f"{registry.name}/ana/chat@^1.2")
    assert reference.repo == "ana/chat"
    assert resolve_revision(open_registry(reference), "ana/chat", reference.revision).commit == commit
