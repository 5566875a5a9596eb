"""A compiled forward with LoRA adapters in slots: which rows have which adapter, and which adapter lies in a slot, are
values of tensors, so that neither a route nor a swap compiles anything again.

As in Punica, Chen et al. 2023, https://arxiv.org/abs/2310.18547, and S-LoRA, Sheng et al. 2023,
https://arxiv.org/abs/2311.03285, with ranks padded by zeros; slot 0 holds zeros and stands for the base alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.base.site import Site
from hubkit.tensors.experts.expert import is_expert
from hubkit.tensors.live.plan import At, Plan
from hubkit.tensors.lowrank.rows import Rows, row_count
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Route
from hubkit.tensors.parts.part import LowRank


class Slots:
    """Stacked factors of every site: down (slots, rank, in) and up (slots, out, rank), scaled, in the base's dtype.

    Args:
        sites: where adapters may act.
        count: how many adapters there is room for at once.
        rank: the largest rank of one.

    Raises:
        HubkitError: ``HK-SLOTS`` for sites that are not linear, or none; ``HK-OPTIONS``.
    """

    def __init__(self, sites: Sequence[Site], count: int, rank: int) -> None:
        if count < 1 or rank < 1:
            have = f"{count} slots of rank {rank}"
            raise HubkitError("HK-OPTIONS", "out of range", want="slots >= 1, rank >= 1", have=have)
        others = [f"{s.name}: {s.kind}" for s in sites if s.kind != "linear" or is_expert(s.name)]  # rows of no batch
        if others or not sites:
            raise HubkitError(
                "HK-SLOTS",
                "only low-rank parts at linear layers can be compiled",
                have=others or "none of these",
                fix="attach such adapters alone, or call the model as it is",
            )
        self.count, self.rank = count, rank
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for site in sites:
            out, inner = site.shape
            self.down[site.name] = torch.zeros(count + 1, rank, inner, dtype=site.dtype, device=site.device)
            self.up[site.name] = torch.zeros(count + 1, out, rank, dtype=site.dtype, device=site.device)
        self.index = torch.zeros(1, dtype=torch.long)
        """The slot of each row, while a forward is traced or running."""
        self._holders: dict[int, Adapter] = {}
        """Slot -> what lies in it, least recently used first."""
        self._calls = [0] * (count + 1)
        self._lock = threading.Lock()

    def act(self, name: str, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """`y` (rows, ..., out) with what the slots of the rows add at site `name`; x is (rows, ..., in)."""
        index = self.index if index is None else index
        down, up = self.down[name].index_select(0, index), self.up[name].index_select(0, index)
        low = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), down.transpose(1, 2))
        return y + torch.bmm(low, up.transpose(1, 2)).view(y.shape)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts all factors, as `torch.nn.Module.to` does with parameters."""
        for stack in (self.down, self.up):
            stack.update({name: fn(tensor) for name, tensor in stack.items()})
        self.index = self.index.to(self._device)

    def move_beside(self, base: Base) -> None:
        """Takes all factors where their sites are."""
        for stack in (self.down, self.up):
            stack.update({name: tensor.to(base.site(name).device) for name, tensor in stack.items()})

    @contextmanager
    def placed(self, adapters: Sequence[Adapter | None]) -> Iterator[Tensor]:
        """Inside, each adapter lies in a slot; gives the slot of each, (rows,), 0 for None.

        Raises:
            HubkitError: ``HK-SLOTS`` for an adapter that no slot can hold, or more of them than there are slots.
        """
        wanted = list({id(one): one for one in adapters if one is not None}.values())
        for one in wanted:
            self._require_fitting(one)
        with self._lock:
            slots = self._take(wanted)
            for slot in slots.values():
                self._calls[slot] += 1
        try:
            yield torch.tensor([0 if one is None else slots[id(one)] for one in adapters], device=self._device)
        finally:
            with self._lock:
                for slot in slots.values():
                    self._calls[slot] -= 1

    @property
    def _device(self) -> torch.device:
        return next(iter(self.down.values())).device

    def _take(self, wanted: Sequence[Adapter]) -> dict[int, int]:
        """A slot for each: where it lies already, an empty one, or that of the least recently used one at rest."""
        found = {id(one): slot for slot, held in self._holders.items() for one in wanted if held is one}
        missing = [one for one in wanted if id(one) not in found]
        empty = [slot for slot in range(1, self.count + 1) if slot not in self._holders]
        resting = [slot for slot in self._holders if not self._calls[slot] and slot not in found.values()]
        if len(missing) > len(empty) + len(resting):
            raise HubkitError(
                "HK-SLOTS",
                "one call needs more adapters than there are free slots",
                want=f"at most {self.count}",
                have=f"{len(wanted)} in this call, {self.count - len(empty) - len(resting)} slots in use",
                fix="more slots, or fewer adapters in one batch",
            )
        for one, slot in zip(missing, [*empty, *resting], strict=False):
            self._holders.pop(slot, None)
            self._write(slot, one)
            self._holders[slot] = one
            found[id(one)] = slot
        for slot in found.values():
            self._holders[slot] = self._holders.pop(slot)
        return found

    @torch.no_grad()
    def _write(self, slot: int, adapter: Adapter) -> None:
        for name in self.down:
            down, up = self.down[name][slot], self.up[name][slot]
            down.zero_()
            up.zero_()
            part = adapter.parts.get(name)
            if isinstance(part, LowRank):
                lower, upper = part.lower(), part.upper()
                down[: lower.shape[0]] = lower.to(down)
                up[:, : upper.shape[1]] = (upper.to(accumulation_dtype(up.dtype)) * part.scale).to(up)

    def _require_fitting(self, adapter: Adapter) -> None:
        strange = [
            name for name, part in adapter.parts.items() if not isinstance(part, LowRank) or name not in self.down
        ]
        large = max((part.A.shape[0] for part in adapter.parts.values() if isinstance(part, LowRank)), default=0)
        if strange or large > self.rank:
            raise HubkitError(
                "HK-SLOTS",
                f"no slot can hold the adapter {adapter.name!r}",
                want=f"low-rank parts of rank {self.rank} at most, at the sites that were compiled",
                have=strange or f"rank {large}",
                fix="larger slots, or the model that is not compiled",
            )


