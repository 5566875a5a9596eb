"""cache: what is in the store and why, what may leave it, and that nothing leaves it that something needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nobody import as_nobody
from projects import BASE, make_project, publish_base, ship

from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.registry.opening import open_registry
from hubkit.registry.store.store import Store
from hubkit.verbs.add import add
from hubkit.verbs.bundle import bundle
from hubkit.verbs.cache import Cached, Freed, cache
from hubkit.verbs.deploy import deploy
from hubkit.verbs.lock import lock
from hubkit.verbs.mix import mix
from hubkit.verbs.pull import Pulled, pull
from hubkit.verbs.sync import sync

DAY = 24 * 3600


def aged(digest: str, days: float) -> None:
    """As if an artifact had come, and been used last, so many days ago."""
    then, store = time.time() - days * DAY, Store()
    os.utime(store.path(digest), (then, then))
    note = store.home / "index" / "used" / digest.removeprefix("sha256:")
    if note.exists():
        os.utime(note, (then, then))


def stored() -> dict[str, Cached]:
    return {one.digest: one for one in cache("list")}


def refused(code: str, *arguments: str, **options: object) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        cache(*arguments, **options)  # type: ignore[call-overload]
    assert refusal.value.code == code, refusal.value
    return refusal.value


@pytest.fixture
def chat(registry: str, tmp_path: Path) -> Pulled:
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    return pull("ana/chat")


def test_list_says_when_it_was_used(chat: Pulled) -> None:
    (one,) = cache("list")
    reference = f"{open_registry(None).name}/{chat.reference}"
    assert (one.reference, one.kind, one.digest) == (reference, "adapter", chat.digest)
    assert one.size == sum(path.stat().st_size for path in chat.path.iterdir() if path.name != "README.md")
    assert one.used == one.pulled == time.strftime("%Y-%m-%d")
    assert one.needed == ()
    aged(chat.digest, 40)
    assert stored()[chat.digest].used == time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * DAY))
    pull(chat.reference, offline=True)
    assert stored()[chat.digest].used == time.strftime("%Y-%m-%d")


def test_a_use_is_noted_once_a_day(chat: Pulled) -> None:
    note = Store().home / "index" / "used" / chat.digest.removeprefix("sha256:")
    aged(chat.digest, 0.5)
    before = note.stat().st_mtime
    pull("ana/chat")
    assert note.stat().st_mtime == before
    aged(chat.digest, 1.5)
    pull("ana/chat")
    assert note.stat().st_mtime > before


def test_a_clock_that_was_ahead(chat: Pulled) -> None:
    """What was used in the future stays, and the next use is noted by the clock as it is now."""
    aged(chat.digest, -400)
    assert cache("prune", older_than="1d").removed == ()
    pull("ana/chat")
    assert stored()[chat.digest].used == time.strftime("%Y-%m-%d")
    aged(chat.digest, 31)
    assert [one.digest for one in cache("prune").removed] == [chat.digest]


def test_a_store_that_may_only_be_read_serves_all_the_same(
    common: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(common / "home"))
    monkeypatch.setenv("HUBKIT_REGISTRY", str(common / "registry"))
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    found = pull("ana/chat")
    aged(found.digest, 3)
    assert as_nobody(lambda: pull("ana/chat", offline=True)) == ""
    assert as_nobody(lambda: cache("list")) == ""


def test_prune_goes_by_age_and_says_what_came_free(chat: Pulled, tmp_path: Path) -> None:
    ship("dora", "ana/sql", tmp_path / "sql", version="1.0.0")
    new = pull("ana/sql")
    size = sum(path.stat().st_size for path in chat.path.iterdir())
    aged(chat.digest, 31)
    would = cache("prune", dry_run=True)
    assert ([one.digest for one in would.removed], would.size, would.dry_run) == ([chat.digest], size, True)
    assert chat.path.is_dir()
    assert cache("prune", older_than="5w").removed == ()
    done = cache("prune")
    assert ([one.digest for one in done.removed], done.size) == ([chat.digest], size)
    assert not chat.path.exists()
    assert set(stored()) == {new.digest}
    assert cache("prune", older_than="0d").removed[0].digest == new.digest
    assert pull("ana/chat").fetched > 0


def test_what_locks_and_deployments_need_stays(registry: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    make_project(project)
    made = lock(project)
    sync(project)
    names = {one.digest for one in made.lock.adapters if one.revision} & set(stored())
    assert len(names) == 1
    for digest in stored():
        aged(digest, 99)
    assert all(one.needed == (project / "hubkit.lock",) for one in stored().values())
    assert {one.kind for one in stored().values()} == {"adapter", "base"}
    assert cache("prune").removed == ()
    other = project / "other.lock"
    shutil.move(project / "hubkit.lock", other)
    assert len(cache("prune", keep=[other], dry_run=True).removed) == 0
    assert refused("HK-MISSING", "prune", keep=[tmp_path / "none.lock"]).where == str(tmp_path / "none.lock")
    shutil.copy(other, project / "hubkit.lock")
    deploy(tmp_path / "out", engine="merged", lock=other)
    (project / "hubkit.lock").unlink()
    other.unlink()
    for digest in stored():
        aged(digest, 99)
    assert all(one.needed == (tmp_path / "out" / "deployment.json",) for one in stored().values())
    fault = refused("HK-CACHE-NEEDED", "remove", "ana/base")
    assert fault.have == [f"needed by {tmp_path / 'out' / 'deployment.json'}"]
    assert cache("remove", "ana/base", force=True).size > 0
    assert cache("prune").removed == ()
    shutil.rmtree(tmp_path / "out")
    assert len(cache("prune").removed) == 1
    assert Store().needs.documents() == ()


def test_every_verb_that_writes_a_lock_is_remembered(registry: str, tmp_path: Path) -> None:
    publish_base()
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    (tmp_path / "p").mkdir()
    add("ana/chat@^1", recipe=tmp_path / "p" / "hubkit.toml", base="ana/base")
    assert Store().needs.documents() == (tmp_path / "p" / "hubkit.lock",)
    shutil.move(tmp_path / "p", tmp_path / "q")
    assert lock(tmp_path / "q", dry_run=True).path not in Store().needs.documents()
    lock(tmp_path / "q", check=True)
    assert len(Store().needs.documents()) == 1
    lock(tmp_path / "q")
    cache("prune")
    assert Store().needs.documents() == (tmp_path / "q" / "hubkit.lock",)


def test_a_lock_with_conflicts_keeps_what_both_sides_name(registry: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    make_project(project)
    sync(project)
    text = (project / "hubkit.lock").read_text()
    (project / "hubkit.lock").write_text(f"<<<<<<< ours\n{text}=======\n>>>>>>> theirs\n")
    for digest in stored():
        aged(digest, 99)
    assert cache("prune").removed == ()


def test_members_of_a_locked_mix_stay(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mix that was pulled, and of one in a folder beside the lock."""
    publish_base()
    for method, repo in (("lora", "ana/chat"), ("dora", "ana/sql")):
        ship(method, repo, tmp_path / repo.partition("/")[2], version="1.0.0")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    mix("ana/chat + ana/sql", "./both")
    (project / "hubkit.toml").write_text('[base]\nsource = "ana/base"\n[adapters.both]\nsource = "./both"\n')
    sync(project)
    for digest in stored():
        aged(digest, 99)
    assert len(stored()) == 3
    assert cache("prune").removed == ()
    (project / "hubkit.lock").unlink()
    assert len(cache("prune").removed) == 3


