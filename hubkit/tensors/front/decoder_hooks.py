"""Virtual tokens at work: keys and values in front of every attention's own, embeddings that are run to become such.

The model's cache is never filled. A pre-hook on each attention module hands it a view of its cache, whose ``update``
puts the virtual keys and values first, and widens the mask on the left; a pre-hook on the decoder moves positions on.
Cache lengths, masks and ``generate`` stay the base's own, so beams, static caches, continued and uncached generation,
left padding and gradient checkpointing need nothing of their own.

Prefix tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190; prompt tuning, Lester et al. 2021,
https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubkit.compat.torch import version_of
from hubkit.compat.transformers import attention_of, keys_after
from hubkit.errors import HubkitError
from hubkit.tensors.front.front import CacheView, Front, Layers, front_of_rows, joined, runs_of_one_kind
from hubkit.tensors.front.plan import RowsVirtual, Virtual, VirtualPlan
from hubkit.tensors.parts.part import KV

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base

SHORT_ROWS = "hubkit_short_rows"
"""The attention that training sets on a CPU, with the masks of ``sdpa``: `hubkit.training.attention`."""
ATTENTIONS = ("sdpa", "eager", SHORT_ROWS)
"""Implementations whose mask can be widened."""

BARE: ContextVar[bool] = ContextVar("hubkit_bare", default=False)
"""Whether this thread asks the base itself: whatever is attached to it stays out."""

_STATE = "_hubkit_front"


class _Argument:
    """One argument of a module's forward, whether it is passed by name or by place."""

    def __init__(self, forward: Callable[..., Any], names: Sequence[str]) -> None:
        known = list(inspect.signature(forward).parameters)
        self.name = next((name for name in names if name in known), names[0])
        self.place = known.index(self.name) if self.name in known else 1 << 30

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[self.place] if self.place < len(args) else kwargs.get(self.name)

    def put(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        if self.place < len(args):
            args[self.place] = value
        else:
            kwargs[self.name] = value


def _require_release(base: Base) -> None:
    """Refuses an architecture whose attention of the installed transformers takes no virtual tokens: ``HK-ARCH``."""
    have = version("transformers")
    if int(have.partition(".")[0]) < base.arch.tokens_since:
        raise HubkitError(
            "HK-ARCH",
            "virtual tokens have no place in this architecture as an older transformers has it",
            where=base.source,
            want=f"transformers {base.arch.tokens_since}",
            have=f"transformers {have}, {base.arch.model_type}",
            fix=f"pip install 'transformers>={base.arch.tokens_since}'",
        )


def attentions_of(model: nn.Module, base: Base, classes: Collection[str]) -> dict[str, nn.Module]:
    """Name -> attention module, one of these classes for each layer; ``HK-ARCH`` where there are more or fewer."""
    found = {name: module for name, module in model.named_modules() if type(module).__name__ in classes}
    if len(found) != base.decoder.layers:
        raise HubkitError(
            "HK-ARCH",
            "the model has another number of attention modules than its configuration says",
            where=base.source,
            want=f"{base.decoder.layers} of class {' or '.join(classes)}",
            have=str(len(found)),
        )
    return found


def require_attention(config: Any) -> None:
    """Refuses a model that has chosen an attention whose mask is another's business: ``HK-ATTENTION``."""
    kind = attention_of(config)
    if kind not in ATTENTIONS:
        raise HubkitError(
            "HK-ATTENTION",
            "virtual tokens need an attention whose mask they can widen",
            want="sdpa or eager",
            have=str(kind),
            fix='model.set_attn_implementation("sdpa")',
        )


def parted_where_checkpointed(front: Front, plan: Virtual, trunk: nn.Module, modules: Iterable[Any]) -> Front:
    """`front`, which takes its gradient by a copy where layers of `trunk` are run again in the backward pass."""
    checkpointed = trunk.training and any(module.gradient_checkpointing for module in modules)
    if checkpointed and torch.is_grad_enabled() and any(p.requires_grad for p in plan.sources):
        front.part_from_graph()
    return front


class VirtualHooks:
    """The hooks on one model that put virtual tokens in front of its text.

    Args:
        model: the live base.
        base: its sites.
        active: the plan of the forward that is running, or None.
        under: makes a plan the active one, inside a ``with``.

    Raises:
        HubkitError: ``HK-ARCH`` where the model has no known place for them.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        active: Callable[[], Virtual | None],
        under: Callable[[Any], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        _require_release(base)
        attentions = attentions_of(model, base, (base.arch.attention,))
        name, attention = next(iter(attentions.items()))
        stack = next(i for i, part in enumerate(name.split(".")) if part.isdigit())
        self.decoder = model.get_submodule(".".join(name.split(".")[: stack - 1]))
        # FSDP2 gathers what is outside the layers in the outermost forward alone
        self._entrance: nn.Module = model if hasattr(model, "unshard") else self.decoder
        self._active, self._under = active, under
        self._limit = base.decoder.context if base.arch.learned_positions else None
        self._weights = list(model.parameters())
        self._checkpointing: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._made: ContextVar[Front | None] = ContextVar("hubkit_front_made", default=None)
        self._now: ContextVar[Front | None] = ContextVar("hubkit_front", default=None)
        self._anchor: ContextVar[Front | None] = ContextVar("hubkit_anchor", default=None)
        outer, inner = self.decoder.forward, attention.forward
        self._ids, self._embeds = _Argument(outer, ["input_ids"]), _Argument(outer, ["inputs_embeds"])
        self._positions, self._past = _Argument(outer, ["position_ids"]), _Argument(outer, base.arch.cache)
        self._cache, self._mask = _Argument(inner, base.arch.cache), _Argument(inner, ["attention_mask"])
        self._hiding = base.arch.hiding_masks
        self._padding = _Argument(outer, ["attention_mask"]) if base.arch.counted_positions else None
        self.table = base.site("tokens").module
        assert self.table is not None
        self._handles = [
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.table.register_forward_hook(self._after_embedding),
            *(m.register_forward_pre_hook(self._before_attention, with_kwargs=True) for m in attentions.values()),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan, making = self._active(), self._made.get()
        if plan is None and making is None:
            self._now.set(None)
            return None
        require_attention(self.decoder.config)
        listed, named = list(args), dict(kwargs)
        text = self._ids.get(listed, named)
        text = self._embeds.get(listed, named) if text is None else text
        front = making if making is not None else self._front(plan, text.shape[0])  # type: ignore[arg-type]
        self._now.set(front)
        if plan is not None:
            plan.last = front
        positions = self._moved(listed, named, text, front)
        setattr(positions, _STATE, front)  # an attention that is recomputed later finds its own forward's by it
        self._positions.put(listed, named, positions)
        embeds = self._embeds.get(listed, named)
        if front.leaves and embeds is not None:
            self._embeds.put(listed, named, front.anchored(embeds))
        elif front.leaves:
            self._anchor.set(front)
        return tuple(listed), named

    def _moved(self, args: list[Any], kwargs: dict[str, Any], text: Tensor, front: Front) -> Tensor:
        """The positions of the text, further on by what is in front of each row."""
        positions, last = self._positions.get(args, kwargs), None
        if positions is None:
            past = self._past.get(args, kwargs)
            start = 0 if past is None else int(past.get_seq_length())
            padding = None if self._padding is None else self._padding.get(args, kwargs)
            if padding is None:
                positions = (torch.arange(text.shape[1], device=text.device) + start)[None]
                last = start + text.shape[1] - 1 + front.length
            else:
                positions = (padding.cumsum(1) * padding - 1).long()[:, start:]
        shift = front.shift
        moved: Tensor = positions + (shift if isinstance(shift, int) else shift.to(positions.device))
        if self._limit is None:
            return moved
        last = int(moved.max()) if last is None else last  # only positions that are not counted here are looked at
        if last >= self._limit:
            raise HubkitError(
                "HK-ROW-TOO-LONG",
                "virtual tokens and text do not fit the base's context",
                want=f"at most {self._limit - front.length} tokens of text beside {front.length} virtual ones",
                have=str(last + 1 - front.length),
            )
        return moved

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        front = self._anchor.get()
        if front is None:
            return None
        self._anchor.set(None)
        return front.anchored(y)

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        front: Front | None = getattr(kwargs.get("position_ids"), _STATE, None) or self._now.get()
        if front is None:  # a recomputation in another thread, of an architecture that passes no positions on
            plan = self._active()
            front = None if plan is None else plan.last
        if front is None:
            return None
        listed, named = list(args), dict(kwargs)
        text = listed[0] if listed else named["hidden_states"]
        cache = self._cache.get(listed, named)
        mask = self._mask.get(listed, named)
        mask, crop = front.widened(
            ~mask if self._hiding and mask is not None else mask,
            text,
            lambda: keys_after(cache, text.shape[1], _layer(module)),
        )
        self._mask.put(listed, named, ~mask if self._hiding and mask is not None else mask)
        if named.get("alibi") is not None:
            named["alibi"] = self._biased(named["alibi"], text.shape[0], front)
        self._cache.put(listed, named, CacheView(cache, front, crop))
        return tuple(listed), named

    def _biased(self, alibi: Tensor, rows: int, front: Front) -> Tensor:
        """BLOOM's bias by position, (rows · heads, 1, keys), with that of what is in front: it begins at -n.

        Softmax sees differences only, so that the text's own may go on beginning at 0.
        """
        ones = torch.ones(1, front.length + 1, dtype=torch.long, device=alibi.device)
        own = self.decoder.build_alibi_tensor(ones, len(alibi) // rows, alibi.dtype)  # type: ignore[operator]
        return torch.cat([(own[..., :-1] - own[..., -1:]).repeat(rows, 1, 1), alibi], -1)

    def _front(self, plan: Virtual, rows: int) -> Front:
        """What is in front of this forward's text of `rows` rows."""
        front = self._made_of_rows(plan, rows) if isinstance(plan, RowsVirtual) else self._kept(plan)
        return parted_where_checkpointed(front, plan, self.decoder, self._checkpointing)

    def _made_of_rows(self, plan: RowsVirtual, rows: int) -> Front:
        fronts = {}
        for number, (member, whole) in plan.members.items():
            with self._under(whole):
                fronts[number] = self._kept(member)
        key = rows, list(fronts.values())
        if plan.ready is None or plan.ready[0] != key:
            plan.ready = key, front_of_rows(fronts, plan.rows.of(rows))
        return plan.ready[1]

    def _kept(self, plan: VirtualPlan) -> Front:
        """What a mix puts in front; kept from pass to pass where nothing is trained."""
        weights = [*plan.sources, *self._weights] if plan.runs else plan.sources
        if any(p.requires_grad for p in weights):
            plan.ready = None  # fused optimizers change values and leave versions as they were
            return self._make(plan)
        if plan.runs and self.decoder.training:  # dropout is drawn anew
            return self._make(plan)
        versions = [version_of(p) for p in weights]
        key = (self._dtype, torch.is_inference_mode_enabled(), versions)
        if plan.ready is None or plan.ready[0] != key:
            plan.ready = (key, self._make(plan))
        return plan.ready[1]

    @property
    def _dtype(self) -> torch.dtype:
        weight: Any = self.table.weight  # type: ignore[union-attr]
        return torch.float32 if not weight.is_floating_point() else weight.dtype

    def _make(self, plan: VirtualPlan) -> Front:
        layers: Layers = []
        length = 0
        for parts in runs_of_one_kind(plan.parts):
            if isinstance(parts[0], KV):
                rows = joined([part() for part in parts], 3).to(self._dtype)
                made: Layers = [(layer[0][None], layer[1][None]) for layer in rows.unbind(0)]
            else:
                embeds = joined([part() for part in parts], 0)[None].to(self._dtype)
                # a copy: CTRLModel.forward of transformers 5.23 scales what it is given in place
                made = self.run({"inputs_embeds": embeds.clone()}, Front(layers, length))
            layers = [_after(a, b) for a, b in zip(layers, made, strict=True)] if layers else made
            length += sum(part.length for part in parts)
        return Front(layers, length)

    def run(self, inputs: Mapping[str, Tensor], front: Front) -> Layers:
        """Keys and values, per layer, that the decoder makes of one row with `front` in front of it."""
        recorded: dict[int, tuple[Tensor, Tensor]] = {}
        front.recorded = recorded
        with self._uncheckpointed():
            token = self._made.set(front)
            try:
                self._entrance(**inputs, use_cache=False)
            finally:
                self._made.reset(token)
        return [recorded[index] for index in sorted(recorded)]

    @contextlib.contextmanager
    def _uncheckpointed(self) -> Iterator[None]:
        """Keys and values are taken out of the layers on the way: nothing would be saved by making them twice."""
        on = [module for module in self._checkpointing if module.gradient_checkpointing]
        for module in on:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in on:
                module.gradient_checkpointing = True


def _layer(module: nn.Module) -> int:
    """The number of an attention module's layer."""
    number: Any = module.layer_idx if hasattr(module, "layer_idx") else module.layer_id  # as GPT-Neo calls it
    return int(number)


def _after(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, joined where the first are: a prefix is on one device, layers may be on several."""
    return torch.cat([first[0], then[0].to(first[0])], 2), torch.cat([first[1], then[1].to(first[1])], 2)
