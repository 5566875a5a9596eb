"""Tiny seeded random causal models of every architecture with a place for virtual tokens, and texts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP32, FP64 = 1e-4, 1e-9
"""What two orders of the same sums may differ by, relative to the largest value."""
N = 5
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "qwen3": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 64},
}


def model_of(kind: str, attention: str = "sdpa", /, **more: Any) -> Any:
    """A tiny seeded random causal model of one architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {k: v for k, v in SIZES.items() if kind != "gpt2" or not k.startswith(("num_", "hidden", "inter", "max"))}
    config = AutoConfig.for_model(kind, **{**sizes, **OWN.get(kind, {}), **more})
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
