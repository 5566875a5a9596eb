"""Which adapters are on a live base: hooks at their sites, their parts as modules, what is offered but not read yet.

Which of them act is not known here; that is `hubkit.tensors.live.attached.Attached`'s to say.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block
from hubkit.tensors.base.site import Site
from hubkit.tensors.experts.expert import Expert
from hubkit.tensors.experts.products import Products
from hubkit.tensors.fourbit.linear import Swap, keep_packed
from hubkit.tensors.front.decoder_hooks import VirtualHooks
from hubkit.tensors.front.encoder_hooks import EncoderHooks, virtual_hooks
from hubkit.tensors.live.block_hooks import BlockHooks
from hubkit.tensors.live.plan import Plan
from hubkit.tensors.live.pool import Pool
from hubkit.tensors.live.slots import Slots
from hubkit.tensors.live.vocabulary_hooks import VocabularyHooks
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.vocabulary import TokenRows

T = TypeVar("T")


class Roster:
    """The adapters on one live base.

    `adapters` is replaced, never changed: a call keeps what it began with. Callers hold `lock` around every change.

    Args:
        model: the live base.
        base: its sites.
        active: the plan of the forward that is running.
        under: makes a plan the active one of this thread, inside a ``with``.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        active: Callable[[], Plan],
        under: Callable[[Plan], AbstractContextManager[None]],
    ) -> None:
        self.sites = base
        self.adapters: dict[str, Adapter] = {}
        self.parts = nn.ModuleDict()
        self.pool = Pool()
        self.slots: Slots | None = None
        self.lock = threading.RLock()
        self._model, self._active, self._under = model, active, under
        self._keys: dict[str, str] = {}
        self._added = 0
        self._swaps: list[Swap] = []
        self._virtual: VirtualHooks | EncoderHooks | None = None
        self._vocabulary: VocabularyHooks | None = None
        self._products: dict[nn.Module, Products] = {}
        self._handles: dict[str, torch.utils.hooks.RemovableHandle | BlockHooks] = {}
        weighty = [site for site in base.sites.values() if site.module is not None]
        layers = {re.sub(r"(\.\d+)\..*", r"\1", site.name): site for site in weighty}  # one site of each layer
        self._ends = list(layers.values())
        self._placed = self._place()
        for site in weighty:
            keep_packed(site.module)

    @property
    def known(self) -> set[str]:
        """Names of all adapters, those included that are only offered."""
        return {*self.adapters, *self.pool.names}

    @property
    def hook_numbers(self) -> set[int]:
        """The numbers that torch has given to the hooks at sites."""
        held = [h.handles if isinstance(h, BlockHooks) else (h,) for h in self._handles.values()]
        return {handle.id for handles in held for handle in handles}

    def new_slots(self, count: int, rank: int) -> Slots:
        """Slots wherever some adapter has acted; hooks that are traced know the newest alone.

        Raises:
            HubkitError: ``HK-SLOTS``, ``HK-OPTIONS``.
        """
        virtual = [] if self._virtual is None else self.sites.virtual.values()
        self.slots = Slots([*(self.sites.sites[name] for name in self._handles), *virtual], count, rank)
        return self.slots

    def add(self, name: str, adapter: Adapter) -> None:
        """Takes in an adapter under a name that is free.

        Raises:
            HubkitError: ``HK-SHAPE``, ``HK-DEVICE``, ``HK-NAN``; nothing has changed then.
        """
        self._take_in(name, adapter)
        self.adapters = {**self.adapters, name: adapter}

    def replace(self, name: str, adapter: Adapter) -> None:
        """Takes in an adapter in the place of the one under `name`.

        Raises:
            HubkitError: as for `add`.
        """
        old = self._keys[name]
        self._take_in(name, adapter)
        del self.parts[old]
        self.pool.withdraw(name)
        self.adapters = {**self.adapters, name: adapter}

    def remove(self, name: str) -> None:
        """Forgets the adapter under `name`, attached or offered; its hooks stay until `clear`."""
        self.pool.withdraw(name)
        if name in self.adapters:
            del self.parts[self._keys.pop(name)]
            self.adapters = {known: adapter for known, adapter in self.adapters.items() if known != name}

    def require_free(self, name: str) -> None:
        """Refuses a name that is taken: ``HK-NAME-TAKEN``."""
        if name in self.known:
            raise HubkitError("HK-NAME-TAKEN", f"an adapter {name!r} is attached already", fix="remove it first")

    def with_offered(
        self, named: Iterable[str], pinned: Iterable[str], make: Callable[[Mapping[str, Adapter]], T]
    ) -> tuple[T, set[str]]:
        """What `make` makes of the adapters once the offered ones among `named` are there, and names that gave way.

        Nothing has changed where `make` refuses.

        Args:
            pinned: names that may not give way.
        """
        named = list(named)
        if not self.pool.names or not named:
            return make(self.adapters), set()
        come, go = self.pool.read(named, self.adapters, pinned)
        adapters = {**{name: own for name, own in self.adapters.items() if name not in go}, **come}
        for name, adapter in come.items():
            self.require_sites(name, adapter)
        made = make(adapters)
        for name, adapter in come.items():
            self._take_in(name, adapter)
        for name in go:
            del self.parts[self._keys.pop(name)]
        self.adapters = adapters
        self.pool.settle(named, adapters)
        return made, set(go)

    def require_sites(self, name: str, adapter: Adapter) -> None:
        """Refuses an adapter of other sites: ``HK-SHAPE``; one at weights that are not in memory: ``HK-DEVICE``."""
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
                "HK-DEVICE",
                "some of the base's weights are offloaded: they are in memory only while their layer runs",
                have=[f"{len(absent)} sites of adapter {name!r}", *absent[:3]],
                fix="load the base with a device_map of devices alone, or quantized",
            )

    @property
    def base_moved(self) -> bool:
        """Whether somebody has moved the base since its parts were placed."""
        return self._place() != self._placed

    def move_parts(self) -> None:
        """Takes every part where its site is, after the base alone was moved, or spread over several devices."""
        for adapter in self.adapters.values():
            for name, part in adapter.parts.items():
                part.to(self.sites.site(name).device)
        if self.slots is not None:
            self.slots.move_beside(self.sites)
        self._placed = self._place()

    def _place(self) -> tuple[torch.device, ...]:
        """Where the first and the last site are: it changes when somebody moves the base."""
        return tuple(site.device for site in self._ends)

    def clear(self) -> None:
        """Takes everything off, and gives the base its own layers back."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        for products in self._products.values():
            products.remove()
        self._products.clear()
        if self._virtual is not None:
            self._virtual.remove()
        if self._vocabulary is not None:
            self._vocabulary.remove()
        self._virtual = self._vocabulary = self.slots = None
        self.adapters = {}
        self.parts.clear()
        self._keys.clear()
        self.pool = Pool()
        self._restore(0)

    def _take_in(self, name: str, adapter: Adapter) -> None:
        """Hooks at the adapter's sites, and its parts as modules."""
        self.require_sites(name, adapter)
        if adapter.base.codec is not None:
            self._quantize()
        if self._virtual is None and adapter.virtual():
            self._virtual = virtual_hooks(self._model, self.sites, lambda: self._active().virtual, self._under)
        for site in adapter.edits():
            if site not in self._handles:
                self._handles[site] = self._hooked(self.sites.sites[site])
        if self._vocabulary is None and any(isinstance(part, TokenRows) for part in adapter.parts.values()):
            self._vocabulary = VocabularyHooks(self._model, self.sites, lambda: self._active().vocabulary)
        elif self._vocabulary is not None:
            self._vocabulary.last()
        self._added += 1
        self._keys[name] = f"adapter_{self._added}"
        for site, part in adapter.parts.items():
            place = self.sites.site(site).device
            if any(value.device != place for value in part.parameters()):  # made before the base was moved
                part.to(place)
        self.parts[self._keys[name]] = nn.ModuleList(adapter.parts.values()).train(self.parts.training)

    def _quantize(self) -> None:
        """Quantizes the base's linear layers in place, those that are not yet; `clear` restores them."""
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

    def _hooked(self, site: Site) -> torch.utils.hooks.RemovableHandle | BlockHooks:
        def act(module: nn.Module, x: Tensor | None, y: Tensor) -> Tensor | None:
            chosen = self._active().get(site.name)
            if chosen is None:
                return None
            if x is None:
                raise HubkitError(
                    "HK-BLOCK",
                    f"{site.name} was called without its layer: there is no residual stream to see",
                    fix="call the model or the whole layer",
                )
            return chosen(module, _beside(x, y), y)

        if isinstance(site, Block):
            return BlockHooks(site, act)
        assert site.module is not None
        if isinstance(site.module, Expert):
            self._run_by_products(site.module.holder)
        return site.module.register_forward_hook(self._hook(site.name), with_kwargs=True)

    def _run_by_products(self, holder: nn.Module) -> None:
        """Has a module of experts ask their layers for each product, while something acts at one of them."""
        if holder in self._products:
            return
        here = {name: s.module for name, s in self.sites.sites.items() if isinstance(s.module, Expert)}
        experts = {name: expert for name, expert in here.items() if expert.holder is holder}
        acts = self._active
        made = Products(holder, experts.values(), lambda: not acts().keys().isdisjoint(experts))
        made.attach()
        self._products[holder] = made

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
