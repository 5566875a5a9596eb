"""The directory registry: atomic commits under threads, processes and kill -9; names, links, damage."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nobody import as_nobody

from hubkit.documents.drafts import scratch
from hubkit.errors import HubkitError
from hubkit.registry.api import Registry
from hubkit.registry.directory import objects
from hubkit.registry.directory.directory import MAX_FILES, DirectoryRegistry

REPO = "ana/chat"
GROWN = Path("/proc/self/status")


@pytest.fixture
def registry(tmp_path: Path) -> DirectoryRegistry:
    made = DirectoryRegistry(tmp_path / "registry")
    assert made.create(REPO) is True
    return made


def refused(code: str, action: Callable[[], object]) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        action()
    assert caught.value.code == code
    return caught.value


def push(registry: DirectoryRegistry, files: dict[str, bytes | Path], parent: str | None = None, **more: str) -> str:
    return registry.commit(REPO, files, (), message="m", parent=parent, **more)


def sound(registry: DirectoryRegistry) -> None:
    """Everything reachable can be read and has its digest."""
    for repo in registry.repos():
        for commit in {*registry.refs(repo).branches.values(), *registry.refs(repo).tags.values()}:
            for made in registry.history(repo, commit):
                for path, entry in registry.tree(repo, made.id).items():
                    data = registry.read(repo, made.id, path)
                    assert len(data) == entry.size
                    assert hashlib.sha256(data).hexdigest() == entry.sha256


def test_is_a_registry(registry: DirectoryRegistry) -> None:
    assert isinstance(registry, Registry)
    assert registry.name.startswith("file:///")
    assert registry.create(REPO) is False


def test_what_is_committed_is_read_back(registry: DirectoryRegistry, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\0\1binary")
    commit = push(registry, {"a/ü b.json": b"{}", "w.safetensors": tmp_path / "f"})
    assert (
        registry.resolve(REPO, None) == registry.resolve(REPO, "main") == registry.resolve(REPO, commit[:8]) == commit
    )
    listed = {f.path: (f.size, f.sha256) for f in registry.files(REPO, commit)}
    assert listed["w.safetensors"] == (8, "sha256:" + hashlib.sha256(b"\0\1binary").hexdigest())
    assert registry.read(REPO, commit, "w.safetensors", 2, 5) == b"bin"
    assert registry.read(REPO, commit, "w.safetensors", 6, 500) == b"ry"
    steps: list[int] = []
    registry.download(REPO, commit, "w.safetensors", tmp_path / "out", steps.append)
    assert (tmp_path / "out").read_bytes() == b"\0\1binary"
    assert sum(steps) == 8
    after = registry.commit(REPO, {"n": b"1"}, ["a/ü b.json"], message="x", parent=commit)
    assert [f.path for f in registry.files(REPO, after)] == ["n", "w.safetensors"]
    assert [f.path for f in registry.files(REPO, commit)] == ["a/ü b.json", "w.safetensors"]


def test_same_content_is_the_same_commit_in_any_directory(registry: DirectoryRegistry, tmp_path: Path) -> None:
    other = DirectoryRegistry(tmp_path / "elsewhere")
    other.create("bob/other")
    ids = [r.commit(n, {"a": b"1"}, (), message="m", parent=None) for r, n in ((registry, REPO), (other, "bob/other"))]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 40
    assert push(registry, {"a": b"1"}) == ids[0], "nothing to change: the tip stays"


def test_git_names_agree_with_git(registry: DirectoryRegistry, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is the oracle here")
    commit = push(registry, {"t.md": b"hello\n", "e.txt": b""})
    for path, entry in registry.tree(REPO, commit).items():
        told = subprocess.run(
            ["git", "hash-object", "--stdin"], input=registry.read(REPO, commit, path), capture_output=True, check=True
        )
        assert entry.oid == told.stdout.decode().strip()


def test_a_stale_parent_is_refused_and_nothing_changes(registry: DirectoryRegistry) -> None:
    first = push(registry, {"a": b"1"})
    second = push(registry, {"a": b"2"}, parent=first)
    error = refused("HK-STALE", lambda: push(registry, {"a": b"3"}, parent=first))
    assert second in "".join(error.have)
    assert registry.resolve(REPO) == second


def test_threads_with_one_parent_one_wins(registry: DirectoryRegistry) -> None:
    parent = registry.resolve(REPO)
    codes: list[str] = []

    def work(n: int) -> None:
        try:
            push(registry, {"a": str(n).encode()}, parent=parent)
            codes.append("ok")
        except HubkitError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == ["HK-STALE"] * 5 + ["ok"]


def _append(root: Path, n: int) -> None:
    registry = DirectoryRegistry(root)
    for m in range(5):
        registry.commit(REPO, {f"{n}-{m}": b"x"}, (), message="m", parent=None)


def test_processes_without_parent_all_land(registry: DirectoryRegistry) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(registry.root, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    tip = registry.resolve(REPO)
    assert len(registry.files(REPO, tip)) == 20
    assert len(registry.history(REPO, tip)) == 21


def _die_at(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a process that kills itself before its `step`-th call that changes the disk; True: it ended."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*a: object, **k: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)

            return call

        for name in ("fsync", "replace", "rename", "mkdir", "fchmod", "open", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            action()
            os._exit(0)
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("what", ["commit", "create", "tag", "delete", "move"])
def test_killed_at_any_point_it_is_the_old_state_or_the_new(registry: DirectoryRegistry, what: str) -> None:
    step, ended = 0, False
    while not ended:
        step += 1
        content, name = f"content {step}".encode(), f"ana/new{step}"
        before = registry.resolve(REPO)
        if what in ("delete", "move") and not registry.exists("ana/gone"):
            registry.create("ana/gone")
        actions: dict[str, Callable[[], object]] = {
            "commit": lambda: push(registry, {"f": content, "g/h": content * 2}, parent=before),  # noqa: B023
            "create": lambda: registry.create(name),  # noqa: B023
            "tag": lambda: registry.tag(REPO, f"v{step}", before),  # noqa: B023
            "delete": lambda: registry.delete("ana/gone"),
            "move": lambda: registry.move("ana/gone", name),  # noqa: B023
        }
        ended = _die_at(step, actions[what])
        sound(registry)
        after = registry.resolve(REPO)
        if after != before:
            assert {registry.read(REPO, after, "f"), registry.read(REPO, after, "g/h")} == {content, content * 2}
        assert registry.exists("ana/gone") + registry.exists(name) <= 1
        push(registry, {"alive": str(step).encode()})  # no lock is left behind
    assert step > 5
    left = [p for p in (registry.root / "scratch").iterdir() if p.is_dir()]
    assert left == [], "what dead processes left is swept"


def test_scratch_of_the_living_is_not_swept(tmp_path: Path) -> None:
    with scratch(tmp_path) as mine:
        (mine / "f").touch()
        with scratch(tmp_path) as other:
            assert (mine / "f").exists()
            assert other != mine
    assert not mine.exists()


def test_scratch_of_many_at_once(tmp_path: Path) -> None:
    """One owner finishing while another sweeps is no fault of either."""
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(60):
                with scratch(tmp_path) as mine:
                    (mine / "f").touch()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_only_plain_files_go_in(registry: DirectoryRegistry, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    before = registry.resolve(REPO)
    for name in ("link", "pipe", "."):
        refused("HK-SYMLINK", partial(push, registry, {"f": tmp_path / name}))
    refused("HK-NOT-FOUND", lambda: push(registry, {"f": tmp_path / "absent"}))
    refused("HK-IO", lambda: push(registry, {"f": tmp_path / "real" / "below"}))
    assert registry.resolve(REPO) == before


def test_links_inside_the_registry_are_refused(registry: DirectoryRegistry, tmp_path: Path) -> None:
    commit = push(registry, {"f": b"secret of another"})
    (registry.root / "repos" / "eve").symlink_to(registry.root / "repos" / "ana")
    refused("HK-SYMLINK", lambda: registry.resolve("eve/chat"))
    stored = registry.object(REPO, registry.entry(REPO, commit, "f").sha256)
    (tmp_path / "other").write_bytes(stored.read_bytes())
    stored.unlink()
    stored.symlink_to(tmp_path / "other")
    refused("HK-SYMLINK", lambda: registry.read(REPO, commit, "f"))


def test_links_are_refused_where_the_system_follows_all(
    registry: DirectoryRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no O_NOFOLLOW."""
    monkeypatch.setattr(objects, "_NO_FOLLOW", 0)
    monkeypatch.setattr(objects, "_PLAIN", os.O_RDONLY)
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused("HK-SYMLINK", lambda: push(registry, {"f": tmp_path / "link"}))
    push(registry, {"f": tmp_path / "real"})


