"""A merged checkpoint packed into 4 bits again, as bitsandbytes and transformers read it; and what that loses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hubkit.artifact.identity.base_files import INDEX, WEIGHTS
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.coded import QUANTIZATION
from hubkit.tensors.files.shards import Shards, Written, computed, open_shards, write_file
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.files import settings
from hubkit.tensors.fourbit.nf4 import PackedWeight, quantize
from hubkit.tensors.weights.beside import write_index


@dataclass(frozen=True)
class PackedFiles:
    """What `write_packed` wrote.

    Args:
        files: file name -> sha256.
        own: tensors that are as they were in the merged checkpoint, not packed.
        tensors: all tensors, those of packed weights counted one by one.
        shift: how far the weights lie from the merged ones: the norm of the difference over that of the latter.
        lost: the same norm over that of what the merge changed in the weights.
    """

    files: Mapping[str, str]
    own: frozenset[str]
    tensors: int
    shift: float
    lost: float


def to_pack(shards: Shards) -> dict[str, Site]:
    """The weights that are packed, by the names of their tensors.

    Raises:
        HubkitError: ``HK-CODEC`` for a base without any.
    """
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    found = {site.tensor: site for site in base.to_quantize()}
    if not found:
        raise HubkitError("HK-CODEC", "the base has no linear layer that could be packed", where=str(shards.path))
    return found


def stored_tensors(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors by which files hold a packed weight, by their names."""
    return {f"{name}.{key}" if key else name: tensor for key, tensor in packed.tensors().items()}


def packed_config(config: Mapping[str, Any], packed: PackedWeight, shards: Shards) -> dict[str, Any]:
    """``config.json`` of a checkpoint whose weights are packed like `packed`, of the `config` before."""
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    sites = to_pack(shards)
    kept = [site.name for site in base.linear() if site.tensor not in sites]
    return {**config, QUANTIZATION: settings(packed, packed.dtype, kept)}


def write_packed(merged: Path, out: Path, before: Shards) -> PackedFiles:
    """Packs the linear weights of a checkpoint but the output heads'; the same shards under the same names.

    In memory: one shard's packed weights, and one weight.

    Args:
        merged: its folder, in 16 or 32 bits.
        out: folder of the packed one.
        before: the weights that were merged into.

    Raises:
        HubkitError: ``HK-CODEC``, ``HK-NAN``; what opening files raises.
    """
    shards = open_shards(merged)
    sites, loss = to_pack(shards), _Loss(before)
    files: dict[str, str] = {}
    placed: dict[str, list[Written]] = {}
    for file in shards.files():
        made: list[Written] = []
        for name in (name for name, place in shards.file_of.items() if place == file):
            made += loss.pack(sites[name]) if name in sites else [shards.copied(name)]
        files[file] = write_file(out / file, made)
        placed[file] = [replace(one, blocks=tuple) for one in made]
    if list(placed) != [WEIGHTS]:
        write_index(out / INDEX, placed)
    assert loss.last is not None
    config = packed_config(json.loads((merged / "config.json").read_bytes()), loss.last, shards)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    own = frozenset(shards.headers.keys() - sites.keys())
    return PackedFiles(files, own, sum(map(len, placed.values())), *loss.figures())


class _Loss:
    """Packs weights and adds up what that loses."""

    def __init__(self, before: Shards) -> None:
        self._before = before
        self._lost = self._total = self._changed = 0.0
        self.last: PackedWeight | None = None

    def pack(self, site: Site) -> list[Written]:
        weight = site.weight()
        self.last = packed = quantize(weight)
        was = self._before.read(site.tensor)
        self._lost += _square(dequantize(packed), weight)
        self._changed += _square(weight, was.t() if site.transposed else was)
        self._total += float(weight.double().square().sum())
        return [
            computed(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
            for name, tensor in stored_tensors(site.tensor, packed).items()
        ]

    def figures(self) -> tuple[float, float]:
        """`PackedFiles.shift` and `PackedFiles.lost`."""
        return tuple(math.sqrt(self._lost / of) if of else 0.0 for of in (self._total, self._changed))  # type: ignore[return-value]


def _square(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())
