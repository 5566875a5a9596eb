"""tag, yank: a version never moves; one that was taken back is chosen by no range and stays for whoever named it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from projects import publish_base, put, ship
from registry.answering import Answering

from hubkit.errors import HubkitError, Notice
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import open_registry
from hubkit.registry.versions import resolve_revision
from hubkit.verbs.copy import copy
from hubkit.verbs.lock import lock
from hubkit.verbs.outdated import outdated
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.sync import sync
from hubkit.verbs.tag import tag
from hubkit.verbs.yank import yank


@pytest.fixture
def three(registry: str, tmp_path: Path) -> dict[str, str]:
    """Three versions of ana/chat, and their commits."""
    found = {}
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        found[version] = ship("lora", "ana/chat", tmp_path / "chat", version=version)
    return found


def code(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(HubkitError) as refusal:
        call(*arguments, **options)  # type: ignore[operator]
    return refusal.value.code


def test_a_commit_gets_a_version(registry: str) -> None:
    commit = publish_base("labs/base")
    done = tag("labs/base", "v1.0.0")
    assert (done.version, done.commit, done.created) == ("1.0.0", commit, True)
    assert not tag("labs/base@main", "1.0.0").created
    assert pull("labs/base@^1", base=True).commit == commit
    place = DirectoryRegistry(Path(registry))
    place.commit("labs/base", {"README.md": b"# new"}, [], message="card", parent=None)
    assert code(tag, "labs/base", "1.0.0") == "HK-VERSION-EXISTS"
    assert place.refs("labs/base").tags == {"v1.0.0": commit}
    assert code(tag, "labs/base", "1.0") == "HK-VERSION"
    assert code(tag, "labs/base@gone", "2.0.0") == "HK-NO-REVISION"
    assert code(tag, "./labs", "2.0.0") == "HK-REFERENCE"


def test_an_adapter_has_the_version_of_its_manifest(three: dict[str, str]) -> None:
    with pytest.raises(HubkitError) as refusal:
        tag("ana/chat", "3.0.0")
    assert (refusal.value.code, refusal.value.want) == ("HK-VERSION", ["1.2.0"])
    assert tag("ana/chat", "1.2.0").created is False


def test_no_range_chooses_a_yanked_version(three: dict[str, str]) -> None:
    done = yank("ana/chat@1.2.0", reason="trained on\nthe test set")
    assert (done.reason, done.yanked) == ("trained on the test set", ("1.2.0",))
    assert pull("ana/chat@^1").revision == "v1.1.0"
    with pytest.warns(Notice, match=r"ana/chat@v1\.2\.0 was yanked: trained on the test set"):
        assert pull("ana/chat@1.2.0").commit == three["1.2.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pull(f"ana/chat@{three['1.2.0']}").commit == three["1.2.0"]  # nobody is asked
        pull("ana/chat@1.1.0")
    assert yank("ana/chat@1.2.0").commit is None  # the reason stays
    yank("ana/chat@v1.1.0")
    with pytest.raises(HubkitError) as refusal:
        pull("ana/chat@>=1.1")
    assert refusal.value.code == "HK-YANKED"
    assert refusal.value.have == ["1.2.0: trained on the test set", "1.1.0: no reason was given"]
    assert "ana/chat@1.2.0" in refusal.value.fix
    assert pull("ana/chat@^1").revision == "v1.0.0"
    assert yank("ana/chat@1.2.0", undo=True).yanked == ("1.1.0",)
    assert pull("ana/chat@^1").revision == "v1.2.0"


def test_what_cannot_be_yanked(three: dict[str, str]) -> None:
    assert code(yank, "ana/chat@1.3.0") == "HK-NO-REVISION"
    assert code(yank, "ana/chat@^1") == "HK-REFERENCE"
    assert code(yank, "ana/chat") == "HK-REFERENCE"
    assert code(yank, "ana/chat@1.2.0", reason="hf_" + "a" * 40) == "HK-SECRET"
    assert code(yank, "ana/chat@1.2.0", reason="x" * 301) == "HK-OPTIONS"
    assert code(yank, "ana/chat@1.2.0", reason="x", undo=True) == "HK-OPTIONS"


def test_a_yank_outlives_the_next_push(three: dict[str, str], tmp_path: Path) -> None:
    yank("ana/chat@1.2.0")
    push(put("lora", tmp_path / "chat", version="1.3.0"), "ana/chat")
    yank("ana/chat@1.3.0")
    assert pull("ana/chat@^1").revision == "v1.1.0"


def test_a_commit_that_came_first_is_kept(
    three: dict[str, str], registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else yanks between our look and our commit: both are yanked in the end."""
    raced: list[bool] = []
    real = DirectoryRegistry.commit

    def commit(self: DirectoryRegistry, *arguments: object, **options: object) -> str:
        if not raced:
            raced.append(True)
            yank("ana/chat@1.1.0", reason="first")
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectoryRegistry, "commit", commit)
    assert yank("ana/chat@1.2.0").yanked == ("1.1.0", "1.2.0")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"schema": "hubkit/yanked/2"}', '{"schema": "hubkit/yanked/1", "versions": 1}']
)
def test_a_list_that_cannot_be_read_is_not_passed_over(three: dict[str, str], registry: str, text: str) -> None:
    place = DirectoryRegistry(Path(registry))
    place.commit("ana/chat", {".hubkit/yanked.json": text.encode()}, [], message="x", parent=None)
    assert code(pull, "ana/chat@^1") in ("HK-SCHEMA", "HK-JSON", "HK-NEWER")
    assert pull(f"ana/chat@{three['1.0.0']}").commit == three["1.0.0"]
    with pytest.warns(Notice, match="cannot be read"):
        assert pull("ana/chat@1.0.0").commit == three["1.0.0"]
    if "yanked/2" in text:
        assert code(yank, "ana/chat@1.2.0") == "HK-NEWER"
    else:
        yank("ana/chat@1.2.0")
        assert pull("ana/chat@^1").revision == "v1.1.0"


