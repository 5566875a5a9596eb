"""Virtual tokens in an encoder: embeddings in front of every row's own, whose outputs are cut off again, and keys and
values in front of every attention's.

All tokens see one another, so virtual embeddings run with the text of each row, through every layer. What the layers
give for them is cut off the encoder's output; a pooler inside the encoder, and heads that read the first position, see
the first virtual token, as in PEFT. PEFT leaves those outputs in, gives token types up when it extracts features, and
has its RoBERTa count padding as positions where a prompt is in front; here a padded row is what that row is alone.

Prompt tuning, Lester et al. 2021, https://arxiv.org/abs/2104.08691; prefixes in encoders: P-Tuning v2, Liu et al. 2021,
https://arxiv.org/abs/2110.07602
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.front.decoder_hooks import (
    BARE,
    VirtualHooks,
    attentions_of,
    parted_where_checkpointed,
    require_attention,
)
from hubkit.tensors.front.front import CacheView, Front, Layers, joined
from hubkit.tensors.front.plan import RowsVirtual, Virtual, VirtualPlan
from hubkit.tensors.parts.part import Tokens

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base

_STATE = "_hubkit_front"
Active = Callable[[], VirtualPlan | None]


def virtual_hooks(
    model: nn.Module,
    base: Base,
    active: Callable[[], Virtual | None],
    under: Callable[[Any], AbstractContextManager[None]],
) -> VirtualHooks | EncoderHooks:
    """The hooks that put virtual tokens in front of the text of `model`: a decoder's or an encoder's."""
    if not base.arch.encoder:
        return VirtualHooks(model, base, active, under)

    def alike() -> VirtualPlan | None:
        plan = active()
        assert not isinstance(plan, RowsVirtual), "an encoder's rows are refused when the route is planned"
        return plan

    return EncoderHooks(model, base, alike)


def run_once(model: nn.Module, base: Base, inputs: Mapping[str, Tensor]) -> Layers:
    """Keys and values, per layer, that a bare model makes of one row, in eval mode; what is attached stays out."""
    hooks = virtual_hooks(model, base, lambda: None, lambda plan: nullcontext())
    training, token = model.training, BARE.set(True)
    model.eval()
    try:
        with torch.no_grad():
            return hooks.run(inputs, Front([], 0))
    finally:
        model.train(training)
        BARE.reset(token)
        hooks.remove()


@dataclass
class _Pass:
    """One forward.

    Args:
        front: keys and values in front of every attention's.
        tokens: embeddings in front of each row's.
        uncut: what the encoder made of all of them and of the text.
    """

    front: Front
    tokens: int = 0
    uncut: Tensor | None = None


class EncoderHooks:
    """The hooks on one encoder that put virtual tokens in front of its text.

    Args:
        model: the live base.
        base: its sites.
        active: the plan of the forward that is running, or None.

    Raises:
        HubkitError: ``HK-ARCH`` where the model has no known place for them.
    """

    def __init__(self, model: nn.Module, base: Base, active: Active) -> None:
        facts = base.arch.encoder
        assert facts is not None
        attentions = attentions_of(model, base, facts.attention)
        table = base.site("tokens").module
        assert table is not None
        self.table = table
        self.trunk = model.get_submodule(_common(next(iter(attentions)), _name_of(table, model)))
        config: Any = self.trunk.config
        self._config, self._context, self._active = config, base.decoder.context, active
        self._pad: int | None = config.pad_token_id if facts.counted_positions else None
        self._names = list(inspect.signature(self.trunk.forward).parameters)
        inner = list(inspect.signature(next(iter(attentions.values())).forward).parameters)
        self._inner, self._cache = inner, next(name for name in base.arch.cache if name in inner)
        self._checkpointing: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._bare: ContextVar[Front | None] = ContextVar("hubkit_bare_front", default=None)
        self._now: ContextVar[_Pass | None] = ContextVar("hubkit_pass", default=None)
        self._heads = [m for m in model.modules() if type(m).__name__ in facts.first_position]
        self._handles = [
            self.trunk.register_forward_pre_hook(self._before_trunk, with_kwargs=True),
            self.trunk.register_forward_hook(self._after_trunk),
            *(m.register_forward_pre_hook(self._before_attention, with_kwargs=True) for m in attentions.values()),
            *(m.register_forward_pre_hook(self._before_head) for m in self._heads),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before_trunk(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan, bare = self._active(), self._bare.get()
        if bare is not None or plan is None:
            self._now.set(None if bare is None else _Pass(bare))
            return None
        require_attention(self._config)
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids = named.pop("input_ids", None)
        if (ids is None) == (named.get("inputs_embeds") is None):
            return None  # the base says itself what is wrong with that
        if ids is not None:
            named["inputs_embeds"] = self.table(ids)
        self._widen(named, plan, ids)
        return (), named

    def _widen(self, named: dict[str, Any], plan: VirtualPlan, ids: Tensor | None) -> None:
        """Puts the virtual tokens of `plan` in front in the arguments of one forward."""
        embeds: Tensor = named["inputs_embeds"]
        rows, own, by = embeds.shape[0], self._positions(named.get("position_ids"), ids, embeds), 0
        vectors, kept, places = [], [], []
        for part in plan.parts:
            if isinstance(part, Tokens):
                vectors.append(part().to(embeds).expand(rows, -1, -1))
                places.append(torch.arange(by, by + part.length, device=own.device) + self._first)
            else:
                kept.append(part().to(embeds))
            by += part.length
        now = _Pass(self._front(plan, kept), sum(len(place) for place in places))
        moved = own + by if self._pad is None else torch.where(own == self._pad, own, own + by)
        self._require_room(moved, by)
        positions = torch.cat([*(place.expand(len(own), -1) for place in places), moved], 1)
        setattr(positions, _STATE, now.front)  # an attention that is recomputed later finds its own forward's by it
        named["position_ids"] = positions
        named["inputs_embeds"] = torch.cat([*vectors, now.front.anchored(embeds)], 1)
        for name, value in (("token_type_ids", 0), ("attention_mask", 1)):
            if named.get(name) is not None and now.tokens:
                named[name] = F.pad(_by_token(name, named[name]), (now.tokens, 0), value=value)
        self._now.set(now)
        plan.last = now.front

    @property
    def _first(self) -> int:
        """The position of the first token."""
        return 0 if self._pad is None else self._pad + 1

    def _positions(self, given: Tensor | None, ids: Tensor | None, embeds: Tensor) -> Tensor:
        """The positions that the base gives the text, (1 or rows, tokens)."""
        if given is not None:
            return given
        if ids is None or self._pad is None:
            return torch.arange(embeds.shape[1], device=embeds.device)[None] + self._first
        text = ids.ne(self._pad).long()
        return text.cumsum(1) * text + self._pad

    def _require_room(self, moved: Tensor, by: int) -> None:
        if self._context is None or moved.shape[1] + by <= self._context:
            return  # whatever the positions are: a device that runs ahead of the host is not asked for them
        if (length := int(moved.max()) + 1 - self._first) > self._context:
            raise HubkitError(
                "HK-ROW-TOO-LONG",
                "virtual tokens and text do not fit the base's context",
                want=f"at most {self._context - by} tokens of text beside {by} virtual ones",
                have=str(length - by),
            )

    def _front(self, plan: VirtualPlan, kept: list[Tensor]) -> Front:
        """The keys and values of one forward."""
        if not kept:
            return Front([], 0)
        rows = joined(kept, 3)
        front = Front([(layer[0][None], layer[1][None]) for layer in rows.unbind(0)], rows.shape[3])
        return parted_where_checkpointed(front, plan, self.trunk, self._checkpointing)

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._inner, args, strict=False)), **kwargs}
        front = self._front_of(named)
        if front is None or not (front.length or front.recorded is not None):
            return None
        mask = named.get("attention_mask")
        if mask is not None:
            named["attention_mask"] = front.widened(mask, named["hidden_states"], lambda: 0)[0]
        named[self._cache] = CacheView(None, front, 0)
        return (), named

    def _front_of(self, named: Mapping[str, Any]) -> Front | None:
        """The keys and values of the forward that an attention runs in, or is run again for."""
        hidden = named["hidden_states"]
        known: Front | None = getattr(named.get("position_ids"), _STATE, None) or getattr(hidden, _STATE, None)
        if known is None:
            now, plan = self._now.get(), self._active()
            known = now.front if now is not None else None if plan is None else plan.last
            if known is not None:
                setattr(hidden, _STATE, known)  # where no positions are passed on
        return known

    def _after_trunk(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        now = self._now.get()
        if now is None or not now.tokens:
            return None
        if self._heads:
            now.uncut = y[0]
        cut: Any = _cut(y, now.tokens, y[0].shape[1])
        return cut

    def _before_head(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        now = self._now.get()
        if now is None or now.uncut is None:
            return None
        uncut, now.uncut = now.uncut, None
        return (uncut, *args[1:])

    def run(self, inputs: Mapping[str, Tensor], front: Front) -> Layers:
        """Keys and values, per layer, that the encoder makes of one row by itself."""
        recorded: dict[int, tuple[Tensor, Tensor]] = {}
        front.recorded = recorded
        token = self._bare.set(front)
        try:
            self.trunk(**inputs)
        finally:
            self._bare.reset(token)
        return [recorded[index] for index in sorted(recorded)]


def _name_of(wanted: nn.Module, model: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def _common(one: str, other: str) -> str:
    """The path of the innermost module that holds both."""
    shared: list[str] = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _by_token(name: str, value: Tensor) -> Tensor:
    if value.dim() != 2:
        raise HubkitError(
            "HK-ATTENTION",
            f"{name} must have one value per token where learned tokens are put in front",
            want="(rows, tokens)",
            have=str(tuple(value.shape)),
        )
    return value


def _cut(value: Any, tokens: int, whole: int) -> Any:
    """`value`, an output of the encoder, without what belongs to its first `tokens` of `whole` tokens."""
    if isinstance(value, Tensor):
        if value.dim() == 3 and value.shape[1] == whole:
            return value[:, tokens:]
        return value[:, :, tokens:] if value.dim() == 4 and value.shape[2] == whole else value
    if isinstance(value, Mapping):
        return type(value)(**{key: _cut(item, tokens, whole) for key, item in value.items()})
    return tuple(_cut(item, tokens, whole) for item in value) if isinstance(value, tuple) else value
