"""export: another tool's folder, made from the adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import make_adapter
from variants import logits, names, refused, say, small_disk, tree

from hubkit.artifact.folder import write_adapter
from hubkit.documents.manifest import Manifest
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.pack import pack


def test_peft_reads_it_and_computes_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = make_adapter(tmp_path / "chat", tiny_llama, alpha=1, rank_pattern={"q_proj": 3}, rslora=True)
    done = export(str(adapter), tmp_path / "peft")
    assert done.files == ("adapter_config.json", "adapter_model.safetensors")
    assert names(tmp_path / "peft") == set(done.files)
    theirs = logits(PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path / "peft")))
    assert (logits(attach(load_base(tiny_llama), str(adapter))) - theirs).abs().max() <= 1e-5


def test_the_same_bytes_each_time(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "one")
    export(str(adapter), tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert all(str(tmp_path).encode() not in data for data in tree(tmp_path / "one").values())
    assert tree(adapter)["adapter_model.safetensors"] == tree(tmp_path / "one")["adapter_model.safetensors"]


def test_refusals_write_nothing(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    before = tree(tmp_path)
    for line, status, code in (
        ((adapter, "-o", work), 1, "HK-EXISTS"),
        ((adapter, "-o", work, "--replace"), 1, "HK-EXISTS"),
        ((adapter, "-o", adapter, "--replace"), 1, "HK-EXISTS"),
        ((adapter, "-o", tmp_path / "x", "--to", "onnx"), 2, "HK-EXPORT"),
        ((adapter, "-o", tmp_path / "x", "--to", "gguf"), 1, "HK-GGUF"),
        ((tmp_path / "nope", "-o", tmp_path / "x"), 1, "HK-NOT-ADAPTER"),
    ):
        assert say(capsys, "export", *line).refusal(status) == code
    with small_disk(1000):
        refused("HK-DISK", export, str(adapter), tmp_path / "x")
    assert tree(tmp_path) == before


def test_an_earlier_export_is_replaced_on_demand(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "peft")
    other = make_adapter(tmp_path / "other", tiny_llama, seed=9)
    export(str(other), tmp_path / "peft", replace=True)
    exported, own = tree(tmp_path / "peft"), tree(other)
    assert exported["adapter_model.safetensors"] == own["adapter_model.safetensors"]


def test_without_the_bases_tensors_the_base_is_needed(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(adapter)
    files: dict[str, bytes | Path] = {e.path: (adapter / e.path).read_bytes() for e in manifest.files}
    del files["tensors.json"]
    write_adapter(adapter, manifest, files, replace=True)
    assert "--base" in refused("HK-BASE-NEEDED", export, str(adapter), tmp_path / "out").fix
    refused("HK-BASE-NEEDED", pack, adapter, license="mit")
    export(str(adapter), tmp_path / "out", base=tiny_llama)
    pack(adapter, base=str(tiny_llama))
    export(str(adapter), tmp_path / "out", replace=True)
