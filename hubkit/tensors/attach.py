"""Attaching adapters to a live model: permanent forward hooks, so that names, checkpoints and fingerprints stay.

`Attached` is the module to train, call, compile or wrap: the base inside it keeps every name and value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors import mix as mixes
from hubkit.tensors.adapter import Adapter
from hubkit.tensors.base import Base
from hubkit.tensors.blocks import Block, BlockHooks
from hubkit.tensors.folded import Folded
from hubkit.tensors.lowrank import Group, SiteParts, add_low_rank, owns_output
from hubkit.tensors.mix import Mix, Stack
from hubkit.tensors.parts import Edit, LowRank
from hubkit.tensors.quantlinear import Swap
from hubkit.tensors.site import Site
from hubkit.tensors.virtual import BARE, VirtualHooks, VirtualPlan, plan_virtual

At = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Plan(dict[str, At]):
    """What one mix does: site -> what is done to its output; and what is put in front of the text."""

    virtual: VirtualPlan | None = None


def require_uncompiled(model: nn.Module) -> None:
    """Refuses a model that torch.compile has wrapped, or a part of it: ``HK-COMPILED``."""
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise HubkitError(
            "HK-COMPILED", "the model is compiled already: hooks registered now would be ignored",
            fix="attach first, then torch.compile the attached model",
        )  # fmt: skip


class Attached(nn.Module):
    """A base with adapters attached and one mix of them active.

    Args:
        model: the live base; its parameters are frozen while attached.
        base: its sites, if already known.

    Raises:
        HubkitError: ``HK-COMPILED`` for a model that torch.compile has already wrapped: it would ignore the hooks.
    """

    def __init__(self, model: nn.Module, base: Base | None = None) -> None:
        super().__init__()
        require_uncompiled(model)
        self.model = model
        self.sites = base or Base.from_model(model)
        self.adapters: dict[str, Adapter] = {}
        self.mix: Mix | None = None
        self.parts = nn.ModuleDict()
        self.training = model.training
        self._added = 0
        self._swaps: list[Swap] = []
        self._plan = Plan()
        self._virtual: VirtualHooks | None = None
        self._handles: dict[str, torch.utils.hooks.RemovableHandle | BlockHooks] = {}
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._override: ContextVar[Plan | None] = ContextVar("hubkit_plan", default=None)
        self.folded: Folded | None = None
        model.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with the active mix."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's ``generate`` with the active mix."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def add(self, name: str, adapter: Adapter) -> None:
        """Attaches `adapter` under `name`, in training or eval mode as this module is; it acts once a mix names it.

        One made for a quantized base has the base quantized, until `detach`.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``, or ``HK-SHAPE`` when a site is not this base's; ``HK-NAN`` when a weight
                cannot be quantized.
        """
        self.require_unmerged()
        if name in self.adapters:
            raise HubkitError("HK-NAME-TAKEN", f"an adapter {name!r} is attached already", fix="remove it first")
        wrong = [
            f"{s.name}: {s.shape}"
            for s in adapter.sites.values()
            if (found := self.sites.find(s.name)) is None or found.shape != s.shape
        ]
        if wrong:
            raise HubkitError("HK-SHAPE", f"adapter {name!r} belongs to a base of other sites or shapes", have=wrong)
        if adapter.base.codec is not None:
            self._quantize()
        if self._virtual is None and adapter.virtual():
            self._virtual = VirtualHooks(self.model, self.sites, lambda: self._active().virtual)
        self.adapters[name] = adapter
        self._added += 1
        self.parts[f"adapter_{self._added}"] = nn.ModuleList(adapter.parts.values()).train(self.training)
        for site in adapter.edits():
            if site not in self._handles:
                self._handles[site] = self._hooked(self.sites.sites[site])

    def _quantize(self) -> None:
        """Quantizes the base's linear layers in place, those that are not yet; `detach` restores them."""
        begun = len(self._swaps)
        try:
            for site in self.sites.to_quantize():
                assert site.module is not None
                self._swaps.append(Swap(site.module))
        except HubkitError as error:
            self._restore(begun)
            error.where = error.where or site.name
            raise

    def _restore(self, count: int) -> None:
        while len(self._swaps) > count:
            self._swaps.pop().undo()

    def remove(self, name: str) -> None:
        """Takes an adapter off; it must not be in the active mix."""
        mixes.require_known(name, self.adapters)
        if self.mix is not None and name in mixes.names(self.mix):
            raise HubkitError("HK-IN-USE", f"adapter {name!r} is in the active mix", fix="set another mix first")
        adapter = self.adapters.pop(name)
        first = next(iter(adapter.parts.values()))
        key = next(k for k, held in self.parts.items() if next(iter(held)) is first)  # type: ignore[call-overload]
        del self.parts[key]
        for site in [s for s in self._handles if not any(s in a.parts for a in self.adapters.values())]:
            self._handles.pop(site).remove()
        if not any(a.virtual() for a in self.adapters.values()):
            self._drop_virtual()

    def _drop_virtual(self) -> None:
        if self._virtual is not None:
            self._virtual.remove()
        self._virtual = None

    def set_mix(self, mix: Mix | None) -> None:
        """Makes `mix` the active one (None: the base alone). Nothing changes when it is refused.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-MIX``.
        """
        self._plan = self._make_plan(mix)
        self.mix = mix

    @contextlib.contextmanager
    def using(self, mix: Mix | None) -> Iterator[None]:
        """The mix of this thread inside the ``with``; others keep theirs."""
        token = self._override.set(self._make_plan(mix))
        try:
            yield
        finally:
            self._override.reset(token)

    def merge(self) -> Folded:
        """Merges the active mix into the weights until `unmerge`, or for a ``with``: see `hubkit.tensors.folded`."""
        self.require_unmerged()
        own = self._override.get() is not None
        if self.mix is None or own:
            raise HubkitError(
                "HK-MIX", "this thread uses a mix of its own" if own else "no mix is active",
                want="an active mix, for all threads", fix="set_mix first, outside using",
            )  # fmt: skip
        return Folded(self, self.mix)

    def unmerge(self) -> None:
        """Puts the base's own weights back; where nothing is merged there is nothing to do."""
        if self.folded is not None:
            self.folded.undo()

    def require_unmerged(self) -> None:
        """Refuses what cannot be done while a mix is merged: ``HK-MERGED``."""
        if self.folded is not None:
            raise HubkitError("HK-MERGED", "a mix is merged into the weights", fix="unmerge first")

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """``context_fn`` for non-reentrant checkpointing: the recomputation runs under the mix of its forward."""
        return contextlib.nullcontext(), self._restored(self._active())

    @contextlib.contextmanager
    def _restored(self, plan: Plan) -> Iterator[None]:
        token = self._override.set(plan)
        try:
            yield
        finally:
            self._override.reset(token)

    def detach(self) -> nn.Module:
        """Takes every adapter off and gives back the base: same object, same parameters, same ``requires_grad``."""
        self.unmerge()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._drop_virtual()
        self.adapters.clear()
        self.parts.clear()
        self._plan, self.mix = Plan(), None
        self._restore(0)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return self.model

    def _active(self) -> Plan:
        if BARE.get() or self.folded is not None:
            return Plan()
        override = self._override.get()
        return self._plan if override is None else override

    def _hooked(self, site: Site) -> torch.utils.hooks.RemovableHandle | BlockHooks:
        def act(module: nn.Module, x: Tensor | None, y: Tensor) -> Tensor | None:
            chosen = self._active().get(site.name)
            if chosen is None:
                return None
            if x is None:
                raise HubkitError(
                    "HK-BLOCK", f"{site.name} was called without its layer: there is no residual stream to see",
                    fix="call the model or the whole layer",
                )  # fmt: skip
            return chosen(module, x, y)

        if isinstance(site, Block):
            return BlockHooks(site, act)
        assert site.module is not None
        return site.module.register_forward_hook(self._hook(site.name), with_kwargs=True)

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            act = self._active().get(name)
            return None if act is None else act(module, args[0] if args else next(iter(kwargs.values())), y)

        return hook

    def _make_plan(self, mix: Mix | None) -> Plan:
        self.require_unmerged()
        plan = Plan()
        if mix is None:
            return plan
        mixes.require_known(mix, self.adapters)
        edits = {name: self.adapters[name].edits() for name in mixes.names(mix)}
        reached = {site for found in edits.values() for site in found}
        touched = [site for site in self.sites.sites if site in reached]
        low: dict[str, SiteParts] = {}
        for site in touched:
            here = [(edits[name][site], weight) for name, weight in mixes.leaves(mix) if site in edits[name]]
            rank_parts = [(part, weight) for part, weight in here if isinstance(part, LowRank)]
            if len(here) == 1 and not rank_parts and here[0][1] == 1.0:
                plan[site] = _acting(here[0][0], self.sites.sites[site])
            elif len(rank_parts) == len(here):
                low[site] = SiteParts([pair for pair in rank_parts if pair[1] != 0.0] or rank_parts)
            else:
                plan[site] = self._fold(mix, self.sites.sites[site])
        groups = self.sites.arch.groups(low)
        made: dict[tuple[str, ...], Group] = {}
        for site in low:
            members = groups.get(site, (site,))
            group = made.setdefault(members, Group({name: low[name] for name in members}))
            plan[site] = _adding(group, site)
        plan.virtual = plan_virtual(mix, self.adapters)
        return plan

    def _fold(self, mix: Mix, site: Site) -> At:
        """The general rule, for parts that read the output or the weight."""
        adapters = self.adapters
        self._require_mergeable_below(mix, site)

        def increment(node: Mix, x: Tensor, y: Tensor, at: Site) -> Tensor:
            if isinstance(node, str):
                part = adapters[node].parts.get(at.name)
                return part(x, y, at) if isinstance(part, Edit) else torch.zeros_like(y)
            if not isinstance(node, Stack):
                return torch.stack([w * increment(child, x, y, at) for child, w in node.members]).sum(0)
            start = y
            for index, (child, weight) in enumerate(node.members):
                y = y + weight * increment(child, x, y, at)
                rest = [c for c, _ in node.members[index + 1 :]]
                reads = self._reads_weight(rest, at.name)
                change = mixes.delta(child, at, _delta_of(adapters, torch.is_grad_enabled())) if reads else None
                at = at if change is None else at.after(change.scaled(weight))
            return y - start

        return lambda module, x, y: y + increment(mix, x, y, site).to(y.dtype)

    def _reads_weight(self, nodes: list[Mix], site: str) -> bool:
        parts = (self.adapters[name].parts.get(site) for node in nodes for name in mixes.names(node))
        return any(isinstance(part, Edit) and part.reads_weight for part in parts)

    def _require_mergeable_below(self, node: Mix, site: Site) -> None:
        """A member that reads the weight cannot stand above one that has none to give: refused when the mix is set."""
        if isinstance(node, str):
            return
        for index, (child, _) in enumerate(node.members):
            self._require_mergeable_below(child, site)
            above = [c for c, _ in node.members[index + 1 :]]
            if isinstance(node, Stack) and self._reads_weight(above, site.name):
                mixes.delta(child, site, _delta_of(self.adapters))


def _adding(group: Group, site: str) -> At:
    return lambda module, x, y: add_low_rank(group, site, module, x, y)


def _acting(part: Edit, site: Site) -> At:
    return lambda module, x, y: part.act(x, y, site, owns_output(module, y))


def _delta_of(adapters: Mapping[str, Adapter], grad: bool = False) -> Callable[[str, Site], Any]:
    return lambda name, site: adapters[name].delta(site, grad=grad)
