"""Attention of short rows on a CPU in half precision: torch's fused kernel is slow there, plain products are not.

Packed rows (`hubkit.training.packing`) are computed row by row: their mask would make every row pay for all others.

Forward and backward of one layer at 4 rows of 128 tokens, 9 heads of 64, bf16, two cores: 4 ms instead of 15 in a
running training. Scores and softmax are float32, as in the fused kernel, and are computed again in the backward pass:
nothing is kept but queries, keys and values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hubkit.compat.transformers import attention_of
from hubkit.tensors.front.decoder_hooks import SHORT_ROWS

LONGEST = 128
"""Tokens of a row up to which the plain products are faster; at 256 torch's kernel has caught up."""
MOST_KEYS = 192
"""Keys of such a row: those of its tokens, and what stands in front of them. Scores grow with these by half at most; at
256 torch's kernel has caught up here, too."""


_PACKED: ContextVar[Sequence[int]] = ContextVar("packed", default=())


@contextmanager
def rows_of(lengths: Sequence[int]) -> Iterator[None]:
    """Within it, what is packed into one row are rows of these `lengths`; none: nothing is packed."""
    token = _PACKED.set(lengths)
    try:
        yield
    finally:
        _PACKED.reset(token)


@contextmanager
def short_attention(model: nn.Module, enabled: bool = True) -> Iterator[bool]:
    """Within it, the scaled dot-product attention of `model` runs short rows as plain products; yields whether.

    It is an attention of transformers like any other (`AttentionInterface`), set on this model and put back. Masks
    (boolean or added), causality, grouped heads and scale mean what they mean there; whatever is no short row goes
    transformers' own way. Only the rounding differs.

    Args:
        model: its first parameter says device and dtype: a CPU and half precision, or nothing is changed; nor is a
            model that has chosen another attention than ``sdpa``, or whose architecture does not let it be chosen.
        enabled: False leaves everything alone.
    """
    first = next(model.parameters())
    owner = _chooser(model) if enabled and first.device.type == "cpu" and first.dtype.itemsize == 2 else None
    if owner is None or not _registered():
        yield False
        return
    owner.set_attn_implementation(SHORT_ROWS)
    try:
        yield attention_of(owner.config) == SHORT_ROWS
    finally:
        owner.set_attn_implementation("sdpa")


def _chooser(model: nn.Module) -> Any:
    """The outermost module that lets its attention be chosen, where that is ``sdpa``; else None."""
    modules: Iterator[Any] = (module for module in model.modules() if hasattr(module, "set_attn_implementation"))
    owner = next(modules, None)
    return owner if attention_of(getattr(owner, "config", None)) == "sdpa" else None


@functools.cache
def _registered() -> bool:
    """Makes transformers know the attention, and that its masks are those of ``sdpa``; False where it has no such door.

    Without the second registration masks are left out without a word: padding and windows would vanish.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return False
    AttentionInterface.register(SHORT_ROWS, functools.partial(attend, sdpa_attention_forward))
    AttentionMaskInterface.register(SHORT_ROWS, sdpa_mask)
    return True


_OTHERS = ("softcap", "position_bias", "cache", "output_attentions")
"""Arguments that ask for more than scaled dot-product attention, unless they are None or (transformers 4) False."""


def attend(
    otherwise: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.

    Args:
        otherwise: the one to call for what is no short row.
        module: says whether it is causal, unless `is_causal` does.
        query: (rows, heads, T, d); key and value: (rows, key heads, S, d).
        attention_mask: broadcastable to (rows, heads, T, S), True or 0 where a key is seen; None: all are.

    Returns:
        (rows, T, heads, d) and no weights.
    """
    asked = not all(kwargs.get(name) is None or kwargs[name] is False for name in _OTHERS)
    lengths = _PACKED.get()
    if not asked and not dropout and _is_packed(lengths, query, key, attention_mask):
        parts = [torch.split(side, list(lengths), 2) for side in (query, key, value)]
        options = {**kwargs, "dropout": 0.0, "scaling": scaling, "is_causal": True}
        with rows_of(()):
            rows = [attend(otherwise, module, q, k, v, None, **options)[0] for q, k, v in zip(*parts, strict=True)]
        return torch.cat(rows, 1), None
    if asked or dropout or torch.compiler.is_compiling() or not _is_short(query, key, value, attention_mask):
        found: tuple[Tensor, Tensor | None] = otherwise(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return found
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    out: Tensor = _Attention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _is_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if not (query.dim() == key.dim() == value.dim() == 4) or query.dtype.itemsize != 2 or query.device.type != "cpu":
        return False
    rows, heads, tokens, width = query.shape
    kept_apart = key.shape[0] != rows or key.shape[3] != width or value.shape[:3] != key.shape[:3]
    if kept_apart or heads % key.shape[1]:
        return False
    if mask is not None and (mask.requires_grad or mask.dim() > 4):
        return False
    return 1 < tokens <= LONGEST and key.shape[2] <= MOST_KEYS


def _is_packed(lengths: Sequence[int], query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether these are packed rows, and the mask says no more than that: each is causal, and sees all of itself."""
    tokens = query.shape[2]
    if not lengths or query.shape[0] != 1 or key.shape[2] != tokens or sum(lengths) != tokens:
        return False
    if mask is None or mask.dtype != torch.bool or mask.shape != (1, 1, tokens, tokens) or mask.device.type != "cpu":
        return False
    own = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.equal(mask[0, 0], (own[:, None] == own).tril_())


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
