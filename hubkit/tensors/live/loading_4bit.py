"""Loading a base in 4 bits: quantized tensor by tensor while it is read, or as bitsandbytes stored it.

transformers builds the model and loads everything but the quantized layers, which stand empty meanwhile; they are then
filled one by one. At no time is there more than the 4-bit model and one tensor of the original.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubkit.compat.transformers import has_its_values, quantization
from hubkit.compat.transformers_names import file_naming, fused_rows
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.tokenizer import ForTask, model_class
from hubkit.tensors.experts.expert import Expert
from hubkit.tensors.experts.finding import experts_of
from hubkit.tensors.experts.products import QuantExperts
from hubkit.tensors.files.coded import QUANTIZATION
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.fourbit.files import PackedHeaders, settings
from hubkit.tensors.fourbit.linear import QuantLinear, quantizable, shell
from hubkit.tensors.fourbit.nf4 import CODEC, PackedWeight, packed_on, quantize


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether the base with this ``config.json`` lies in 4 bits, as bitsandbytes writes it."""
    facts = config.get(QUANTIZATION)
    return isinstance(facts, Mapping) and bool(facts.get("load_in_4bit") or facts.get("_load_in_4bit"))


class Packing:
    """Which layers of the base in a folder are packed, and what into: quantized now, or as its files hold them.

    Args:
        path: the folder.
        codec: how to quantize a base that is not; None where its files are packed already.

    Raises:
        HubkitError: ``HK-CODEC``, ``HK-QUANT-STATE``; what opening the files raises.
    """

    def __init__(self, path: Path, codec: str | None) -> None:
        if codec not in (None, CODEC):
            raise HubkitError("HK-CODEC", f"unknown codec {codec!r}", want=CODEC, have=str(codec))
        shards = open_shards(path)
        self._path, self._headers = path, PackedHeaders(shards.headers, shards.read, str(path))
        self._base = Base.from_headers(shards.headers, shards.config, str(path), shards.read)
        ready = [site for site in self._base.sites.values() if site.packed]
        self.sites = ready or self._base.to_quantize()

    def empty(self, model: nn.Module) -> set[str]:
        """Puts empty layers in the places of a model without values; returns what it calls the weights it had there."""
        return _empty(model, {site.name for site in self.sites})

    def layers(self, model: nn.Module) -> list[tuple[QuantLinear, Site]]:
        """The empty layers of a model, each with the site that fills it.

        Raises:
            HubkitError: ``HK-BASE-LOAD``, ``HK-BASE-INCOMPLETE`` where model and files do not go together.
        """
        there = {name: module for name, (_, module) in _places(model).items()}
        _require_layers(fused_rows(model), self.sites)
        sites = [site for site in self.sites if site.name in there]
        _require_shapes(there, sites, self._path)
        return [(_require_linear(there[site.name], site), site) for site in sites]

    def packed(self, site: Site, dtype: torch.dtype, device: torch.device) -> PackedWeight:
        """The weight of one layer, on `device`.

        Raises:
            HubkitError: ``HK-NAN``, ``HK-DTYPE``, ``HK-QUANT-STATE``.
        """
        if site.packed:
            return packed_on(replace(self._headers.packed(site.tensor), dtype=dtype), device)
        try:
            return quantize(site.weight().to(device).to(dtype))
        except HubkitError as error:
            error.where = error.where or site.tensor
            raise

    def outline(self, site: Site, dtype: torch.dtype) -> PackedWeight | None:
        """`packed` by its sizes alone, where it lies in the files; None where it is quantized first."""
        return replace(self._headers.outline(site.tensor), dtype=dtype) if site.packed else None

    def note(self, model: nn.Module, layers: Sequence[QuantLinear], dtype: torch.dtype, sites: Sequence[Site]) -> None:
        """Writes into the configuration of `model` how its `layers` at `sites` are packed: all alike."""
        packed = layers[0].packed if layers else None
        if packed is None:
            return
        kept = [site.name for site in self._base.linear() if site not in sites]
        model.config.quantization_config = settings(packed, dtype, kept)  # type: ignore[union-attr]


