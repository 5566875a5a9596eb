"""Attention of short rows on a CPU in half precision: torch's fused kernel is slow there, plain products are not.

Forward and backward of one layer at 4 rows of 128 tokens, 9 heads of 64, bf16, two cores: 4 ms instead of 15 in a
running training. Scores and softmax are float32, as in the fused kernel, and are computed again in the backward pass:
nothing is kept but queries, keys and values.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

LONGEST = 128
"""Tokens of a row up to which the plain products are faster; at 256 torch's kernel has caught up."""
MOST_KEYS = 192
"""Keys of such a row: those of its tokens, and what stands in front of them. Scores grow with these by half at most; at
256 torch's kernel has caught up here, too."""
_NAME = "scaled_dot_product_attention"


@contextmanager
def short_attention(model: nn.Module, enabled: bool = True) -> Iterator[bool]:
    """Within it, in this thread, scaled dot-product attention of short rows runs as plain products; yields whether.

    Masks (boolean or added), causality, grouped heads and scale mean what they mean to torch; a call with dropout or
    of another shape goes torch's own way. Only the rounding differs.

    Args:
        model: its first parameter says device and dtype: a CPU and half precision, or nothing is changed.
        enabled: False leaves everything alone.
    """
    first = next(model.parameters())
    if not enabled or first.device.type != "cpu" or first.dtype not in (torch.bfloat16, torch.float16):
        yield False
        return
    with _redirected():
        yield True


class _Here(threading.local):
    """How often this thread is within `_redirected`."""

    depth = 0


_here, _lock = _Here(), threading.Lock()
_threads = 0


@contextmanager
def _redirected() -> Iterator[None]:
    """Puts `_attention` in the place of torch's function, for this thread: others pass through.

    A mode of torch would be tidier, but none is active while a backward pass recomputes what was checkpointed.
    """
    global _threads
    with _lock:
        _threads += not _here.depth
        vars(F)[_NAME] = _attention
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _threads -= not _here.depth
            if not _threads:
                vars(F)[_NAME] = scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """As torch's function of this name: query (rows, heads, T, d), key and value (rows, key heads, S, d)."""
    if torch.compiler.is_compiling():
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    if not _here.depth or dropout_p or not _is_short(query, key, value, attn_mask, kwargs.get("enable_gqa", False)):
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    scale = kwargs.get("scale")
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    out: Tensor = _Attention.apply(query, key, value, attn_mask, scale)  # type: ignore[no-untyped-call]
    return out


def _is_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> bool:
    if not (query.dim() == key.dim() == value.dim() == 4) or query.dtype.itemsize != 2 or query.device.type != "cpu":
        return False
    rows, heads, tokens, width = query.shape
    kept_apart = key.shape[0] != rows or key.shape[3] != width or value.shape[:3] != key.shape[:3]
    if kept_apart or heads % key.shape[1] or not (grouped or heads == key.shape[1]):
        return False
    if mask is not None and (mask.requires_grad or mask.dim() > 4):
        return False
    return 1 < tokens <= LONGEST and key.shape[2] <= MOST_KEYS


class _Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v. Heads that share a key are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        out = torch.bmm(_probabilities(query, key, mask, scale), value.reshape(-1, *value.shape[2:]))
        return out.view(*query.shape[:3], value.shape[3])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        weights = _probabilities(query, key, mask, ctx.scale)
        tokens = weights.shape[1]
        grad = grad.reshape(-1, tokens, grad.shape[3])
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        wide = weights.float()
        slope = torch.bmm(grad, value.reshape(-1, *value.shape[2:]).transpose(1, 2)).float()
        slope.sub_(torch.linalg.vecdot(slope, wide).unsqueeze(-1)).mul_(wide)
        narrow = slope.mul_(ctx.scale).to(query.dtype)
        grad_query = torch.bmm(narrow, key.reshape(-1, *key.shape[2:]))
        grad_key = torch.bmm(narrow.transpose(1, 2), query.reshape(-1, tokens, query.shape[3]))
        return grad_query.view(query.shape), grad_key.view(key.shape), grad_value.view(value.shape), None, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(rows · key heads, heads a key · T, S), in the dtype of the queries; a row that may see nothing is zero."""
    shape = (*query.shape[:3], key.shape[2])
    left = (query.float() * scale).reshape(key.shape[0] * key.shape[1], -1, query.shape[3])
    scores = torch.bmm(left, key.float().reshape(-1, *key.shape[2:]).transpose(1, 2))
    if mask is None:
        return torch.softmax(scores, -1).to(query.dtype)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    scores.view(shape).add_(mask)
    weights = torch.softmax(scores, -1).to(query.dtype)
    blind = (mask == -math.inf).all(-1, keepdim=True)
    if blind.any():
        weights.view(shape).masked_fill_(blind, 0.0)
    return weights