@pytest.mark.skipif(not GROWN.exists(), reason="needs Linux's /proc")
def test_a_file_longer_than_it_says_is_changing(registry: DirectoryRegistry) -> None:
    """What /proc holds is longer than its size, like a file that something writes to."""
    assert GROWN.stat().st_size == 0
    assert refused("HK-FILES", lambda: push(registry, {"f": GROWN})).where == "f"


def test_what_arrives_is_held_against_what_was_announced(registry: DirectoryRegistry) -> None:
    data = b"12345"
    digest = hashlib.sha256(data).hexdigest()

    def receive(limit: int, want: str) -> str:
        with registry.receive(REPO, limit) as incoming:
            incoming.write(data)
            return incoming.finish(want)

    refused("HK-LIMIT", lambda: receive(4, digest))
    refused("HK-FILES", lambda: receive(5, "0" * 64))
    refused("HK-NOT-FOUND", lambda: registry.object(REPO, digest))
    assert receive(5, digest) == digest
    assert registry.object(REPO, digest).read_bytes() == data
    refused("HK-FILES", lambda: registry.object(REPO, "../refs.json"))


def test_too_many_files_are_refused(registry: DirectoryRegistry) -> None:
    refused("HK-LIMIT", lambda: push(registry, {str(number): b"" for number in range(MAX_FILES + 1)}))


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a//b", "a/../b", "a\\b", "con.txt", "a\u202eb", ".git/config", "e\u0301"]
)
def test_bad_file_names_are_refused(registry: DirectoryRegistry, path: str) -> None:
    refused("HK-NAME", lambda: push(registry, {path: b"x"}))