def test_a_lock_keeps_what_was_yanked_and_outdated_says_so(
    three: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_base()
    project = tmp_path / "project"
    project.mkdir()
    recipe = '[base]\nsource = "ana/base"\n[adapters.chat]\nsource = "ana/chat@^1"\n'
    (project / "hubkit.toml").write_text(recipe)
    lock(project)
    before = (project / "hubkit.lock").read_bytes()
    yank("ana/chat@1.2.0", reason="bad")
    assert not lock(project).changed
    assert (project / "hubkit.lock").read_bytes() == before
    (row,) = [one for one in outdated(project) if one.name == "chat"]
    assert (row.state, row.yanked, row.newest.split()[0]) == ("behind", "bad", "1.1.0")
    assert lock(project, upgrade=True).changed == ("chat",)
    (row,) = [one for one in outdated(project) if one.name == "chat"]
    assert (row.state, row.yanked) == ("current", None)
    yank("ana/chat@1.0.0")
    yank("ana/chat@1.1.0")
    (row,) = [one for one in outdated(project) if one.name == "chat"]
    assert row.state == "yanked"


def test_a_lock_is_brought_from_wherever_its_yanked_version_lies(
    three: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the commit is another one: then the version leads to it, and its digest proves it."""
    publish_base()
    (tmp_path / "hubkit.toml").write_text('[base]\nsource = "ana/base"\n[adapters.chat]\nsource = "ana/chat@^1"\n')
    lock(tmp_path)
    for version in three:
        yank(f"ana/chat@{version}")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "second"))
    assert {one.name for one in sync(tmp_path).entries} == {"base", "chat"}
    other = str(tmp_path / "other")
    copy("ana/chat", other, all_versions=True)
    copy("ana/base", other)
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "third"))
    monkeypatch.setenv("HUBKIT_REGISTRY", other)
    with pytest.warns(Notice, match="was yanked"):
        assert {one.name for one in sync(tmp_path).entries} == {"base", "chat"}


def test_asking_what_was_yanked_costs_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is the one which a pull reads anyway, where the version is the newest; an exact commit costs nothing."""
    commit, model = "1" * 40, "/api/models/ana/chat"
    refs = {
        "branches": [{"name": "main", "targetCommit": commit}],
        "tags": [{"name": "v1.0.0", "targetCommit": commit}],
    }
    with Answering() as server:
        server.routes[f"{model}/refs"] = (200, {}, refs)
        server.routes[f"{model}/tree/{commit}"] = (200, {}, [])
        server.routes[f"{model}/revision/{commit}"] = (200, {}, {"sha": commit})
        for revision, asked in (("^1", ["refs", "tree"]), ("1.0.0", ["refs", "tree"]), (commit, ["revision", "tree"])):
            place = open_registry(None, server.url)
            server.seen.clear()
            found = resolve_revision(place, "ana/chat", revision).commit
            assert place.files("ana/chat", found) == ()
            assert [path.removeprefix(f"{model}/").partition("/")[0] for path, _, _ in server.seen] == asked
        server.seen.clear()
        assert resolve_revision(open_registry(None, server.url), "ana/chat", "main").commit == commit
        assert [path for path, _, _ in server.seen] == [f"{model}/refs"]