def test_a_damaged_list_of_locks_lets_nothing_go(chat: Pulled) -> None:
    aged(chat.digest, 99)
    (Store().home / "index" / "needed-by").write_text('"/gone/hubkit.lock"\n{"half')
    assert "hubkit sync" in refused("HK-JSON", "prune").fix
    assert chat.path.is_dir()


def test_leftovers_are_swept(chat: Pulled) -> None:
    home = Store().home
    partial, lost = home / "partial" / ("a" * 64), home / "quarantine" / "x" / "weights.1234"
    dead = home / "staging" / f"work.{'0' * 16}"
    for path, size in ((partial, 100), (lost, 200), (dead / "artifact" / "weights", 400)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    dead.with_name(f"{dead.name}.lock").touch()
    os.utime(partial, (0, 0))
    assert cache("prune", dry_run=True).leftovers == 500
    assert cache("prune").leftovers == 500
    assert not partial.exists()
    assert not dead.exists()
    assert cache("prune", older_than="0d").leftovers == 200
    assert not lost.exists()


def test_remove_by_reference_and_digest(chat: Pulled, registry: str, tmp_path: Path) -> None:
    newer = ship("lora", "ana/chat", tmp_path / "chat", version="2.0.0")
    both = [chat, pull("ana/chat@2.0.0")]
    assert cache("remove", f"ana/chat@{newer}", dry_run=True).removed[0].digest == both[1].digest
    assert [one.digest for one in cache("remove", "ana/chat@2.0.0").removed] == [both[1].digest]
    pull("ana/chat")
    assert len(cache("remove", "ana/chat").removed) == 2
    assert refused("HK-MISSING", "remove", "ana/chat").where == "ana/chat"
    pull("ana/chat")
    assert isinstance(cache("remove", both[1].digest), Freed)
    assert refused("HK-REFERENCE", "remove", "./chat").status == 2
    assert cache("list") == ()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("polish",), {}),
        (("remove",), {}),
        (("verify", "ana/chat"), {}),
        (("list",), {"force": True}),
        (("prune",), {"force": True}),
        (("prune",), {"older_than": "a while"}),
        (("remove", "ana/chat"), {"older_than": "3d"}),
    ],
)
def test_arguments_that_say_nothing(registry: str, arguments: tuple[str, ...], options: dict[str, object]) -> None:
    assert refused("HK-OPTIONS", *arguments, **options).status == 2