def test_names_that_clash_are_refused_against_what_is_there(registry: DirectoryRegistry) -> None:
    push(registry, {"adapter": b"x"})
    refused("HK-NAME", lambda: push(registry, {"Adapter": b"x"}))
    refused("HK-NAME", lambda: push(registry, {"adapter/config.json": b"x"}))


@pytest.mark.parametrize(
    "repo", ["chat", "a/b/c", "../x/y", "a/..", "a/.b", "-a/b", "a/b-", "a--b/c", "a/b.git", "ä/b", ""]
)
def test_bad_repository_names_are_refused(registry: DirectoryRegistry, repo: str) -> None:
    refused("HK-NAME", lambda: registry.create(repo))


def test_a_repository_differing_in_case_is_refused(registry: DirectoryRegistry) -> None:
    refused("HK-EXISTS", lambda: registry.create("Ana/Chat"))


@pytest.mark.parametrize("name", ["", "a..b", "/a", "a/", "HEAD", "a b", "0" * 40, "refs/x", "a.lock", "~"])
def test_bad_tag_names_are_refused(registry: DirectoryRegistry, name: str) -> None:
    refused("HK-NAME", lambda: registry.tag(REPO, name, registry.resolve(REPO)))


def test_a_tag_stays_where_it_is(registry: DirectoryRegistry) -> None:
    first = push(registry, {"a": b"1"})
    registry.tag(REPO, "v1.0.0", first)
    registry.tag(REPO, "v1.0.0", first)
    second = push(registry, {"a": b"2"})
    refused("HK-VERSION-EXISTS", lambda: registry.tag(REPO, "v1.0.0", second))
    refused("HK-NOT-FOUND", lambda: registry.tag(REPO, "v2.0.0", "0" * 40))
    assert registry.refs(REPO).tags == {"v1.0.0": first}
    assert registry.resolve(REPO, "v1.0.0") == registry.resolve(REPO, "refs/tags/v1.0.0") == first


def test_branches(registry: DirectoryRegistry) -> None:
    first = push(registry, {"a": b"1"})
    registry.branch(REPO, "try/x", first)
    tip = push(registry, {"b": b"1"}, branch="try/x")
    assert registry.resolve(REPO) == first
    assert registry.resolve(REPO, "try/x") == tip
    refused("HK-EXISTS", lambda: registry.branch(REPO, "try/x", first))
    refused("HK-NOT-FOUND", lambda: push(registry, {"b": b"2"}, branch="nope"))
    registry.delete_branch(REPO, "try/x")
    refused("HK-FORBIDDEN", lambda: registry.delete_branch(REPO, "main"))
    refused("HK-NOT-FOUND", lambda: registry.delete_branch(REPO, "try/x"))
    registry.tag(REPO, "v1", first)
    registry.delete_tag(REPO, "v1")
    refused("HK-NOT-FOUND", lambda: registry.delete_tag(REPO, "v1"))


