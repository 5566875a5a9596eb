"""The proof that ends a merge: whatever is wrong with the written files is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from making import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import refused, resharded

from hubkit.artifact.folder import open_adapter
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.shards import Shards, open_shards
from hubkit.tensors.weights.merging import MergePlan, plan_merge, write_merged
from hubkit.tensors.weights.proof import expected, read_back

TOUCHED, OWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def planned(tiny_llama: Path, tmp_path: Path) -> tuple[MergePlan, Shards]:
    folder = resharded(tiny_llama, tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", folder, targets=["q_proj"])
    base = Base.from_folder(folder)
    return plan_merge(base, "a", {"a": read_adapter(open_adapter(adapter), base, name="a")}), open_shards(folder)


def test_what_is_expected_is_what_is_written(planned: tuple[MergePlan, Shards], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_merged(*planned, tmp_path / "out")
    merged, want = open_shards(tmp_path / "out"), expected(*planned, None)
    assert merged.headers.keys() == want.keys()
    for name, one in want.items():
        assert merged.read(name).equal(one.values())


def _flip(name: str) -> Callable[[dict[str, Tensor]], None]:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] += 1

    return flip


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "missing": (f"{OWN}: missing", lambda tensors: tensors.__delitem__(OWN)),
    "more": ("x.weight: not of this merge", lambda tensors: tensors.update({"x.weight": tensors[OWN].clone()})),
    "shape": ("(16, 32), not F32 (32, 16)", lambda tensors: tensors.update({OWN: tensors[OWN].t().contiguous()})),
    "dtype": ("F64 (32, 16), not F32", lambda tensors: tensors.update({OWN: tensors[OWN].double()})),
    "computed": ("sha256:", _flip(TOUCHED)),
    "own": (f"{OWN}: not the base's", _flip(OWN)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault: str, planned: tuple[MergePlan, Shards], tmp_path: Path) -> None:
    """What a broken disk or writer would leave: as if it had been written so, or written right and damaged later."""
    out, (said, damage) = tmp_path / "out", FAULTS[fault]
    out.mkdir()
    plan, shards = planned
    written = write_merged(plan, shards, out)
    base = fingerprint_folder(shards.path).tensors
    assert len(read_back(out, plan, shards, None, written, base)) == 19
    name = OWN if fault != "computed" else TOUCHED
    file = out / shards.file_of[name]
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    if fault in ("missing", "more"):
        index = json.loads((out / "model.safetensors.index.json").read_text())
        kept = {n: f for n, f in index["weight_map"].items() if f != file.name} | dict.fromkeys(tensors, file.name)
        (out / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
    error = refused("HK-MERGE-DIFFERS", read_back, out, plan, shards, None, written, base)
    assert any(said in line for line in error.have), error.have
