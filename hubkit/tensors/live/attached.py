"""Attaching adapters to a live model: permanent forward hooks, so that names, checkpoints and fingerprints stay.

`Attached` is the module to train, call, compile or wrap: the base inside it keeps every name and value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hubkit.artifact.identity.digest import BaseRecord
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.front.decoder_hooks import BARE
from hubkit.tensors.live.compiling import compiled_layers
from hubkit.tensors.live.folded import Folded
from hubkit.tensors.live.likeness import Likeness
from hubkit.tensors.live.plan import Plan
from hubkit.tensors.live.pool import Load
from hubkit.tensors.live.recompute import checkpointing_modules, stand_in, step_aside
from hubkit.tensors.live.roster import Roster
from hubkit.tensors.live.route_plan import make_plan
from hubkit.tensors.live.slots import Compiled, names_of_rows
from hubkit.tensors.lowrank.rows import repeated, row_count
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Route
from hubkit.tensors.weights.merging import plan_merge

T = TypeVar("T")
ROUTES = 2
"""Plans of routes that are kept for the next call."""


class Attached(Likeness):
    """A base with adapters attached and one mix of them active.

    Plans are replaced, never changed: a call keeps what it began with. What it does not have itself is the base's:
    see `hubkit.tensors.live.likeness`.

    Args:
        model: the live base; its parameters are frozen while attached.
        base: its sites, if already known.

    Raises:
        HubkitError: ``HK-NOT-LIVE`` for what is no model, or not as it was loaded; ``HK-COMPILED`` for one that
            torch.compile has already wrapped: it would ignore the hooks.
    """

    def __init__(self, model: nn.Module, base: Base | None = None) -> None:
        super().__init__()
        self.model = model
        self._roster = Roster(model, base or Base.from_model(model), self._active, self.using_plan)
        self.parts = self._roster.parts
        self.mix: Mix | None = None
        self.folded: Folded | None = None
        self.record: BaseRecord | None = None
        """What the base was proven to be, by whoever attached adapters to it."""
        self._plan = Plan()
        self._routes: dict[Route, Plan] = {}
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._override: ContextVar[Plan | None] = ContextVar("hubkit_plan", default=None)
        self._checkpointing = checkpointing_modules(model)
        self._entry = model.register_forward_pre_hook(self._enter)
        self.training = self.parts.training = model.training
        model.requires_grad_(False)

    @property
    def sites(self) -> Base:
        """The sites of the base."""
        return self._roster.sites

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters that are attached, by name; those that are only offered are not among them."""
        return self._roster.adapters

    @property
    def offered(self) -> list[str]:
        """Names of the adapters that are read when they are named, whether they have been or not."""
        return self._roster.pool.names

    @property
    def memory(self) -> int | None:
        """Bytes that offered adapters may take together; the least recently used give way. None: no limit."""
        return self._roster.pool.budget

    @memory.setter
    def memory(self, budget: int | None) -> None:
        if budget is not None and budget < 1:
            raise HubkitError("HK-OPTIONS", "out of range", want="at least 1 byte, or None", have=str(budget))
        self._roster.pool.budget = budget

    def add(self, name: str, adapter: Adapter) -> None:
        """Attaches `adapter` under `name`, in training or eval mode as this module is; it acts once a mix names it.

        One made for a quantized base has the base quantized, until `detach`.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``, or ``HK-SHAPE`` when a site is not this base's; ``HK-NAN`` when a weight
                cannot be quantized; ``HK-DEVICE`` for a base whose weights are offloaded.
        """
        with self._roster.lock:
            self.require_unmerged()
            self._roster.require_free(name)
            self._roster.add(name, adapter)

    def swap(self, name: str, adapter: Adapter) -> None:
        """Puts `adapter` in the place of the one attached under `name`, at once: values, scale and configuration.

        A call that is running ends with the old one; when the new one is refused, the old one stays.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-SHAPE``; ``HK-MIX`` or ``HK-NOT-MERGEABLE`` where the active mix
                cannot hold it.
        """
        with self._roster.lock:
            self.require_unmerged()
            mixes.require_known(name, self.adapters)
            self._roster.require_sites(name, adapter)
            plan = self._plan
            if name in mixes.names(self.mix):
                plan = make_plan(self.mix, {**self.adapters, name: adapter}, self.sites)
            self._roster.replace(name, adapter)
            self._plan = plan
            self._routes.clear()

    def remove(self, name: str) -> None:
        """Takes an adapter off; it must not be in the active mix. Calls that are running with it end with it."""
        with self._roster.lock:
            mixes.require_known(name, self._roster.known)
            if name in mixes.names(self.mix):
                raise HubkitError("HK-IN-USE", f"adapter {name!r} is in the active mix", fix="set another mix first")
            self._roster.remove(name)
            self._routes.clear()

    def offer(self, name: str, load: Load) -> None:
        """An adapter that is read when a mix or a route first names it; `memory` says how many of these stay.

        Args:
            load: reads it, as often as it is needed.

        Raises:
            HubkitError: ``HK-NAME-TAKEN``.
        """
        with self._roster.lock:
            self._roster.require_free(name)
            self._roster.pool.offer(name, load)

    def _moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self._roster.slots is not None:
            self._roster.slots.apply(fn)
        self._follow()

    def _follow(self) -> None:
        """Parts go where their sites are, and plans look anew at values that were moved or cast."""
        with self._roster.lock:
            self._roster.move_parts()
            for plan in (self._plan, *self._routes.values()):
                if plan.rows is not None:
                    plan.rows.forget()

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
        if plan.rows is not None and (rows := row_count(args, kwargs)) is not None:
            plan.rows.require(rows)
        with self.using_plan(plan):
            yield

    def _routed(self, route: Route) -> Plan:
        """The plan of `route`; the last few are kept, with the factors that they have gathered."""
        with self._roster.lock:
            plan = self._routes.pop(route, None)
            if plan is None:
                plan = self._planned(route)
            else:
                self._roster.pool.settle(mixes.names(route), self.adapters)
            self._routes[route] = plan
            while len(self._routes) > ROUTES:
                del self._routes[next(iter(self._routes))]
            return plan

    def _planned(self, mix: Mix | None) -> Plan:
        """The plan of `mix`, once the offered adapters that it names are there."""
        return self._with_offered(mix, lambda adapters: make_plan(mix, adapters, self.sites))

    def _with_offered(self, mix: Mix | None, make: Callable[[Mapping[str, Adapter]], T]) -> T:
        """What `make` makes of the adapters that are there once those that `mix` names are."""
        self.require_unmerged()
        if mix is not None:
            mixes.require_known(mix, self._roster.known)
        made, gone = self._roster.with_offered(mixes.names(mix), mixes.names(self.mix), make)
        if gone:
            self._routes = {route: plan for route, plan in self._routes.items() if not gone & {*mixes.names(route)}}
        return made

    def set_mix(self, mix: Mix | None) -> None:
        """Makes `mix` the active one (None: the base alone). Nothing changes when it is refused.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-MIX``.
        """
        with self._roster.lock:
            self._plan = self._planned(mix)
            self.mix = mix

    @contextlib.contextmanager
    def using(self, mix: Mix | None) -> Iterator[None]:
        """The mix of this thread inside the ``with``; others keep theirs."""
        with self._roster.lock:
            plan = self._planned(mix)
        with self.using_plan(plan):
            yield

    def merge(self) -> Folded:
        """Merges the active mix into the weights until `unmerge`, or for a ``with``: see folded.py."""
        self.require_unmerged()
        own = self._override.get() is not None
        if self.mix is None or own:
            raise HubkitError(
                "HK-MIX",
                "this thread uses a mix of its own" if own else "no mix is active",
                want="an active mix, for all threads",
                fix="set_mix first, outside using",
            )
        return Folded(self.model, plan_merge(self.sites, self.mix, self.adapters), self._hold)

    def _hold(self, folded: Folded | None) -> None:
        """Notes what is merged into the weights, None once it is out again: hooks do nothing meanwhile."""
        self.folded = folded

    def unmerge(self) -> None:
        """Puts the base's own weights back; where nothing is merged there is nothing to do."""
        if self.folded is not None:
            self.folded.undo()

    def require_unmerged(self) -> None:
        """Refuses what cannot be done while a mix is merged: ``HK-MERGED``."""
        if self.folded is not None:
            raise HubkitError("HK-MERGED", "a mix is merged into the weights", fix="unmerge first")

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """``context_fn`` for checkpointing of your own: the recomputation runs under the mix of its forward.

        Checkpointing that a model of transformers offers needs nothing.
        """
        return contextlib.nullcontext(), self.using_plan(self._active())

    @contextlib.contextmanager
    def using_plan(self, plan: Plan) -> Iterator[None]:
        token = self._override.set(plan)
        try:
            yield
        finally:
            self._override.reset(token)

    def compiled(self, slots: int = 8, rank: int = 16, **options: Any) -> Compiled:
        """A compiled forward for the low-rank adapters attached now and later, at the sites that those attached have.

        Args:
            slots: how many adapters lie ready at once; which, is seen to at each call.
            rank: the largest rank.
            options: of torch.compile.

        Raises:
            HubkitError: ``HK-SLOTS`` where an adapter is attached that is more than low-rank parts at linear layers;
                ``HK-OPTIONS``.
        """
        self.require_unmerged()
        made = self._roster.new_slots(slots, rank)
        return Compiled(made, self.model, self._adapters_of_rows, self.using_plan, lambda: self._roster.slots, options)

    def compiled_training(self, **options: Any) -> contextlib.AbstractContextManager[None]:
        """Within it training runs the base's layers compiled, under the mix active now: `hubkit.tensors.compiling`."""
        return compiled_layers(self.sites, self._active, self._roster.hook_numbers, **options)

    def _adapters_of_rows(self, route: Iterable[str | None] | None, rows: int) -> list[Adapter | None]:
        """The adapter of each row of a batch, read where it is only offered; by the active mix without a route.

        Raises:
            HubkitError: ``HK-ROUTE``, ``HK-UNKNOWN-ADAPTER``; ``HK-SLOTS`` for a mix of several.
        """
        if self._roster.base_moved:
            self._follow()
        names = names_of_rows([self.mix] * rows if route is None else route, rows)
        with self._roster.lock:
            there = self._with_offered(Route(names), dict)
            return [None if name is None else there[name] for name in names]

    def detach(self) -> nn.Module:
        """Takes every adapter off and gives back the base: same object, same parameters, same ``requires_grad``."""
        self.unmerge()
        self._roster.clear()
        self._routes.clear()
        self._plan, self.mix = Plan(), None
        self._entry.remove()
        step_aside(self._checkpointing)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return self.model

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._roster.base_moved:
            self._follow()
        if (rows := self._active().rows) is not None:
            rows.look()
        if torch.is_grad_enabled():
            stand_in(self._checkpointing, self._active, self.using_plan)

    def _active(self) -> Plan:
        if BARE.get() or self.folded is not None:
            return Plan()
        override = self._override.get()
        return self._plan if override is None else override
