"""A base as its quantized view computes: every weight that quantizing is about, packed and decoded again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import dtype_named, torch_dtype
from hubkit.tensors.files.shards import Shards, Written, computed, open_shards, write_file
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import CODEC, quantize


@dataclass(frozen=True)
class DecodedShards(Shards):
    """The weight files of a base whose quantized weights have the values that their 4 bits hold, in the files' dtypes.

    What computes with them computes, bit for bit, what an adapter on the quantized base was trained with, and needs to
    know nothing of quantizing.

    Args:
        weights: tensor name -> makes its decoded values, as stored.
    """

    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        return self.weights[name]() if name in self.weights else super().read(name)

    def copied(self, name: str) -> Written:
        if name not in self.weights:
            return super().copied(name)
        info = self.headers[name]
        return computed(name, torch_dtype(info.dtype), info.shape, self.weights[name])


def decoded(shards: Shards, codec: str, compute_dtype: str | None = None) -> DecodedShards:
    """The view of `shards` that an adapter was trained on. Weights that are packed in the files stay as they are.

    Args:
        codec: how the base was quantized.
        compute_dtype: in which it was, and was decoded to; None: the files' own.

    Raises:
        HubkitError: ``HK-CODEC`` for a codec that is not known here; while reading, ``HK-NAN`` for a weight that cannot
            be quantized.
    """
    if codec != CODEC:
        raise HubkitError("HK-CODEC", f"unknown codec {codec!r}", want=CODEC, have=codec)
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    wide = dtype_named(compute_dtype)
    weights = {site.tensor: partial(_decoded, site, wide) for site in base.to_quantize()}
    return DecodedShards(shards.path, shards.config, shards.headers, shards.file_of, weights)


def distance(original: Shards, view: DecodedShards) -> float:
    """How far the decoded weights lie from the original ones: the norm of the difference over that of the originals."""
    difference = total = 0.0
    for name in view.weights:
        weight = original.read(name).double()
        difference += float((view.read(name).double() - weight).square().sum())
        total += float(weight.square().sum())
    return math.sqrt(difference / total) if total else 0.0


def write_decoded(path: Path, out: Path, codec: str, compute_dtype: str | None = None) -> None:
    """Streams the weight files of the base in folder `path`, decoded, into folder `out`, under the same names.

    Raises:
        HubkitError: as `decoded`; what opening the files raises.
    """
    shards = decoded(open_shards(path), codec, compute_dtype)
    for file in shards.files():
        write_file(out / file, [shards.copied(name) for name, place in shards.file_of.items() if place == file])


def _decoded(site: Site, compute_dtype: torch.dtype | None) -> Tensor:
    """The weight as stored, of the values that its 4 bits hold."""
    stored = site.weight()
    try:
        with torch.no_grad():
            weight = dequantize(quantize(stored.to(compute_dtype or stored.dtype))).to(stored.dtype)
    except HubkitError as error:
        error.where = error.where or site.tensor
        raise
    return weight.t() if site.transposed else weight
