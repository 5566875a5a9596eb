"""lock: deterministic, stable under upgrades of others, stale when its recipe moved, refused when bases differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import make_adapter

from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.registry.opening import open_registry
from hubkit.verbs.lock import lock
from hubkit.verbs.merge import merge
from hubkit.verbs.push import push

RECIPE = """
[base]
source = "{base}"

[adapters.chat]
source = "ana/chat@^0.1"

[adapters.sql]
source = "./sql"
weight = -0.5
"""


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path, adapter: Path, published_base: str) -> Path:
    """A recipe of a published base, a published adapter and a folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    push(adapter, "ana/chat")
    make_adapter(folder / "sql", tiny_llama, seed=5, rank=3, rslora=True)
    (folder / "hubkit.toml").write_text(RECIPE.format(base=published_base))
    return folder


def refused(folder: Path, check: bool = False) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        lock(folder, check=check)
    return refusal.value


def test_everything_is_pinned(project: Path) -> None:
    done = lock(project)
    pinned = Lock.read(project)
    assert done.lock == pinned
    assert done.changed == ("base", "chat", "sql")
    assert pinned.base.revision is not None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in pinned.base.files}
    chat, sql = pinned.adapters
    assert (chat.name, chat.weight, len(chat.revision or "")) == ("chat", 1.0, 40)
    assert (sql.name, sql.weight, sql.revision) == ("sql", -0.5, None)
    assert "hubkit.json" in {file.path for file in sql.files}
    assert str(project.parent) not in (project / "hubkit.lock").read_text()


def test_the_same_again_is_the_same_bytes(project: Path) -> None:
    lock(project)
    first = (project / "hubkit.lock").read_bytes()
    assert lock(project).changed == ()
    (project / "hubkit.lock").unlink()
    lock(project)
    assert (project / "hubkit.lock").read_bytes() == first


def test_a_dry_run_writes_nothing(project: Path) -> None:
    assert lock(project, dry_run=True).changed == ("base", "chat", "sql")
    assert not (project / "hubkit.lock").exists()


def test_a_pin_moves_only_with_upgrade(project: Path, adapter: Path, tiny_llama: Path) -> None:
    lock(project)
    make_adapter(adapter, tiny_llama, seed=9, version="0.1.1")
    newer = push(adapter, "ana/chat")
    assert lock(project).changed == ()
    assert lock(project, upgrade=True).changed == ("chat",)
    assert Lock.read(project).adapters[0].revision == newer.commit


def test_check_finds_a_changed_recipe_and_a_changed_folder(project: Path, tiny_llama: Path) -> None:
    assert refused(project, check=True).code == "HK-MISSING"
    lock(project)
    assert lock(project, check=True).changed == ()
    make_adapter(project / "sql", tiny_llama, seed=6)
    assert refused(project, check=True).have == ["sql: ./sql changed since"]
    recipe = project / "hubkit.toml"
    recipe.write_text(recipe.read_text().replace("-0.5", "0.5"))
    error = refused(project, check=True)
    assert error.code == "HK-LOCK-STALE"
    assert error.have == ["sql: weight 0.5 in hubkit.toml, -0.5 in the lock", "sql: ./sql changed since"]


def test_a_comment_does_not_make_it_stale(project: Path) -> None:
    lock(project)
    (project / "hubkit.toml").write_text("# ours\n" + (project / "hubkit.toml").read_text())
    lock(project, check=True)


def test_an_adapter_of_another_base_is_refused(project: Path, tiny_gpt2: Path) -> None:
    make_adapter(project / "sql", tiny_gpt2, targets="c_attn")
    error = refused(project)
    assert error.code == "HK-BASE-MISMATCH"
    assert "'sql'" in error.what
    assert not (project / "hubkit.lock").exists()
    assert lock(project, allow_base_mismatch=True).lock.overrides == ("allow-base-mismatch",)
    assert Lock.read(project).overrides == ("allow-base-mismatch",)


def test_a_base_in_a_folder(project: Path, tiny_llama: Path) -> None:
    (project / "model").symlink_to(tiny_llama)
    (project / "hubkit.toml").write_text(RECIPE.format(base="./model"))
    pinned = lock(project).lock
    assert (pinned.base.source, pinned.base.revision) == ("./model", None)
    assert pinned.base.fingerprint.weights is not None


def test_only_adapters_and_mixes_are_locked(project: Path, adapter: Path, tiny_llama: Path, registry: str) -> None:
    open_registry(None, registry).create("ana/plain")
    merge(str(tiny_llama), str(adapter), project / "merged")
    recipe = (project / "hubkit.toml").read_text()
    for source, word in (("ana/plain", "hubkit.json"), ("./merged", "merged checkpoint")):
        (project / "hubkit.toml").write_text(recipe.replace("./sql", source))
        error = refused(project)
        assert error.code == "HK-NOT-ADAPTER"
        assert word in error.what
    assert not (project / "hubkit.lock").exists()
