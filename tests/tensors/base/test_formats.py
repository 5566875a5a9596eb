"""Bases that store codes: adapters act beside them exactly as in PEFT; nothing is ever added to a code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import logits, refused, rows_file

import hubkit
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.formats import computed_in, is_coded

FAST: dict[str, Any] = {"steps": 2, "learning_rate": 0.1}


def with_tensors(base: Path, folder: Path, change: Any, **config: Any) -> Path:
    shutil.copytree(base, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= change(name, tensor) if name.endswith("proj.weight") else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    return folder


def fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}


@pytest.fixture
def in_fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    facts = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return with_tensors(tiny_llama, tmp_path / "fp8", fp8, quantization_config=facts)


@pytest.fixture
def in_int8(tiny_llama: Path, tmp_path: Path) -> Path:
    """As bitsandbytes saves it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True)
    folder = tmp_path / "int8"
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=how).save_pretrained(folder)
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", ["in_fp8", "in_int8"])
def test_nothing_is_added_to_codes(
    kind: str, tiny_llama: Path, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(kind)
    coded = {name for name, site in Base.from_folder(base).sites.items() if site.coded}
    assert coded == {name for name in Base.from_folder(tiny_llama).sites if name.endswith("proj")}
    error = refused("HK-BASE-FORMAT", hubkit.merge, str(base), str(adapter), tmp_path / "out", allow_base_mismatch=True)
    assert set(error.have) <= coded
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["in_fp8", "in_int8"])
def test_what_reads_weights_is_refused_and_the_rest_trains(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, rows = request.getfixturevalue(kind), rows_file(tmp_path / "rows.jsonl")
    for method in ("dora", "qlora") if kind == "in_int8" else ("qlora",):
        refused("HK-BASE-FORMAT", hubkit.train, base, rows, tmp_path / "no", method=method, **FAST)
        assert not (tmp_path / "no").exists()
    if kind == "in_fp8" and transformers.__version__.startswith("4."):  # it computes with fp8 on a GPU alone
        refused("HK-BASE-LOAD", hubkit.train, base, rows, tmp_path / "yes", **FAST)
        return
    hubkit.train(base, rows, tmp_path / "yes", **FAST)
    hubkit.verify(str(tmp_path / "yes"), base=str(base))
    refused("HK-BASE-FORMAT", hubkit.merge, str(base), str(tmp_path / "yes"), tmp_path / "merged")


def test_beside_int8_it_computes_as_in_peft(in_int8: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    hubkit.train(in_int8, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", **FAST)
    model = AutoModelForCausalLM.from_pretrained(in_int8, dtype=torch.float32)
    plain = logits(model)
    attached = hubkit.attach(model, str(tmp_path / "a"), base=in_int8)
    again = AutoModelForCausalLM.from_pretrained(in_int8, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "a")
    # the codes are the same and so are the products with them: what differs is how an addition is rounded
    largest = logits(attached).abs().max()
    assert (logits(attached) - logits(theirs)).abs().max() <= 1e-4 * largest
    assert (logits(attached) - plain).abs().max() > 1e-2 * largest
    refused("HK-BASE-FORMAT", attached.merge)


def test_packed_weights_are_named_for_what_they_are(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name.replace("weight", "qweight"): torch.zeros(2, 4, dtype=torch.int32)}

    base = with_tensors(tiny_llama, tmp_path / "gptq", packed, quantization_config={"quant_method": "gptq", "bits": 4})
    rows = rows_file(tmp_path / "rows.jsonl")
    for call in (
        lambda: hubkit.train(base, rows, tmp_path / "out", steps=1),
        lambda: hubkit.merge(str(base), str(adapter), tmp_path / "out", allow_base_mismatch=True),
    ):
        error = refused("HK-BASE-FORMAT", call)
        assert "gptq" in error.what
    assert not (tmp_path / "out").exists()


def test_what_counts_as_codes() -> None:
    coded = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32}
    assert {d for d in (*coded, torch.float16, torch.bfloat16, torch.float32, torch.float64) if is_coded(d)} == coded
    assert computed_in({"torch_dtype": "float16"}) == torch.float16
    assert computed_in({"dtype": "float8_e4m3fn"}) == computed_in({}) == torch.bfloat16
