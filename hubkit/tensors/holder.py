"""Which adapters are on a live base: hooks at their sites, their parts as modules, what is offered but not read yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors import mix as mixes
from hubkit.tensors.adapter import Adapter
from hubkit.tensors.base import Base
from hubkit.tensors.blocks import Block, BlockHooks
from hubkit.tensors.encoder import EncoderHooks, virtual_hooks
from hubkit.tensors.mix import Mix, Route
from hubkit.tensors.planning import Plan
from hubkit.tensors.pool import Load, Pool
from hubkit.tensors.quantlinear import Swap
from hubkit.tensors.routing import make_plan
from hubkit.tensors.site import Site
from hubkit.tensors.slots import Slots
from hubkit.tensors.virtual import VirtualHooks
from hubkit.tensors.vocabulary import TokenRows, VocabularyHooks

T = TypeVar("T")


class Holder(nn.Module):
    """A live base and the adapters on it; which of them act is `Attached`'s to say.

    `adapters` and plans are replaced, never changed: a call keeps what it began with.
    """

    def __init__(self, model: nn.Module, base: Base) -> None:
        super().__init__()
        self.model = model
        self.sites = base
        self.adapters: dict[str, Adapter] = {}
        self.mix: Mix | None = None
        self.parts = nn.ModuleDict()
        self._keys: dict[str, str] = {}
        self._added = 0
        self._swaps: list[Swap] = []
        self._plan = Plan()
        self._routes: dict[Route, Plan] = {}
        self._lock = threading.RLock()
        self._pool = Pool()
        self.slots: Slots | None = None
        self._virtual: VirtualHooks | EncoderHooks | None = None
        self._vocabulary: VocabularyHooks | None = None
        self._handles: dict[str, torch.utils.hooks.RemovableHandle | BlockHooks] = {}
        weighty = [site for site in base.sites.values() if site.module is not None]
        self._ends = [weighty[0], weighty[-1]] if weighty else []
        self._placed = self._place()

    def _active(self) -> Plan:
        """The plan of the forward that is running."""
        raise NotImplementedError

    def require_unmerged(self) -> None:
        """Refuses what cannot be done while a mix is merged into the weights."""
        raise NotImplementedError

    def under(self, plan: Plan) -> AbstractContextManager[None]:
        """Makes `plan` the active one of this thread, inside a ``with``."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Holder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slots is not None:
            self.slots.apply(fn)
        self._forget()
        return self

    def _forget(self) -> None:
        """Has values looked at anew that were moved or cast."""
        self._placed = self._place()
        for plan in (self._plan, *self._routes.values()):
            if plan.rows is not None:
                plan.rows.forget()

    def _place(self) -> tuple[torch.device, ...]:
        """Where the first and the last site are: it changes when somebody moves the base."""
        return tuple(site.device for site in self._ends)

    def follow(self) -> None:
        """Takes every part where its site is, after the base alone was moved, or spread over several devices."""
        with self._lock:
            for adapter in self.adapters.values():
                for name, part in adapter.parts.items():
                    part.to(self.sites.site(name).device)
            if self.slots is not None:
                self.slots.follow(self.sites)
            self._forget()

    def add(self, name: str, adapter: Adapter) -> None:
        """Attaches `adapter` under `name`, in training or eval mode as this module is; it acts once a mix names it.

        One made for a quantized base has the base quantized, until `detach`.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``, or ``HK-SHAPE`` when a site is not this base's; ``HK-NAN`` when a weight
                cannot be quantized.
        """
        with self._lock:
            self.require_unmerged()
            self._require_free(name)
            self._take_in(name, adapter)
            self.adapters = {**self.adapters, name: adapter}

    def swap(self, name: str, adapter: Adapter) -> None:
        """Puts `adapter` in the place of the one attached under `name`, at once: values, scale and configuration.

        A call that is running ends with the old one; when the new one is refused, the old one stays.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-SHAPE``; ``HK-MIX`` or ``HK-NOT-MERGEABLE`` where the active mix
                cannot hold it.
        """
        with self._lock:
            self.require_unmerged()
            mixes.require_known(name, self.adapters)
            adapters = {**self.adapters, name: adapter}
            self._require_sites(name, adapter)
            plan = self._plan
            if self.mix is not None and name in mixes.names(self.mix):
                plan = make_plan(self.mix, adapters, self.sites)
            old = self._keys[name]
            self._take_in(name, adapter)
            del self.parts[old]
            self._pool.withdraw(name)
            self.adapters, self._plan = adapters, plan
            self._routes.clear()

    def remove(self, name: str) -> None:
        """Takes an adapter off; it must not be in the active mix. Calls that are running with it end with it."""
        with self._lock:
            mixes.require_known(name, {*self.adapters, *self._pool.names})
            if self.mix is not None and name in mixes.names(self.mix):
                raise HubkitError("HK-IN-USE", f"adapter {name!r} is in the active mix", fix="set another mix first")
            self._pool.withdraw(name)
            if name not in self.adapters:
                return
            del self.parts[self._keys.pop(name)]
            self.adapters = {known: adapter for known, adapter in self.adapters.items() if known != name}
            self._routes.clear()

    def offer(self, name: str, load: Load) -> None:
        """An adapter that is read when a mix or a route first names it; `memory` says how many of these stay.

        Args:
            load: reads it, as often as it is needed.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``.
        """
        with self._lock:
            self._require_free(name)
            self._pool.offer(name, load)

    @property
    def offered(self) -> list[str]:
        """Names of the adapters that are read when they are named, whether they have been or not."""
        return self._pool.names

    @property
    def memory(self) -> int | None:
        """Bytes that offered adapters may take together; the least recently used give way. None: no limit."""
        return self._pool.budget

    @memory.setter
    def memory(self, budget: int | None) -> None:
        if budget is not None and budget < 1:
            raise HubkitError("HK-OPTIONS", "out of range", want="at least 1 byte, or None", have=str(budget))
        self._pool.budget = budget

    def _require_free(self, name: str) -> None:
        if name in self.adapters or name in self._pool.names:
            raise HubkitError("HK-NAME-TAKEN", f"an adapter {name!r} is attached already", fix="remove it first")

    def _planned(self, mix: Mix | None) -> Plan:
        """The plan of `mix`, once the offered adapters that it names are there."""
        return self._with_offered(mix, lambda adapters: make_plan(mix, adapters, self.sites))

    def _with_offered(self, mix: Mix | None, make: Callable[[Mapping[str, Adapter]], T]) -> T:
        """What `make` makes of the adapters that are there once those that `mix` names are."""
        self.require_unmerged()
        if mix is None or not self._pool.names:
            return make(self.adapters)
        named = mixes.names(mix)
        mixes.require_known(mix, {*self.adapters, *self._pool.names})
        come, go = self._pool.read(named, self.adapters, () if self.mix is None else mixes.names(self.mix))
        adapters = {**{name: own for name, own in self.adapters.items() if name not in go}, **come}
        for name, adapter in come.items():
            self._require_sites(name, adapter)
        made = make(adapters)
        for name, adapter in come.items():
            self._take_in(name, adapter)
        for name in go:
            del self.parts[self._keys.pop(name)]
        self.adapters = adapters
        self._routes = {route: plan for route, plan in self._routes.items() if not {*go} & {*mixes.names(route)}}
        self._pool.settle(named, adapters)
        return made

    def _require_sites(self, name: str, adapter: Adapter) -> None:
        wrong = [
            f"{s.name}: {s.shape}"
            for s in adapter.sites.values()
            if (found := self.sites.find(s.name)) is None or found.shape != s.shape
        ]
        if wrong:
            raise HubkitError("HK-SHAPE", f"adapter {name!r} belongs to a base of other sites or shapes", have=wrong)
        absent = [s.name for s in adapter.sites.values() if self.sites.site(s.name).device.type == "meta"]
        if absent and any(device.type != "meta" for device in self._place()):
            raise HubkitError(
                "HK-DEVICE", "some of the base's weights are offloaded: they are in memory only while their layer runs",
                have=[f"{len(absent)} sites of adapter {name!r}", *absent[:3]],
                fix="load the base with a device_map of devices alone, or quantized",
            )  # fmt: skip

    def _take_in(self, name: str, adapter: Adapter) -> None:
        """Hooks at the adapter's sites, and its parts as modules of this one."""
        self._require_sites(name, adapter)
        if adapter.base.codec is not None:
            self._quantize()
        if self._virtual is None and adapter.virtual():
            self._virtual = virtual_hooks(self.model, self.sites, lambda: self._active().virtual, self.under)
        for site in adapter.edits():
            if site not in self._handles:
                self._handles[site] = self._hooked(self.sites.sites[site])
        if self._vocabulary is None and any(isinstance(part, TokenRows) for part in adapter.parts.values()):
            self._vocabulary = VocabularyHooks(self.model, self.sites, lambda: self._active().vocabulary)
        elif self._vocabulary is not None:
            self._vocabulary.last()
        self._added += 1
        self._keys[name] = f"adapter_{self._added}"
        self.parts[self._keys[name]] = nn.ModuleList(adapter.parts.values()).train(self.training)

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

    def _clear(self) -> None:
        """Takes everything off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if self._virtual is not None:
            self._virtual.remove()
        if self._vocabulary is not None:
            self._vocabulary.remove()
        self._virtual = self._vocabulary = self.slots = None
        self.adapters = {}
        self.parts.clear()
        self._keys.clear()
        self._routes.clear()
        self._pool = Pool()
        self._plan, self.mix = Plan(), None
        self._restore(0)

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
            return chosen(module, _beside(x, y), y)

        if isinstance(site, Block):
            return BlockHooks(site, act)
        assert site.module is not None
        return site.module.register_forward_hook(self._hook(site.name), with_kwargs=True)

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self.slots is not None and torch.compiler.is_compiling():
                return self.slots.act(name, x, y) if name in self.slots.down else None
            act = self._active().get(name)
            return None if act is None else act(module, _beside(x, y), y)

        return hook


def _beside(x: Tensor, y: Tensor) -> Tensor:
    """`x` where `y` is: accelerate moves a module's input inside its call, so hooks see it on the device before."""
    return x if x.device == y.device else x.to(y.device)
