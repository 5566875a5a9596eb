"""Methods that change the base's own tensors, through the verbs: what is stored, verified, published, added, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from variants import logits, refused, rows_file

from hubkit.artifact.folder import open_adapter
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.compose import compose
from hubkit.verbs.export import export
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained(base: Path, out: Path, method: str, **options: Any) -> Path:
    rows = rows_file(out.with_suffix(".jsonl"))
    train(str(base), rows, out, method=method, **{"steps": 3, "learning_rate": 0.01, **options})
    return out


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_full_is_stored_added_and_merged(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(kind)
    out = trained(base, tmp_path / "full", "full", validation=0.2)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["validation_loss"] < metrics["untrained_loss"]
    stored, original = load_file(out / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    assert set(stored) == set(original), "its names are the base's"
    assert not (out / "adapter_config.json").exists()
    assert [check.name for check in verify(str(out), base=str(base)).checks] == ["files", "base", "tensors"]
    other = trained(base, tmp_path / "other", "selective")
    done = merge(str(base), f"0.5*{out} + {other}", tmp_path / "merged")
    assert not done.unties
    attached = Attached(load_base(base))
    for name, folder in (("full", out), ("other", other)):
        attached.add(name, read_adapter(open_adapter(folder), attached.sites, name=name, dtype="base"))
    from hubkit.tensors.parts.mix import Sum

    attached.set_mix(Sum({"full": 0.5, "other": 1.0}))
    torch.testing.assert_close(logits(load_base(tmp_path / "merged")), logits(attached), rtol=1e-4, atol=1e-5)
    compose(f"0.5*{out} + {other}", tmp_path / "composed")
    merge(str(base), str(tmp_path / "composed"), tmp_path / "again")
    torch.testing.assert_close(logits(load_base(tmp_path / "again")), logits(attached), rtol=1e-4, atol=1e-5)
    refused("HK-EXPORT", export, str(out), tmp_path / "exported")


def test_tensors_that_did_not_change_are_not_stored_and_the_manifest_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    """A learning rate that decays to nothing below the top: what is below stays the base's."""
    config = {"layer_decay": 1e-200, "depth": 2}
    out = trained(tiny_llama, tmp_path / "top", "full", config=config, steps=1, warmup=0.0, schedule="constant")
    manifest = open_adapter(out).manifest
    stored = load_file(out / "adapter_model.safetensors")
    assert set(stored) == set(manifest.config["tensors"]) == {"lm_head.weight", "model.norm.weight"}
    assert all(tensor.count_nonzero() for tensor in stored.values())
    assert [check.name for check in verify(str(out), base=str(tiny_llama)).checks] == ["files", "base", "tensors"]
    assert merge(str(tiny_llama), str(out), tmp_path / "merged").changed == 2


def test_merging_one_weight_at_a_time_gives_the_fp32_sum(tiny_llama: Path, tmp_path: Path) -> None:
    """W + Δ in fp32, one addition, bit for bit."""
    out = trained(tiny_llama, tmp_path / "full", "full")
    merge(str(tiny_llama), str(out), tmp_path / "merged")
    stored, original = load_file(out / "adapter_model.safetensors"), load_file(tiny_llama / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in original.items():
        change = stored[name]
        change = change.t() if name.endswith("embed_tokens.weight") else change.view(value.shape)
        assert torch.equal(merged[name], value + change), name


def test_files_that_do_not_fit_are_refused(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    out = trained(tiny_llama, tmp_path / "norms", "selective")
    folder = open_adapter(out)
    refused("HK-KEYS", read_adapter, folder, Base.from_folder(tiny_gpt2))
    weights = out / "adapter_model.safetensors"
    refused("HK-BASE-MISMATCH", merge, str(tiny_gpt2), str(out), tmp_path / "merged")
    weights.chmod(0o644)
    weights.write_bytes(b"garbage" * 9)
    refused("HK-FILES", open_adapter, out)