def test_absent_things_are_not_found(registry: DirectoryRegistry, tmp_path: Path) -> None:
    tip = registry.resolve(REPO)
    refused("HK-NOT-FOUND", lambda: registry.resolve("ana/none"))
    refused("HK-NOT-FOUND", lambda: registry.resolve(REPO, "v9"))
    refused("HK-NOT-FOUND", lambda: registry.read(REPO, tip, "none"))
    refused("HK-NOT-FOUND", lambda: registry.files(REPO, "0" * 40))
    refused("HK-NOT-FOUND", lambda: registry.files(REPO, "../repo.json"))
    refused("HK-NOT-FOUND", lambda: registry.commit(REPO, {}, ["none"], message="m", parent=None))
    refused("HK-NOT-FOUND", lambda: DirectoryRegistry(tmp_path / "nowhere").resolve(REPO))
    assert DirectoryRegistry(tmp_path / "nowhere").repos() == ()
    assert not (tmp_path / "nowhere").exists(), "asking makes nothing"


def test_move_delete_and_privacy(registry: DirectoryRegistry) -> None:
    commit = push(registry, {"a": b"1"})
    registry.set_private(REPO, True)
    assert registry.private(REPO) is True
    registry.create("bob/b")
    refused("HK-EXISTS", lambda: registry.move(REPO, "bob/b"))
    registry.move(REPO, "bob/c")
    assert registry.resolve("bob/c") == commit
    assert registry.private("bob/c") is True
    assert registry.repos("bob") == ("bob/b", "bob/c")
    assert registry.repos("bob/c") == ("bob/c",)
    assert registry.repos("bo") == ()
    registry.delete("bob/c")
    refused("HK-NOT-FOUND", lambda: registry.resolve("bob/c"))


def test_a_newer_format_is_refused_before_anything_is_read(registry: DirectoryRegistry) -> None:
    (registry.root / "registry.json").write_text(json.dumps({"schema": "hubkit/registry/2"}))
    refused("HK-NEWER", lambda: DirectoryRegistry(registry.root).resolve(REPO))
    refused("HK-NEWER", lambda: DirectoryRegistry(registry.root).create("ana/other"))


def test_a_directory_of_somebody_else(common: Path) -> None:
    registry = DirectoryRegistry(common / "registry")
    registry.create(REPO)
    assert as_nobody(lambda: registry.resolve(REPO)) == ""
    for folder in (registry.root / "scratch", registry.root / "repos" / REPO / "commits"):
        folder.chmod(0o555)
    assert as_nobody(lambda: push(registry, {"a": b"1"})) == "HK-FORBIDDEN"
    refs = registry.root / "repos" / REPO / "refs.json"
    refs.chmod(0)
    assert as_nobody(lambda: registry.resolve(REPO)) == "HK-FORBIDDEN"
    registry.root.chmod(0)
    assert as_nobody(lambda: DirectoryRegistry(registry.root).resolve(REPO)) == "HK-FORBIDDEN"
    assert as_nobody(lambda: DirectoryRegistry(registry.root).create(REPO)) == "HK-FORBIDDEN"
    registry.root.chmod(0o755)


def test_a_directory_that_is_none(registry: DirectoryRegistry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("HK-IO", lambda: DirectoryRegistry(root).create(REPO))  # noqa: B023


def test_squash_keeps_files_and_old_commits(registry: DirectoryRegistry) -> None:
    old = push(registry, {"a": b"1"})
    new = registry.squash(REPO, "main", "one")
    assert [c.title for c in registry.history(REPO, new)] == ["one"]
    assert registry.read(REPO, new, "a") == registry.read(REPO, old, "a") == b"1"


CHANGES = st.lists(
    st.tuples(st.sampled_from(["a", "b", "d/e", "d/f"]), st.one_of(st.none(), st.binary(max_size=20))), max_size=4
)


@settings(max_examples=15, deadline=None)
@given(commits=st.lists(CHANGES, max_size=5))
def test_any_history_reads_back(
    tmp_path_factory: pytest.TempPathFactory, commits: list[list[tuple[str, bytes | None]]]
) -> None:
    registry = DirectoryRegistry(tmp_path_factory.mktemp("any"))
    registry.create(REPO)
    now: dict[str, bytes] = {}
    seen = {registry.resolve(REPO): dict(now)}
    for changes in commits:
        add = {path: data for path, data in changes if data is not None}
        delete = {path for path, data in changes if data is None} & now.keys() - add.keys()
        now = {k: v for k, v in {**now, **add}.items() if k not in delete}
        seen[registry.commit(REPO, add, sorted(delete), message="m", parent=None)] = dict(now)
    for commit, files in seen.items():
        assert {f.path: registry.read(REPO, commit, f.path) for f in registry.files(REPO, commit)} == files
