"""An adapter on a quantized base, from training to merging: bound to the original base, with the codec on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from variants import logits, refused, rows_file, tree

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train


@pytest.fixture
def trained(tiny_llama: Path, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    config = {"rank": 2, "dropout": 0.0}
    rows, out = rows_file(tmp_path / "rows.jsonl"), tmp_path / "chat"
    train(str(tiny_llama), rows, out, method="qlora", steps=4, learning_rate=0.02, config=config)
    return out


def quantized(model: Any) -> int:
    return sum(packed_of(module) is not None for module in model.modules())


def test_train_attach_merge(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    manifest = open_adapter(trained).manifest
    assert manifest.base is not None
    assert (manifest.method, manifest.base.codec) == ("qlora", CODEC)
    model = load_base(tiny_llama)
    plain = logits(model)
    attached = attach(model, str(trained))
    assert quantized(model) == 14
    live = logits(attached)
    loaded = load_base(tiny_llama, codec=CODEC)
    assert quantized(loaded) == 14
    again = attach(loaded, str(trained))
    assert torch.equal(logits(again), live)
    attach(attached, {str(trained): -1.0})  # once more, on what is quantized by now
    assert list(attached.adapters) == ["chat", "chat-2"]
    assert torch.equal(logits(attached.detach()), plain)
    assert quantized(model) == 0
    merge(str(tiny_llama), str(trained), tmp_path / "merged")
    change = {
        n: s.weight() - Base.from_folder(tiny_llama).sites[n].weight()
        for n, s in Base.from_folder(tmp_path / "merged").sites.items()
        if s.kind != "block"
    }
    delta = again.adapters["chat"].delta(again.sites.sites["model.layers.0.mlp.up_proj"])
    matrix = None if delta is None else delta.matrix()
    assert matrix is not None
    assert torch.allclose(change["model.layers.0.mlp.up_proj"], matrix, atol=1e-6)
    generate("x", base=str(tiny_llama), terms=str(trained), max_new_tokens=2)


def test_the_same_seed_gives_the_same_bytes(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    before = tree(trained)
    config = {"rank": 2, "dropout": 0.0}
    options: dict[str, Any] = {
        "method": "qlora",
        "steps": 4,
        "learning_rate": 0.02,
        "config": config,
        "checkpointing": True,
    }
    train(str(tiny_llama), tmp_path / "rows.jsonl", trained, replace=True, **options)
    assert tree(trained)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_it_is_an_ordinary_peft_adapter(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export(str(trained), tmp_path / "peft")
    model = load_base(tiny_llama)
    attached = attach(model, str(trained))
    want = logits(attached)
    decoded = {s.name: s.weight() for s in attached.sites.sites.values() if packed_of(s.module) is not None}
    attached.detach()
    for name, weight in decoded.items():
        model.get_submodule(name).weight.data = weight
    assert torch.allclose(logits(PeftModel.from_pretrained(model, str(tmp_path / "peft"))), want, atol=1e-5)


def test_a_base_in_4_bits(tiny_llama: Path, tmp_path: Path) -> None:
    """Any method trains on it and answers on it; nothing is merged into it."""
    torch.set_num_threads(1)
    import shutil

    shutil.copytree(tiny_llama, tmp_path / "packed", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    load_base(tiny_llama, codec=CODEC).save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    base, rows = str(tmp_path / "packed"), rows_file(tmp_path / "rows.jsonl")
    for method in ("lora", "qlora"):
        out = tmp_path / method
        train(base, rows, out, method=method, steps=2, learning_rate=0.02, config={"rank": 2})
        generate("x", base=base, terms=str(out), max_new_tokens=2)
        attached = hubkit.attach(load_base(base), str(out))
        assert quantized(attached) == 14
        before = tree(tmp_path)
        error = refused("HK-NOT-MERGEABLE", merge, base, str(out), tmp_path / "merged")
        assert "16-bit base" in error.fix
        assert tree(tmp_path) == before
