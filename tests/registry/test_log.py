"""log: the same versions, and what changed, of a directory and of a server in front of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from projects import put, ship
from registry.conftest import HubServer

from hubkit.cli import run
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.verbs.log import log
from hubkit.verbs.push import push


@pytest.fixture
def versions(registry: str, tmp_path: Path) -> tuple[str, list[str]]:
    """A repository whose second version has another configuration and licence, and whose third is of another method."""
    folder = tmp_path / "chat"
    first = ship("lora", "ana/chat", folder, version="1.0.0")
    manifest = replace(Manifest.read(folder), version="1.1.0", license="MIT")
    manifest = replace(manifest, config={**manifest.config, "dropout": 0.25})
    (folder / "hubkit.json").write_bytes(manifest.to_bytes())
    second = push(folder, "ana/chat", message="dropout").commit
    assert second is not None
    third = ship("dora", "ana/chat", tmp_path / "other", version="2.0.0")
    place = DirectoryRegistry(registry)
    place.commit("ana/chat", {"notes.txt": b"x"}, [], message="notes", parent=None)
    return registry, [first, second, third]


@pytest.mark.parametrize("where", ["directory", "server"])
def test_versions_and_what_changed(
    versions: tuple[str, list[str]],
    where: str,
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer],
) -> None:
    registry, commits = versions
    at = registry if where == "directory" else start_server(Path(registry), None).url
    found = log("ana/chat", registry=at)
    assert [(one.versions, one.commit) for one in found] == [
        (("v2.0.0",), commits[2]),
        (("v1.1.0",), commits[1]),
        (("v1.0.0",), commits[0]),
    ]
    newest, middle, oldest = found
    assert {(one.name, one.first, one.second) for one in middle.fields} == {
        ("config/dropout", 0.0, 0.25),
        ("license", "apache-2.0", "MIT"),
    }
    assert (middle.title, {one.name for one in middle.files}) == ("dropout", {"README.md"})
    assert ("method", "lora", "dora") in {(one.name, one.first, one.second) for one in newest.fields}
    assert "adapter_model.safetensors" in {one.name for one in newest.files}
    assert (oldest.first, oldest.fields, oldest.files) == (True, (), ())
    assert newest.date[:4].isdigit()
    assert newest.date.endswith("Z")
    every = log("ana/chat", registry=at, every=True)
    assert [one.title for one in every][:1] == ["notes"]
    assert [(one.name, one.first) for one in every[0].files] == [("notes.txt", None)]
    assert len(every) == 5  # the first commit of every repository has no files
    assert [one.commit for one in log("ana/chat@1.1.0", registry=at)] == commits[1::-1]
    assert [one.first for one in log("ana/chat", registry=at, limit=2)] == [False, False]
    with pytest.raises(HubkitError) as refusal:
        log("ana/none", registry=at)
    assert refusal.value.code == "HK-NOT-FOUND"


def test_a_version_that_the_branch_does_not_lead_to(versions: tuple[str, list[str]]) -> None:
    registry, commits = versions
    DirectoryRegistry(registry).squash("ana/chat", "main", "one")
    assert [one.commit for one in log("ana/chat")] == commits[::-1]
    assert log("ana/chat", every=True)[0].title == "one"


def test_a_folder_of_a_repository_and_none_of_a_machine(registry: str, tmp_path: Path) -> None:
    place = DirectoryRegistry(registry)
    place.create("ana/many")
    files = {f"a/{path.name}": path for path in put("lora", tmp_path / "a").iterdir()}
    first = place.commit("ana/many", files, [], message="a", parent=None)
    place.tag("ana/many", "v1.0.0", first)
    place.tag("ana/many", "v1.1.0", place.commit("ana/many", {"b/x": b"x"}, [], message="b", parent=None))
    assert [one.files for one in log("ana/many:a")] == [(), ()]
    for code, reference, limit in (("HK-REFERENCE", "./chat", 1), ("HK-OPTIONS", "ana/many", 0)):
        with pytest.raises(HubkitError) as refusal:
            log(reference, limit=limit)
        assert refusal.value.code == code


def test_as_typed(versions: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    registry, commits = versions
    assert run(["log", "ana/chat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"v2.0.0  {commits[2][:12]}  20")
    assert "    method: lora -> dora" in lines
    assert "    config/dropout: 0 -> 0.25" in lines
    assert lines[-1].startswith(f"v1.0.0  {commits[0][:12]}  20")
    assert run(["log", "ana/chat", "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["versions"] == ["v2.0.0"]
    DirectoryRegistry(registry).create("ana/empty")
    assert run(["log", "ana/empty"]) == 0
    assert capsys.readouterr().out == "no versions; --all lists the commits\n"
