"""A base on a machine that does not hold it: each process reads its own share of the files.

The model is made without values (`hubkit.training.ranks.skeleton`), divided by FSDP2, and filled: of each tensor a
process reads its own rows. In 4 bits a weight is quantized as a whole, because its statistics are means over all of it:
the processes take the layers in turn, one each at a time, and hand out the shares. So none of them holds more than its
shares and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hubkit.tensors.base.site import Site
from hubkit.tensors.base.tokenizer import ForTask
from hubkit.tensors.device import computing, require_dtype
from hubkit.tensors.fourbit.divided import hollowed
from hubkit.tensors.fourbit.linear import QuantLinear
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.training.ranks.sharding import shard
from hubkit.training.ranks.skeleton import Skeleton, skeleton
from hubkit.training.ranks.world import World, world

_WHOLE = ("levels", "nested_map", "kind", "block", "nested_block", "offset")
"""What of a packed weight is not divided: a few hundred numbers."""


def attached_base(
    path: Path,
    dtype: str | None,
    codec: str | None,
    device: torch.device,
    divided: bool,
    *,
    incomplete: bool = False,
    task: ForTask | None = None,
    fill: Callable[[nn.Module], object] | None = None,
) -> tuple[Attached, bool]:
    """The base in folder `path`, ready for adapters, and whether it is still to be divided, by `shard` (a collective).

    Args:
        path, dtype, codec, incomplete, task: as for `hubkit.tensors.live.loading.load_base`.
        divided: among all processes, while it is read or afterwards: then it lies on the CPU meanwhile.
        fill: gives a model that was loaded the values that no file has.

    Raises:
        HubkitError: as `load_base`.
    """
    read = attached_divided(path, dtype, codec, world(), device) if divided and task is None else None
    if read is not None:
        return read, False
    model = load_base(path, dtype, codec, "cpu" if divided else device, allow_incomplete_base=incomplete, task=task)
    if fill is not None:
        fill(model)
    return Attached(model), divided


def attached_divided(
    path: Path, dtype: str | None, codec: str | None, world: World, device: torch.device
) -> Attached | None:
    """The base in folder `path`, divided among all processes, ready for adapters (a collective).

    None for one of which there is no `skeleton`: it is loaded as a whole, and divided afterwards.

    Args:
        path, dtype, codec: as for `hubkit.tensors.live.loading.load_base`.
        device: where the shares lie.

    Raises:
        HubkitError: as `load_base`.
    """
    outline = skeleton(path, dtype, codec)
    if outline is None:
        return None
    require_dtype(device, outline.dtype)
    attached = Attached(outline.model)
    with computing(device, f"the base {path.name}", "more processes, --dtype bfloat16, or a quantized base"):
        shard(outline.model, world, device)
        fill(outline, world, device)
    return attached


def fill(outline: Skeleton, world: World, device: torch.device) -> None:
    """Gives a divided model its values (a collective)."""
    shards, model = outline.shards, outline.model
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        own = next((outline.names[name] for name in names if name in outline.names), None)
        if own is None:
            continue  # bytes of a packed weight
        empty: Any = model.get_parameter(names[0])
        part = rows_of(empty, world)
        rows = shards.rows(own, part) if part.stop > part.start else torch.empty(0, *empty.shape[1:])
        value = with_share(empty, rows.to(empty.dtype), device)
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, value)
    for name, buffer in model.named_buffers():
        if name in outline.names:
            buffer.copy_(shards.read(outline.names[name]))
    _fill_packed(outline, world, device)


def rows_of(parameter: Any, world: World) -> slice:
    """Which rows of a divided tensor are this process's: as many in each but the last ones, as FSDP2 cuts."""
    count = parameter.shape[0]
    each = -(-count // world.size)
    start = min(world.rank * each, count)
    part = slice(start, min(start + each, count))
    assert parameter.to_local().shape[0] == part.stop - part.start
    return part


def with_share(empty: Any, share: Tensor, device: torch.device) -> nn.Parameter:
    """A parameter divided as `empty` is, of which this process has `share`."""
    from torch.distributed.tensor import DTensor

    found = DTensor.from_local(
        share.to(device),
        empty.device_mesh,
        empty.placements,
        run_check=False,
        shape=empty.shape,
        stride=empty.stride(),
    )
    return nn.Parameter(found, requires_grad=False)


def _fill_packed(outline: Skeleton, world: World, device: torch.device) -> None:
    """The layers in 4 bits, in rounds: each process packs one, then each hands its own out."""
    for first in range(0, len(outline.packed), world.size):
        some = outline.packed[first : first + world.size]
        mine = some[world.rank] if world.rank < len(some) else None
        parts: dict[str, Tensor] = {}
        facts = world.each(partial(_packed, outline, mine, device, parts))
        for owner, (layer, _) in enumerate(some):
            hollow = layer.packed
            assert hollow is not None
            for field, empty in layer.divided.items():
                share = handed_out(parts.pop(field, None) if owner == world.rank else None, empty, owner, world)
                setattr(layer, _name_of(layer, empty), with_share(empty, share, device))
            own = facts[owner].items()
            whole: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in own}
            layer.describe(replace(hollow, **whole))


def _packed(
    outline: Skeleton, mine: tuple[QuantLinear, Site] | None, device: torch.device, parts: dict[str, Tensor]
) -> dict[str, Any]:
    """Puts the bytes of one layer's weight into `parts`; returns what of it is not divided."""
    if mine is None or outline.packing is None:
        return {}
    hollow, bytes_of = hollowed(outline.packing.packed(mine[1], outline.dtype, device))
    parts.update(bytes_of)
    found = ((name, getattr(hollow, name)) for name in _WHOLE)
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found}


def _name_of(layer: nn.Module, parameter: Tensor) -> str:
    return next(name for name, own in layer.named_parameters(recurse=False) if own is parameter)


def handed_out(whole: Tensor | None, empty: Any, owner: int, world: World) -> Tensor:
    """This process's share of bytes that `owner` has (a collective).

    Args:
        whole: all of them, (n,) uint8, in that process; None in the others.
        empty: the parameter whose share it is.
    """
    part = rows_of(empty, world)
    each = -(-empty.shape[0] // world.size)
    box = torch.empty(each, dtype=torch.uint8)
    pieces = None
    if whole is not None:
        pieces = [*torch.split(whole.cpu(), each)]
        pieces += [torch.empty(0, dtype=torch.uint8)] * (world.size - len(pieces))
        pieces = [torch.nn.functional.pad(piece, (0, each - len(piece))) for piece in pieces]
    dist.scatter(box, pieces, src=owner)
    return box[: part.stop - part.start]
