"""What scaled dot-product attention keeps for its backward pass, on the meta device: torch has no kernel there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hubkit.compat.torch_meta import Multiplied, attention_by_products, fuses_attention


class Attending(TorchFunctionMode):
    """Within it attention on the meta device keeps what it would keep on a device of kind `device`.

    Fused kernels keep queries, keys, values, the output and a sum per query. Where torch has none for what is asked
    (dropout, or values of another width, on a CPU), it multiplies, and keeps the scores of all pairs of tokens.

    Args:
        multiplied: is told the products of fused kernels; their backward pass makes the scores once more.
    """

    def __init__(self, device: str, multiplied: Multiplied) -> None:
        super().__init__()
        self._device, self._multiplied = device, multiplied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        asked = attn_mask, dropout_p, is_causal, scale, enable_gqa
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes numbers of it, in each layer anew
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        if not fuses_attention(self._device, query, key, value, *asked):
            return attention_by_products(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        rows, heads, tokens, width = query.shape
        self._multiplied.note((tokens, width, key.shape[2]), rows * heads, 2)
        self._multiplied.note((tokens, key.shape[2], value.shape[3]), rows * heads, 3)
        out: Tensor = _Kept.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return out


class _Kept(torch.autograd.Function):
    """An attention that keeps what fused kernels keep; no value is computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query) if value.shape[-1] == query.shape[-1] else _by_token(query, value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        raise AssertionError("it is only counted what is kept")


def _by_token(query: Tensor, width: int) -> Tensor:
    rows, heads, tokens = query.shape[:3]
    return query.new_empty((rows, tokens, heads, width)).transpose(1, 2)
