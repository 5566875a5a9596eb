"""push: one commit, one tag, or nothing; a dropped race, a killed push and a hand-written card are survived."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter

from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push


def state(registry: str) -> dict[str, Any]:
    place = DirectoryRegistry(Path(registry))
    return {repo: (dict(place.refs(repo).branches), dict(place.refs(repo).tags)) for repo in place.repos()}


def test_one_commit_and_a_tag(adapter: Path, registry: str) -> None:
    done = push(adapter, "ana/chat")
    place = DirectoryRegistry(Path(registry))
    refs = place.refs("ana/chat")
    assert refs.tags == {"v0.1.0": done.commit}
    assert refs.branches == {"main": done.commit}
    assert len(place.history("ana/chat", done.commit or "")) == 2  # the repository's own first commit, and ours
    assert place.read("ana/chat", done.commit or "", "hubkit.json") == (adapter / "hubkit.json").read_bytes()
    assert done.created
    assert done.digest == Manifest.read(adapter).digest
    assert {"hubkit.json", "adapter_model.safetensors", "README.md"} <= set(done.uploaded)


def test_the_same_bytes_again_change_nothing(adapter: Path, registry: str) -> None:
    first = push(adapter, "ana/chat")
    before = state(registry)
    again = push(adapter, "ana/chat")
    assert again.unchanged
    assert again.commit == first.commit
    assert state(registry) == before


def test_a_dry_run_sends_nothing(adapter: Path, registry: str) -> None:
    plan = push(adapter, "ana/chat", dry_run=True)
    assert plan.created
    assert plan.commit is None
    assert "hubkit.json" in plan.uploaded
    assert not Path(registry).exists()


def test_a_published_version_never_changes(adapter: Path, registry: str, tiny_llama: Path) -> None:
    push(adapter, "ana/chat")
    before = state(registry)
    make_adapter(adapter, tiny_llama, seed=1)
    with pytest.raises(HubkitError) as refusal:
        push(adapter, "ana/chat")
    assert refusal.value.code == "HK-VERSION-EXISTS"
    assert "--version 0.1.1" in refusal.value.fix
    assert state(registry) == before


def test_the_next_version_replaces_files_and_keeps_those_of_others(
    adapter: Path, registry: str, tiny_llama: Path
) -> None:
    first = push(adapter, "ana/chat")
    place = DirectoryRegistry(Path(registry))
    place.commit("ana/chat", {"notes.txt": b"by hand"}, [], message="notes", parent=None)
    make_adapter(adapter, tiny_llama, seed=1, version="0.2.0")
    second = push(adapter, "ana/chat")
    assert second.commit != first.commit
    assert place.refs("ana/chat").tags == {"v0.1.0": first.commit, "v0.2.0": second.commit}
    assert "notes.txt" in {file.path for file in place.files("ana/chat", second.commit or "")}
    assert "adapter_config.json" not in second.uploaded  # unchanged: not sent again


def test_text_written_on_the_registry_survives(adapter: Path, registry: str, tiny_llama: Path) -> None:
    push(adapter, "ana/chat")
    place = DirectoryRegistry(Path(registry))
    tip = place.resolve("ana/chat")
    edited = place.read("ana/chat", tip, "README.md") + b"\nWritten on the Hub.\n"
    place.commit("ana/chat", {"README.md": edited}, [], message="card", parent=tip)
    make_adapter(adapter, tiny_llama, seed=1, version="0.2.0")
    done = push(adapter, "ana/chat")
    card = place.read("ana/chat", done.commit or "", "README.md").decode()
    assert "Written on the Hub." in card
    assert "`0.2.0`" in card


def test_a_push_killed_before_its_tag_is_finished_by_the_next(
    adapter: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryRegistry, "tag", killed)
        with pytest.raises(KeyboardInterrupt):
            push(adapter, "ana/chat")
    place = DirectoryRegistry(Path(registry))
    assert place.refs("ana/chat").tags == {}
    done = push(adapter, "ana/chat")
    assert done.commit == place.resolve("ana/chat")
    assert place.refs("ana/chat").tags == {"v0.1.0": done.commit}


def test_a_commit_that_came_first_is_kept(adapter: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody commits between our look and our commit: both commits are there in the end."""
    place = DirectoryRegistry(Path(registry))
    place.create("ana/chat")
    real = DirectoryRegistry.commit
    raced: list[str] = []

    def commit(self: DirectoryRegistry, *args: Any, **options: Any) -> str:
        if not raced:
            raced.append(real(self, "ana/chat", {"notes.txt": b"first"}, [], message="first", parent=None))
        return real(self, *args, **options)

    monkeypatch.setattr(DirectoryRegistry, "commit", commit)
    done = push(adapter, "ana/chat")
    assert {"notes.txt", "hubkit.json"} <= {file.path for file in place.files("ana/chat", done.commit or "")}


