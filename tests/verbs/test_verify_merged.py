"""verify of a merged checkpoint: the whole merge is made again from its manifest, and one bit too many is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import other_weights, refused, resharded, rows_file, say

from hubkit.artifact.folder import open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.manifest import FileEntry, Manifest
from hubkit.verbs.merge import merge
from hubkit.verbs.mix import mix
from hubkit.verbs.push import push
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

TOUCHED, OWN = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def merged(adapter: Path, tiny_llama: Path, tmp_path: Path) -> Path:
    merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    return tmp_path / "merged"


def proof(folder: Path, base: Path, **options: Any) -> str:
    done = verify(str(folder), base=str(base), offline=True, **options)
    assert [check.name for check in done.checks] == ["files", "base", "merge"]
    return done.checks[-1].detail


def sealed(folder: Path, **changes: Any) -> None:
    """The manifest written anew, so that it vouches for the files as they are now."""
    manifest = Manifest.read(folder)
    files = tuple(
        FileEntry(entry.path, (folder / entry.path).stat().st_size, hash_file(folder / entry.path))
        for entry in manifest.files
    )
    (folder / "hubkit.json").write_bytes(replace(manifest, files=files, **changes).to_bytes())


def changed(folder: Path, name: str, units: int) -> None:
    """One value of a tensor, not zero, is some units in the last place further from zero."""
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    bits = tensors[name].view(-1).view({2: torch.int16, 4: torch.int32}[tensors[name].element_size()])
    bits[3] += units
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("mixed", ["sum", "stack"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2", "shards"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_merge_is_made_again(
    kind: str, mixed: str, dtype: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    llama: Path = request.getfixturevalue("tiny_llama")
    base = resharded(llama, tmp_path / "shards") if kind == "shards" else request.getfixturevalue(kind)
    a = make_adapter(tmp_path / "a", base, seed=1)
    b = make_adapter(tmp_path / "b", base, seed=2, targets=["wte"] if kind == "tiny_gpt2" else ["q_proj", "lm_head"])
    merge(str(base), f"1.0*{a} + -0.5*{b}", tmp_path / "merged", mix=mixed, dtype=dtype)
    assert "2 adapters: each the same, bit for bit" in proof(tmp_path / "merged", base)


@pytest.mark.parametrize("into", ["trained", "original"])
def test_into_quantized_weights(into: str, tiny_llama: Path, tmp_path: Path) -> None:
    train(
        str(tiny_llama), rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", method="qlora", steps=1, dtype="bfloat16"
    )
    merge(str(tiny_llama), str(tmp_path / "a"), tmp_path / "merged", into=into)
    assert "bit for bit" in proof(tmp_path / "merged", tiny_llama)


def test_parents_are_found_by_digest(
    adapter: Path, tiny_llama: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the store, beside the checkpoint, in the registry, where one says; or nowhere, and what was proven is said."""
    push(adapter, "ana/chat")
    mix(f"stack({adapter}, 0.5*{adapter})", tmp_path / "mixed")
    merge(str(tiny_llama), f"{adapter} + 0.5*{tmp_path / 'mixed'}", tmp_path / "merged")
    merge(str(tiny_llama), "ana/chat", tmp_path / "pulled")
    assert "2 adapters" in proof(tmp_path / "merged", tiny_llama)
    assert "bit for bit" in proof(tmp_path / "pulled", tiny_llama)
    apart = tmp_path / "apart"
    apart.mkdir()
    shutil.move(tmp_path / "merged", apart / "merged")
    assert "bit for bit" in proof(apart / "merged", tiny_llama, parents=[adapter, tmp_path / "mixed"])
    shutil.move(adapter, tmp_path / "away")
    shutil.rmtree(os.environ["HUBKIT_HOME"])
    said = say(capsys, "verify", apart / "merged", "--base", tiny_llama, "--offline")
    assert said.refusal(3) == "HK-MERGE-UNPROVEN"
    assert "proven: files: " in said.err
    assert "proven: base: the values of all 21 tensors" in said.err
    assert verify(str(tmp_path / "pulled"), base=str(tiny_llama)).checks[-1].name == "merge"  # pulled again


