"""What a merge will need, from headers alone: memory, room on the disk, time."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.staging import reclaimed
from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import accumulation_dtype, tile_rows
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.pipeline import BUFFERS
from hubkit.tensors.files.shards import BLOCK, Shards, Written
from hubkit.tensors.parts.part import LowRank
from hubkit.tensors.parts.tied import TiedChange
from hubkit.tensors.weights.merging import MergePlan

SLACK = 64 << 20
"""Bytes for headers, parts, what arithmetic keeps to itself and what the allocator does not give back."""
WHOLE = 16
"""Bytes for each value of a weight that is computed with as a whole: itself, its change and what leads to it."""
PASSES = (2.8, 1.6)
"""Time of reading, making, writing and hashing a byte, in that of hashing it alone: on one core, on several."""


@dataclass(frozen=True)
class MergeEstimate:
    """What a merge will need.

    Args:
        memory: bytes beyond those of the process once everything is imported.
        disk: bytes of the weight files.
        free: bytes there are for them where they go.
        seconds: about how long it takes here, where the disk keeps up.
        unread: bytes of the base whose digest is not known yet: a merge reads them once more.
        shards: name of each weight file -> bytes of its tensors.
        pull: bytes of the base's weights that a merge brings into the store first.
        whole: weights whose change needs them as a whole in memory, each at its turn: DoRA's norms, decoded weights.
    """

    memory: int
    disk: int
    free: int
    seconds: float
    unread: int
    shards: Mapping[str, int]
    whole: tuple[str, ...]
    pull: int = 0

    def require_room(self, out: Path) -> None:
        """Refuses a disk that cannot hold the result: ``HK-DISK``."""
        if self.disk > self.free:
            raise HubkitError(
                "HK-DISK",
                "the disk has no room for the result",
                where=str(out),
                want=f"{self.disk} bytes",
                have=f"{self.free} bytes free",
                fix="free some space, or another --out",
            )


def estimate(
    plan: MergePlan, shards: Shards, placed: Mapping[str, Sequence[Written]], out: Path, unread: int
) -> MergeEstimate:
    """What it takes to write `placed`, as `hubkit.tensors.weights.merging.in_files` has it, to the folder `out`.

    Args:
        unread: bytes of the base that will be hashed first.
    """
    sizes = {name: sum(tensor.size for tensor in tensors) for name, tensors in placed.items()}
    whole = tuple(site.name for site in plan.sites if _is_whole(plan, shards, site))
    widest = max((torch_dtype(tensor.dtype).itemsize for tensors in placed.values() for tensor in tensors), default=1)
    tiles = [_tile(site) for site in plan.sites]
    ring = BUFFERS * max(BLOCK * 2, *(count * max(widest, site.dtype.itemsize) for count, site in tiles), 0)
    sums = max((count * accumulation_dtype(site.dtype).itemsize for count, site in tiles), default=0)
    sites = max((_held(plan, site, site.name in whole) for site in plan.sites), default=0)
    disk = sum(sizes.values())
    several = (os.cpu_count() or 1) > 1
    seconds = (disk * PASSES[several] + unread) * _second_per_byte()
    free = shutil.disk_usage(_existing(out)).free + reclaimed(out)
    return MergeEstimate(ring + sums + sites + SLACK, disk, free, seconds, unread, sizes, whole)


def _is_whole(plan: MergePlan, shards: Shards, site: Site) -> bool:
    parts = (adapter.parts.get(site.name) for adapter in plan.adapters.values())
    plain = (part.part if isinstance(part, TiedChange) else part for part in parts)
    return not shards.holds(site.tensor) or not all(isinstance(part, LowRank | None) for part in plain)


def _tile(site: Site) -> tuple[int, Site]:
    rows, columns = site.shape[::-1] if site.transposed else site.shape
    return min(rows, tile_rows(columns)) * columns, site


def _held(plan: MergePlan, site: Site, whole: bool) -> int:
    """Bytes of the change at one site: its factors widened, scaled and joined, those of the next site beside them."""
    parts = (adapter.parts.get(site.name) for adapter in plan.adapters.values())
    factors = sum(value.numel() for part in parts if part is not None for value in part.roles().values())
    return 6 * accumulation_dtype(site.dtype).itemsize * factors + (
        WHOLE * site.shape[0] * site.shape[1] if whole else 0
    )


def _second_per_byte() -> float:
    """How long hashing takes here."""
    data = bytes(1 << 22)
    hashlib.sha256(data)
    start = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - start) / len(data)


def _existing(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    return path if path.exists() or path == path.parent else _existing(path.parent)
