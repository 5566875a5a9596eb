"""copy: the same bytes, digests and versions in another registry, whichever two they are, and nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from projects import publish_base, put, ship

from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import open_registry
from hubkit.verbs.copy import copy
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.yank import yank

KILLED = """
import os, random, sys
from killing import attempt, duration
from hubkit.registry.opening import open_registry
from hubkit.verbs.copy import copy

folder, chance, kills = sys.argv[1], random.Random(7), 0
source = open_registry()
wanted = {tag: source.read("ana/chat", at, "hubkit.json") for tag, at in source.refs("ana/chat").tags.items()}
whole = duration(lambda: copy("ana/chat", f"{folder}/undisturbed", all_versions=True))
for number in range(12):
    os.environ["HUBKIT_HOME"] = f"{folder}/home{number}"
    there = open_registry(None, f"{folder}/copy{number}")
    work = lambda: copy("ana/chat", f"{folder}/copy{number}", all_versions=True)
    while not attempt(work, chance.uniform(0.3, 1.1) * whole):
        kills += 1
        if "ana/chat" in (there.repos() if os.path.isdir(f"{folder}/copy{number}") else ()):
            tags = there.refs("ana/chat").tags
            assert all(there.read("ana/chat", at, "hubkit.json") == wanted[tag] for tag, at in tags.items())
    assert {tag: there.read("ana/chat", at, "hubkit.json") for tag, at in there.refs("ana/chat").tags.items()} == wanted
print(kills)
"""


@pytest.fixture
def three(registry: str, tmp_path: Path) -> dict[str, str]:
    """Three versions of ana/chat, and their commits."""
    return {v: ship("lora", "ana/chat", tmp_path / "chat", version=v) for v in ("1.0.0", "1.1.0", "1.2.0")}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of `hubkit serve` in front of an empty directory."""
    (tmp_path / "served").mkdir()
    command = [sys.executable, "-m", "hubkit", "serve", str(tmp_path / "served"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def content(where: str, repo: str, revision: str) -> dict[str, bytes]:
    place = open_registry(None, where)
    commit = place.refs(repo).tags.get(revision) or place.resolve(repo, revision)
    return {file.path: place.read(repo, commit, file.path) for file in place.files(repo, commit)}


def test_all_versions_arrive_to_the_byte(three: dict[str, str], registry: str, served: str, tmp_path: Path) -> None:
    """A directory → a server → another directory, and the last is as the first."""
    yank("ana/chat@1.1.0", reason="bad")
    there = copy("ana/chat", served, all_versions=True)
    assert [(one.version, one.present) for one in there.versions] == [(v, False) for v in three]
    assert there.created
    back = copy(f"{served}/ana/chat", str(tmp_path / "other"), all_versions=True)
    assert [one.digest for one in back.versions] == [one.digest for one in there.versions]
    for version in three:
        first = content(registry, "ana/chat", f"v{version}")
        first.pop(".hubkit/yanked.json", None)
        assert content(str(tmp_path / "other"), "ana/chat", f"v{version}") == first
    yank("ana/chat@1.2.0", registry=str(tmp_path / "other"))
    assert pull("ana/chat@^1", registry=str(tmp_path / "other")).revision == "v1.0.0"
    again = copy("ana/chat", served, all_versions=True)
    assert all(one.present and not one.uploaded for one in again.versions)
    assert not again.created


def test_a_base_without_a_version(registry: str, tmp_path: Path) -> None:
    publish_base("labs/base")
    place = DirectoryRegistry(Path(registry))
    others = {"README.md": b"# Base", "onnx/model.onnx": b"other form"}
    place.commit("labs/base", others, [], message="more", parent=None)
    done = copy("labs/base", str(tmp_path / "other"))
    assert (done.versions[0].version, done.left_out) == (None, ("onnx/model.onnx",))
    here, there = pull("labs/base", base=True), pull("labs/base", base=True, registry=str(tmp_path / "other"))
    assert here.digest == there.digest == done.versions[0].digest
    assert content(str(tmp_path / "other"), "labs/base", "main")["README.md"] == b"# Base"
    again = copy("labs/base", str(tmp_path / "other"))
    assert (again.versions[0].commit, again.versions[0].uploaded) == (done.versions[0].commit, ())


def test_one_version_and_then_the_next(three: dict[str, str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    assert copy("ana/chat@^1.1,<1.2", other, name="acme/chat").versions[0].version == "1.1.0"
    with pytest.raises(HubkitError) as refusal:
        copy("ana/chat@1.0.0", other, name="acme/chat")
    assert (refusal.value.code, refusal.value.status) == ("HK-VERSION", 2)
    newest = copy("ana/chat", other, name="acme/chat").versions[0]
    assert newest.version == "1.2.0"  # the default branch is at that version
    assert "adapter_model.safetensors" not in newest.uploaded  # the target has it
    assert pull("acme/chat@^1", registry=other).digest == newest.digest


def test_a_version_with_other_content_is_not_replaced(three: dict[str, str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    push(put("dora", tmp_path / "else", version="1.1.0"), "ana/chat", registry=other)
    before = content(other, "ana/chat", "main")
    with pytest.raises(HubkitError) as refusal:
        copy("ana/chat@1.1.0", other)
    assert refusal.value.code == "HK-VERSION-EXISTS"
    with pytest.raises(HubkitError):
        copy("ana/chat", other, all_versions=True)
    assert content(other, "ana/chat", "main") == before
    assert sorted(open_registry(None, other).refs("ana/chat").tags) == ["v1.1.0"]


def test_the_same_adapter_pushed_there_is_the_same(three: dict[str, str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    push(put("lora", tmp_path / "same", version="1.1.0"), "labs/talk", registry=other)
    assert Manifest.read(tmp_path / "same").version == "1.1.0"
    assert copy("ana/chat@1.1.0", other, name="labs/talk").versions[0].present  # its card names another repository


def test_a_copy_killed_before_its_tag_is_finished_by_the_next(
    three: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    other = str(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryRegistry, "tag", killed)
        with pytest.raises(KeyboardInterrupt):
            copy("ana/chat", other, all_versions=True)
    done = copy("ana/chat", other, all_versions=True)
    assert (done.versions[0].version, done.versions[0].uploaded) == ("1.0.0", ())
    assert sorted(open_registry(None, other).refs("ana/chat").tags) == ["v1.0.0", "v1.1.0", "v1.2.0"]


@pytest.mark.parametrize(
    ("reference", "to", "options"),
    [
        ("./chat", "./other", {}),
        ("ana/chat@1.0.0", "./other", {"all_versions": True}),
        ("ana/chat", "acme/chat@1.0.0", {}),
        ("ana/chat", "nowhere", {}),
        ("ana/chat", "./other", {"name": "chat"}),
    ],
)
def test_what_cannot_be_copied(three: dict[str, str], reference: str, to: str, options: dict[str, Any]) -> None:
    with pytest.raises(HubkitError) as refusal:
        copy(reference, to, **options)
    assert (refusal.value.code, refusal.value.status) == ("HK-REFERENCE", 2)


@pytest.mark.slow
def test_killed_at_random_moments(three: dict[str, str], tmp_path: Path) -> None:
    """No tag ever names other content, and the copy that comes through has everything."""
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "verbs"), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kills")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "kills that hit the work"