def load_packed(
    path: Path,
    transformers: Any,
    codec: str | None,
    options: Mapping[str, Any],
    device: torch.device,
    task: ForTask | None = None,
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The language model in folder `path` with its linear layers packed, and what transformers says of loading it.

    Args:
        transformers: the module.
        codec: as for `Packing`.
        options: of ``from_pretrained``.
        device: where the layers are packed and lie; `options` say it to transformers.
        task: as `model_class` has it; the head that it makes is not packed.

    Raises:
        HubkitError: as `Packing` and its methods.
    """
    packing = Packing(path, codec)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, QUANTIZATION):
        del config.quantization_config
    if task is not None:
        task.configure(config)
    own: set[str] = set()
    empty = quantization(lambda model: own.update(packing.empty(model)))
    model, found = model_class(transformers, config, task).from_pretrained(
        path, config=config, quantization_config=empty, trust_remote_code=False, **options
    )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    layers = packing.layers(model)
    for layer, site in layers:
        layer.fill(packing.packed(site, dtype, device))
    sites = [site for _, site in layers]
    packing.note(model, [layer for layer, _ in layers], dtype, sites)
    own |= {stem for site in sites for stem in (site.name, site.tensor.removesuffix(".weight"))}
    rest = {key for key in found["unexpected_keys"] if own.isdisjoint(accumulate(key.split("."), "{}.{}".format))}
    return model, {**found, "unexpected_keys": rest}


def _empty(model: nn.Module, names: set[str]) -> set[str]:
    """Puts empty quantized layers in the named places of a model that is about to be loaded: nothing will be there.

    Returns:
        what the model calls the weights that it had there.
    """
    gone: set[str] = set()
    for name, (path, module) in _places(model).items():
        if name in names and quantizable(module):
            layer, parent = shell(module), model.get_submodule(path.rpartition(".")[0])
            has_its_values(layer)
            if not any(True for of in (parent.parameters, parent.buffers) for _ in of(recurse=False)):
                has_its_values(parent)  # else Siglip's attention draws weights for layers that have none yet
            model.set_submodule(path, layer)
            gone.add(path)
    held: dict[nn.Module, dict[str, Expert]] = {}
    for name, expert in experts_of(model).items():
        held.setdefault(expert.holder, {})[name] = expert
    paths = {module: path for path, module in model.named_modules()}
    for holder, experts in held.items():
        if experts.keys() <= names:
            below = {name.rpartition(".experts.")[2]: expert for name, expert in experts.items()}
            model.set_submodule(paths[holder], QuantExperts(holder, below))
            gone |= {f"{paths[holder]}.{expert.tensor}" for expert in experts.values()}
    return gone


def _places(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Name in the files -> path and module, of the modules with a weight."""
    naming = file_naming(model)
    named = ((naming(f"{path}.weight"), path, module) for path, module in model.named_modules() if path)
    return {name.removesuffix(".weight"): (path, module) for name, path, module in named if name is not None}


def _require_layers(fused: Collection[str], sites: list[Site]) -> None:
    """Refuses weights to pack that the model holds as part of a tensor of many: ``HK-BASE-LOAD``."""
    have = [site.name for site in sites if site.tensor in fused]
    if have:
        raise HubkitError(
            "HK-BASE-LOAD",
            "quantized experts belong to a model that computes them in a way in which nothing can be in their place",
            have=have,
            fix="use the original base without quantizing it",
        )


def _require_shapes(modules: Mapping[str, nn.Module], sites: list[Site], path: Path) -> None:
    """Refuses weights of other shapes than their layers': ``HK-BASE-INCOMPLETE``."""
    layers = ((site, modules[site.name]) for site in sites)
    shapes = (
        (site, (layer.out_features, layer.in_features)) for site, layer in layers if isinstance(layer, QuantLinear)
    )
    have = [
        f"{site.tensor}: {site.shape} in the files, {shape} in the model"
        for site, shape in shapes
        if site.shape != shape
    ]
    if have:
        raise HubkitError(
            "HK-BASE-INCOMPLETE",
            "weights of the files do not fit the model",
            where=str(path),
            have=have,
            fix="the config.json that belongs to these weights",
        )


def _require_linear(layer: nn.Module, site: Site) -> QuantLinear:
    """Refuses a packed weight of a layer that is no linear one in the model: ``HK-BASE-LOAD``."""
    if isinstance(layer, QuantLinear):
        return layer
    raise HubkitError(
        "HK-BASE-LOAD",
        "a quantized weight belongs to a layer that is not linear in this version of transformers",
        where=site.name,
        have=type(layer).__name__,
        fix="use the original base without quantizing it",
    )
