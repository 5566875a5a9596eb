"""Additive parts: a change Δ of a module's own weight and bias, acting by the module's own formula.

    y + f(x; Δ) - f(x; 0)        f(x; W) is what the module computes, affine in W

which for a linear is x Δᵀ, for an embedding the rows of Δᵀ, for a norm Δ ⊙ (x normalized), whether its gain is W or
1 + W. W + Δ is never made: the base stays as it is, and the parts of several adapters add up.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.torch import parameters_of, twin_of
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.part import Edit, Part
from hubkit.tensors.parts.tied import Tied, at_tables, tied_pairs, with_tied_heads


class Additive(Edit):
    """A change of a site's weight, of its bias, or of both; zero at the start.

    Args:
        site: where.
        weight: the weight changes: a parameter ``weight``, (out, in).
        bias: the bias changes: a parameter ``bias``, (out,).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, site: Site, *, weight: bool, bias: bool) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.empty(site.shape)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(site.shape[0])) if bias else None)

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        for parameter in self.roles().values():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return effect(site, x, y, self.weight, self.bias)

    def at_head(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return effect(site, x, y, self.get_parameter("weight").t(), None)


def additive_parts(
    base: Base, weights: Collection[str], biases: Collection[str], tied: Tied = "keep"
) -> dict[str, Part]:
    """Parts that change the weights of the sites `weights` and the biases of the sites `biases`.

    Args:
        tied: where an output head is tied to its embedding table and one of the two changes: ``keep``, both do, as when
            the tensor itself is trained; ``break``, only what is named.

    Raises:
        HubkitError: ``HK-TARGET`` for the bias alone of a head that follows its table.
    """
    if tied == "keep":
        weights = at_tables(base, weights)
    parts: dict[str, Part] = {
        name: Additive(site, weight=name in weights, bias=name in biases)
        for name, site in base.sites.items()
        if name in weights or name in biases
    }
    if tied == "break":
        return parts
    for head, table in tied_pairs(base).items():
        if table in weights and head in biases:
            raise HubkitError(
                "HK-TARGET",
                f"the bias of {head} cannot change beside a weight that follows {table}",
                where=base.source,
                fix="leave the bias out, or let the two part: --set tied=break",
            )
    return with_tied_heads(base, parts)


def effect(site: Site, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What adding `weight` (out, in) and `bias` (out,) to those of the module at `site` adds to its output.

    Args:
        x: the module's input.
        y: its output, for the shape.
    """
    module = site.module
    assert module is not None, "only a live site has a module"
    if site.kind == "norm":
        wide = accumulation_dtype(x.dtype)
        zero = torch.zeros(site.shape[0], dtype=wide, device=x.device)
        gain = zero if weight is None else weight.reshape(-1).to(wide)
        shift = None if not site.has_bias else zero if bias is None else bias.to(wide)
        x = x.to(wide)
        return forward_with(module, x, gain, shift) - forward_with(module, x, zero, None if shift is None else zero)
    if weight is None:
        assert bias is not None
        return bias.to(y.dtype).expand(y.shape)
    if site.kind == "embedding":
        return forward_with(module, x, weight.t(), None)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def forward_with(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, **others: object) -> Tensor:
    """The module's own forward with another weight and bias, and perhaps other attributes.

    The module, its hooks among it, is not touched.
    """
    own = {**parameters_of(module), "weight": weight}
    if "bias" in own:
        own["bias"] = bias
    made: Tensor = type(module).forward(twin_of(module, parameters=own, **others), x)
    return made
