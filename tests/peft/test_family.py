"""The LoRA family on the real 135M model in fp32: PEFT computes the same logits from the files written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter

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
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=moved))
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


@pytest.mark.slow
@pytest.mark.model
def test_qlora_on_bitsandbytes_own_layers(smol: Path, tmp_path: Path, record_property: Any) -> None:
    """The base in 4 bits by bitsandbytes, the adapter through PEFT: the logits are hubkit's, to the rounding of fp32.

    In training mode, because in eval mode bitsandbytes rearranges the weights for a kernel of its own, in bf16.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    ours = Attached(load_base(smol, "float32", "nf4/64/double"))
    method = host().load("qlora")
    adapter = Adapter.fresh("a", method, parse_config(method.info.config, {}, "x"), ours.sites, 0)
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainables().values():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=moved))
        plain = ours(ids).logits
    adapter.to_compute_dtype()
    ours.add("a", adapter)
    ours.set_mix("a")
    mine = ours(ids).logits.detach()
    for file, data in method.export(adapter, "peft").items():
        (tmp_path / file).write_bytes(data)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(smol, quantization_config=how, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path)).train()(input_ids=ids).logits.detach()
    difference, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
    record_property("difference", difference)
    record_property("largest", largest)
    assert (mine - plain).abs().max() > 0.1
    assert difference <= FP32 * largest
