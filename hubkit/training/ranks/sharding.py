"""A base divided among processes by FSDP2, for one that does not fit on each of their devices.

Each layer is a group: gathered before its forward and its backward, let go after them. Embeddings, last norm and head
are the root's group, gathered from the beginning of a forward to the end of its backward, because the loss reads the
head after it. Adapters are whole in each process and not FSDP2's business: their gradients are summed as without it.

FSDP2's hooks stand around those of a layer's children, so what an adapter adds at a site sees gathered weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.fourbit.linear import QuantLinear
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.ranks.world import World

TOKENS = "tokens"
"""The site at which learned embeddings stand in front of a text; see `hubkit.tensors.base.decoder.virtual_sites`."""


def require_divisible(sites: Collection[str]) -> None:
    """Refuses an adapter at `sites` that cannot be trained on a divided base: ``HK-OPTIONS``."""
    # learned embeddings run through parts of layers outside these layers' own forward, where nothing is gathered
    if TOKENS in sites:
        raise HubkitError(
            "HK-OPTIONS",
            "learned embeddings are not trained on a divided base",
            want="parts at the base's modules",
            have="--shard",
            fix="train without --shard",
            status=USAGE,
        )


def shard(model: nn.Module, world: World, device: torch.device, adapter: Adapter | None = None) -> None:
    """Divides the frozen `model` among all processes, and puts each one's share on its `device` (a collective).

    Args:
        model: the base, on the CPU, on `device`, or without values on meta.
        adapter: goes to `device` as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh

    divide(model, init_device_mesh(device.type, (world.size,)))
    if adapter is not None:
        for part in adapter.parts.values():
            part.to(device)
    world.sharded = True


def divide(model: nn.Module, mesh: Any) -> None:
    """`shard` over a device mesh of one dimension."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.divide()
    for parameter in model.parameters():
        if not parameter.is_contiguous():  # FSDP2 wants it so; layers that store (in, out) are made by transposing
            parameter.data = parameter.data.contiguous()
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one: the members of the outermost lists of modules with parameters."""
    if isinstance(model, nn.ModuleList):
        return [child for child in model if any(True for _ in child.parameters())]
    return [layer for child in model.children() for layer in layers(child)]
