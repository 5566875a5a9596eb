"""Low-rank parts of a batch whose rows have different ones: two batched products per site, however many adapters.

The factors of each row are gathered once, and again only when the rows or a value change; sites that share an input
share the first product. As in S-LoRA, Sheng et al. 2023, https://arxiv.org/abs/2311.03285, with ranks padded by zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.torch import parameters_of
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.device import indices
from hubkit.tensors.lowrank.group import FEW, Group, SharedInput, SiteParts, add_low_rank, is_few, owns_output
from hubkit.tensors.lowrank.kernel import RowKernel, tiled
from hubkit.tensors.lowrank.rows import Rows


@dataclass(frozen=True)
class Gathered:
    """The factors of every row.

    Args:
        key: what they were made of.
        down: (rows, in, ΣR), of all sites of the group side by side.
        ups: site -> (rows, R, out), scaled.
    """

    key: Any
    down: Tensor
    ups: Mapping[str, Tensor]


@dataclass(frozen=True)
class MixFactors:
    """The factors of every mix, in bf16.

    Args:
        key: what they were made of.
        down: (mixes, ΣR, in).
        ups: site -> where its part of ΣR begins, `tiled` (mixes, R, out), what multiplies it (mixes,).
    """

    key: object
    down: Tensor
    ups: Mapping[str, tuple[int, Tensor, Tensor]]


class RowGroup:
    """Sites that are called with the same input, and the low-rank parts that each mix has there.

    Args:
        sites: site -> {number of the mix: its parts}.
        rows: which row has which mix.
    """

    def __init__(self, sites: Mapping[str, Mapping[int, SiteParts]], rows: Rows) -> None:
        self.sites, self.rows = sites, rows
        self.ranks = [max(parts.rank for parts in here.values()) for here in sites.values()]
        self._parts = [part for here in sites.values() for one in here.values() for part, _ in one.parts]
        self._looks_up = any(part.is_lookup for part in self._parts)
        self._drops = any(part.dropout > 0 for part in self._parts)
        rows.values += [value for part in self._parts for value in parameters_of(part).values() if value is not None]
        self._shared = SharedInput()
        self._ready: dict[Any, Gathered] = {}
        self._packed: MixFactors | None = None

    def act(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y` with what the parts at site `name` add to their rows.

        Args:
            x: (rows, ..., in).
            y: (rows, ..., out).
        """
        if y.shape[0] == 1:
            x, y = self.rows.spread(x, y)
        kernel = self.rows.kernel
        if (
            kernel is not None
            and x.numel() <= FEW * x.shape[-1]
            and x.dtype is y.dtype is torch.bfloat16
            and not torch.is_grad_enabled()
            and not (self._looks_up or self._drops)
            and x.is_cpu
            and x.is_contiguous()
            and owns_output(module, y)
        ):
            return self._by_kernel(kernel, name, x, y)
        if self._looks_up or (self._drops and any(part.drops for part in self._parts)):
            return self._one_by_one(name, module, x, y)
        few = is_few(x)
        of = self.rows.of(y.shape[0])
        known = self._shared.take(name, x, few)
        if known is None:
            gathered = self._gathered(of, x, torch.float32 if few else x.dtype)
            low = torch.bmm(_flat(x).to(gathered.down.dtype), gathered.down)
            pieces = [low] if len(self.ranks) == 1 else low.split_with_sizes(self.ranks, -1)
            mine = self._shared.keep(name, x, few, dict(zip(self.sites, pieces, strict=True)), gathered)
        else:
            mine, gathered = known
        return _added(module, y, mine, gathered.ups[name], few)

    def _by_kernel(self, kernel: RowKernel, name: str, x: Tensor, y: Tensor) -> Tensor:
        packed, state = self._packed, self.rows.state
        if packed is None or packed.key is not state:
            packed = self._packed = self._pack(state)
        places = self.rows.places(y.shape[0], x.numel() // x.shape[-1])
        known = self._shared.take(name, x, "kernel")
        if known is None:
            low = kernel.down(x.view(-1, x.shape[-1]), packed.down, places)
            self._shared.keep(name, x, "kernel", dict.fromkeys(self.sites, low), None)
        else:
            low = known[0]
        first, up, scale = packed.ups[name]
        kernel.add(y.view(-1, y.shape[-1]), low, first, up, scale, places)
        return y

    def _pack(self, key: object) -> MixFactors:
        """The factors of every mix, one behind the other."""
        count = 1 + max(number for number in self.rows.mixes if number is not None)  # also those that are not here
        ups: dict[str, tuple[int, Tensor, Tensor]] = {}
        downs: list[Tensor] = []
        first = 0
        for (name, here), rank in zip(self.sites.items(), self.ranks, strict=True):
            some = next(iter(here.values())).parts[0][0]
            (out, _), inner = some.B.shape, some.A.shape[1]
            down = torch.zeros(count, rank, inner, dtype=torch.bfloat16)
            up, scales = torch.zeros(count, rank, out, dtype=torch.bfloat16), torch.zeros(count)
            for number, parts in here.items():
                lower, (upper, scale) = parts.down(), parts.up(torch.bfloat16)
                down[number, : lower.shape[0]] = lower
                up[number, : upper.shape[1]] = upper.t()
                scales[number] = scale
            downs.append(down)
            ups[name] = first, tiled(up), scales
            first += rank
        return MixFactors(key, downs[0] if len(downs) == 1 else torch.cat(downs, 1), ups)

    def _one_by_one(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mix by mix: where rows are looked up, or each adapter drops its own components."""
        here = self.sites[name]
        parts, order = self.rows.parted(y.shape[0], here, y.device)
        made = [
            y[own] if mix is None else add_low_rank(Group({name: here[mix]}), name, module, x[own], y[own])
            for mix, own in parts
        ]
        return torch.cat(made).index_select(0, order)

    def _gathered(self, of: Sequence[int | None], x: Tensor, dtype: torch.dtype) -> Gathered:
        state = self.rows.state
        if state is None:
            self._ready.clear()
            return self._gather(None, of, x, dtype)
        at = len(of), dtype, x.device
        ready = self._ready.get(at)
        if ready is None or ready.key is not state:
            ready = self._gather(state, of, x, dtype)
            self._ready = {at: ready}  # one batch at a time: the factors of every row are not small
        return ready

    def _gather(self, key: Any, of: Sequence[int | None], x: Tensor, dtype: torch.dtype) -> Gathered:
        numbers = list(dict.fromkeys(of))
        at = indices(tuple(map(numbers.index, of)), x.device)
        downs: list[list[Tensor]] = [[] for _ in numbers]
        ups: dict[str, Tensor] = {}
        for (name, here), rank in zip(self.sites.items(), self.ranks, strict=True):
            some = next(iter(here.values())).parts[0][0]
            up: list[Tensor] = []
            for number, own in zip(numbers, downs, strict=True):
                parts = here.get(number) if number is not None else None
                down = some.A.new_zeros(0, some.A.shape[1]) if parts is None else parts.down()
                own.append(F.pad(down.to(dtype), (0, 0, 0, rank - down.shape[0])))
                up.append(_padded(parts, rank, some.B, dtype))
            ups[name] = torch.stack(up).index_select(0, at)
        sides = [(own[0] if len(own) == 1 else torch.cat(own)).t() for own in downs]
        return Gathered(key, torch.stack(sides).index_select(0, at), ups)


def _padded(parts: SiteParts | None, rank: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled up factors, (rank, out): zeros where there are none."""
    if parts is None:
        return like.new_zeros(rank, like.shape[0], dtype=dtype)
    up, scale = parts.up(accumulation_dtype(like.dtype))
    scaled = (up.to(accumulation_dtype(like.dtype)) * scale).to(dtype).t()
    return F.pad(scaled, (0, 0, 0, rank - scaled.shape[0]))


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def _added(module: nn.Module, y: Tensor, low: Tensor, up: Tensor, few: bool) -> Tensor:
    """`y` (rows, ..., out) plus low (rows, n, R) times up (rows, R, out)."""
    if few:
        change = torch.bmm(low, up).view(y.shape)
        change = change.to(y.dtype)
        return y.add_(change) if owns_output(module, y) else y + change
    if low.dtype == y.dtype and not torch.is_grad_enabled() and owns_output(module, y):
        y.view(y.shape[0], -1, y.shape[-1]).baddbmm_(low, up)
        return y
    if low.dtype == y.dtype:
        return torch.baddbmm(_flat(y), low, up).view(y.shape)
    return y + torch.bmm(low, up).view(y.shape).to(y.dtype)
