"""sync: everything that the lock names lies here afterwards, proven; without a network, too."""

from __future__ import annotations

import errno
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import make_project, put, ship

from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import open_registry
from hubkit.registry.store.store import Store
from hubkit.verbs.add import add
from hubkit.verbs.bundle import bundle
from hubkit.verbs.lock import lock
from hubkit.verbs.outdated import outdated
from hubkit.verbs.pull import pull
from hubkit.verbs.sync import sync


@pytest.fixture
def project(tmp_path: Path, registry: str) -> Path:
    return make_project(tmp_path / "project")


def refused(*arguments: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        sync(*arguments, **options)
    return caught.value


def place() -> DirectoryRegistry:
    found = open_registry()
    assert isinstance(found, DirectoryRegistry)
    return found


def test_it_locks_first_and_brings_what_is_missing(project: Path) -> None:
    done = sync(project)
    assert done.locked is not None
    assert done.locked.changed == ("base", "chat", "sql")
    assert [(one.name, one.place) for one in done.entries] == [
        ("base", place().name),
        ("chat", place().name),
        ("sql", "folder"),
    ]
    assert done.fetched == sum(one.fetched for one in done.entries) > 0
    again = sync(project)
    assert again.fetched == 0
    assert [one.place for one in again.entries] == ["store", "store", "folder"]


def test_locked_refuses_where_the_lock_is_stale_and_frozen_does_not_look(project: Path) -> None:
    assert refused(project, locked=True).code == "HK-MISSING"
    sync(project)
    recipe = project / "hubkit.toml"
    recipe.write_text(recipe.read_text().replace("-0.5", "0.5"))
    before = (project / "hubkit.lock").read_bytes()
    assert refused(project, locked=True).code == "HK-LOCK-STALE"
    assert sync(project, frozen=True).locked is None
    recipe.write_text("no recipe at all")
    sync(project, frozen=True)
    recipe.unlink()
    assert sync(project / "hubkit.lock", frozen=True, offline=True).fetched == 0
    assert (project / "hubkit.lock").read_bytes() == before
    error = refused(project, frozen=True, locked=True)
    assert (error.code, error.status) == ("HK-USAGE", 2)


def test_plain_sync_renews_a_stale_lock(project: Path) -> None:
    sync(project)
    (project / "hubkit.toml").write_text((project / "hubkit.toml").read_text().replace("-0.5", "0.5"))
    done = sync(project)
    assert done.locked is not None
    assert done.locked.changed == ("sql",)
    sync(project, locked=True)


def test_all_that_is_missing_is_named_at_once(project: Path) -> None:
    lock(project)
    put("full", project / "sql")
    error = refused(project, frozen=True, offline=True)
    assert error.code == "HK-LOCK-MISSING"
    assert error.what == "3 entries of the lock are not here as they were locked"
    assert [line.partition(":")[0] for line in error.have] == ["base", "chat", "sql"]
    assert "hubkit pull --base ana/base@" in error.fix


def test_every_byte_is_proven(project: Path) -> None:
    done = sync(project)
    for one in done.entries:
        (path,) = one.path.glob("*.safetensors")
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert refused(project, frozen=True, offline=True).code in ("HK-LOCK-MISSING", "HK-FILES", "HK-LOCK-DRIFT")
        path.write_bytes(data)
    sync(project, frozen=True, offline=True)


def test_a_moved_tag_or_a_rewritten_repository_changes_nothing(project: Path, tmp_path: Path) -> None:
    sync(project)
    place().delete("ana/chat")
    ship("full", "ana/chat", tmp_path / "evil", version="1.1.0")
    digest = Lock.read(project).adapters[0].digest
    assert sync(project).entries[1].digest == digest
    Store().remove(digest)
    error = refused(project, frozen=True)
    assert error.code == "HK-LOCK-MISSING"
    assert any("ana/chat@v1.1.0: another one" in line for line in error.have)


def test_a_mix_comes_with_what_is_in_it(project: Path, tmp_path: Path) -> None:
    for name in ("mix", "lora", "dora", "full"):
        put(name, project / name)
    add(project / "mix", recipe=project)
    mixed = sync(project).entries[-1]
    assert mixed.size > sum(path.stat().st_size for path in (project / "lora").glob("*.safetensors"))
    put("full", project / "full", version="9.9.9")
    assert refused(project, frozen=True).code == "HK-MIX-MEMBER"


def test_members_that_lead_in_a_circle_are_refused(project: Path) -> None:
    """A mix names its members by digest, so that none can hold itself: one that says so holds another."""
    for name in ("mix", "lora", "dora", "full"):
        put(name, project / name)
    from hubkit.documents.manifest import Manifest

    mix = Manifest.read(project / "mix").mix
    assert mix is not None
    first = next(iter(mix["members"]))
    members = {**mix["members"], first: {**mix["members"][first], "reference": "../mix"}}
    put("mix", project / "mix", mix={**mix, "members": members})
    add(project / "mix", recipe=project)
    error = refused(project)
    assert error.code == "HK-MIX-MEMBER"
    assert "is not the one that was mixed" in error.what


def test_a_bundle_is_all_that_an_empty_machine_needs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mix", "lora", "dora", "full"):
        put(name, project / name)
    add(project / "mix", recipe=project)
    made = bundle(project, out=tmp_path / "all.tar", base=True)
    digest = Lock.read(project).digest
    shutil.rmtree(place().root)
    shutil.rmtree(project)
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "other-home"))
    done = sync(tmp_path / "new", bundle=made.path, offline=True)
    assert (done.path, done.digest) == (tmp_path / "new" / "hubkit.lock", digest)
    assert made.lock == digest
    assert {one.place for one in done.entries} == {"store"}
    assert sync(tmp_path / "new", frozen=True, offline=True).fetched == 0
    assert pull("ana/chat@^1", offline=True).digest == done.entries[1].digest
    again = bundle(tmp_path / "new", out=tmp_path / "again.tar", base=True, offline=True)
    assert again.digest == made.digest


