"""Gradients and losses of the processes, summed.

Nothing is rounded that one process would not round: of two processes with one micro-batch each the sum is that of
``--accumulate 2``, bit for bit; of more only the order in which the terms are added differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hubkit.training.ranks.world import World

BUCKET = 1 << 24
"""Numbers that are summed in one message: 64 MiB."""


def summed(
    world: World, params: Sequence[nn.Parameter], losses: Mapping[int, Tensor], count: int, device: torch.device
) -> Tensor:
    """Puts the sum of all processes' gradients into `params`, and returns that of the losses (a collective).

    A parameter that no process reached keeps no gradient.

    Args:
        params: in the same order in all processes.
        losses: number of the micro-batch -> its weighted loss, without dimensions.
        count: micro-batches of the step.

    Returns:
        the loss, float32, added up in the order of the micro-batches.
    """
    total = torch.zeros((), device=device)
    if world.size == 1:
        for number in sorted(losses):
            total += losses[number].to(device)
        return total
    facts = torch.zeros(count + len(params), dtype=torch.float64, device=device)
    for number, loss in losses.items():
        facts[number] = loss
    facts[count:] = torch.tensor([float(p.grad is not None) for p in params], dtype=torch.float64)
    dist.all_reduce(facts)
    for loss in facts[:count]:
        total += loss
    reached = [param for param, there in zip(params, facts[count:].tolist(), strict=True) if there]
    for bucket in _buckets(reached):
        _sum(bucket)
    return total


def _sum(params: Sequence[nn.Parameter]) -> None:
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params if param.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _buckets(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """`params` in their order, as many together as `BUCKET` holds, of one dtype."""
    found: list[list[nn.Parameter]] = []
    room, dtype = 0, None
    for param in params:
        if param.numel() > room or param.dtype != dtype:
            found.append([])
            room, dtype = BUCKET, param.dtype
        found[-1].append(param)
        room -= param.numel()
    return found
