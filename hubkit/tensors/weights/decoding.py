"""Views of a base's files with decoded weights: as a quantized base computes, or without the codes that they store."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hubkit.artifact.identity.header import TensorInfo
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.formats import computed_in, format_name, refuse_codes
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.coded import QUANTIZATION, Coded, decoded_headers
from hubkit.tensors.files.dtypes import DTYPE_NAMES, dtype_named, torch_dtype
from hubkit.tensors.files.shards import Make, Shards, Written, computed, open_shards, write_file
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.files import PackedHeaders
from hubkit.tensors.fourbit.nf4 import CODEC, quantize


@dataclass(frozen=True)
class DecodedShards(Shards):
    """The weight files of a base with some weights decoded.

    Of a base that was quantized for training (`decoded`) they have the values that their 4 bits hold, in the files'
    dtypes: what computes with them computes, bit for bit, what an adapter on the quantized base was trained with, and
    needs to know nothing of quantizing. Of one that stores codes (`without_codes`) they are ordinary weights, headers
    and config say so.

    Args:
        weights: tensor name -> makes its decoded values, as stored.
        codec: how they are quantized.
    """

    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    codec: str = ""

    def read(self, name: str, number: int | None = None, /) -> Tensor:
        if name not in self.weights:
            return super().read(name, number)
        return self.weights[name]() if number is None else self.weights[name]()[number]

    def holds(self, name: str) -> bool:
        return name not in self.weights

    def copied(
        self, name: str, dtype: torch.dtype | None = None, make: Make | None = None, part: slice | None = None
    ) -> Written:
        if name not in self.weights:
            return super().copied(name, dtype, make, part)
        info = self.headers[name]
        return computed(name, torch_dtype(info.dtype), info.shape, self.weights[name])


def trained_on(path: Path, codec: str | None, compute_dtype: str | None) -> tuple[Shards, Base]:
    """The weights in folder `path` that an adapter was trained beside, decoded if they were quantized, and their sites.

    Args:
        codec, compute_dtype: as for `decoded`.

    Raises:
        HubkitError: as `decoded`; what opening the files raises.
    """
    shards = decoded(open_shards(path), codec, compute_dtype)
    return shards, Base.from_headers(shards.headers, shards.config, str(path), shards.read)


def decoded(
    shards: Shards, codec: str | None, compute_dtype: str | None = None, *, packed: bool = True
) -> Shards | DecodedShards:
    """The view of `shards` that an adapter was trained on; `shards` itself where nothing is quantized.

    Args:
        codec: how the base was quantized; None: not, or in its files.
        compute_dtype: in which it was, and was decoded to; None: the files' own, of packed weights the config's.
        packed: decode the weights that are packed in the files, too; the view has then their values under their names,
            and a config without ``quantization_config``.

    Raises:
        HubkitError: ``HK-CODEC`` for a codec that is not known here; ``HK-QUANT-STATE`` for packed weights that are not
            whole; while reading, ``HK-NAN`` for a weight that cannot be quantized.
    """
    if codec not in (None, CODEC):
        raise HubkitError("HK-CODEC", f"unknown codec {codec!r}", want=CODEC, have=str(codec))
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    wide = dtype_named(compute_dtype)
    weights = {site.tensor: partial(_decoded, site, wide) for site in base.to_quantize()} if codec else {}
    stored = [site for site in base.sites.values() if site.packed] if packed else []
    if not stored:
        view = DecodedShards(shards.path, shards.config, shards.headers, shards.file_of, weights, codec or "")
        return view if weights else shards
    dtype = wide or computed_in(shards.config)
    found = PackedHeaders(shards.headers, shards.read, str(shards.path))
    weights |= {site.tensor: partial(_unpacked, found, site, dtype) for site in stored}
    names = [name for name in shards.headers if f"{name.rpartition('.weight.')[0]}.weight" not in weights]
    headers = {name: shards.headers[name] for name in names} | {site.tensor: _header(site, dtype) for site in stored}
    config = {name: value for name, value in shards.config.items() if name != QUANTIZATION}
    file_of = {name: shards.file_of[name] for name in headers}
    return DecodedShards(shards.path, config, headers, file_of, weights, found.packed(stored[0].tensor).codec)


def _header(site: Site, dtype: torch.dtype) -> TensorInfo:
    shape = site.shape[::-1] if site.transposed else site.shape
    return TensorInfo(site.tensor, DTYPE_NAMES[dtype], shape, 0, shape[0] * shape[1] * dtype.itemsize)


def _unpacked(headers: PackedHeaders, site: Site, dtype: torch.dtype) -> Tensor:
    weight = dequantize(headers.packed(site.tensor), dtype)
    return weight.t().contiguous() if site.transposed else weight


def without_codes(shards: Shards, base: Base, sites: Iterable[Site], dtype: torch.dtype | None = None) -> Shards:
    """`shards` without codes at `sites`: their weights are decoded to `dtype`, or to that in which the base computes.

    All others stay codes, and the config says which are none. Where that cannot be said, all are decoded and nothing
    in the config speaks of codes any more: when every tensor is to be in `dtype`; when experts that a model computes as
    one change; when names differ between files and model, as where a model has several parts; for a format of which it
    is not known how a config excepts a layer.

    Args:
        base: of these files.

    Raises:
        HubkitError: ``HK-BASE-FORMAT`` for a `dtype` where there are codes that are not decoded here.
    """
    known = {site.tensor: site.codes for site in base.sites.values() if site.codes is not None}
    chosen = {site.tensor: site.codes for site in sites if site.codes is not None}
    several = "text_config" in shards.config or any(".experts." in name for name in chosen)
    if dtype is not None or (chosen and (several or format_name(shards.config) not in EXCEPTED)):
        chosen = known
    wide = dtype or computed_in(shards.config)
    headers = decoded_headers(shards.headers, chosen.values(), wide)
    if dtype is not None:
        refuse_codes((name for name, info in headers.items() if info.dtype.startswith("F8")), str(shards.path))
    if not chosen:
        return shards
    plain = [s.name for s in base.linear() if not s.coded or s.tensor in chosen]
    config = _excepting(shards.config, plain, coded=len(chosen) < len(known))
    files = {name: shards.file_of[chosen[name].codes if name in chosen else name] for name in headers}
    weights = {name: partial(_uncoded, one, shards, wide) for name, one in chosen.items()}
    return DecodedShards(shards.path, config, headers, files, weights)


EXCEPTED = {
    "fp8": "modules_to_not_convert",
    "fbgemm_fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "bitsandbytes": "llm_int8_skip_modules",
}
"""``quant_method`` -> where its config lists the modules whose weights are no codes."""


def _excepting(config: Mapping[str, object], plain: Collection[str], coded: bool) -> Mapping[str, object]:
    """`config` saying that the modules `plain` have no codes; without a word of codes where no weight is `coded`."""
    facts = config.get(QUANTIZATION)
    if not coded or not isinstance(facts, Mapping):
        return {key: value for key, value in config.items() if key != QUANTIZATION}
    key = EXCEPTED[format_name(config)]
    listed = facts.get(key) or facts.get("ignored_layers") or ()  # MiniMax's word for the first of them
    names = [*dict.fromkeys((*listed, *plain))] if isinstance(listed, list | tuple) else list(plain)
    return {**config, QUANTIZATION: {**facts, key: names}}


def _uncoded(one: Coded, shards: Shards, dtype: torch.dtype) -> Tensor:
    return one.decoded(shards.read).to(dtype)


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

    What is packed in the files stays so.

    Raises:
        HubkitError: as `decoded`; what opening the files raises.
    """
    shards = decoded(open_shards(path), codec, compute_dtype, packed=False)
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