def test_a_bundle_without_its_base_says_what_is_missing(project: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lock(project)
    made = bundle(project, out=tmp_path / "some.tar")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "other-home"))
    error = refused(tmp_path / "new", bundle=made.path, offline=True)
    assert (error.code, error.where) == ("HK-LOCK-MISSING", "ana/base")
    assert error.want[1].startswith("model.safetensors: sha256:")
    assert sync(tmp_path / "new", frozen=True).entries[1].place == "store"


def test_a_bundle_of_another_lock_is_refused(project: Path, tmp_path: Path) -> None:
    made = bundle(project, out=tmp_path / "old.tar") if lock(project) else None
    assert made is not None
    add("ana/chat@1.0.0", recipe=project)
    assert refused(project, bundle=made.path).code == "HK-EXISTS"


def test_what_a_bundle_claims_of_a_registry_is_believed_offline_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker may say that a commit holds what it does not hold: where the registry can be asked, it is."""
    import dataclasses

    lock(project)
    honest = Lock.read(project)
    forged = dataclasses.replace(honest.adapters[1], name="chat", source="ana/chat@^1", revision="a" * 40)
    forged = dataclasses.replace(forged, revision=honest.adapters[0].revision)
    dataclasses.replace(honest, adapters=(forged,)).write(project / "hubkit.lock")
    push = ship("dora", "ana/sql", tmp_path / "copy")
    assert push
    pull("ana/sql")
    made = bundle(project, out=tmp_path / "forged.tar")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "other-home"))
    with pytest.raises(HubkitError):
        sync(tmp_path / "new", bundle=made.path, offline=True)  # its base is not here
    sync(tmp_path / "new", frozen=True)
    assert pull(f"ana/chat@{honest.adapters[0].revision}").digest == honest.adapters[0].digest


SERVE = """
import sys
from pathlib import Path
from hubkit.registry.server import run_server
run_server(Path(sys.argv[1]), "127.0.0.1", 0, tokens=None, ready=lambda url: print(url, flush=True))
"""


@pytest.mark.slow
def test_without_sockets_everything_runs_on_what_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb but push and pull; the registry was a real server, which has ended. Only `outdated` asks for it."""
    import hubkit
    from hubkit.cli import run

    root, tried = tmp_path / "registry", list[object]()
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HUBKIT_REGISTRY", str(root))
    project = make_project(tmp_path / "project")
    with subprocess.Popen([sys.executable, "-c", SERVE, str(root)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv("HUBKIT_REGISTRY", server.stdout.readline().strip())
        sync(project)
        server.terminate()

    def no_socket(*arguments: Any, **named: Any) -> None:
        tried.append(arguments)
        raise OSError(errno.ENETUNREACH, "no network")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.chdir(project)
    out = tmp_path / "out"
    chat, base = "ana/chat@^1", "ana/base"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    sync(project)
    sync(project, locked=True)
    sync(project, frozen=True, offline=True)
    lock(project)
    lock(project, check=True)
    add("./sql", name="twice", recipe=project)
    hubkit.remove("twice", recipe=project)
    hubkit.deploy(out / "run", engine="merged", lock=project, offline=True)
    hubkit.deploy(out / "run", check=True)
    bundle(project, out=out / "all.tar", base=True)
    assert hubkit.list()
    put("lora", project / "more", version="3.0.0")
    hubkit.compose(f"{chat} + -0.5*./more", out / "both", offline=True)
    hubkit.mix(f"{chat} + ./sql", out / "mix", offline=True)
    hubkit.merge(base, chat, out / "merged", offline=True)
    hubkit.export(chat, out / "peft", to="peft", offline=True)
    hubkit.generate("hello", base=base, terms=chat, offline=True, max_new_tokens=1)
    assert [check.name for check in hubkit.verify(chat, base=base, offline=True).checks] == ["files", "base", "tensors"]
    hubkit.train(base, rows, out / "new", steps=1, offline=True)
    for line in ("methods", "list", "lock --check", "sync --frozen", "outdated --offline"):
        assert run(line.split()) == 0, line
    assert tried == []
    states = {one.name: one.state for one in outdated(project)}
    assert states == {"base": "unknown", "chat": "unknown", "sql": "current"}
    assert tried
