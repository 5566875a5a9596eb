"""A packed weight as parameters of bytes: what FSDP2 divides among processes and gathers for each forward and backward.

A weight's codes and statistics become flat uint8 tensors, whatever they are made of: FSDP2 divides the first dimension,
and casts parameters of floats where a mixed precision asks for it, never those of integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hubkit.tensors.fourbit.nf4 import PackedWeight

BYTES = "bytes_of_"
"""What the names of such parameters begin with; the field of `PackedWeight` follows."""
_FIELDS = ("codes", "absmax", "nested_absmax")
"""Those that grow with the weight. The two tables of levels are the same few numbers everywhere, and stay whole."""


def hollowed(packed: PackedWeight) -> tuple[PackedWeight, dict[str, Tensor]]:
    """`packed` with its large tensors on the meta device, and these by their fields, as bytes, (n,) uint8."""
    parts = {field: tensor for field in _FIELDS if (tensor := getattr(packed, field)) is not None}
    empty: dict[str, Any] = {field: tensor.to("meta") for field, tensor in parts.items()}
    flat = {field: tensor.contiguous().reshape(-1).view(torch.uint8) for field, tensor in parts.items()}
    return replace(packed, **empty), flat


def parts_of(parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of a layer's parameters that `hollowed` made, by their fields."""
    return {
        name.removeprefix(BYTES): part
        for name, part in parameters.items()
        if name.startswith(BYTES) and part is not None
    }


def collected(tensor: Tensor) -> Tensor:
    """`tensor`; the whole of one that is divided among processes (a collective then)."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def gathered(hollow: PackedWeight, parts: Mapping[str, Tensor]) -> PackedWeight:
    """What `hollowed` took apart; the hollow weight where the parts are not gathered."""
    if any(hasattr(part, "placements") for part in parts.values()):  # a DTensor: importing that class takes long
        return hollow
    found: dict[str, Any] = {}
    for field, part in parts.items():
        like: Tensor = getattr(hollow, field)
        found[field] = part.detach().view(like.dtype).view(like.shape)
    device = next(iter(parts.values())).device
    for field in ("levels", "nested_map"):
        table: Tensor | None = getattr(hollow, field)
        if table is not None:
            found[field] = table.to(device)
    return replace(hollow, **found)
