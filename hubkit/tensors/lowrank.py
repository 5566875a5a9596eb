"""Low-rank parts at work: one pair of products per site, however many adapters, and one ``x Aᵀ`` per shared input.

For the backward pass x and x Aᵀ are kept and nothing more; the output is updated in place where nobody else holds it.
A and B are fp32 masters in training: they are cast to the base's dtype, x never is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.tensors.delta import accumulation_dtype
from hubkit.tensors.parts import LowRank


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
            grad_b = (flat.t() @ scaled).to(ctx.dtype)
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


@dataclass
class SiteParts:
    """The low-rank parts of one site under one mix: (part, weight in the mix)."""

    parts: Sequence[tuple[LowRank, float]]
    _ready: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        return sum(part.A.shape[0] for part, _ in self.parts)

    @property
    def drops(self) -> bool:
        return any(part.drops for part, _ in self.parts)

    @property
    def frozen(self) -> bool:
        return not any(p.requires_grad for part, _ in self.parts for p in (part.A, part.B))

    def down_factor(self) -> Tensor:
        """(R, in): all A, one below the other."""
        return self.parts[0][0].A if len(self.parts) == 1 else torch.cat([part.A for part, _ in self.parts])

    def up(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """The factor (out, R) and what multiplies it.

        One B stays as it is, so that trained, stored and reloaded it gives the same bits; a frozen one takes a power of
        two into itself, which changes none. Several are joined, scaled in fp32.
        """
        part, weight = self.parts[0]
        scale = part.scale * weight
        if len(self.parts) > 1 or (self.frozen and math.frexp(scale)[0] in (0.5, -0.5)):
            return self.up_factor(dtype), 1.0
        return part.B, scale

    def up_factor(self, dtype: torch.dtype) -> Tensor:
        """(out, R): all B, side by side, each times its scale and weight, in `dtype`; kept while nothing changes."""
        if self._ready is not None and self._ready[0] == self._key(dtype):
            return self._ready[1]
        wide = accumulation_dtype(dtype)
        scaled = [part.B if part.scale * w == 1.0 else part.B.to(wide) * (part.scale * w) for part, w in self.parts]
        factor = (scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)).to(dtype)
        if self.frozen:
            self._ready = (self._key(dtype), factor)
        return factor

    def _key(self, dtype: torch.dtype) -> Any:
        return dtype, [(p.data_ptr(), p._version) for part, _ in self.parts for p in (part.A, part.B)]


class Group:
    """Sites that are called with the same input, one after the other: ``x Aᵀ`` is computed once for all of them.

    The result is found again by the identity and version of x, so a site that is called with something else, a second
    thread or a recomputation computes its own; nothing depends on the order of calls.
    """

    def __init__(self, sites: dict[str, SiteParts]) -> None:
        self.sites = sites
        self._last: tuple[weakref.ref[Tensor], Any, dict[str, Tensor]] | None = None
        self._ready: tuple[Any, Tensor] | None = None

    def low(self, name: str, x: Tensor) -> Tensor:
        """``x Aᵀ`` of one site, (..., R), in x's dtype."""
        parts = self.sites[name]
        if parts.drops or parts.parts[0][0].is_lookup:
            pieces = [part.down(x, part.A) for part, _ in parts.parts]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        if len(self.sites) == 1:
            return self._down(x)
        state = (torch.is_grad_enabled(), None if x.is_inference() else x._version)
        last = self._last
        if last is None or last[0]() is not x or last[1] != state:
            pieces_of = torch.split(self._down(x), [site.rank for site in self.sites.values()], -1)
            last = (weakref.ref(x), state, dict(zip(self.sites, pieces_of, strict=True)))
        if len(last[2]) > 1 and name in last[2]:
            self._last = (last[0], last[1], {key: low for key, low in last[2].items() if key != name})
        else:
            self._last = None
        found = last[2].get(name)
        return torch.nn.functional.linear(x, parts.down_factor().to(x.dtype)) if found is None else found

    def _down(self, x: Tensor) -> Tensor:
        """``x Aᵀ`` for all A of the group, (..., ΣR); frozen factors are joined and cast once."""
        if not all(site.frozen for site in self.sites.values()):
            low: Tensor = Down.apply(x, *(site.down_factor() for site in self.sites.values()))  # type: ignore[no-untyped-call]
            return low
        key = [site._key(x.dtype) for site in self.sites.values()]
        if self._ready is None or self._ready[0] != key:
            factors = [site.down_factor() for site in self.sites.values()]
            self._ready = (key, (factors[0] if len(factors) == 1 else torch.cat(factors)).to(x.dtype))
        return torch.nn.functional.linear(x, self._ready[1])


def add_low_rank(group: Group, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus what the low-rank parts of site `name` add to it; in place where that is safe.

    Args:
        module: the module that made y.
        x: its input, (..., in).
        y: its output, (..., out).
    """
    low = group.low(name, x)
    if low.dtype == y.dtype and _owns_output(module, y):
        up, scale = group.sites[name].up(low.dtype)
        if torch.is_grad_enabled() and (y.requires_grad or low.requires_grad or up.requires_grad):
            added: Tensor = AddUp.apply(y, low, up, scale)  # type: ignore[no-untyped-call]
            return added
        flat = low.reshape(-1, low.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(flat if scale == 1.0 else flat * scale, up.to(y.dtype).t())
        return y
    return y + (low @ group.sites[name].up_factor(low.dtype).t()).to(y.dtype)


def _owns_output(module: nn.Module, y: Tensor) -> bool:
    """Whether `y` is held by nobody but this call: the fresh result of a plain Linear with no other hook on it.

    Autograd keeps neither a Linear's output nor anything that shares its memory; of other modules nothing is known.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and len(module._forward_hooks) == 1
        and not torch.nn.modules.module._global_forward_hooks
        and not y._is_view()
        and y.is_contiguous()
        and not torch.compiler.is_compiling()
    )
