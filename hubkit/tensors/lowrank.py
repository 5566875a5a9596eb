"""Low-rank parts at work: one pair of products per site, however many adapters, and one ``x Aᵀ`` per shared input.

For the backward pass x and x Aᵀ are kept and nothing more; the output is updated in place where nobody else holds it.
A and B are fp32 masters in training: they are cast to the base's dtype, x never is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.tensors.parts import LowRank


class AddUp(torch.autograd.Function):
    """``y += h Bᵀ`` in place. y (..., out), h (..., r), B (out, r) scaled, all of one dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, b)
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_h = (flat @ b).view(h.shape) if ctx.needs_input_grad[1] else None
        grad_b = flat.t() @ h.reshape(-1, h.shape[-1]) if ctx.needs_input_grad[2] else None
        return grad, grad_h, grad_b


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

    def up_factor(self, dtype: torch.dtype) -> Tensor:
        """(out, R): all B, side by side, each times its scale and weight, in `dtype`; kept while nothing changes."""
        if self._ready is not None and self._ready[0] == self._key(dtype):
            return self._ready[1]
        scaled = [part.B if part.scale * w == 1.0 else part.B * (part.scale * w) for part, w in self.parts]
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
            return torch.nn.functional.linear(x, self._factor(x.dtype))
        state = (torch.is_grad_enabled(), None if x.is_inference() else x._version)
        last = self._last
        if last is None or last[0]() is not x or last[1] != state:
            whole = torch.nn.functional.linear(x, self._factor(x.dtype))
            pieces_of = torch.split(whole, [site.rank for site in self.sites.values()], -1)
            last = (weakref.ref(x), state, dict(zip(self.sites, pieces_of, strict=True)))
        if len(last[2]) > 1 and name in last[2]:
            self._last = (last[0], last[1], {key: low for key, low in last[2].items() if key != name})
        else:
            self._last = None
        found = last[2].get(name)
        return torch.nn.functional.linear(x, parts.down_factor().to(x.dtype)) if found is None else found

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """All A of the group, (ΣR, in), in `dtype`; kept while nothing changes."""
        if all(site.frozen for site in self.sites.values()):
            key = [site._key(dtype) for site in self.sites.values()]
            if self._ready is None or self._ready[0] != key:
                self._ready = (key, self._join(dtype))
            return self._ready[1]
        return self._join(dtype)

    def _join(self, dtype: torch.dtype) -> Tensor:
        factors = [site.down_factor() for site in self.sites.values()]
        return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)


def add_low_rank(group: Group, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus what the low-rank parts of site `name` add to it; in place where that is safe.

    Args:
        module: the module that made y.
        x: its input, (..., in).
        y: its output, (..., out).
    """
    low = group.low(name, x)
    up = group.sites[name].up_factor(low.dtype)
    if low.dtype == y.dtype and _owns_output(module, y):
        if torch.is_grad_enabled() and (y.requires_grad or low.requires_grad or up.requires_grad):
            added: Tensor = AddUp.apply(y, low, up)  # type: ignore[no-untyped-call]
            return added
        y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up.t())
        return y
    return y + (low @ up.t()).to(y.dtype)


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
