"""What autograd keeps of one forward pass, counted on the meta device at the base's real width."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubkit.compat.torch import autocast_on_meta
from hubkit.compat.transformers import quiet
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.methods.host import Method

DEPTHS = (2, 4)
"""Layers of the two models; what all layers of a deep one cost is on the line through them."""
KEPT = "hubkit_kept"


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd saves.

    Args:
        outside: of all but the layers.
        layer: of one layer.
        entry: of what enters a layer: all that checkpointing keeps of it.
        layers: how many there are.
    """

    outside: int
    layer: int
    entry: int
    layers: int

    @property
    def all(self) -> int:
        """Of the whole base."""
        return self.outside + self.layers * self.layer

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: what enters each layer, and one layer that is computed again."""
        return self.outside + self.layers * self.entry + self.layer


class _Kept(torch.autograd.Function):
    """An attention that keeps what fused kernels keep: queries, keys, values, the output and a sum per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens = query.shape[:3]
        out = query.new_empty((rows, tokens, heads, value.shape[-1])).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise AssertionError("it is only counted what is kept")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **rest: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers. Unmasked: no value is computed, and masks are not kept per layer."""
    out: Tensor = _Kept.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def saved_by(method: Method, config: Any, model: nn.Module, rows: int, tokens: int, dtype: torch.dtype) -> Saved:
    """What is saved of a forward pass of `rows` rows of `tokens` tokens.

    Tokens that a method puts in front count as tokens of each row: they pass through the same layers.

    Args:
        model: the base, on the meta device; read only for its class and configuration.

    Raises:
        HubkitError: ``HK-BASE-LOAD`` where a short model of the base cannot be made or run without values.
    """
    stated = getattr(model, "config", None)
    text = stated.get_text_config() if stated is not None else None
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise _unknown(model, "its configuration says no number of layers")
    depths = DEPTHS if layers > DEPTHS[0] else (0, layers)
    found = [0 if n == 0 else _counted(method, config, model, n, rows, tokens, dtype) for n in depths]
    layer = (found[1] - found[0]) // (depths[1] - depths[0])
    entry = rows * tokens * int(getattr(text, "hidden_size", 0)) * dtype.itemsize
    return Saved(found[1] - depths[1] * layer, layer, entry, layers)


def _counted(
    method: Method, config: Any, model: nn.Module, layers: int, rows: int, tokens: int, dtype: torch.dtype
) -> int:
    """Bytes saved by a base of so many layers."""
    from hubkit.tensors.live.attached import Attached

    try:
        with quiet():
            short = _short(model, layers, dtype)
            attached = Attached(short)
            front = _attach(method, config, attached)
            own = {id(value.untyped_storage()) for value in (*attached.parameters(), *attached.buffers())}
            kept: dict[int, Any] = {}

            def keep(value: Tensor) -> Tensor:
                storage = value.untyped_storage()
                if id(storage) not in own:
                    kept[id(storage)] = storage  # held, so that no other one gets its id
                return value

            ids = torch.zeros(rows, tokens + front, dtype=torch.long, device="meta")
            with autocast_on_meta(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                output = attached(input_ids=ids, use_cache=False)
            del output
    except HubkitError:
        raise
    except Exception as e:  # models of other makers look at values, which are not there
        raise _unknown(model, f"{type(e).__name__}: {e}") from e
    return sum(storage.nbytes() for storage in kept.values())


def _short(model: nn.Module, layers: int, dtype: torch.dtype) -> nn.Module:
    """The base with fewer layers, on the meta device."""
    from transformers import AttentionInterface

    AttentionInterface.register(KEPT, _attend)
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    config.pad_token_id = text.pad_token_id = None  # some look for it in the text, which has no values here
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = kinds[:layers]
    with torch.device("meta"):
        short: Any = type(model)(config)
    short.set_attn_implementation(KEPT)
    made: nn.Module = short.to(dtype).eval().requires_grad_(False)
    return made


def _attach(method: Method, config: Any, attached: Any) -> int:
    """Attaches fresh parts in training mode; returns the tokens in front, which act as tokens of the rows instead.

    A base in 4 bits keeps what the plain one keeps: its weights are decoded again in the backward pass.
    """
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import front_length

    with torch.device("meta"):
        parts = method.inject(Base.from_model(attached.model), config)
    front = front_length(parts.values())
    if front:
        table = attached.model.get_input_embeddings()
        table.register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
        return front
    for part in parts.values():
        part.float()
    attached.add("plan", Adapter("plan", method, config, dict(parts), attached.sites))
    attached.set_mix("plan")
    attached.train()
    return 0


def _unknown(model: nn.Module, why: str) -> HubkitError:
    return HubkitError(
        "HK-BASE-LOAD",
        "what this base keeps while it trains cannot be counted without its weights",
        where=type(model).__name__,
        have=why,
        fix="train one step and watch",
    )
