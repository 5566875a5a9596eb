"""What was tested is what runs: three adapters, one a range and one a tree, from a recipe to every engine and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ggufs import gguf_of
from making import make_adapter

import hubkit
from hubkit.documents.deployment import Deployment
from hubkit.engines import ENGINES
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.store.store import Store

SETTINGS: dict[str, dict[str, Any]] = {
    "kubernetes": {"storage": "pvc://models/adapters"},
    "llamacpp": {"gguf": "base.gguf"},
    "ollama": {"gguf": "base.gguf"},
}
"""What an engine must be told."""


def publish(place: str, base: Path, folder: Path, version: str, seed: int) -> None:
    made = make_adapter(folder / version, base, seed=seed, rank=2)
    packed = folder / f"{version}-packed"
    hubkit.pack(made, out=packed, version=version)
    hubkit.push(packed, "ana/chat", registry=place)


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose base and first adapter are in a registry."""
    place = str(tmp_path / "registry")
    monkeypatch.setenv("HUBKIT_REGISTRY", place)
    registry = DirectoryRegistry(tmp_path / "registry")
    registry.create("ana/base")
    registry.commit("ana/base", {path.name: path for path in tiny_llama.iterdir()}, (), message="x", parent=None)
    publish(place, tiny_llama, tmp_path / "chat", "1.0.0", 1)
    folder = tmp_path / "project"
    make_adapter(folder / "sql", tiny_llama, seed=2, rank=3, rslora=True, targets=["q_proj", "v_proj"])
    make_adapter(folder / "tone", tiny_llama, seed=3, rank=4, targets=["up_proj"])
    hubkit.mix(f"stack({folder / 'sql'}, 0.5*sum({folder / 'tone'}, -1*{folder / 'sql'}))", folder / "polite")
    gguf_of(tiny_llama, folder / "base.gguf")
    hubkit.add("ana/chat@^1.0", base="ana/base", recipe=folder / "hubkit.toml")
    hubkit.add(folder / "sql", weight=-0.5, recipe=folder / "hubkit.toml")
    hubkit.add(folder / "polite", recipe=folder / "hubkit.toml")
    text = (folder / "hubkit.toml").read_text("utf-8")
    for engine, settings in SETTINGS.items():
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        text += "\n".join(["", f"[targets.{engine}]", *lines, ""])
    (folder / "hubkit.toml").write_text(text, "utf-8")
    hubkit.lock(folder)
    return folder


def deltas(folder: Path) -> dict[str, Any]:
    """What a PEFT folder with one rank and alpha = r adds to each weight."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config.get("use_rslora")
    tensors = load_file(folder / "adapter_model.safetensors")
    start, end = "base_model.model.", ".lora_A.weight"
    return {
        key.removeprefix(start).removesuffix(end): tensors[key.replace("lora_A", "lora_B")] @ a
        for key, a in tensors.items()
        if key.endswith(end)
    }


def test_from_a_recipe_to_every_engine_and_back(
    project: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    # an empty store: what the lock names comes here, and everything after that asks nobody
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "other"))
    assert Store().list() == ()
    synced = hubkit.sync(project, frozen=True)
    assert synced.fetched > 0
    assert hubkit.sync(project, frozen=True, offline=True).fetched == 0
    made = {}
    for engine in ENGINES:
        made[engine] = hubkit.deploy(tmp_path / engine, engine=engine, lock=project, offline=True)
        assert hubkit.deploy(tmp_path / engine, check=True).digest == made[engine].digest
        again = hubkit.deploy(tmp_path / "again" / engine, engine=engine, lock=project, offline=True)
        assert again.digest == made[engine].digest
        document = Deployment.read(tmp_path / engine)
        assert document.version
        assert document.unproven == made[engine].unproven
    # side by side and merged, they say the same
    merged = load_file(tmp_path / "merged" / "model" / "model.safetensors")
    base = load_file(tiny_llama / "model.safetensors")
    (adapter,) = (tmp_path / "vllm" / "adapters").iterdir()
    found = deltas(adapter)
    assert found
    for site, change in found.items():
        torch.testing.assert_close(base[f"{site}.weight"] + change, merged[f"{site}.weight"], rtol=1e-5, atol=1e-6)
    # one entry moves, the others stay; what it replaces is kept
    publish(str(tmp_path / "registry"), tiny_llama, tmp_path / "chat", "1.1.0", 4)
    states = {one.name: one.state for one in hubkit.outdated(project)}
    assert states == {"base": "current", "chat": "behind", "sql": "current", "polite": "current"}
    before = hubkit.deploy(tmp_path / "vllm", check=True).digest
    moved = hubkit.lock(project, upgrade=["chat"])
    assert moved.changed == ("chat",)
    done = hubkit.deploy(tmp_path / "vllm", engine="vllm", lock=project, replace=True)
    assert done.changed is not None
    assert any(line.startswith("adapter chat: ") for line in done.changed)
    assert not any(line.startswith("adapter sql: ") for line in done.changed)
    back = hubkit.deploy(tmp_path / "vllm", rollback=True)
    assert back.digest == before
    assert hubkit.deploy(tmp_path / "vllm", check=True).digest == before
