"""The LoRA family on the real 135M model in fp32: PEFT computes the same logits from the files written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.adapter import Adapter
from hubkit.tensors.attach import Attached
from hubkit.tensors.live import load_base

peft = pytest.importorskip("peft")

FP32 = 1e-5
"""Largest difference of two fp32 logits computed in different orders, relative to the largest logit."""

FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"rslora": True, "alpha": 8}),
    "dora": ("dora", {}),
    "pissa": ("lora", {"init": "pissa", "layers": "0-5"}),
    "olora": ("lora", {"init": "olora", "layers": "0,10,29"}),
}


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("case", FAMILY)
def test_peft_computes_the_same(case: str, smol: Path, tmp_path: Path, record_property: Any) -> None:
    name, options = FAMILY[case]
    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    ours = Attached(load_base(smol, "float32"))
    method = host().load(name)
    adapter = Adapter.fresh("a", method, parse_config(method.info.config, options, "x"), ours.sites, 0)
    with torch.no_grad():
        plain = ours(ids).logits
        ours.add("a", adapter)
        ours.set_mix("a")
        assert torch.equal(ours(ids).logits, plain), "fresh: the base, bit for bit"
        moved = torch.Generator().manual_seed(1)
        for parameter in adapter.trainables().values():
            parameter += 0.003 * torch.randn(parameter.shape, generator=moved)
        adapter.to_compute_dtype()
        mine = ours(ids).logits
        for file, data in method.export(adapter, "peft").items():
            (tmp_path / file).write_bytes(data)
        theirs = peft.PeftModel.from_pretrained(ours.detach(), str(tmp_path))(input_ids=ids).logits
    difference, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
    record_property("difference", difference)
    record_property("largest", largest)
    assert (mine - plain).abs().max() > 0.1, "an adapter that does something"
    assert difference <= FP32 * largest
