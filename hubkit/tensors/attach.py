"""Attaching adapters to a live model: permanent forward hooks, so that names, checkpoints and fingerprints stay.

`Attached` is the module to train, call, compile or wrap: the base inside it keeps every name and value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors import mix as mixes
from hubkit.tensors.adapter import Adapter
from hubkit.tensors.base import Base
from hubkit.tensors.folded import Folded
from hubkit.tensors.holder import Holder
from hubkit.tensors.mix import Mix, Route
from hubkit.tensors.planning import Plan
from hubkit.tensors.recompute import checkpointing_modules, stand_in, step_aside
from hubkit.tensors.rows import Rows, repeated, rows_of
from hubkit.tensors.slots import Compiled, Slots
from hubkit.tensors.virtual import BARE

ROUTES = 2
"""Plans of routes that are kept for the next call."""


def require_uncompiled(model: nn.Module) -> None:
    """Refuses a model that torch.compile has wrapped, or a part of it: ``HK-COMPILED``."""
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise HubkitError(
            "HK-COMPILED", "the model is compiled already: hooks registered now would be ignored",
            fix="attach first, then torch.compile the attached model",
        )  # fmt: skip


class Attached(Holder):
    """A base with adapters attached and one mix of them active.

    Args:
        model: the live base; its parameters are frozen while attached.
        base: its sites, if already known.

    Raises:
        HubkitError: ``HK-COMPILED`` for a model that torch.compile has already wrapped: it would ignore the hooks.
    """

    def __init__(self, model: nn.Module, base: Base | None = None) -> None:
        require_uncompiled(model)
        super().__init__(model, base or Base.from_model(model))
        self.training = model.training
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._override: ContextVar[Plan | None] = ContextVar("hubkit_plan", default=None)
        self._checkpointing = checkpointing_modules(model)
        self._entry = model.register_forward_pre_hook(self._enter)
        self.folded: Folded | None = None
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
        if plan.rows is not None and (rows := rows_of(args, kwargs)) is not None:
            plan.rows.require(rows)
        with self.under(plan):
            yield

    def _routed(self, route: Route) -> Plan:
        """The plan of `route`; the last few are kept, with the factors that they have gathered."""
        with self._lock:
            plan = self._routes.pop(route, None)
            if plan is None:
                plan = self._planned(route)
            else:
                self._pool.settle(mixes.names(route), self.adapters)
            self._routes[route] = plan
            while len(self._routes) > ROUTES:
                del self._routes[next(iter(self._routes))]
            return plan

    def set_mix(self, mix: Mix | None) -> None:
        """Makes `mix` the active one (None: the base alone). Nothing changes when it is refused.

        Raises:
            HubkitError: ``HK-UNKNOWN-ADAPTER``, ``HK-MIX``.
        """
        with self._lock:
            self._plan = self._planned(mix)
            self.mix = mix

    @contextlib.contextmanager
    def using(self, mix: Mix | None) -> Iterator[None]:
        """The mix of this thread inside the ``with``; others keep theirs."""
        with self._lock:
            plan = self._planned(mix)
        with self.under(plan):
            yield

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
        """``context_fn`` for checkpointing of your own: the recomputation runs under the mix of its forward.

        Checkpointing that a model of transformers offers needs nothing.
        """
        return contextlib.nullcontext(), self.under(self._active())

    @contextlib.contextmanager
    def under(self, plan: Plan) -> Iterator[None]:
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
        if slots < 1 or rank < 1:
            have = f"{slots} slots of rank {rank}"
            raise HubkitError("HK-OPTIONS", "out of range", want="slots >= 1, rank >= 1", have=have)
        self.require_unmerged()
        sites = [self.sites.sites[name] for name in self._handles]
        if self._virtual is not None or not sites or any(site.kind != "linear" for site in sites):
            raise HubkitError(
                "HK-SLOTS", "only low-rank parts at linear layers can be compiled", where=self.sites.source,
                have=[f"{site.name}: {site.kind}" for site in sites if site.kind != "linear"] or "none of these",
                fix="attach such adapters alone, or call the model as it is",
            )  # fmt: skip
        made = self.slots = Slots(sites, slots, rank)

        def run(index: Tensor, *args: Any, **kwargs: Any) -> Any:
            made.index = index
            return self.model(*args, **kwargs)

        return Compiled(made, torch.compile(run, **options), self)

    def of_rows(self, route: Iterable[str | None] | None, rows: int) -> list[Adapter | None]:
        """The adapter of each row of a batch, read where it is only offered; by the active mix without a route.

        Raises:
            HubkitError: ``HK-ROUTE``, ``HK-UNKNOWN-ADAPTER``; ``HK-SLOTS`` for a mix of several.
        """
        mix = Route(route) if route is not None else Route([self.mix] * rows)
        Rows([None] * len(mix.rows)).require(rows)
        several = [row for row in mix.rows if row is not None and not isinstance(row, str)]
        if several:
            raise HubkitError("HK-SLOTS", "a slot holds one adapter, not a mix", have=repr(several[0]))
        with self._lock:
            mixes.require_known(mix, {*self.adapters, *self._pool.names})
            there = self._with_offered(mix, dict)
            return [there[row] if isinstance(row, str) else None for row in mix.rows]

    def detach(self) -> nn.Module:
        """Takes every adapter off and gives back the base: same object, same parameters, same ``requires_grad``."""
        self.unmerge()
        self._clear()
        self._entry.remove()
        step_aside(self._checkpointing)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return self.model

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._place() != self._placed:
            self.follow()
        if (rows := self._active().rows) is not None:
            rows.look()
        if torch.is_grad_enabled():
            stand_in(self._checkpointing, self._active, self.under)

    def _active(self) -> Plan:
        if BARE.get() or self.folded is not None:
            return Plan()
        override = self._override.get()
        return self._plan if override is None else override
