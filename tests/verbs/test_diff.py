"""diff: manifests, tensors, and what two adapters add to their base, held to the formulas written out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making import make_adapter
from projects import GOLDEN, put, ship
from safetensors.torch import load_file

from hubkit.cli import run
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.verbs.cache import cache
from hubkit.verbs.diff import diff
from hubkit.verbs.pull import pull


def products(folder: Path) -> dict[str, torch.Tensor]:
    """Site -> scale · B·A in fp64, from the files of a plain low-rank adapter."""
    tensors = {name: value.double() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    return {name.removeprefix("base_model.model."): scale * tensors[name + ends[1]] @ tensors[name + ends[0]]
            for name in names}  # fmt: skip


@pytest.fixture
def two(tmp_path: Path, tiny_llama: Path) -> tuple[Path, Path]:
    """Two low-rank adapters, of other ranks and other values."""
    first = make_adapter(tmp_path / "first", tiny_llama)
    return first, make_adapter(tmp_path / "second", tiny_llama, seed=1, rank=3, version="0.2.0")


def test_the_figures_are_those_of_the_formula(two: tuple[Path, Path]) -> None:
    found = diff(*two)
    first, second = map(products, two)
    assert {one.site for one in found.sites} == set(first) == set(second)
    for one in found.sites:
        a, b = first[one.site], second[one.site]
        torch.testing.assert_close(
            torch.tensor(one.norms), torch.stack([a.norm(), b.norm()]).float(), rtol=1e-6, atol=0
        )
        assert one.difference == pytest.approx(float((b - a).norm()), rel=1e-6)
        assert one.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)
    apart = sum(float((second[name] - first[name]).square().sum()) for name in first)
    assert found.relative == pytest.approx(
        (apart / sum(float(a.square().sum()) for a in first.values())) ** 0.5, rel=1e-6
    )
    assert (found.same, found.left_out, found.notes) == (False, "", ())
    assert [(one.name, one.first, one.second) for one in found.config if one.name == "rank"] == [("rank", 2, 3)]
    assert {"name", "version"} <= {one.name for one in found.fields}
    assert all(one.first != one.second for one in found.tensors)


def test_there_and_back_is_the_same_difference(two: tuple[Path, Path]) -> None:
    there, back = diff(*two), diff(two[1], two[0])
    for one, other in zip(there.sites, back.sites, strict=True):
        assert one.norms == pytest.approx(other.norms[::-1], rel=1e-12)
        assert one.difference == pytest.approx(other.difference, rel=1e-12)


def test_the_same_and_the_same_values_under_another_version(two: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "copy")
    assert diff(two[0], tmp_path / "copy").same
    manifest = replace(Manifest.read(two[0]), version="9.0.0")
    (tmp_path / "copy" / "hubkit.json").write_bytes(manifest.to_bytes())
    found = diff(two[0], tmp_path / "copy")
    assert [one.name for one in found.fields] == ["version"]
    assert (found.same, found.config, found.files, found.tensors, found.relative) == (False, (), (), (), 0.0)
    assert {(one.difference, round(one.cosine or 0, 12)) for one in found.sites} == {(0.0, 1.0)}


def test_a_site_of_one_alone(two: tuple[Path, Path], tmp_path: Path, tiny_llama: Path) -> None:
    less = make_adapter(tmp_path / "less", tiny_llama, targets=["q_proj"])
    found = diff(two[0], less)
    alone = [one for one in found.sites if not one.site.endswith("q_proj")]
    assert alone
    assert all(one.norms[1] == 0 and one.cosine is None for one in alone)
    assert all(one.difference == pytest.approx(one.norms[0]) for one in alone)
    assert sum(one.second is None for one in found.tensors) == 2 * len(alone)


@pytest.mark.parametrize("method", ["full", "selective", "prefix", "prompt", "adapters", "heads", "tokens", "qlora"])
def test_every_kind_of_part_is_compared(method: str, tmp_path: Path) -> None:
    """With itself under another version: no difference at any site, and norms that are not zero."""
    first, second = put(method, tmp_path / "a"), put(method, tmp_path / "b", version="9.0.0")
    found = diff(first, second)
    assert (found.left_out, found.relative) == ("", 0.0)
    assert all(one.norms[0] == one.norms[1] > 0 for one in found.sites), found.sites
    assert found.sites


def test_a_module_that_is_held_whole(tmp_path: Path) -> None:
    """Its values, where the base's are not at hand; what it changes in the base, where they are."""
    first, second = put("heads", tmp_path / "a"), put("heads", tmp_path / "b", version="9.0.0")
    values, changes = diff(first, second), diff(first, second, base=GOLDEN / "base")
    held = {one.site: one for one in values.sites if one.values}
    assert held
    assert not any(one.values for one in changes.sites)
    assert "held whole" in values.notes[0]
    assert all(one.norms[0] < held[one.site].norms[0] for one in changes.sites if one.site in held)


