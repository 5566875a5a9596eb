"""What training changes outside itself is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import model_of

from hubkit.compat.torch import hook_numbers
from hubkit.tensors.live.attached import Attached
from hubkit.training.guards import training_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("asked_before", [True, False])
def test_checkpointing_leaves_no_hook_on_the_embeddings(attached: bool, asked_before: bool) -> None:
    """transformers 5 puts one there as it switches checkpointing on, and leaves it there."""
    base = model_of("llama")
    if asked_before:
        base.enable_input_require_grads()
    model: Any = Attached(base) if attached else base
    table = base.get_input_embeddings()
    before = hook_numbers(table)
    assert bool(before) is asked_before
    with training_state(model, CPU, checkpointing=True):
        assert any(
            module.gradient_checkpointing for module in base.modules() if hasattr(module, "gradient_checkpointing")
        )
    assert hook_numbers(table) == before
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
