"""Blocks: the sub-layers of a layer (attention, feed-forward) as sites; where they are is data in ``arch.json``.

A part at a block sees the residual stream before the sub-layer (x) and what the sub-layer is about to add to it (y,
with the sub-layer's own dropout and norm behind it), and says what to add to y.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import Arch, Sublayer
from hubkit.tensors.base.site import Site


@dataclass(frozen=True)
class Block(Site):
    """A sub-layer as a site; its shape is (hidden, hidden), and it has no weight of its own.

    Args:
        role: ``attention`` or ``feedforward``.
        path: of its layer: the name without that of the sub-layer.
        layer: number of its layer, from 0; a decoder's go on where its encoder's end.
        module: the live module whose output the sub-layer adds to the residual stream.
        residual: the live module that is called with the residual stream.
        argument: which of its arguments that is.
        norm: the live norm of their sum, in a post-norm architecture.
        projection: the linear site that ends the sub-layer.
    """

    role: str = ""
    path: str = ""
    layer: int = 0
    residual: nn.Module | None = field(default=None, compare=False, repr=False)
    argument: int = 0
    norm: nn.Module | None = field(default=None, compare=False, repr=False)
    projection: Site | None = field(default=None, compare=False, repr=False)

    @property
    def sublayer(self) -> str:
        """Its name below the layer."""
        return self.name.removeprefix(f"{self.path}.")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.projection is None else self.projection.device

    def weight(self) -> Tensor:
        raise HubkitError("HK-PLUGIN", f"{self.name} is a block and has no weight", fix="report this to the author")

    def bias(self) -> Tensor | None:
        return None


def block_sites(sites: Iterable[Site], arch: Arch, model: nn.Module | None = None) -> list[Block]:
    """The blocks of a base: one wherever the linear that ends a known sub-layer is.

    Args:
        sites: its linear sites.
        model: the live base, if there is one.
    """
    linears = {site.name: site for site in sites if site.kind == "linear"}
    found: list[Block] = []
    first = 0
    for stack in arch.layers:
        if not any(name.startswith(f"{stack}.") for name in linears):
            stack = stack.partition(".")[2]  # a model without its head: model.layers is layers there
        numbers = sorted({int(n) for name in linears if (n := _number(name, stack)) is not None})
        for number in numbers:
            for one in arch.sublayers:
                layer = f"{stack}.{number}"
                projection = linears.get(f"{layer}.{one.projection}")
                if projection is not None:
                    found.append(_block(one, layer, first + number, projection, model))
        first += numbers[-1] + 1 if numbers else 0
    return found


def _number(name: str, stack: str) -> int | None:
    inside = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(inside) if stack and name.startswith(f"{stack}.") and inside.isdecimal() else None


def _block(one: Sublayer, layer: str, number: int, projection: Site, model: nn.Module | None) -> Block:
    def module(path: str) -> nn.Module | None:
        return None if model is None or not path else model.get_submodule(f"{layer}.{path}")

    width = projection.shape[0]
    return Block(
        f"{layer}.{one.name}", "block", (width, width), projection.dtype, False, "", None, module=module(one.output),
        role=one.role, path=layer, layer=number, residual=module(one.residual), argument=one.argument,
        norm=module(one.norm), projection=projection,
    )  # fmt: skip
