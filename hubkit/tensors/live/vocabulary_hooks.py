"""The hooks of a live model that look rows of tokens up in an adapter and lengthen its logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.transformers import flattens_by_its_size, lengthened_loss
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.token_sites import SUFFIX, table_size
from hubkit.tensors.device import indices
from hubkit.tensors.parts.additive import forward_with
from hubkit.tensors.parts.vocabulary_plan import VocabularyPlan

_IDS = "_hubkit_ids"


class VocabularyHooks:
    """The hooks on one model that look rows of tokens up in an adapter and lengthen its logits.

    Args:
        model: the live base.
        base: its sites.
        active: the plan of the forward that is running, or None.
    """

    def __init__(self, model: nn.Module, base: Base, active: Callable[[], VocabularyPlan | None]) -> None:
        self._active = active
        self._table = next(base.sites[s.name.removesuffix(SUFFIX)] for s in base.rows.values() if s.transposed)
        size = table_size(self._table)
        self._head = next((s for s in base.sites.values() if base.arch.is_head(s.name) and s.shape == size), None)
        assert self._table.module is not None, "only a live site has a module"
        self._first = [self._table.module.register_forward_pre_hook(self._before, with_kwargs=True)]
        if flattens_by_its_size(model):
            self._first.append(model.register_forward_pre_hook(self._without_labels, with_kwargs=True))
        self._loss = ExitStack()
        self._loss.enter_context(lengthened_loss(model, lambda: active() is not None))
        self._last: list[torch.utils.hooks.RemovableHandle] = []
        self.last()

    def last(self) -> None:
        """Puts the hooks that write rows and logits behind those of all parts."""
        for handle in self._last:
            handle.remove()
        pairs = ((self._table, self._look_up), (self._head, self._lengthen))
        self._last = [
            site.module.register_forward_hook(hook, with_kwargs=True)
            for site, hook in pairs
            if site is not None and site.module is not None
        ]

    def remove(self) -> None:
        """Takes all hooks off, and gives the model its loss back."""
        for handle in (*self._first, *self._last):
            handle.remove()
        self._loss.close()

    def _without_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses labels where the model would take logits to be as long as its own vocabulary."""
        plan = self._active()
        if kwargs.get("labels") is not None and plan is not None and plan.size > table_size(self._table)[0]:
            raise HubkitError(
                "HK-VOCABULARY",
                "this architecture computes its loss for the base's own vocabulary only",
                want=f"logits of {table_size(self._table)[0]} tokens",
                have=f"{plan.size} with those that were added",
                where=type(module).__name__,
                fix="leave labels out and compute the loss from the logits",
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._active()
        if plan is None:
            return None
        ids: Tensor = args[0] if args else kwargs["input"]
        known = ids.masked_fill(ids >= table_size(self._table)[0], 0)
        setattr(known, _IDS, ids)
        return ((known, *args[1:]), kwargs) if args else ((), {**kwargs, "input": known})

    def _look_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        plan = self._active()
        virtual = None if plan is None else plan.at(self._table)
        if plan is None or virtual is None:
            return None
        known = args[0] if args else kwargs["input"]
        tokens: Tensor = getattr(known, _IDS, known)
        ids, change = plan.change(virtual)
        places = torch.full((plan.size,), len(ids), device=tokens.device)
        places.index_copy_(0, indices(tuple(ids), tokens.device), torch.arange(len(ids), device=tokens.device))
        padded = torch.cat([change, change.new_zeros(1, change.shape[1])])
        added = forward_with(module, places[tokens], padded, None, padding_idx=None)
        beyond = (tokens >= table_size(self._table)[0])[..., None]
        return (y.to(change.dtype).masked_fill(beyond, 0.0) + added).to(y.dtype)

    def _lengthen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        plan = self._active()
        virtual = None if plan is None or self._head is None else plan.at(self._head)
        if plan is None or virtual is None:
            return None
        x: Tensor = args[0] if args else kwargs["input"]
        ids, change = plan.change(virtual)
        logits = F.linear(x, change.to(x.dtype)).to(y.dtype)
        count = sum(i < y.shape[-1] for i in ids)
        if count:
            y = y.index_add(-1, indices(tuple(ids[:count]), y.device), logits[..., :count])
        return torch.cat([y, logits[..., count:]], -1)