def names_of_rows(mixes: Iterable[Mix | None], rows: int) -> list[str | None]:
    """The adapter's name of each row of a batch, None for the base alone.

    Args:
        mixes: the mix of each.
        rows: how many rows the batch has.

    Raises:
        HubkitError: ``HK-ROUTE`` for another number of them; ``HK-SLOTS`` for a mix of several adapters.
    """
    listed = Route(mixes).rows
    Rows([None] * len(listed)).require(rows)
    several = [mix for mix in listed if not (mix is None or isinstance(mix, str))]
    if several:
        raise HubkitError("HK-SLOTS", "a slot holds one adapter, not a mix", have=repr(several[0]))
    return [mix if isinstance(mix, str) else None for mix in listed]


class SlotPlan(Plan):
    """What slots do, for modules that are run and not traced: a forward may be compiled in part only.

    Args:
        index: the slot of each row.
    """

    def __init__(self, slots: Slots, index: Tensor) -> None:
        super().__init__({name: self._at(name) for name in slots.down})
        self._slots, self._index = slots, index

    def _at(self, name: str) -> At:
        return lambda module, x, y: self._slots.act(name, x, y, self._index)


class Compiled:
    """A compiled forward of a base with adapters in slots; call it as the model, with a route of names.

    Args:
        slots: the factors.
        model: the base, whose hooks look into the slots.
        adapters_of: the adapter of each row, by a route or by the active mix: (route, number of rows).
        under: makes a plan the active one, inside a ``with``.
        newest: the slots of the newest compiled forward: hooks that are traced know no others.
        options: of torch.compile.
    """

    def __init__(
        self,
        slots: Slots,
        model: nn.Module,
        adapters_of: Callable[[Iterable[str | None] | None, int], list[Adapter | None]],
        under: Callable[[Plan], AbstractContextManager[None]],
        newest: Callable[[], Slots | None],
        options: Mapping[str, Any],
    ) -> None:
        def run(index: Tensor, *args: Any, **kwargs: Any) -> Any:
            slots.index = index
            return model(*args, **kwargs)

        self.slots, self._adapters_of, self._under, self._newest = slots, adapters_of, under, newest
        self._run = torch.compile(run, **options)

    def __call__(self, *args: Any, route: Iterable[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's forward, compiled.

        Args:
            route: the adapter of each row, None for the base alone; without it the active mix, one adapter or none.

        Raises:
            HubkitError: ``HK-ROUTE``, ``HK-UNKNOWN-ADAPTER``, ``HK-SLOTS``.
        """
        if self._newest() is not self.slots:
            raise HubkitError("HK-SLOTS", "the base was detached or compiled anew", fix="attached.compiled(...) again")
        rows = row_count(args, kwargs)
        if rows is None:
            raise HubkitError("HK-ROUTE", "a compiled call needs its rows", want="input_ids or inputs_embeds")
        with (
            self.slots.placed(self._adapters_of(route, rows)) as index,
            self._under(SlotPlan(self.slots, index)),
        ):
            return self._run(index, *args, **kwargs)