def test_whole_weights_and_biases_are_compared_directly(tmp_path: Path) -> None:
    first = put("full", tmp_path / "a")
    second = put("full", tmp_path / "b", version="9.0.0")
    tensors = load_file(second / "adapter_model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    found = diff(first, second)
    (site,) = [one for one in found.sites if one.site in name]
    assert site.norms[0] == pytest.approx(float(tensors[name].double().norm()), rel=1e-6)


def test_a_method_that_reads_the_base_needs_it(tmp_path: Path) -> None:
    first, second = put("dora", tmp_path / "a"), put("dora", tmp_path / "b", version="9.0.0")
    without = diff(first, second)
    assert (without.sites, without.relative) == ((), None)
    assert "--base" in without.left_out
    assert diff(first, second, base=GOLDEN / "base").relative == 0.0
    mixed = diff(put("lora", tmp_path / "c"), first, base=GOLDEN / "base")
    assert mixed.sites
    assert any("methods" in note for note in mixed.notes)


def test_what_makes_no_sense_is_left_out_with_its_reason(
    two: tuple[Path, Path], tmp_path: Path, tiny_gpt2: Path, tiny_llama: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny_gpt2)
    assert "bases" in diff(two[0], other).left_out
    assert any(one.name.startswith("base/") for one in diff(two[0], other).fields)
    golden = put("prefix", tmp_path / "p"), put("lora", tmp_path / "l"), put("mix", tmp_path / "m")
    assert "no weight" in diff(golden[0], golden[1]).left_out
    assert "mix" in diff(golden[1], golden[2]).left_out
    manifest = Manifest.read(two[1])
    assert manifest.base is not None
    moved = replace(manifest, base=replace(manifest.base, weights=f"sha256:{'0' * 64}", files={}))
    (two[1] / "hubkit.json").write_bytes(moved.to_bytes())
    found = diff(*two)
    assert found.notes == ("their bases have other weights",)
    assert len(found.sites) == 14
    with pytest.raises(HubkitError) as refusal:
        diff(*two, base=tiny_llama)
    assert refusal.value.code == "HK-BASE-MISMATCH"


def test_as_typed(registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version in ("1.0.0", "1.1.0"):
        ship("lora", "ana/chat", tmp_path / "chat", version=version)
    pull("ana/chat@1.0.0")
    assert run(["diff", "ana/chat@1.0.0", "ana/chat@1.1.0"]) == 0
    out = capsys.readouterr().out
    assert "MANIFEST  FIRST  SECOND\nversion   1.0.0  1.1.0\n" in out
    assert out.endswith("sites\n")
    assert "relative difference 0.0000 at " in out
    assert len(cache("list")) == 2
    assert run(["diff", "ana/chat@1.0.0", "ana/chat@1.1.0", "--exit-code", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert run(["diff", "ana/chat@1.1.0", str(tmp_path / "chat"), "--exit-code"]) == 0
    assert "the same: " in capsys.readouterr().out
