"""Low-rank parts at work: one pair of products per site, however many adapters, and one ``x Aᵀ`` per shared input.

For the backward pass x and x Aᵀ are kept and nothing more; the output is updated in place where nobody else holds it.
A and B are fp32 masters in training: they are cast to the base's dtype, x never is.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.compat.torch import changes_of, has_one_hook, is_view, parameters_of, version_of
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.fourbit.linear import QuantLinear, Swapped
from hubkit.tensors.parts.part import LowRank

_FRESH = (nn.Linear, QuantLinear)
FEW = 32
"""Rows up to which, on a CPU, half-precision products are faster in fp32: oneDNN's set-up costs more than they do."""


class AddUp(torch.autograd.Function):
    """``y += scale · h Bᵀ`` in place. y (..., out) and h (..., r) of one dtype; B (out, r), perhaps an fp32 master.

    Scaling and casting belong to it: as nodes of their own they cost more than their arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        scaled = h.reshape(-1, h.shape[-1]) if scale == 1.0 else h.reshape(-1, h.shape[-1]) * scale
        cast = b.to(y.dtype)
        ctx.mark_dirty(y)
        ctx.save_for_backward(scaled, cast)
        ctx.scale, ctx.shape, ctx.dtype = scale, h.shape, b.dtype
        y.view(-1, y.shape[-1]).addmm_(scaled, cast.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_h = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_h = flat @ b
            grad_h = (grad_h if ctx.scale == 1.0 else grad_h.mul_(ctx.scale)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            grad_b = (scaled.t() @ flat).t().to(ctx.dtype, memory_format=torch.contiguous_format)
        return grad, grad_h, grad_b, None


class Down(torch.autograd.Function):
    """``x Aᵀ`` for the factors A of several sites, one below the other: x (..., in), each A (r, in) -> (..., Σr)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        a = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(x.dtype)
        ctx.save_for_backward(x, a)
        ctx.ranks, ctx.dtype = [f.shape[0] for f in factors], factors[0].dtype
        return torch.nn.functional.linear(x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = (flat @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, *(None for _ in ctx.ranks)
        grad_a = (flat.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtype)
        return grad_x, *grad_a.split(ctx.ranks)


@dataclass(frozen=True)
class SiteParts:
    """The low-rank parts of one site under one mix: (part, weight in the mix)."""

    parts: Sequence[tuple[LowRank, float]]

    @property
    def rank(self) -> int:
        return sum(part.A.shape[0] for part, _ in self.parts)

    @property
    def drops(self) -> bool:
        return any(part.drops for part, _ in self.parts)

    def down(self) -> Tensor:
        """(R, in): all A, one below the other."""
        return self.parts[0][0].lower() if len(self.parts) == 1 else torch.cat([p.lower() for p, _ in self.parts])

    def up(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """(out, R), all B side by side, and what multiplies it.

        One B stays as it is: trained, stored and reloaded it gives the same bits. Several are joined, scaled in fp32.
        """
        if len(self.parts) == 1:
            part, weight = self.parts[0]
            return part.upper(), part.scale * weight
        wide = accumulation_dtype(dtype)
        return torch.cat([part.upper().to(wide) * (part.scale * weight) for part, weight in self.parts], 1).to(
            dtype
        ), 1.0

    def plainly(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` and what the parts add to it, in operations that a compiler can see through and join."""
        for part, weight in self.parts:
            low = part.down(x, part.lower()) * (part.scale * weight)
            y = y + torch.nn.functional.linear(low, part.upper().to(low.dtype)).to(y.dtype)
        return y


@dataclass(frozen=True)
class _Ready:
    """Frozen factors of a group, joined, cast and laid out once.

    Args:
        key: what they were made of.
        down: (ΣR, in).
        ups: site -> (R, out), contiguous, which is twice as fast as a transposed view when rows are few; and its scale.
    """

    key: Any
    down: Tensor
    ups: Mapping[str, tuple[Tensor, float]]

    @functools.cached_property
    def _wide(self) -> tuple[Tensor, Tensor]:
        """In fp32: (in, ΣR), and (ΣR, Σout) with the scaled up factors as its diagonal blocks."""
        blocks = [up.float() * scale for up, scale in self.ups.values()]
        up: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return self.down.float().t().contiguous(), up

    def additions(self, x: Tensor) -> dict[str, Tensor]:
        """Site -> what it adds, (..., out), in x's dtype; computed in fp32, two products for all."""
        down, up = self._wide
        low = torch.mm(x.reshape(-1, x.shape[-1]).float(), down)
        whole = torch.mm(low, up).to(x.dtype).view(*x.shape[:-1], -1)
        if len(self.ups) == 1:
            return dict.fromkeys(self.ups, whole)
        # not torch.split: its Python costs as much as a product
        pieces = whole.split_with_sizes([up.shape[1] for up, _ in self.ups.values()], -1)
        return dict(zip(self.ups, pieces, strict=True))


class SharedInput:
    """What sites that are called with one input share: computed at the first one's call, handed out at the others'.

    It is found again by the identity and version of the input, so a site that is called with something else, a second
    thread or a recomputation computes its own; nothing depends on the order of calls.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], Any, dict[str, Tensor], Any] | None = None

    def take(self, name: str, x: Tensor, state: object) -> tuple[Tensor, Any] | None:
        """The share of site `name`, once, and what was kept with it; None where it has to be computed.

        Args:
            x: the input.
            state: how it was computed; another way's result is none.
        """
        last = self._last
        if last is None or last[0]() is not x or last[1] != (torch.is_grad_enabled(), state, changes_of(x)):
            return None
        mine = last[2].pop(name, None)
        return None if mine is None else (mine, last[3])

    def keep(self, name: str, x: Tensor, state: object, made: dict[str, Tensor], beside: Any) -> Tensor:
        """Keeps `made`, site -> result, with `beside`, and hands out the share of site `name`."""
        mine = made.pop(name)
        if made:
            self._last = (weakref.ref(x), (torch.is_grad_enabled(), state, changes_of(x)), made, beside)
        return mine


class Group:
    """Sites that are called with the same input, one after the other: ``x Aᵀ`` is computed once for all of them."""

    def __init__(self, sites: dict[str, SiteParts]) -> None:
        self.sites = sites
        self._parts = [part for site in sites.values() for part, _ in site.parts]
        self._looks_up = any(part.is_lookup for part in self._parts)
        self._shared = SharedInput()
        self._ready: _Ready | None = None

    def addition(self, name: str, x: Tensor) -> Tensor | None:
        """All that one site adds, (..., out), where x is a few rows in a pass without gradient; None where it is not.

        A small product costs the same whatever its size: two serve the whole group.
        """
        known = self._shared.take(name, x, "few")
        if known is not None:
            return known[0]
        if not is_few(x) or self._looks_up or any(part.drops for part in self._parts):
            return None
        ready = self._frozen(x.dtype)
        return None if ready is None else self._shared.keep(name, x, "few", ready.additions(x), ready)

    def low(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """``x Aᵀ`` of one site, (..., R), in x's dtype; its up factor, (R, out); the scale."""
        parts = self.sites[name]
        if parts.drops or parts.parts[0][0].is_lookup:
            pieces = [part.down(x, part.lower()) for part, _ in parts.parts]
            low = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
            return low, *self._up(name, low.dtype, self._frozen(low.dtype))
        known = self._shared.take(name, x, "many")
        if known is None:
            ready = self._frozen(x.dtype)
            known = self._shared.keep(name, x, "many", self._lows(x, ready), ready), ready
        return known[0], *self._up(name, x.dtype, known[1])

    def _lows(self, x: Tensor, ready: _Ready | None) -> dict[str, Tensor]:
        """Site -> its part of ``x Aᵀ``, for all sites of the group."""
        if ready is None:
            whole: Tensor = Down.apply(x, *(site.down() for site in self.sites.values()))  # type: ignore[no-untyped-call]
        else:
            whole = torch.nn.functional.linear(x, ready.down)
        if len(self.sites) == 1:
            return dict.fromkeys(self.sites, whole)
        pieces = torch.split(whole, [site.rank for site in self.sites.values()], -1)
        return dict(zip(self.sites, pieces, strict=True))

    def _up(self, name: str, dtype: torch.dtype, ready: _Ready | None) -> tuple[Tensor, float]:
        if ready is not None:
            return ready.ups[name]
        up, scale = self.sites[name].up(dtype)
        return up.t(), scale

    def _frozen(self, dtype: torch.dtype) -> _Ready | None:
        """The group's factors made ready, where none is trained; made again when a value has changed."""
        key: list[Any] = [dtype]
        for part in self._parts:
            for value in parameters_of(part).values():
                if value is not None:
                    if value.requires_grad:
                        self._ready = None  # fused optimizers change values and leave versions as they were
                        return None
                    key.append(version_of(value))
        if self._ready is None or self._ready.key != key:
            factors = [site.down() for site in self.sites.values()]
            down = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)
            self._ready = _Ready(
                key, down, {name: _laid_out(*site.up(dtype), dtype) for name, site in self.sites.items()}
            )
        return self._ready


def is_few(x: Tensor) -> bool:
    """Whether `x` is a handful of half-precision rows on a CPU, in a pass without gradient: a step of decoding."""
    return (
        x.dtype.itemsize == 2
        and x.dim() > 1
        and x.numel() <= FEW * x.shape[-1]
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
    )


def _laid_out(up: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(R, out), contiguous. A scale that is a power of two goes into it, which changes no bit of the result."""
    cast = up.to(dtype).t().contiguous()
    return (cast * scale, 1.0) if math.frexp(scale)[0] in (0.5, -0.5) else (cast, scale)


def add_low_rank(group: Group, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus what the low-rank parts of site `name` add to it; in place where that is safe.

    Args:
        module: the module that made y.
        x: its input, (..., in).
        y: its output, (..., out).
    """
    addition = group.addition(name, x)
    if addition is not None:
        return y.add_(addition) if owns_output(module, y) else y + addition
    low, up, scale = group.low(name, x)
    if low.dtype == y.dtype and owns_output(module, y):
        if torch.is_grad_enabled() and (y.requires_grad or low.requires_grad or up.requires_grad):
            added: Tensor = AddUp.apply(y, low, up.t(), scale)  # type: ignore[no-untyped-call]
            return added
        flat = low.reshape(-1, low.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(flat if scale == 1.0 else flat * scale, up.to(y.dtype))
        return y
    return y + ((low if scale == 1.0 else low * scale) @ up.to(low.dtype)).to(y.dtype)


def owns_output(module: nn.Module, y: Tensor) -> bool:
    """Whether `y` is held by nobody but this call: the fresh result of a linear layer with no other hook on it.

    Autograd keeps neither a Linear's output nor anything that shares its memory; of other modules nothing is known.
    """
    forward = module.__dict__.get("forward")
    return (
        (type(module) in _FRESH if forward is None else type(forward) is Swapped)
        and has_one_hook(module)
        and not is_view(y)
        and y.is_contiguous()
        and not torch.compiler.is_compiling()
    )
