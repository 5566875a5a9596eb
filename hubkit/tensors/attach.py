"""Attaching adapters to a live model: permanent forward hooks, so that names, checkpoints and fingerprints stay.

`Attached` is the module to train, call, compile or wrap: the base inside it keeps every name and value.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors import mix as mixes
from hubkit.tensors.adapter import Adapter
from hubkit.tensors.base import Base
from hubkit.tensors.blocks import Block, BlockHooks
from hubkit.tensors.mix import Mix, Route
from hubkit.tensors.planning import Plan
from hubkit.tensors.quantlinear import Swap
from hubkit.tensors.recompute import checkpointing_modules, stand_in, step_aside
from hubkit.tensors.routing import make_plan
from hubkit.tensors.rows import repeated
from hubkit.tensors.site import Site
from hubkit.tensors.virtual import BARE, VirtualHooks

ROUTES = 2
"""Plans of routes that are kept for the next call."""
_BATCHES = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids")


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
        self._keys: dict[str, str] = {}
        self.training = model.training
        self._added = 0
        self._swaps: list[Swap] = []
        self._plan = Plan()
        self._routes: dict[Route, Plan] = {}
        self._lock = threading.RLock()
        self._virtual: VirtualHooks | None = None
        self._handles: dict[str, torch.utils.hooks.RemovableHandle | BlockHooks] = {}
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._override: ContextVar[Plan | None] = ContextVar("hubkit_plan", default=None)
        self._checkpointing = checkpointing_modules(model)
        self._entry = model.register_forward_pre_hook(self._enter)
        model.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.model.config

    def forward(self, *args: Any, route: Iterable[Mix | None] | None = None, **kwargs: Any) -> Any:
        """The base's forward with the active mix.

        Args:
            route: the mix of each row of this batch, None for the base alone; in place of the active mix.

        Raises:
            HubkitError: ``HK-ROUTE`` when it has another length than the batch; ``HK-UNKNOWN-ADAPTER``, ``HK-MIX``.
        """
        with self._during(route, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, route: Iterable[Mix | None] | None = None, **kwargs: Any) -> Any:
        """The base's ``generate`` with the active mix; it keeps that mix to its end, whatever is set or swapped.

        Args:
            route: the mix of each sample, which its beams and answers follow; else as for `forward`.
        """
        with self._during(route, args, kwargs), repeated():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def _during(
        self, route: Iterable[Mix | None] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Holds the plan of one call, checked against its batch."""
        plan = self._active() if route is None else self._routed(Route(route))
        if plan.rows is not None and (rows := _rows(args, kwargs)) is not None:
            plan.rows.require(rows)
        with self._restored(plan):
            yield

    def _routed(self, route: Route) -> Plan:
        """The plan of `route`; the last few are kept, with the factors that they have gathered."""
        with self._lock:
            plan = self._routes.pop(route, None) or make_plan(route, self.adapters, self.sites)
            self._routes[route] = plan
            while len(self._routes) > ROUTES:
                del self._routes[next(iter(self._routes))]
            return plan

    def add(self, name: str, adapter: Adapter) -> None:
        """Attaches `adapter` under `name`, in training or eval mode as this module is; it acts once a mix names it.

        One made for a quantized base has the base quantized, until `detach`.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``, or ``HK-SHAPE`` when a site is not this base's; ``HK-NAN`` when a weight
                cannot be quantized.
        """
        with self._lock:
            if name in self.adapters:
                raise HubkitError("HK-NAME-TAKEN", f"an adapter {name!r} is attached already", fix="remove it first")
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
            mixes.require_known(name, self.adapters)
            adapters = {**self.adapters, name: adapter}
            self._require_sites(name, adapter)
            plan = self._plan
            if self.mix is not None and name in mixes.names(self.mix):
                plan = make_plan(self.mix, adapters, self.sites)
            old = self._keys[name]
            self._take_in(name, adapter)
            del self.parts[old]
            self.adapters, self._plan = adapters, plan
            self._routes.clear()

    def _require_sites(self, name: str, adapter: Adapter) -> None:
        wrong = [
            f"{s.name}: {s.shape}"
            for s in adapter.sites.values()
            if (found := self.sites.find(s.name)) is None or found.shape != s.shape
        ]
        if wrong:
            raise HubkitError("HK-SHAPE", f"adapter {name!r} belongs to a base of other sites or shapes", have=wrong)

    def _take_in(self, name: str, adapter: Adapter) -> None:
        """Hooks at the adapter's sites, and its parts as modules of this one."""
        self._require_sites(name, adapter)
        if adapter.base.codec is not None:
            self._quantize()
        if self._virtual is None and adapter.virtual():
            self._virtual = VirtualHooks(self.model, self.sites, lambda: self._active().virtual, self._restored)
        for site in adapter.edits():
            if site not in self._handles:
                self._handles[site] = self._hooked(self.sites.sites[site])
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

    def remove(self, name: str) -> None:
        """Takes an adapter off; it must not be in the active mix. Calls that are running with it end with it."""
        with self._lock:
            mixes.require_known(name, self.adapters)
            if self.mix is not None and name in mixes.names(self.mix):
                raise HubkitError("HK-IN-USE", f"adapter {name!r} is in the active mix", fix="set another mix first")
            del self.parts[self._keys.pop(name)]
            self.adapters = {known: adapter for known, adapter in self.adapters.items() if known != name}
            self._routes.clear()

    def set_mix(self, mix: Mix | None) -> None:
        """Makes `mix` the active one (None: the base alone). Nothing changes when it is refused.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-MIX``.
        """
        with self._lock:
            self._plan = make_plan(mix, self.adapters, self.sites)
            self.mix = mix

    @contextlib.contextmanager
    def using(self, mix: Mix | None) -> Iterator[None]:
        """The mix of this thread inside the ``with``; others keep theirs."""
        with self._restored(make_plan(mix, self.adapters, self.sites)):
            yield

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """``context_fn`` for checkpointing of your own: the recomputation runs under the mix of its forward.

        Checkpointing that a model of transformers offers needs nothing.
        """
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
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if self._virtual is not None:
            self._virtual.remove()
        self._virtual = None
        self._entry.remove()
        step_aside(self._checkpointing)
        self.adapters = {}
        self.parts.clear()
        self._keys.clear()
        self._routes.clear()
        self._plan, self.mix = Plan(), None
        self._restore(0)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return self.model

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            stand_in(self._checkpointing, self._active, self._restored)

    def _active(self) -> Plan:
        if BARE.get():
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


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of rows of the batch that a call brings; None where nothing says it."""
    given = [args[0] if args else None, *(kwargs.get(name) for name in _BATCHES)]
    return next((one.shape[0] for one in given if isinstance(one, Tensor) and one.dim() > 1), None)