START = """
import contextlib, sys
from hubkit.errors import HubkitError
from hubkit.registry.store import pruning
from hubkit.verbs.cache import cache
print(flush=True)
while True:
    with contextlib.suppress(HubkitError):
        cache(*sys.argv[1:])
"""


def started(*arguments: str) -> subprocess.Popen[bytes]:
    """A process that calls `cache` again and again, and has begun to."""
    process = subprocess.Popen([sys.executable, "-c", START, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def killed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended by itself"
    assert process.stdout is not None
    process.stdout.close()


def test_pulls_beside_a_prune_hold_what_they_say(chat: Pulled) -> None:
    """Everything is old again and again; whatever a pull gives is there, whole, until it is old once more."""
    beside = started("prune")
    end, went = time.monotonic() + 1.5, 0
    while time.monotonic() < end:
        if chat.path.is_dir():
            aged(chat.digest, 40)
        found = pull("ana/chat")
        went += found.fetched > 0
        assert all((found.path / name).is_file() for name in ("hubkit.json", "adapter_model.safetensors"))
    killed(beside)
    assert went > 0, "nothing was ever removed"


def test_kill_nine_while_it_is_removed(chat: Pulled) -> None:
    """It is there whole, or not at all; what is left lies in staging and is swept."""
    expected = sorted(path.name for path in chat.path.iterdir())
    for early in (True, False, False):
        pull("ana/chat")
        chat.path.chmod(0o755)
        for number in range(2000):  # so that deleting takes a while
            (chat.path / f"more.{number}").touch()
        process = started("remove", "ana/chat")
        while chat.path.exists() and not early:
            pass
        killed(process)
        if chat.path.exists():
            assert set(expected) <= {path.name for path in chat.path.iterdir()}
        else:
            assert any(path.is_dir() for path in (Store().home / "staging").iterdir()), "no kill met the work"
        assert all(one.damaged == () for one in cache("verify"))
    assert not chat.path.exists()
    assert pull("ana/chat").fetched > 0
    assert sorted(path.name for path in chat.path.iterdir()) == expected
    assert [path for path in (Store().home / "staging").iterdir() if path.is_dir()] == []


def test_a_bundle_is_read_again_after_everything_went(registry: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    make_project(project)
    sync(project)
    bundle(project, out=tmp_path / "all.tar", base=True)
    shutil.copy(project / "hubkit.lock", tmp_path / "kept.lock")
    (project / "hubkit.lock").unlink()
    assert len(cache("prune", older_than="0d").removed) == 2
    sync(project, bundle=tmp_path / "all.tar", offline=True, frozen=True)
    assert Lock.read(project).digest == Lock.read(tmp_path / "kept.lock").digest
    assert BASE.is_dir()
