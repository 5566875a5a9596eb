"""merge: adapters folded into their base, written as a new checkpoint that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import OTHERS, logits, names, other_weights, refused, resharded, say, small_disk, tree
from zoo import near

from hubkit.artifact.folder import open_adapter
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.documents.manifest import Manifest
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.merge import merge


@pytest.fixture
def tied(tiny_llama: Path, tmp_path: Path) -> Path:
    """A base whose output head is its embedding table."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    out = tmp_path / "tied"
    shutil.copytree(tiny_llama, out)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    return out


@pytest.mark.parametrize("mix", ["sum", "stack"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2", "shards", "tied"])
def test_merged_is_live(kind: str, mix: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama: Path = request.getfixturevalue("tiny_llama")
    base = resharded(llama, tmp_path / "shards") if kind == "shards" else request.getfixturevalue(kind)
    table = {"tiny_gpt2": ["wte"], "tied": ["embed_tokens"]}.get(kind, ["q_proj"])
    a = make_adapter(tmp_path / "a", base, seed=1, alpha=2)
    b = make_adapter(tmp_path / "b", base, seed=2, rank=4, alpha=2, rslora=True, targets=[*table, "lm_head"])
    terms = f"1.0*{a} + -0.5*{b}"
    live = logits(attach(load_base(base), terms, mix=mix))
    done = merge(str(base), terms, tmp_path / "merged", mix=mix)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    near(logits(loaded), live)
    assert (live - logits(load_base(base))).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert done.unties == (kind in ("tied", "tiny_gpt2"))
    assert loaded.config.tie_word_embeddings is False
    manifest = open_adapter(tmp_path / "merged").manifest
    assert (manifest.kind, manifest.digest) == ("model", done.digest)
    assert [parent.weight for parent in manifest.parents] == [1.0, -0.5]
    assert list(manifest.mix or {}) == [mix]


def test_only_what_changes_is_another(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_llama, targets=["q_proj"])
    done = merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    before, after = (fingerprint_folder(folder) for folder in (tiny_llama, tmp_path / "merged"))
    differ = {a.name for a, b in zip(before.tensors, after.tensors, strict=True) if a != b}
    assert differ == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
    assert (done.changed, done.tensors, done.kept) == (2, 21, 19)
    said = Manifest.read(tmp_path / "merged").composition
    assert said is not None
    assert said.keys() == {"changed", "computed", "kept", "torch", "processor"}
    assert (said["computed"], said["kept"], said["torch"]) == (2, 19, str(torch.__version__))


def test_what_was_not_written_right_gets_no_name(
    adapter: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit between writing and reading back."""
    from hubkit.tensors.files.shards import write_file

    def worn(path: Path, tensors: Any, pipeline: Any) -> str:
        digest = write_file(path, tensors, pipeline)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return digest

    monkeypatch.setattr("hubkit.tensors.weights.merging.write_file", worn)
    before = names(tmp_path)
    error = refused("HK-MERGE-DIFFERS", merge, str(tiny_llama), str(adapter), tmp_path / "merged")
    assert error.have[0].startswith("model.safetensors: sha256:")
    assert names(tmp_path) == before


def test_nothing_would_change(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Also where the files would differ: the base's header is written otherwise, in other shards."""
    for base in (tiny_llama, resharded(tiny_llama, tmp_path / "other")):
        refused("HK-MERGE-NOOP", merge, str(base), f"0*{adapter}", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge(str(tiny_llama), f"1e-30*{adapter}", tmp_path / "wide", dtype="float64").changed


@pytest.mark.parametrize("what", OTHERS)
def test_another_base(
    what: str, adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = OTHERS[what]
    other = make(tiny_llama, tmp_path / "other")
    before = names(tmp_path)
    done = say(capsys, "merge", adapter, "--base", other, "-o", tmp_path / "merged")
    assert done.refusal() == "HK-BASE-MISMATCH"
    assert said in done.err
    assert "--allow-base-mismatch" in done.err
    assert names(tmp_path) == before
    merge(str(other), str(adapter), tmp_path / "merged", allow_base_mismatch=True)
    assert Manifest.read(tmp_path / "merged").overrides == ("allow-base-mismatch",)


def test_the_same_base_in_other_files(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "one")
    done = merge(str(resharded(tiny_llama, tmp_path / "other")), str(adapter), tmp_path / "two")
    assert done.overrides == ()
    one, two = (fingerprint_folder(tmp_path / name).fingerprint.weights for name in ("one", "two"))
    assert one == two


def test_in_another_dtype(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "narrow", dtype="bfloat16")
    model = load_base(tmp_path / "narrow")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert refused("HK-DTYPE", merge, str(tiny_llama), str(adapter), tmp_path / "x", dtype="float7").want
    error = refused("HK-NAN", merge, str(tiny_llama), f"1e6*{adapter}", tmp_path / "x", dtype="float16")
    assert "float32" in error.fix
    assert "_proj" in str(error), "which tensor"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_what_storing_it_loses_is_said(
    dtype: str | None, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one layer, which is then looked at: against the same sums in fp64."""
    adapter = make_adapter(tmp_path / "a", tiny_llama, targets=["q_proj"], layers=[0], alpha=1e-2)
    name, site = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj"
    options = () if dtype is None else ("--dtype", dtype)
    said = say(capsys, "merge", adapter, "-b", tiny_llama, "-o", tmp_path / "merged", *options)
    found = (Manifest.read(tmp_path / "merged").composition or {}).get("rounding")
    assert ("rounded off: " in said.out) == (found is not None) == (dtype is not None)
    if found is None:
        return
    was, have = (open_shards(folder).read(name) for folder in (tiny_llama, tmp_path / "merged"))
    base = Base.from_folder(tiny_llama)
    delta = read_adapter(open_adapter(adapter), base).delta(base.sites[site])
    matrix = None if delta is None else delta.matrix()
    assert matrix is not None
    exact = was.double() + matrix.double()
    off, same = (have.double() - exact).norm(), have == was.to(have.dtype)
    assert found["weights"] == pytest.approx(float(off / exact.norm()), rel=1e-2)
    assert found["change"] == pytest.approx(float(off / matrix.double().norm()), rel=1e-2)
    assert found["vanished"] == pytest.approx(float(same.double().mean()), abs=1e-2)
    assert 0 < found["vanished"] < 1


def test_what_lies_beside_the_base(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Tokenizer and licence come along; weights of other formats, their indexes, code and adapters do not."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "LICENSE").write_text("free")
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "consolidated.pth",
        "modeling.py",
        "consolidated.safetensors",
        "adapter_config.json",
        "state.pkl",
        ".hidden",
    ):
        (base / name).write_bytes(b"{}")
    merge(str(base), str(adapter), tmp_path / "merged")
    ours = {"README.md", "hubkit.json"}
    assert names(tmp_path / "merged") - ours == names(tiny_llama) | {"LICENSE"}


def test_refusals_write_nothing(
    adapter: Path, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    cut = tmp_path / "cut"
    shutil.copytree(tiny_llama, cut)
    (cut / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:-1])
    hollow = tmp_path / "hollow"
    shutil.copytree(tiny_llama, hollow, ignore=shutil.ignore_patterns("model.safetensors"))
    pickled = tmp_path / "pickled"
    shutil.copytree(hollow, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    new, before = tmp_path / "new", tree(tmp_path)
    for line, status, code in (
        ((adapter, "-b", tiny_llama, "-o", work), 1, "HK-EXISTS"),
        ((adapter, "-b", tiny_llama, "-o", work, "--replace"), 1, "HK-EXISTS"),
        ((adapter, "-b", tiny_llama, "-o", work, "--dry-run"), 1, "HK-EXISTS"),
        ((adapter, "-b", tiny_llama, "-o", tmp_path / "a b"), 2, "HK-NAME"),
        ((adapter, "-b", tiny_gpt2, "-o", new), 1, "HK-BASE-MISMATCH"),
        ((adapter, "-b", tiny_gpt2, "-o", new, "--allow-base-mismatch"), 1, "HK-KEYS"),
        ((adapter, "-b", tmp_path / "nope", "-o", new), 1, "HK-BASE-MISSING"),
        ((adapter, "-b", work, "-o", new), 1, "HK-BASE-FILES"),
        ((adapter, "-b", cut, "-o", new), 1, "HK-SAFETENSORS"),
        ((adapter, "-b", hollow, "-o", new), 1, "HK-BASE-FILES"),
        ((adapter, "-b", pickled, "-o", new), 1, "HK-PICKLE"),
        ((adapter, "-b", "nope", "-o", new), 2, "HK-REFERENCE"),
        ((adapter, "-o", new), 2, "HK-USAGE"),
        ((adapter, "-b", tiny_llama, "-o", new, "--mix", "heap"), 2, "HK-USAGE"),
    ):
        assert say(capsys, "merge", *line).refusal(status) == code, line
    assert refused("HK-MIX", merge, str(tiny_llama), str(adapter), new, mix="heap")
    for size in (0, 1000, 30000, 61000):
        with small_disk(size):
            refused("HK-DISK", merge, str(tiny_llama), str(adapter), new)
    assert tree(tmp_path) == before


def test_a_dry_run_says_it_all(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = say(capsys, "merge", adapter, "-b", tiny_llama, "-o", tmp_path / "new", "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("would merge  ")
    assert not (tmp_path / "new").exists()
    other = other_weights(tiny_llama, tmp_path / "other")
    refused("HK-BASE-MISMATCH", merge, str(other), str(adapter), tmp_path / "new", dry_run=True)


def test_replacing_is_all_or_nothing(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    before = tree(tmp_path)
    with small_disk(30000):
        refused("HK-DISK", merge, str(tiny_llama), f"2*{adapter}", tmp_path / "merged", replace=True)
    refused("HK-MERGE-NOOP", merge, str(tiny_llama), f"0*{adapter}", tmp_path / "merged", replace=True)
    assert tree(tmp_path) == before
    merge(str(tiny_llama), f"2*{adapter}", tmp_path / "merged", replace=True)
    assert tree(tmp_path).keys() == before.keys()
    assert tree(tmp_path) != before
