"""A base as its quantized view computes: every weight that quantizing is about, packed and decoded again, in files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import computed, copied, open_shards, write_file
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import quantize


def write_decoded(path: Path, out: Path) -> None:
    """Streams the weight files of the base in folder `path` into folder `out`, under the same names and dtypes.

    What computes with them computes, bit for bit, what an adapter on the quantized base was trained with, and needs to
    know nothing of quantizing. Weights that are packed already stay as they are.

    Raises:
        HubkitError: ``HK-NAN`` for a weight that cannot be quantized; what opening the files raises.
    """
    shards = open_shards(path)
    base = Base.from_headers(shards.headers, shards.config, str(path), shards.read)
    sites = {site.tensor: site for site in base.to_quantize()}
    for file in shards.files():
        tensors = []
        for name in (name for name, place in shards.file_of.items() if place == file):
            if (site := sites.get(name)) is None:
                tensors.append(copied(shards, name))
            else:
                info = shards.headers[name]
                tensors.append(computed(name, torch_dtype(info.dtype), info.shape, partial(_decoded, site)))
        write_file(out / file, tensors)


def _decoded(site: Site) -> Tensor:
    """The weight as stored, of the values that its 4 bits hold."""
    try:
        with torch.no_grad():
            weight = dequantize(quantize(site.weight()))
    except HubkitError as error:
        error.where = error.where or site.tensor
        raise
    return weight.t() if site.transposed else weight
