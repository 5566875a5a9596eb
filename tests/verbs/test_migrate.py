"""migrate: modules called otherwise now find their places, are proven and recorded; what is unsure is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from probing import aged, larger, naming
from safetensors.torch import load_file
from variants import refused, say, tree
from words import tokenizer
from zoo import model_of

from hubkit.artifact.folder import open_adapter, write_adapter
from hubkit.documents.manifest import Manifest
from hubkit.documents.schema import canonical
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.verbs.export import export
from hubkit.verbs.migrate import migrate
from hubkit.verbs.pack import pack
from hubkit.verbs.verify import verify

WEIGHTS = "adapter_model.safetensors"
RENAMES: dict[str, dict[str, str]] = {
    "a wrapper of several parts": {r"model\.layers\.": "language_model.model.layers."},
    "another stem": {r"model\.layers\.": "transformer.h."},
    "inside": {r"self_attn\.": "attention."},
    "Llama's reference code": {
        r"model\.layers\.": "layers.",
        r"self_attn\.([qkvo])_proj": r"attention.w\1",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.down_proj": "feed_forward.w2",
        r"mlp\.up_proj": "feed_forward.w3",
    },
}
STRANGE = {r"mlp\.gate_proj": "mlp.one", r"mlp\.up_proj": "mlp.two"}
"""Names of which nobody knows what they are; the two have one shape."""


def aged_own(adapter: Path, out: Path, rules: dict[str, str], *, digests: bool = True) -> Path:
    """An adapter of ours on a base that had the names of before."""
    old, opened = naming(rules), open_adapter(adapter)
    peft = aged(adapter, out.with_name(f"{out.name}-peft"), rules)
    files: dict[str, Any] = {entry.path: peft / entry.path for entry in opened.manifest.files}
    tensors = json.loads((adapter / "tensors.json").read_text())
    for row in tensors["tensors"]:
        row["name"] = old(row["name"])
        if not digests:
            row.pop("sha256", None)
    tensors["tensors"].sort(key=lambda row: row["name"])
    files["tensors.json"] = canonical(tensors)
    write_adapter(out, opened.manifest, files)
    return out


@pytest.fixture
def peft(adapter: Path, tmp_path: Path) -> Path:
    """The adapter as PEFT writes it."""
    export(adapter, tmp_path / "peft" / "chat")
    return tmp_path / "peft" / "chat"


@pytest.mark.parametrize("rules", RENAMES.values(), ids=RENAMES)
def test_what_was_renamed_comes_back_to_the_bit(
    rules: dict[str, str], peft: Path, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    old = aged(peft, tmp_path / "old", rules)
    assert "hubkit migrate" in refused("HK-KEYS", pack, old, base=tiny_llama, out=tmp_path / "packed").fix
    done = migrate(old, tmp_path / "new", base=tiny_llama)
    assert (done.parent, done.proven) == (None, ("shapes",))
    want, have = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)
    assert verify(tmp_path / "new", base=tiny_llama).checks
    kinds = {one.old: one.new for one in done.renamed}
    assert Manifest.read(tmp_path / "new").migration == {"renamed": kinds, "proven": ["shapes"]}
    assert all(re.sub(r"\*", "0", one.old) == naming(rules)(re.sub(r"\*", "0", one.new)) for one in done.renamed)


def test_an_adapter_of_ours_keeps_what_is_known_of_it(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    pack(adapter, base=tiny_llama, probes=True, version="1.2.0", license="mit")
    old = aged_own(adapter, tmp_path / "old", RENAMES["a wrapper of several parts"])
    done = migrate(old, tmp_path / "new", base=tiny_llama)
    assert done.proven == ("shapes", "digests", "probes")
    manifest, before = Manifest.read(tmp_path / "new"), Manifest.read(old)
    assert (manifest.name, manifest.version, manifest.license) == ("chat", "1.2.0", "mit")
    assert [one.digest for one in manifest.parents] == [before.digest] == [done.parent]
    assert (tmp_path / "new" / "probes.json").read_bytes() == (adapter / "probes.json").read_bytes()
    checks = verify(tmp_path / "new", base=tiny_llama, probes=True).checks
    assert [check.name for check in checks] == ["files", "base", "tensors", "probes"]


def test_digests_decide_where_names_say_nothing(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    old = aged_own(adapter, tmp_path / "old", STRANGE)
    done = migrate(old, tmp_path / "new", base=tiny_llama)
    assert {one.why for one in done.renamed} == {"the same weights, by their digests"}
    want, have = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_what_is_not_certain_is_refused_and_can_be_said(
    peft: Path, adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = aged(peft, tmp_path / "old", STRANGE)
    before = tree(old)
    error = refused("HK-MIGRATE", migrate, old, tmp_path / "new", base=tiny_llama)
    assert len(error.have) == 2
    assert "model.layers.*.mlp.one (2): of its shape: model.layers.*.mlp.gate_proj, " in error.have[0]
    assert not (tmp_path / "new").exists()
    assert tree(old) == before
    words = [f"model.layers.{n}.mlp.{old}=model.layers.{n}.mlp.{new}_proj"
             for n in (0, 1) for old, new in (("one", "gate"), ("two", "up"))]  # fmt: skip
    flags = [flag for word in words for flag in ("--rename", word)]
    said = say(capsys, "migrate", str(old), str(tmp_path / "new"), "--base", str(tiny_llama), "--dry-run", *flags)
    assert (said.status, (tmp_path / "new").exists()) == (0, False)
    assert "would migrate" in said.out
    migrate(old, tmp_path / "new", base=tiny_llama, rename=words)
    want, have = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert all(torch.equal(want[key], have[key]) for key in want)
    assert refused("HK-OPTIONS", migrate, old, tmp_path / "x", base=tiny_llama, rename=["a"]).status == 2


@pytest.mark.parametrize("digests", [True, False])
def test_a_wrong_renaming_does_not_pass_its_proofs(
    digests: bool, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Gate and up have one shape; digests know them apart, and so do probes."""
    pack(adapter, base=tiny_llama, probes=True)
    old = aged_own(adapter, tmp_path / "old", STRANGE, digests=digests)
    wrong = [f"model.layers.{n}.mlp.{old}=model.layers.{n}.mlp.{new}_proj"
             for n in (0, 1) for old, new in (("one", "up"), ("two", "gate"))]  # fmt: skip
    error = refused("HK-MIGRATE", migrate, old, tmp_path / "new", base=tiny_llama, rename=wrong)
    assert ("other values" if digests else "probes say") in error.what
    assert not (tmp_path / "new").exists()


