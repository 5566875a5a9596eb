"""A directory registry that something has damaged: every document and object is checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hubkit.errors import HubkitError
from hubkit.registry.directory import history
from hubkit.registry.directory.directory import DirectoryRegistry

REPO = "ana/chat"
DATA = b"12345"
DEEP = b"[" * 100_000


@pytest.fixture
def registry(tmp_path: Path) -> DirectoryRegistry:
    made = DirectoryRegistry(tmp_path / "registry")
    made.create(REPO)
    made.commit(REPO, {"f": DATA}, (), message="m", parent=None)
    return made


@pytest.fixture
def folder(registry: DirectoryRegistry) -> Path:
    return registry.root / "repos" / REPO


def code(action: Callable[[], object]) -> str:
    with pytest.raises(HubkitError) as caught:
        action()
    return caught.value.code


def damage(path: Path, data: bytes | None) -> None:
    """Put `data` in place of what a file holds; None removes it."""
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def test_an_objects_bytes(registry: DirectoryRegistry, tmp_path: Path) -> None:
    commit = registry.resolve(REPO)
    stored = registry.object(REPO, registry.entry(REPO, commit, "f").sha256)
    damage(stored, DATA[:-1] + b"6")
    assert code(lambda: registry.download(REPO, commit, "f", tmp_path / "out")) == "HK-FILES"
    assert not (tmp_path / "out").exists()
    damage(stored, None)
    assert code(lambda: registry.read(REPO, commit, "f")) == "HK-NOT-FOUND"


TREES = [
    b"",
    b"[]",
    b"{}",
    b'{"files": []}',
    b'{"files": {"x": 1}}',
    b'{"files": {"x": [1]}}',
    b"\xff",
    DEEP,
    None,
    b'{"files":{"../x":[1,"2","3",true]}}',
]


@pytest.mark.parametrize("data", TREES)
def test_a_tree(registry: DirectoryRegistry, folder: Path, data: bytes | None) -> None:
    commit = registry.resolve(REPO)
    damage(folder / "trees" / registry.one(REPO, commit).tree, data)
    assert code(lambda: registry.files(REPO, commit)) == "HK-REGISTRY"


COMMITS = [
    b"",
    b"[]",
    b"{}",
    b"\xff",
    DEEP,
    b'{"author":"","message":"another","parents":[],"tree":"' + b"0" * 64 + b'"}',
    b'{"author":"","message":"m","parents":[],"tree":7}',
    b'{"author":"","message":"m","parents":7,"tree":""}',
]


@pytest.mark.parametrize("data", COMMITS)
def test_a_commit(registry: DirectoryRegistry, folder: Path, data: bytes) -> None:
    commit = registry.resolve(REPO)
    damage(folder / "commits" / commit, data)
    assert code(lambda: registry.files(REPO, commit)) == "HK-REGISTRY"


def named_by_digest(folder: Path, tree: bytes | str) -> str:
    """A commit that somebody wrote into the directory, with its tree or the name of one; every digest is right."""
    if isinstance(tree, bytes):
        name = hashlib.sha256(tree).hexdigest()
        (folder / "trees" / name).write_bytes(tree)
        tree = name
    body = json.dumps({"author": "", "message": "m", "parents": [], "tree": tree}).encode()
    commit = hashlib.sha256(body).hexdigest()[:40]
    (folder / "commits" / commit).write_bytes(body)
    return commit


@pytest.mark.parametrize("tree", ["../../repo.json", *(data for data in TREES if data is not None)])
def test_what_a_right_digest_does_not_prove(registry: DirectoryRegistry, folder: Path, tree: bytes | str) -> None:
    commit = named_by_digest(folder, tree)
    assert code(lambda: registry.files(REPO, commit)) == "HK-REGISTRY"


def test_an_endless_document(registry: DirectoryRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = registry.resolve(REPO)
    size = (registry.root / "repos" / REPO / "commits" / commit).stat().st_size
    monkeypatch.setattr(history, "MAX_DOCUMENT", size)
    assert registry.one(REPO, commit).id == commit
    monkeypatch.setattr(history, "MAX_DOCUMENT", size - 1)
    assert code(lambda: registry.one(REPO, commit)) == "HK-REGISTRY"


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"branches": {}}', b'{"branches": 1, "tags": {}}', b'{"branches": ["x"], "tags": {}}', DEEP],
)
def test_the_refs(registry: DirectoryRegistry, folder: Path, data: bytes) -> None:
    damage(folder / "refs.json", data)
    assert code(lambda: registry.resolve(REPO)) == "HK-REGISTRY"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", DEEP])
def test_the_mark_of_the_format(registry: DirectoryRegistry, data: bytes) -> None:
    damage(registry.root / "registry.json", data)
    assert code(lambda: DirectoryRegistry(registry.root).resolve(REPO)) == "HK-REGISTRY"


def test_what_is_gone_or_is_no_file(registry: DirectoryRegistry, folder: Path) -> None:
    damage(folder / "repo.json", None)
    assert code(lambda: registry.private(REPO)) == "HK-NOT-FOUND"
    (folder / "repo.json").mkdir()
    assert code(lambda: registry.private(REPO)) == "HK-IO"
