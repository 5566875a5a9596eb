"""What storing a merge in few bits loses: looked at in some rows of some layers, so that it costs next to nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hubkit.tensors.base.delta import Tiles, accumulation_dtype, tile_rows
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.shards import Shards
from hubkit.tensors.weights.merging import MergePlan

LOOKED_AT = 8
"""Weights that are looked at, spread evenly over those that change."""
ROWS = 64
"""Rows of each that are looked at, from its middle."""


def rounding(plan: MergePlan, shards: Shards, dtype: torch.dtype | None) -> dict[str, float] | None:
    """What the one cast at the end of a merge takes away; None where it is stored as it is accumulated.

    Args:
        shards, dtype: as given to `write_merged`.

    Returns:
        ``weights``: the norm of what is rounded off over that of the merged weights; ``change``: over that of what the
        mix adds; ``vanished``: the part of the added values, not zero, that leave the stored value as it was.
    """
    off = total = added = 0.0
    moved = vanished = 0
    count = len(plan.sites)
    for number in sorted({place * count // LOOKED_AT for place in range(LOOKED_AT)}) if count else ():
        site = plan.sites[number]
        shape = site.shape[::-1] if site.transposed else site.shape
        start = max(0, (shape[0] - ROWS) // 2)
        rows = slice(start, min(start + ROWS, shape[0], start + tile_rows(shape[1])))
        stored = _rows(site, shards, rows).view(-1, shape[1])
        wide = accumulation_dtype(stored.dtype)
        tiles = Tiles(shape, stored.dtype, plan.delta(site), device=stored.device, transposed=site.transposed)
        exact = tiles.sum(rows, stored)
        kept = exact.to(dtype or stored.dtype)
        changed = exact != stored.to(wide)
        off += _square(kept.to(wide) - exact)
        total += _square(exact)
        added += _square(exact - stored.to(wide))
        moved += int(changed.sum())
        vanished += int((changed & (kept == stored.to(kept.dtype))).sum())
    if not off or not added:
        return None
    of = {"weights": math.sqrt(off / total), "change": math.sqrt(off / added), "vanished": vanished / moved}
    return {name: float(f"{value:.3g}") for name, value in of.items()}


def _rows(site: Site, shards: Shards, rows: slice) -> Tensor:
    """Some rows of the weight, as it is stored."""
    if site.number is None and site.kind != "norm" and shards.holds(site.tensor):
        return shards.rows(site.tensor, rows)
    return (site.weight().t() if site.transposed else site.weight())[rows]


def _square(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
