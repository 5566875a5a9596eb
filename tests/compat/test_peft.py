"""PEFT still is what `hubkit/engines/run.py` takes it for, which imports nothing of hubkit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import ids, model_of, near

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "embed_tokens"]


@pytest.fixture
def made() -> Any:
    """A model with an adapter that changes something, embeddings among it."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model_of("llama"), config).eval()


def change(model: Any) -> Tensor:
    """What the adapter adds to the output of one layer."""
    layer = model.base_model.model.model.embed_tokens
    tokens = ids(1, 4)
    with torch.no_grad():
        added: Tensor = layer(tokens) - layer.base_layer(tokens)
    return added


def test_what_an_adapter_adds_is_proportional_to_its_scaling(made: Any) -> None:
    want = change(made)
    assert want.abs().max() > 0.01
    found = [module.scaling for module in made.modules() if isinstance(getattr(module, "scaling", None), dict)]
    assert found == [{"default": 4.0}] * 3
    for scaling in found:
        scaling["default"] *= -0.5
    near(change(made), -0.5 * want)


def test_the_public_way_leaves_embeddings_out(made: Any) -> None:
    """Once it does not, `run.py` may take it."""
    want = change(made)
    for module in made.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    near(change(made), want)
    assert made.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 12.0}
