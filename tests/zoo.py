"""Tiny seeded random causal models of every architecture with a place for virtual tokens, and texts for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bases import architectures as bases
from torch import Tensor

FP32, FP64 = 1e-4, 1e-9
"""What two orders of the same sums may differ by, relative to the largest value."""
N = 5
SIZES: Mapping[str, Any] = {
    **bases.SIZES,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
    "init_std": 0.4,
}
OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "qwen3": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "llama4_text": {"floor_scale": 3, "attn_scale": 0.5},
}
"""What makes them harder than the rows of the table of bases, whose configurations they have otherwise."""


def model_of(kind: str, attention: str = "sdpa", /, **more: Any) -> Any:
    """A tiny seeded random causal model of one architecture."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(1)
    blank = CONFIG_MAPPING[kind]()
    config = bases.sized(blank, {**bases.ARCHITECTURES[kind].own, **OWN.get(kind, {}), **more}, SIZES)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def near(have: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    assert have.shape == want.shape
    tolerance = tolerance or (FP64 if want.dtype == torch.float64 else FP32)
    assert (have - want).detach().abs().max() <= tolerance * max(1.0, float(want.detach().abs().max()))