def test_bytes_that_changed_on_the_way_are_noticed(
    adapter: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DirectoryRegistry.commit

    def commit(self: DirectoryRegistry, repo: str, add: Any, *args: Any, **options: Any) -> str:
        return real(self, repo, {**add, "tensors.json": b"{}"}, *args, **options)

    monkeypatch.setattr(DirectoryRegistry, "commit", commit)
    with pytest.raises(HubkitError) as refusal:
        push(adapter, "ana/chat")
    assert refusal.value.code == "HK-FILES"
    assert refusal.value.have == ["tensors.json: other bytes"]
    assert DirectoryRegistry(Path(registry)).refs("ana/chat").tags == {}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / "tensors.json").write_text("{}"), "HK-FILES"),
        (lambda folder: (folder / "hubkit.json").unlink(), "HK-NOT-ADAPTER"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "HK-FILES"),
    ],
    ids=["changed", "no manifest", "missing"],
)
def test_nothing_broken_leaves(adapter: Path, registry: str, spoil: Any, code: str) -> None:
    spoil(adapter)
    with pytest.raises(HubkitError) as refusal:
        push(adapter, "ana/chat")
    assert refusal.value.code == code
    assert not Path(registry).exists()


def test_nan_does_not_leave(tmp_path: Path, tiny_llama: Path, registry: str) -> None:
    import torch
    from safetensors.torch import load_file, save

    from hubkit.artifact.folder import write_adapter

    folder = make_adapter(tmp_path / "nan", tiny_llama)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = torch.nan
    manifest = Manifest.read(folder)
    files: dict[str, bytes | Path] = {e.path: (folder / e.path).read_bytes() for e in manifest.files}
    files["adapter_model.safetensors"] = save(tensors, {"format": "pt"})
    write_adapter(folder, manifest, files, replace=True)
    with pytest.raises(HubkitError) as refusal:
        push(folder, "ana/chat")
    assert refusal.value.code == "HK-NAN"
    assert len(refusal.value.have) == 1
    assert refusal.value.have[0].rpartition(".")[0] in name
    assert not Path(registry).exists()


@pytest.mark.parametrize("repo", ["chat", "ana/chat@v1", "./chat", "a/b/c"])
def test_where_to_must_be_a_repository(adapter: Path, registry: str, repo: str) -> None:
    with pytest.raises(HubkitError) as refusal:
        push(adapter, repo)
    assert (refusal.value.code, refusal.value.status) == ("HK-REFERENCE", 2)


def test_a_base_is_published_and_pulled(tiny_llama: Path, registry: str, tmp_path: Path) -> None:
    """With a directory alone: everything that its adapters need is put there, and comes back to the byte."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text("# A base")
    (folder / "training_args.bin").write_bytes(b"left over")
    (folder / ".cache").mkdir()
    planned = push(folder, "labs/base", dry_run=True)
    assert (planned.created, planned.commit, Path(registry).exists()) == (True, None, False)
    done = push(folder, "labs/base")
    assert (done.version, done.left_out) == (None, ("training_args.bin",))
    pulled = pull("labs/base", base=True)
    assert (pulled.commit, pulled.digest) == (done.commit, done.digest)
    taken = {path.name: path.read_bytes() for path in pulled.path.iterdir()}
    assert taken == {name: (folder / name).read_bytes() for name in taken}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= taken.keys()
    assert push(folder, "labs/base").unchanged
    assert push(folder, "labs/base").commit == done.commit


def test_another_state_of_a_base_leaves_no_old_shards(tiny_llama: Path, registry: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    shard(folder)
    assert "model-00001-of-00002.safetensors" in push(folder, "labs/base").uploaded
    whole = push(tiny_llama, "labs/base")
    assert "model-00001-of-00002.safetensors" in whole.removed
    assert pull("labs/base", base=True).commit == whole.commit


def test_what_is_no_sound_base_is_not_published(tiny_llama: Path, adapter: Path, registry: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(HubkitError) as refusal:
        push(folder, "labs/base")
    assert refusal.value.code == "HK-SAFETENSORS"
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(HubkitError) as refusal:
        push(folder, "labs/base")
    assert refusal.value.code == "HK-PICKLE"
    assert not Path(registry).exists()
    push(adapter, "ana/chat")
    with pytest.raises(HubkitError) as refusal:
        push(tiny_llama, "ana/chat")
    assert refusal.value.code == "HK-EXISTS"


def shard(folder: Path) -> None:
    """Divide the weights of a model into two files with an index."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
