"""add and remove: the recipe is edited, the lock is made with it, or neither is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from projects import BASE, RECIPE, make_project, put, ship

from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.verbs.add import add
from hubkit.verbs.lock import lock
from hubkit.verbs.remove import remove


@pytest.fixture
def project(tmp_path: Path, registry: str) -> Path:
    return make_project(tmp_path / "project")


def refused(work: Any, *arguments: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        work(*arguments, **options)
    return caught.value


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_new_entry_alone_moves(project: Path, tmp_path: Path) -> None:
    lock(project)
    ship("lora", "ana/chat", tmp_path / "chat", version="1.2.0")
    put("full", project / "deep" / "exact")
    done = add(project / "deep" / "exact", weight=0.25, recipe=project)
    assert (done.name, done.source, done.weight, done.created) == ("exact", "./deep/exact", 0.25, False)
    assert done.locked.changed == ("exact",)
    assert [one.version for one in Lock.read(project).adapters] == ["1.1.0", "1.2.3", "1.2.3"]
    text = (project / "hubkit.toml").read_text()
    assert text.replace('\n[adapters.exact]\nsource = "./deep/exact"\nweight = 0.25\n', "") == RECIPE
    assert remove("exact", recipe=project).locked.changed == ("exact",)
    assert (project / "hubkit.toml").read_text() == RECIPE
    lock(project, check=True)


def test_another_revision_of_the_same_adapter_takes_its_place(project: Path) -> None:
    lock(project)
    done = add("ana/chat@1.0.0", recipe=project)
    assert done.locked.changed == ("chat",)
    assert (project / "hubkit.toml").read_text() == RECIPE.replace("ana/chat@^1", "ana/chat@1.0.0")
    assert add("ana/chat@1.0.0", weight=3, recipe=project).locked.moved[0].what == "weight"


def test_another_adapter_of_the_name_is_refused(project: Path, tmp_path: Path) -> None:
    ship("full", "bob/chat", tmp_path / "bob")
    before = state(project)
    error = refused(add, "bob/chat", recipe=project)
    assert (error.code, error.fix, error.status) == ("HK-EXISTS", "--name NAME", 2)
    assert state(project) == before
    assert add("bob/chat", name="bobs", recipe=project).name == "bobs"


def test_a_recipe_is_made_where_a_base_is_given(tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "new"
    put("lora", project / "chat one")
    monkeypatch.chdir(project)
    error = refused(add, "./chat one")
    assert (error.code, error.fix) == ("HK-MISSING", "hubkit add REFERENCE --base ORG/NAME    makes one")
    os.symlink(BASE, project / "model")
    done = add("./chat one", base="model")
    assert (done.name, done.created) == ("chat-one", True)
    made = '[base]\nsource = "./model"\n\n[adapters.chat-one]\nsource = "./chat one"\n'
    assert (project / "hubkit.toml").read_text() == made
    error = refused(add, "./chat one", base="ana/base")
    assert (error.code, error.want, error.have) == ("HK-EXISTS", ["ana/base"], ["./model"])


@pytest.mark.parametrize(
    ("reference", "options", "code"),
    [
        ("bob/chat", {}, "HK-EXISTS"),
        ("ana/nothing", {}, "HK-NOT-FOUND"),
        ("ana/base", {}, "HK-NOT-ADAPTER"),
        ("ana/more@^9", {}, "HK-NO-REVISION"),
        ("not a reference", {}, "HK-REFERENCE"),
        ("ana/more", {"name": "a/b"}, "HK-NAME"),
        ("ana/more", {"weight": float("nan")}, "HK-RECIPE"),
        ("ana/more", {"weight": float("inf")}, "HK-RECIPE"),
    ],
)
def test_what_cannot_be_locked_changes_nothing(
    project: Path, tmp_path: Path, reference: str, options: Any, code: str
) -> None:
    ship("full", "ana/more", tmp_path / "more")
    lock(project)
    before = state(project)
    assert refused(add, reference, recipe=project, **options).code == code
    assert state(project) == before


def test_a_dry_run_writes_nothing(project: Path) -> None:
    before = state(project)
    assert add("ana/chat@1.0.0", recipe=project, dry_run=True).locked.dry_run
    assert remove("sql", recipe=project, dry_run=True).names == ("sql",)
    assert state(project) == before


def test_a_lock_that_cannot_be_written_leaves_the_recipe(project: Path) -> None:
    (project / "hubkit.lock").mkdir()
    before = state(project)
    assert refused(add, "ana/chat@1.0.0", recipe=project).code == "HK-IO"
    assert state(project) == before


def test_a_name_that_is_not_there(project: Path) -> None:
    before = state(project)
    error = refused(remove, ["chat", "sqll"], recipe=project)
    assert (error.code, error.fix) == ("HK-UNKNOWN-ADAPTER", "hubkit remove sql")
    assert state(project) == before


def test_the_last_adapter_may_go(project: Path) -> None:
    remove(("chat", "sql"), recipe=project)
    assert Lock.read(project).adapters == ()
    assert "# talks to people" in (project / "hubkit.toml").read_text()
    assert add("ana/chat", recipe=project).locked.changed == ("chat",)