def test_another_base_and_nothing_to_rename(adapter: Path, peft: Path, tiny_llama: Path, tmp_path: Path) -> None:
    old = aged_own(adapter, tmp_path / "old", RENAMES["inside"])
    larger(tiny_llama, tmp_path / "scaled")
    error = refused("HK-MIGRATE", migrate, old, tmp_path / "new", base=tmp_path / "scaled")
    assert "rebase" in error.fix
    refused("HK-MIGRATE", migrate, peft, tmp_path / "new", base=tiny_llama)
    refused("HK-MIGRATE", migrate, adapter, tmp_path / "new", base=tiny_llama)
    assert not (tmp_path / "new").exists()


def test_patterns_of_rank_and_alpha_go_along(tiny_llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rank": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 32.0},
    }
    adapter = make_adapter(tmp_path / "chat", tiny_llama, **options, method=host().load("lora"))
    export(adapter, tmp_path / "peft" / "chat")
    old = aged(tmp_path / "peft" / "chat", tmp_path / "old", RENAMES["Llama's reference code"])
    migrate(old, tmp_path / "new", base=tiny_llama)
    base = Base.from_folder(tiny_llama)
    want, have = (read_adapter(open_adapter(folder), base) for folder in (adapter, tmp_path / "new"))
    for site in base.sites.values():
        a, b = want.delta(site), have.delta(site)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            mine, theirs = a.matrix(), b.matrix()
            assert mine is not None
            assert theirs is not None
            assert torch.equal(mine, theirs)


def test_experts_of_mixtral_by_the_names_of_others(tmp_path: Path) -> None:
    model_of("mixtral", vocab_size=320).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "chat", tmp_path / "base", targets=["w1", "w2", "w3", "q_proj"])
    rules = {
        r"block_sparse_moe\.experts": "mlp.experts",
        r"\.w1\b": ".gate_proj",
        r"\.w2\b": ".down_proj",
        r"\.w3\b": ".up_proj",
    }
    old = aged(adapter, tmp_path / "old", rules)
    for name in ("hubkit.json", "tensors.json", "README.md"):
        (old / name).unlink()
    done = migrate(old, tmp_path / "new", base=tmp_path / "base")
    assert {one.why for one in done.renamed} == {"a last name that is known elsewhere"}
    want, have = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_adapters_without_a_form_of_peft_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    bottleneck = make_adapter(tmp_path / "b", tiny_llama, method=host().load("adapters"), width=4)
    refused("HK-NOT-ADAPTER", migrate, bottleneck, tmp_path / "new", base=tiny_llama)


def test_tables_of_manifests_hold_the_migration(adapter: Path) -> None:
    manifest = replace(Manifest.read(adapter), migration={"renamed": {"a.*.b": "c.*.b"}, "proven": ["shapes"]})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
