"""bitsandbytes still is what `hubkit.compat.bitsandbytes` takes it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import model_of

from hubkit.compat import bitsandbytes as insides
from hubkit.errors import HubkitError

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantized(bias: bool = False) -> Any:
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    plain = nn.Linear(64, 32, bias=bias)
    layer.load_state_dict(plain.state_dict())
    return layer


def test_what_a_layer_holds_is_what_it_stores() -> None:
    layer = quantized()
    layer.to("cpu")  # that is when it quantizes
    stored = {key.removeprefix("weight").removeprefix("."): value for key, value in layer.state_dict().items()}
    held = insides.packed_tensors(layer)
    assert held is not None
    assert held.keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in held.items())
    assert insides.decoded_facts(layer) == (torch.float32, False)


def test_other_layers_hold_nothing() -> None:
    for module in (nn.Linear(2, 2), nn.ReLU(), None):
        assert insides.packed_tensors(module) is None
        assert insides.decoded_facts(module) is None


def test_a_layer_that_is_not_quantized_yet_is_refused() -> None:
    with pytest.raises(HubkitError, match="not quantized yet") as caught:
        insides.packed_tensors(quantized())
    assert caught.value.code == "HK-QUANT-STATE"


def test_a_weight_rearranged_for_the_cpu_is_refused() -> None:
    layer = quantized().to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(HubkitError, match="rearranged"):
        insides.packed_tensors(layer)
    assert insides.decoded_facts(layer) == (torch.float32, False)
    source = Path(bitsandbytes.nn.modules.__file__).read_text("utf-8")
    assert "packing_format_for_cpu" in source, "it is set only by a kernel that not every processor has"


@pytest.mark.parametrize(("kind", "transposed"), [("llama", False), ("gpt2", True)])
def test_transformers_notes_what_a_layer_was_made_of(kind: str, transposed: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model_of(kind).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    facts = [insides.decoded_facts(module) for module in model.modules()]
    assert {fact for fact in facts if fact is not None} == {(torch.float32, transposed)}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit"])
def test_the_state_that_is_made_is_that_of_a_first_step(name: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(80, 64)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    made, stepped = (getattr(bitsandbytes.optim, name)(groups, lr=0.0) for _ in range(2))
    for param in params:
        param.grad = torch.ones_like(param)
    stepped.step()
    for param in params:
        insides.make_state(made, param)
        have, want = made.state[param], stepped.state[param]
        assert have.keys() == want.keys()
        for key, value in want.items():
            assert type(have[key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert (have[key].shape, have[key].dtype) == (value.shape, value.dtype)