def test_a_flipped_bit_is_named(merged: Path, tiny_llama: Path) -> None:
    """Whether the manifest vouches for it or not; in a tensor that was merged, and in one that was not."""
    for name in (TOUCHED, OWN):
        changed(merged, name, 1)
        assert refused("HK-FILES", verify, str(merged), base=str(tiny_llama))
        sealed(merged)
        error = refused("HK-MERGE-DIFFERS", verify, str(merged), base=str(tiny_llama))
        assert error.have[0].startswith((f"{TOUCHED}: 1 of ", f"{OWN}: 1 of "))
        changed(merged, name, -1)
        sealed(merged)
    assert "bit for bit" in proof(merged, tiny_llama)


def test_another_processor_may_round_otherwise_once(merged: Path, tiny_llama: Path) -> None:
    how = {**(Manifest.read(merged).composition or {}), "processor": "another"}
    changed(merged, TOUCHED, 1)
    sealed(merged, composition=how)
    assert "1 differ in 1 values, by one unit in the last place at most; merged on another" in proof(merged, tiny_llama)
    changed(merged, TOUCHED, 40)
    sealed(merged)
    assert refused("HK-MERGE-DIFFERS", verify, str(merged), base=str(tiny_llama)).have[0].startswith(TOUCHED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_kernels_that_sum_otherwise(dtype: str, adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """A real merge by another arithmetic: MKL's for any x86 processor."""
    script = "import sys; from hubkit.verbs.merge import merge; merge(*sys.argv[1:4], dtype=sys.argv[4])"
    command = [sys.executable, "-c", script, str(tiny_llama), str(adapter), str(tmp_path / "merged"), dtype]
    other = {**os.environ, "MKL_CBWR": "AVX2" if os.environ.get("MKL_CBWR") == "COMPATIBLE" else "COMPATIBLE"}
    subprocess.run(command, env=other, check=True)
    assert "all tensors made again" in proof(tmp_path / "merged", tiny_llama)


def test_another_base_and_the_manifest_of_another(merged: Path, tiny_llama: Path, tmp_path: Path) -> None:
    refused("HK-BASE-MISMATCH", verify, str(merged), base=str(other_weights(tiny_llama, tmp_path / "other")))
    twin = make_adapter(tmp_path / "twin", tiny_llama, seed=5)
    merge(str(tiny_llama), str(twin), tmp_path / "second")
    shutil.copyfile(tmp_path / "second" / "hubkit.json", merged / "hubkit.json")
    refused("HK-FILES", verify, str(merged), base=str(tiny_llama))
    sealed(merged)
    assert len(refused("HK-MERGE-DIFFERS", verify, str(merged), base=str(tiny_llama)).have) > 1


@pytest.mark.parametrize("what", ["weight", "tree", "config", "extra", "unsaid"])
def test_a_manifest_that_says_otherwise(what: str, merged: Path, tiny_llama: Path) -> None:
    manifest = Manifest.read(merged)
    code, said = "HK-MERGE-DIFFERS", "model.layers.0"
    if what == "weight":
        tree = {"sum": [{**(manifest.mix or {})["sum"][0], "weight": 2.0}]}
        sealed(merged, parents=(replace(manifest.parents[0], weight=2.0),), mix=tree)
    elif what == "tree":
        sealed(merged, mix={"sum": [{"adapter": "who", "weight": 1.0}]})
        said = "hubkit.json#/mix"
    elif what == "config":
        config = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
        sealed(merged)
        said = "config.json"
    elif what == "extra":
        tensors = load_file(merged / "model.safetensors")
        save_file({**tensors, "x.weight": torch.ones(2)}, merged / "model.safetensors", {"format": "pt"})
        sealed(merged)
        said = "x.weight: not of this merge"
    else:
        sealed(merged, parents=())
        code, said = "HK-MERGE-UNPROVEN", "no parents"
    assert refused(code, verify, str(merged), base=str(tiny_llama)).have[0].startswith(said)


def test_an_unknown_parent_changes_nothing(merged: Path, adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", tiny_llama, seed=9)
    assert "bit for bit" in proof(merged, tiny_llama, parents=[other, adapter])
    assert open_adapter(merged).unlisted() == ()
