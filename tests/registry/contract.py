"""The laws of a registry: one importable class, run on every implementation of `hubkit.registry.api.Registry`.

    class TestMine(RegistryContract):
        @pytest.fixture
        def registry(self) -> Registry: ...

`namespace` is an owner under which the caller may create repositories; a test never meets another test's repositories.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.registry.api import Registry

HEX40 = re.compile(r"[0-9a-f]{40}")
ABSENT = "0" * 40
LARGE = bytes(range(256)) * 4096 + b"\x00end"  # 1 MiB of binary: a large object on every server
CONTENTS = st.sampled_from([b"", b"{}", b"text\n", b"\x00\x01\xff", LARGE])
PATHS = st.sampled_from(["a.json", "b.txt", "dir/a.json", "dir/deep/w.safetensors", "ü é.md", "w.safetensors"])


def refusal(call: Callable[..., Any], *args: Any, **named: Any) -> HubkitError:
    """The refusal that a call must end in; it must be complete and printable."""
    with pytest.raises(HubkitError) as caught:
        call(*args, **named)
    assert caught.value.what
    assert caught.value.render().startswith("error[HK-")
    return caught.value


class RegistryContract:
    """Inherit and give the fixture `registry`."""

    namespace = "ana"

    @pytest.fixture
    def registry(self) -> Registry:
        raise NotImplementedError

    @pytest.fixture
    def repo(self, registry: Registry) -> str:
        """A new, empty repository."""
        name = self.fresh()
        assert registry.create(name) is True
        return name

    def fresh(self) -> str:
        """A name that nobody has."""
        return f"{self.namespace}/r{uuid.uuid4().hex[:12]}"

    def test_is_a_registry_with_a_name_without_credentials(self, registry: Registry) -> None:
        assert isinstance(registry, Registry)
        assert "://" in registry.name
        assert "@" not in registry.name
        assert "token" not in registry.name

    # repositories

    def test_create_is_true_once(self, registry: Registry) -> None:
        name = self.fresh()
        assert registry.create(name) is True
        assert registry.create(name) is False
        assert registry.create(name, private=True) is False

    def test_a_new_repository_has_a_first_commit(self, registry: Registry, repo: str) -> None:
        tip = registry.resolve(repo, None)
        assert HEX40.fullmatch(tip)
        assert registry.resolve(repo, "main") == tip
        assert registry.refs(repo).branches == {"main": tip}
        assert registry.refs(repo).tags == {}
        assert {file.path for file in registry.files(repo, tip)} <= {".gitattributes"}

    def test_private_repositories_can_be_used_by_their_owner(self, registry: Registry) -> None:
        name = self.fresh()
        registry.create(name, private=True)
        commit = registry.commit(name, {"a.json": b"{}"}, [], message="m", parent=None)
        assert registry.read(name, commit, "a.json") == b"{}"

    def test_repos_are_found_by_owner_and_by_the_start_of_their_name(self, registry: Registry) -> None:
        first, second = sorted([self.fresh(), self.fresh()])
        registry.create(first)
        registry.create(second)
        every = registry.repos()
        assert {first, second} <= set(every)
        assert list(every) == sorted(every)
        assert {first, second} <= set(registry.repos(self.namespace))
        assert all(name.startswith(f"{self.namespace}/") for name in registry.repos(self.namespace))
        assert registry.repos(first[:-3])[0] == first
        assert registry.repos(f"{self.namespace}/nobody-has-this") == ()
        assert registry.repos("nobody") == ()

    @pytest.mark.parametrize("name", ["../x", "a/b/c", "a", "", "a/../b", "a/b?c", "a/.b", "a/b--c", "a b/c", "a/b\n"])
    def test_bad_repository_names_are_refused(self, registry: Registry, name: str) -> None:
        assert refusal(registry.create, name).code == "HK-NAME"
        assert refusal(registry.resolve, name, None).code in ("HK-NAME", "HK-NOT-FOUND")

    # resolving

    def test_every_name_of_a_commit_resolves_to_it(self, registry: Registry, repo: str) -> None:
        commit = registry.commit(repo, {"a.json": b"{}"}, [], message="m", parent=None)
        registry.tag(repo, "v1.0.0", commit)
        registry.tag(repo, "release/one", commit)
        for name in (None, "main", "v1.0.0", "release/one", commit):
            assert registry.resolve(repo, name) == commit

    def test_what_is_not_there_is_not_found(self, registry: Registry, repo: str) -> None:
        tip = registry.resolve(repo, None)
        assert refusal(registry.resolve, self.fresh(), None).code == "HK-NOT-FOUND"
        assert refusal(registry.refs, self.fresh()).code == "HK-NOT-FOUND"
        assert refusal(registry.files, self.fresh(), tip).code == "HK-NOT-FOUND"
        for revision in ("nope", "v9.9.9", ABSENT):
            assert refusal(registry.resolve, repo, revision).code in ("HK-NO-REVISION", "HK-NOT-FOUND")
        assert refusal(registry.files, repo, ABSENT).code in ("HK-NO-REVISION", "HK-NOT-FOUND")
        assert refusal(registry.read, repo, tip, "nope.json").code == "HK-NOT-FOUND"

    # commits

    def test_a_commit_holds_what_was_sent(self, registry: Registry, repo: str, tmp_path: Path) -> None:
        source = tmp_path / "w.safetensors"
        source.write_bytes(LARGE)
        sent = {"w.safetensors": LARGE, "a b/ü+%23.json": b'{"a": 1}', "empty.txt": b"", "README.md": b"# card\n"}
        before = registry.resolve(repo, None)
        commit = registry.commit(
            repo, {**sent, "w.safetensors": source}, [], message="title\n\nmore", parent=before, branch="main"
        )
        assert HEX40.fullmatch(commit)
        assert commit != before
        assert registry.resolve(repo, None) == commit
        listed = [file for file in registry.files(repo, commit) if file.path != ".gitattributes"]
        assert [file.path for file in listed] == sorted(sent)
        for file in listed:
            assert file.size == len(sent[file.path])
            assert file.sha256 in (None, f"sha256:{hashlib.sha256(sent[file.path]).hexdigest()}")
            assert registry.read(repo, commit, file.path) == sent[file.path]
        large = next(file for file in listed if file.path == "w.safetensors")
        assert large.sha256 is not None

    def test_equal_files_do_not_disturb_each_other(self, registry: Registry, repo: str, tmp_path: Path) -> None:
        add: dict[str, Path | bytes] = {f"{number}.safetensors": LARGE for number in range(4)}
        for number in range(4, 8):
            add[f"{number}.safetensors"] = tmp_path / f"{number}"
            (tmp_path / f"{number}").write_bytes(LARGE)
        commit = registry.commit(repo, add, [], message="m", parent=None)
        for path in add:
            assert registry.read(repo, commit, path) == LARGE

    def test_files_may_be_replaced_deleted_and_replaced_by_themselves(self, registry: Registry, repo: str) -> None:
        first = registry.commit(repo, {"a.json": b"1", "b.txt": b"2", "c/d.txt": b"3"}, [], message="m", parent=None)
        second = registry.commit(repo, {"a.json": LARGE}, ["b.txt"], message="m", parent=first)
        kept = {file.path for file in registry.files(repo, second)} - {".gitattributes"}
        assert kept == {"a.json", "c/d.txt"}
        assert registry.read(repo, second, "a.json") == LARGE
        assert registry.read(repo, first, "a.json") == b"1"
        assert registry.commit(repo, {"a.json": LARGE}, [], message="same", parent=second) == second

    def test_deleting_what_is_absent_changes_nothing(self, registry: Registry, repo: str) -> None:
        tip = registry.resolve(repo, None)
        fault = refusal(registry.commit, repo, {"a.json": b"{}"}, ["nope.txt"], message="m", parent=tip)
        assert fault.code == "HK-NOT-FOUND"
        assert registry.resolve(repo, None) == tip

    def test_a_stale_parent_is_refused_and_changes_nothing(self, registry: Registry, repo: str) -> None:
        first = registry.resolve(repo, None)
        second = registry.commit(repo, {"a.json": b"1"}, [], message="m", parent=first)
        fault = refusal(registry.commit, repo, {"a.json": b"2", "w.safetensors": LARGE}, [], message="m", parent=first)
        assert fault.code == "HK-STALE"
        assert registry.resolve(repo, None) == second
        assert registry.read(repo, second, "a.json") == b"1"

    def test_of_racing_writers_with_one_parent_exactly_one_wins(self, registry: Registry, repo: str) -> None:
        parent = registry.resolve(repo, None)
        start, results = threading.Barrier(4), []

        def write(number: int) -> None:
            start.wait()
            try:
                add = {"a.json": b"%d" % number, f"own{number}.json": b"{}"}
                results.append((number, registry.commit(repo, add, [], message="race", parent=parent)))
            except HubkitError as fault:
                results.append((number, fault.code))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = [(number, commit) for number, commit in results if HEX40.fullmatch(commit)]
        assert len(won) == 1, results
        assert [code for _, code in results if not HEX40.fullmatch(code)] == ["HK-STALE"] * 3
        assert registry.resolve(repo, None) == won[0][1]
        names = {file.path for file in registry.files(repo, won[0][1])} - {".gitattributes"}
        assert names == {"a.json", f"own{won[0][0]}.json"}

    def test_racing_writers_without_a_parent_lose_nothing(self, registry: Registry, repo: str) -> None:
        faults: list[str] = []

        def write(number: int) -> None:
            for _ in range(20):
                try:
                    registry.commit(repo, {f"{number}.json": b"{}"}, [], message="race", parent=None)
                    return
                except HubkitError as fault:
                    faults.append(fault.code)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(faults) <= {"HK-STALE"}
        names = {file.path for file in registry.files(repo, registry.resolve(repo, None))} - {".gitattributes"}
        assert names == {f"{number}.json" for number in range(4)}

    @pytest.mark.parametrize(
        "path",
        [
            "../x.json",
            "/x.json",
            "a/../x.json",
            "a\\x.json",
            "a/",
            "a//b.json",
            ".",
            "",
            "x\x00.json",
            "x\u202e.json",
            "con.json",
            ".git/config",
            "a:b.json",
            "e\u0301.json",
            "x" * 300 + ".json",
        ],
    )
    def test_hostile_file_names_are_refused(self, registry: Registry, repo: str, path: str) -> None:
        tip = registry.resolve(repo, None)
        fault = refusal(registry.commit, repo, {"good.json": b"{}", path: b"{}"}, [], message="m", parent=tip)
        assert fault.code == "HK-NAME"
        assert registry.resolve(repo, None) == tip

    def test_twins_and_clashes_are_refused(self, registry: Registry, repo: str) -> None:
        for add in ({"A.json": b"1", "a.json": b"2"}, {"a": b"1", "a/b.json": b"2"}):
            assert refusal(registry.commit, repo, add, [], message="m", parent=None).code == "HK-NAME"

    def test_only_plain_files_are_sent(self, registry: Registry, repo: str, tmp_path: Path) -> None:
        (tmp_path / "real.json").write_bytes(b"{}")
        (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
        os.mkfifo(tmp_path / "pipe.json")
        for name in ("link.json", "pipe.json", "absent.json", "."):
            fault = refusal(registry.commit, repo, {"a.json": tmp_path / name}, [], message="m", parent=None)
            assert fault.code in ("HK-SYMLINK", "HK-NOT-FOUND")

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(st.dictionaries(PATHS, CONTENTS | st.none(), min_size=1, max_size=4), min_size=1, max_size=4))
    def test_history_is_a_list_of_dictionaries(self, registry: Registry, steps: list[dict[str, bytes | None]]) -> None:
        """Against the simplest model there is: after any commits, every old commit still holds exactly its files."""
        repo = self.fresh()
        registry.create(repo)
        now: dict[str, bytes] = {}
        past: dict[str, dict[str, bytes]] = {}
        for step in steps:
            add = {path: data for path, data in step.items() if data is not None}
            gone = [path for path, data in step.items() if data is None and path in now]
            now = {path: data for path, data in {**now, **add}.items() if path not in gone}
            tip = registry.resolve(repo, None)
            commit = registry.commit(repo, add, gone, message="step", parent=tip) if add or gone else tip
            assert past.setdefault(commit, dict(now)) == now
        for commit, files in past.items():
            listed = {file.path: file.size for file in registry.files(repo, commit) if file.path != ".gitattributes"}
            assert listed == {path: len(data) for path, data in files.items()}
            for path, data in files.items():
                assert registry.read(repo, commit, path) == data

    # reading

    def test_ranges_are_clipped_like_slices(self, registry: Registry, repo: str) -> None:
        for data, path in ((b"0123456789", "small.txt"), (LARGE, "w.safetensors"), (b"", "empty.txt")):
            commit = registry.commit(repo, {path: data}, [], message="m", parent=None)
            size = len(data)
            for start, stop in (
                (0, None),
                (0, 4),
                (3, 7),
                (size // 2, None),
                (size, None),
                (size + 5, None),
                (0, 0),
                (5, 3),
                (0, size + 99),
                (max(0, size - 1), size),
            ):
                assert registry.read(repo, commit, path, start, stop) == data[start:stop]

    @pytest.mark.parametrize("data", [b"", b"text", LARGE])
    def test_download_writes_the_file_and_reports_its_bytes(
        self, registry: Registry, repo: str, tmp_path: Path, data: bytes
    ) -> None:
        commit = registry.commit(repo, {"dir/f.bin": data}, [], message="m", parent=None)
        counts: list[int] = []
        registry.download(repo, commit, "dir/f.bin", tmp_path / "f", counts.append)
        assert (tmp_path / "f").read_bytes() == data
        assert sum(counts) == len(data)

    def test_download_leaves_nothing_on_a_fault_and_keeps_what_is_there(
        self, registry: Registry, repo: str, tmp_path: Path
    ) -> None:
        commit = registry.commit(repo, {"w.safetensors": LARGE}, [], message="m", parent=None)
        out = tmp_path / "out"
        out.mkdir()
        assert refusal(registry.download, repo, commit, "nope", out / "f").code == "HK-NOT-FOUND"

        def stop(count: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            registry.download(repo, commit, "w.safetensors", out / "f", stop)
        assert list(out.iterdir()) == []
        (out / "f").write_bytes(b"mine")
        assert refusal(registry.download, repo, commit, "w.safetensors", out / "f").code == "HK-EXISTS"
        assert (out / "f").read_bytes() == b"mine"

    # history

    def test_the_log_leads_from_a_commit_to_the_first(self, registry: Registry, repo: str) -> None:
        first = registry.resolve(repo, None)
        one = registry.commit(repo, {"a.json": b"1"}, [], message="one\n\nwith more", parent=None)
        two = registry.commit(repo, {"a.json": b"2"}, [], message="two", parent=one)
        found = registry.log(repo, two)
        assert [entry.commit for entry in found] == [two, one, first]
        assert [entry.title for entry in found[:2]] == ["two", "one"]
        assert all(re.match(r"\d{4}-\d\d-\d\dT", entry.date) for entry in found)
        assert registry.log(repo, one) == found[1:]
        assert refusal(registry.log, repo, ABSENT).code in ("HK-NOT-FOUND", "HK-NO-REVISION")

    # tags

    def test_a_tag_stays_where_it_is(self, registry: Registry, repo: str) -> None:
        first = registry.commit(repo, {"a.json": b"1"}, [], message="m", parent=None)
        registry.tag(repo, "v1.0.0", first)
        registry.tag(repo, "v1.0.0", first)
        second = registry.commit(repo, {"a.json": b"2"}, [], message="m", parent=first)
        assert refusal(registry.tag, repo, "v1.0.0", second).code == "HK-VERSION-EXISTS"
        registry.tag(repo, "v1.0.1+build.2", second)
        refs = registry.refs(repo)
        assert refs.tags == {"v1.0.0": first, "v1.0.1+build.2": second}
        assert refs.branches == {"main": second}

    def test_tags_of_nothing_and_bad_tags_are_refused(self, registry: Registry, repo: str) -> None:
        assert refusal(registry.tag, repo, "v1.0.0", ABSENT).code in ("HK-NOT-FOUND", "HK-NO-REVISION")
        tip = registry.resolve(repo, None)
        for name in ("", "a b", "../x", "a..b", "HEAD", "x" * 300, "refs/heads/main"):
            refusal(registry.tag, repo, name, tip)
        assert registry.refs(repo).tags == {}
