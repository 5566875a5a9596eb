"""save: what is written of a live adapter is what `train` would have written, and the live one stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import METHODS
from variants import logits, names, other_weights, refused, rows_file
from zoo import near

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.save import save
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


def trainable(attached: Any) -> dict[str, Any]:
    return {name: p for name, p in attached.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", METHODS)
def test_it_writes_what_train_has_written(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """A trained adapter, attached to train on and saved at once: the same tensors and configuration."""
    method, config = METHODS[kind]
    first = tmp_path / "first" / "chat"
    rows = rows_file(tmp_path / "rows.jsonl")
    train(str(tiny_llama), rows, first, method=method, config=config, steps=2, license="mit")
    attached = attach(load_base(tiny_llama), first, trainable=True, base=tiny_llama)
    second = tmp_path / "second" / "chat"
    base = tiny_llama if kind == "tokens" else None
    if base is not None:
        assert "base=" in refused("HK-BASE-NEEDED", save, attached, "chat", second).fix
        assert not second.exists()
    done = save(attached, "chat", second, license="mit", base=base)
    assert names(second) == names(first) - {"metrics.json"}
    for name in names(second) - {"hubkit.json", "README.md"}:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    have, want = open_adapter(second).manifest, open_adapter(first).manifest
    assert have.digest == done.digest
    for field in ("name", "method", "plugin", "config", "vocabulary", "license", "version"):
        assert getattr(have, field) == getattr(want, field), field
    assert have.base is not None
    assert want.base is not None
    assert have.base.to_document() == want.base.to_document()
    assert verify(str(second), base=str(tiny_llama)).overrides == ()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_is_saved_computes_what_was_attached(dtype: str, tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    load_base(tiny_llama, dtype).save_pretrained(base)  # type: ignore[operator]
    attached = attach(load_base(base), adapter, trainable=True, allow_base_mismatch=True)
    with torch.no_grad():
        for parameter in trainable(attached).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    masters = {name: p.detach().clone() for name, p in trainable(attached).items()}
    save(attached, "chat", tmp_path / "new")
    frozen = attach(load_base(base), tmp_path / "new")
    assert {p.dtype for p in frozen.parts.parameters()} == {getattr(torch, dtype)}
    if dtype == "float32":
        again = attach(load_base(base), tmp_path / "new", trainable=True)
        assert torch.equal(logits(again), logits(attached))
    if dtype == "float64":  # sums of the frozen way are in another order
        near(logits(frozen), logits(attached))
    live = trainable(attached)
    assert live.keys() == masters.keys()
    assert all(torch.equal(live[name], value) and live[name].dtype == value.dtype for name, value in masters.items())


def test_peft_reads_it(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    attached = attach(load_base(tiny_llama), adapter, trainable=True)
    hubkit.save(attached, "chat", tmp_path / "new")
    theirs = peft.PeftModel.from_pretrained(load_base(tiny_llama), tmp_path / "new")
    near(logits(theirs), logits(attached))


def test_version_and_license(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attach(load_base(tiny_llama), adapter, trainable=True)
    save(attached, "chat", tmp_path / "new", version="1.2.0", license="apache-2.0")
    manifest = open_adapter(tmp_path / "new").manifest
    assert (manifest.name, manifest.version, manifest.license) == ("new", "1.2.0", "apache-2.0")
    refused("HK-EXISTS", save, attached, "chat", tmp_path / "new")
    save(attached, "chat", tmp_path / "new", replace=True)


def test_a_base_that_changed_since_is_the_base(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Without a name of the base its weights speak: those that the adapter was trained beside."""
    model = load_base(tiny_llama)
    attached = attach(model, adapter, trainable=True)
    other = load_base(other_weights(tiny_llama, tmp_path / "other"))
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    save(attached, "chat", tmp_path / "new")
    assert verify(str(tmp_path / "new"), base=str(tmp_path / "other")).overrides == ()
    refused("HK-BASE-MISMATCH", attach, load_base(tiny_llama), tmp_path / "new")


def test_a_base_quantized_while_it_was_loaded(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attach(load_base(tiny_llama, codec="nf4/64/double"), adapter, trainable=True)
    save(attached, "chat", tmp_path / "new")
    base = open_adapter(tmp_path / "new").manifest.base
    assert base is not None
    assert base.codec == "nf4/64/double"
    assert verify(str(tmp_path / "new"), base=str(tiny_llama)).overrides == ()


def test_refusals(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attach(load_base(tiny_llama), adapter, trainable=True)
    refused("HK-NOT-LIVE", save, attached.model, "chat", tmp_path / "new")
    refused("HK-UNKNOWN-ADAPTER", save, attached, "chta", tmp_path / "new")
    refused("HK-VERSION", save, attached, "chat", tmp_path / "new", version="one")
    refused("HK-NAME", save, attached, "chat", tmp_path / "a name")
    with attached.merge():
        refused("HK-MERGED", save, attached, "chat", tmp_path / "new")
    with torch.no_grad():
        next(iter(trainable(attached).values())).fill_(float("nan"))
    refused("HK-NAN", save, attached, "chat", tmp_path / "new")
    assert not (tmp_path / "new").exists()
