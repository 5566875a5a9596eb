"""What engines refuse, before anything is written: every reason, by member."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ggufs import gguf_of
from making import make_adapter

from hubkit.artifact.folder import AdapterFolder, open_adapter
from hubkit.engines import ENGINES, Member, Plan, engine_named
from hubkit.errors import HubkitError


def plan(base: Path, *members: tuple[AdapterFolder, float], settings: Mapping[str, Any] | None = None) -> Plan:
    files = tuple(sorted(path.name for path in base.iterdir()))
    named = tuple(Member(f"{folder.manifest.name}-{i}", folder, weight) for i, (folder, weight) in enumerate(members))
    return Plan(base, files, named, "sum", settings or {})


def needed(engine: str, base: Path, room: Path) -> dict[str, Any]:
    """The settings without which an engine refuses whatever it is given."""
    if engine in ("llamacpp", "ollama"):
        return {"gguf": str(gguf_of(base, room / "base.gguf"))}
    return {"storage": "pvc://models/hubkit"} if engine == "kubernetes" else {}


@pytest.fixture
def whole(tiny_llama: Path, tmp_path: Path) -> AdapterFolder:
    return open_adapter(make_adapter(tmp_path / "whole", tiny_llama))


def with_manifest(folder: AdapterFolder, **changes: Any) -> AdapterFolder:
    return AdapterFolder(folder.path, replace(folder.manifest, **changes))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_what_it_is(name: str) -> None:
    engine = engine_named(name)
    assert engine.name == name
    assert engine.summary


def test_an_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(HubkitError) as refusal:
        engine_named("pfet")
    assert (refusal.value.code, refusal.value.fix) == ("HK-ENGINE-UNKNOWN", "--engine peft")


@pytest.mark.parametrize("name", ENGINES)
def test_adapters_are_accepted_and_everything_else_is_named(
    name: str, tiny_llama: Path, whole: AdapterFolder, tmp_path: Path
) -> None:
    engine, settings = engine_named(name), needed(name, tiny_llama, tmp_path)
    assert engine.refusals(plan(tiny_llama, (whole, 1.0), settings=settings)) == []
    assert engine.refusals(plan(tiny_llama, (whole, 1.0), (whole, -2.0), settings=settings)) == []
    assert engine.refusals(plan(tiny_llama, settings=settings)) == []
    mix = with_manifest(whole, kind="mix", files=())
    wordy = with_manifest(whole, vocabulary={"added": ["<x>"]})
    reasons = engine.refusals(plan(tiny_llama, (mix, 1.0), (whole, 1.0), (wordy, 1.0), settings=settings))
    assert [reason.split(":")[0] for reason in reasons if "PEFT" not in reason] == ["whole-0", "whole-2"]


def test_peft_refuses_what_peft_cannot_read(tiny_llama: Path, whole: AdapterFolder) -> None:
    files = tuple(entry for entry in whole.manifest.files if entry.path != "adapter_config.json")
    foreign = with_manifest(whole, files=files, method="strange")
    (reason,) = engine_named("peft").refusals(plan(tiny_llama, (foreign, 1.0)))
    assert "PEFT does not know the method 'strange'" in reason


def test_peft_is_not_given_single_experts(tiny_llama: Path, whole: AdapterFolder) -> None:
    """It passes over such tensors on some architectures, and runs on without them."""
    from safetensors.torch import load_file, save_file

    stored = load_file(whole.weights_path)
    save_file({key.replace("mlp", "mlp.experts.3"): tensor for key, tensor in stored.items()}, whole.weights_path)
    (reason,) = engine_named("peft").refusals(plan(tiny_llama, (whole, 1.0)))
    assert reason.startswith("whole-0: it acts at single experts")


def test_a_deployment_without_adapters_is_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert engine_named("merged").write(plan(tiny_llama), out) == ("python", "run.py")
    assert (out / "model" / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
