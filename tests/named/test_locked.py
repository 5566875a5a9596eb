"""What a lock names is found by its digest, wherever it lies; a folder that changed is never replaced by another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from projects import BASE, make_project, publish_base, put, ship

from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.named.locked import find_adapter, find_base
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import Where, open_registry
from hubkit.registry.store.placing import base_digest
from hubkit.registry.store.store import Store
from hubkit.verbs.lock import lock
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push

HERE, OFFLINE = Where(), Where(offline=True)


@pytest.fixture
def project(tmp_path: Path, registry: str) -> Path:
    made = make_project(tmp_path / "project")
    lock(made)
    return made


@pytest.fixture
def pinned(project: Path) -> Lock:
    return Lock.read(project)


def place() -> DirectoryRegistry:
    found = open_registry()
    assert isinstance(found, DirectoryRegistry)
    return found


def missing(work: object, *arguments: object) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        work(*arguments)  # type: ignore[operator]
    assert caught.value.code == "HK-LOCK-MISSING"
    return caught.value


def test_at_its_commit_and_then_in_the_store(project: Path, pinned: Lock) -> None:
    chat, sql = pinned.adapters
    adapter, found = find_adapter(chat, project, HERE)
    assert (adapter.manifest.digest, found.place) == (chat.digest, place().name)
    assert found.fetched > 0
    shutil.rmtree(place().root)
    assert find_adapter(chat, project, OFFLINE)[1].place == "store"
    assert find_adapter(sql, project, OFFLINE)[1].place == "folder"


def test_under_the_tag_of_its_version_where_the_commit_is_gone(project: Path, pinned: Lock, tmp_path: Path) -> None:
    """A repository that was made again has other commits and the same bytes."""
    place().delete("ana/chat")
    commit = ship("lora", "ana/chat", tmp_path / "again", version="1.1.0")
    assert commit
    place().commit("ana/chat", {"notes.txt": b"x"}, [], message="later", parent=None)
    adapter, found = find_adapter(pinned.adapters[0], project, HERE)
    assert adapter.manifest.digest == pinned.adapters[0].digest
    assert found.fetched > 0


def test_in_a_mirror(project: Path, pinned: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = str(tmp_path / "mirror")
    publish_base(registry=mirror)
    push(put("lora", tmp_path / "copy", version="1.1.0"), "ana/chat", registry=mirror)
    shutil.rmtree(place().root)
    missing(find_adapter, pinned.adapters[0], project, HERE)
    missing(find_base, pinned.base, project, HERE)
    monkeypatch.setenv("HUBKIT_MIRRORS", f"{tmp_path / 'nothing'}, {mirror}")
    name = open_registry(None, mirror).name
    assert find_adapter(pinned.adapters[0], project, HERE)[1].place == name
    assert find_base(pinned.base, project, HERE).place == name


def test_under_another_name_that_it_was_pulled_by(project: Path, pinned: Lock, tmp_path: Path) -> None:
    """The repository was renamed; what the store forgot, it still knows the name of."""
    push(put("lora", tmp_path / "copy", version="1.1.0"), "bob/talk")
    done = pull("bob/talk")
    assert done.digest == pinned.adapters[0].digest
    place().delete("ana/chat")
    assert find_adapter(pinned.adapters[0], project, HERE)[1].place == "store"
    Store().remove(done.digest)
    adapter, found = find_adapter(pinned.adapters[0], project, HERE)
    assert (adapter.manifest.digest, found.reference.repo) == (done.digest, "bob/talk")


def test_a_folder_that_is_not_here_is_taken_from_the_store(project: Path, pinned: Lock, tmp_path: Path) -> None:
    push(put("dora", tmp_path / "copy"), "bob/sql")
    assert pull("bob/sql").digest == pinned.adapters[1].digest
    shutil.rmtree(project / "sql")
    assert find_adapter(pinned.adapters[1], project, OFFLINE)[1].place == "store"
    put("full", project / "sql")
    with pytest.raises(HubkitError) as caught:
        find_adapter(pinned.adapters[1], project, OFFLINE)
    assert caught.value.code == "HK-LOCK-DRIFT"


def test_what_is_damaged_in_the_store_is_fetched_again(project: Path, pinned: Lock) -> None:
    for found in (find_adapter(pinned.adapters[0], project, HERE)[1], find_base(pinned.base, project, HERE)):
        (path,) = found.path.glob("*.safetensors")
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    missing(find_adapter, pinned.adapters[0], project, OFFLINE)
    missing(find_base, pinned.base, project, OFFLINE)
    assert find_adapter(pinned.adapters[0], project, HERE)[1].fetched > 0
    assert find_base(pinned.base, project, HERE).fetched > 0
    assert find_base(pinned.base, project, OFFLINE).place == "store"


def test_a_base_in_the_store_has_the_digest_of_the_lock(project: Path, pinned: Lock) -> None:
    assert pull("ana/base", base=True).digest == base_digest(pinned.base.files)
    shutil.rmtree(place().root)
    assert find_base(pinned.base, project, HERE).place == "store"


def test_a_missing_base_is_named_by_digest_names_and_command(project: Path, pinned: Lock, tmp_path: Path) -> None:
    error = missing(find_base, pinned.base, project, OFFLINE)
    weights = next(file for file in pinned.base.files if file.path == "model.safetensors")
    assert f"model.safetensors: {weights.sha256}" in error.want
    assert f"hubkit pull --base ana/base@{pinned.base.revision}" in error.fix
    assert error.have == ["it was never pulled here"]
    publish_base("bob/copy")
    done = pull("bob/copy", base=True)
    Store().remove(done.digest)
    assert error.where == "ana/base"
    error = missing(find_base, pinned.base, project, OFFLINE)
    assert error.have == [f"it was pulled before as {place().name}/bob/copy@{done.commit}"]


def test_a_base_in_a_folder(tmp_path: Path, registry: str) -> None:
    project = tmp_path / "project"
    shutil.copytree(BASE, project / "model")
    (project / "hubkit.toml").write_text('[base]\nsource = "./model"\n')
    base = lock(project).lock.base
    assert find_base(base, project, OFFLINE).place == "folder"
    (project / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(HubkitError) as caught:
        find_base(base, project, OFFLINE)
    assert (caught.value.code, caught.value.where) == ("HK-LOCK-DRIFT", "./model")
