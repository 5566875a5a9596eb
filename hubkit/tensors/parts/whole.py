"""Modules trained as a whole beside an adapter's factors: heads, embeddings, norms (PEFT's ``modules_to_save``).

    y = f(x; V)        V is all that the module holds, W at the start

The part keeps V itself, laid out as the module stores it, so that files hold the very values that were trained. Alone
it takes the base's place; weighed or added up it is the change V - W, like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import Delta, accumulation_dtype
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.additive import effect, forward_with
from hubkit.tensors.parts.part import Edit, Part
from hubkit.tensors.parts.tied import Tied, at_tables, with_tied_heads

WHOLE_KINDS = ("linear", "embedding", "norm")
Holds = Literal["change", "values"]
"""What parts of whole tensors hold: what is added to them, or what they are then."""


class WholeModule(Edit):
    """All that one module holds: ``weight``, of the shape that the module stores, and ``bias`` where it has one.

    Args:
        site: where.
    """

    bias: nn.Parameter | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        shape = site.shape[:1] if site.kind == "norm" else site.shape[::-1] if site.transposed else site.shape
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(site.shape[0])) if site.bias_tensor else None)

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        weight, bias = site.weight(), site.bias()
        self.weight.copy_((weight.t() if site.transposed else weight).reshape(self.weight.shape))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        wide = accumulation_dtype(site.dtype)
        held = {role: value.to(wide) for role, value in self.roles().items()}
        change = whole_delta(site.widened(), held)
        return effect(site, x, y, change.dense, change.bias)

    def act(self, x: Tensor, y: Tensor, site: Site, owned: bool) -> Tensor:
        module = site.module
        assert module is not None, "only a live site has a module"
        weight, bias = self.weight.to(site.dtype), None if self.bias is None else self.bias.to(site.dtype)
        return forward_with(module, x, weight, bias).to(y.dtype)

    def at_head(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        own = replace(site, change=None)
        return F.linear(x, (self.weight - own.weight().to(self.weight.dtype)).to(x.dtype))

    def head_values(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight.clone()}  # a file holds no tensor under two names


def whole_delta(site: Site, held: Mapping[str, Tensor]) -> Delta:
    """V - W, and the same of the bias.

    Args:
        site: its weight and bias are the base's own, whatever lower members of a stack added.
        held: ``weight`` as the module stores it, and perhaps ``bias``.
    """
    own = replace(site, change=None)
    weight, bias, own_bias = held["weight"], held.get("bias"), own.bias()
    matrix = weight.t() if site.transposed else weight.reshape(site.shape)
    shift = None if bias is None or own_bias is None else bias - own_bias.to(bias.dtype)
    change = matrix - own.weight().to(matrix.dtype)
    if site.change is not None:  # on top of others it is what it adds
        return Delta.full(change, shift)
    return Delta(dense=change, bias=shift, value=matrix, bias_value=bias)


def whole_parts(base: Base, names: Collection[str], tied: Tied) -> dict[str, Part]:
    """Parts that hold the modules `names` whole; a tied head follows its table where `tied` is ``keep``."""
    chosen = at_tables(base, names) if tied == "keep" else set(names)
    parts: dict[str, Part] = {name: WholeModule(site) for name, site in base.sites.items() if name in chosen}
    return with_tied_heads(base, parts) if tied == "keep" else parts


def whole_sites(base: Base, names: Collection[str]) -> set[str]:
    """The sites that `names` choose, each of them one at least.

    Raises:
        HubkitError: ``HK-HEAD`` for a name that the base does not have, with the nearest.
    """
    found: set[str] = set()
    for name in names:
        try:
            found |= {site.name for site in base.match([name], WHOLE_KINDS)}
        except HubkitError as error:
            raise HubkitError(
                "HK-HEAD",
                f"the base has no module {name!r} that could be trained as a whole",
                where=base.source,
                want="a linear layer, an embedding or a norm of the base",
                have=error.what,
                fix=error.fix,
            ) from error
    return found
