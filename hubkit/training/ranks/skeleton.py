"""A base without values, whose tensors are those of its files one by one: what can be filled share by share.

transformers makes the model of the configuration on the meta device; what its modules compute themselves (frequencies
of rotary embeddings, masks) they compute as ever. Where names, shapes or dtypes of model and files do not go together
one to one, there is no skeleton: fused experts, codes that are decoded, a tied head that is stored twice, weights that
transformers keeps in another dtype than the rest. Such a base is loaded as a whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.artifact.identity.digest import is_buffer
from hubkit.compat.transformers import compute_buffers, keeps_some_wide, quiet
from hubkit.compat.transformers_names import file_naming
from hubkit.tensors.base.arch import arch_for
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.tokenizer import model_class, transformers_module
from hubkit.tensors.files.coded import QUANTIZATION
from hubkit.tensors.files.dtypes import dtype_named, torch_dtype
from hubkit.tensors.files.shards import Shards, open_shards
from hubkit.tensors.fourbit.linear import QuantLinear
from hubkit.tensors.live.loading import sound_config
from hubkit.tensors.live.loading_4bit import Packing, is_packed
from hubkit.training.ranks.sizes import packed_outline


@dataclass(frozen=True)
class Skeleton:
    """A model without values, and where they are.

    Args:
        model: its parameters on meta, buffers that are in no file computed on the CPU.
        shards: the files of its base.
        names: name of a parameter or stored buffer in the model -> in the files; of those that are tied all, or one.
        packing: what fills `packed`.
        packed: its layers in 4 bits, that hold the sizes of their weights alone.
        dtype: in which it computes.
    """

    model: nn.Module
    shards: Shards
    names: Mapping[str, str]
    packing: Packing | None
    packed: list[tuple[QuantLinear, Site]]
    dtype: torch.dtype


def skeleton(path: Path, dtype: str | None, codec: str | None) -> Skeleton | None:
    """The language model of the base in folder `path`, without values; None for one that must be loaded as a whole.

    Args:
        dtype, codec: as for `hubkit.tensors.live.loading.load_base`.

    Raises:
        HubkitError: what opening the folder raises; ``HK-BASE-LOAD``, ``HK-BASE-INCOMPLETE`` for layers to pack that
            model and files do not have alike.
    """
    stated, transformers = sound_config(path), transformers_module()
    ready = is_packed(stated)
    if importlib.util.find_spec("accelerate") is None or (stated.get(QUANTIZATION) and not ready):
        return None
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    wanted = dtype_named(dtype) or getattr(config, "dtype", None)
    if not isinstance(wanted, torch.dtype):
        return None
    if hasattr(config, QUANTIZATION):
        del config.quantization_config
    config.name_or_path = str(path)
    model = _without_values(transformers, config, wanted, dtype is not None)
    if model is None or (wanted != torch.float32 and keeps_some_wide(model)):
        return None
    packing = Packing(path, None if ready else codec) if codec or ready else None
    packed: list[tuple[QuantLinear, Site]] = []
    if packing is not None:
        packing.empty(model)
        packed = packing.layers(model)
        for layer, site in packed:
            layer.fill(packing.outline(site, wanted) or packed_outline(layer.out_features, layer.in_features, wanted))
    shards = open_shards(path)
    names = _names(model, shards, [site for _, site in packed], arch_for(shards.config).prefix)
    if names is None:
        return None
    if packing is not None:
        packing.note(model, [layer for layer, _ in packed], wanted, [site for _, site in packed])
    return Skeleton(model.eval().requires_grad_(False), shards, names, packing, packed, wanted)


def _without_values(transformers: Any, config: Any, dtype: torch.dtype, given: bool) -> nn.Module | None:
    """The model of a configuration, its parameters on meta; None where transformers cannot make it so.

    Args:
        given: somebody has asked for this dtype: ``from_pretrained`` writes it into the configuration then.
    """
    from accelerate import init_empty_weights

    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)) if given else ():
        if part is not None:
            part.dtype = dtype
    try:
        with quiet(), torch.no_grad():
            with init_empty_weights():  # buffers are made as ever
                model: nn.Module = model_class(transformers, config).from_config(
                    config, dtype=dtype, trust_remote_code=False
                )
            model.tie_weights()  # type: ignore[operator]  # a parameter became another one when it was assigned
            compute_buffers(model)
    except Exception:  # a model that looks at its values while it is made: loading it as a whole says what is wrong
        return None
    return model


def _names(model: nn.Module, shards: Shards, packed: list[Site], prefix: str) -> dict[str, str] | None:
    """Name in the model -> in the files, of all that both hold; None where they do not go together one to one.

    Args:
        packed: what is filled otherwise.
        prefix: of names that old files leave out.
    """
    naming, stored = file_naming(model), dict(shards.headers)
    bare = bool(prefix) and not any(name.startswith(prefix) for name in stored)
    names: dict[str, str] = {}
    groups: dict[int, list[str]] = {}
    for name, tensor in _stored_by(model).items():
        own = naming(name)
        if own is not None and own not in stored and bare:
            own = own.removeprefix(prefix)
        groups.setdefault(id(tensor), [])
        if own is None or own not in stored:
            continue
        if stored[own].shape != tuple(tensor.shape) or not _castable(torch_dtype(stored[own].dtype), tensor.dtype):
            return None
        groups[id(tensor)].append(own)
        names[name] = own
    if any(len(set(found)) != 1 for found in groups.values()):
        return None
    stems = tuple(f"{site.tensor.removesuffix('.weight')}." for site in packed)
    left = {name for name in stored.keys() - set(names.values()) if not name.startswith(stems)}
    return None if any(not is_buffer(name, stored[name].dtype, stored[name].shape) for name in left) else names


def _stored_by(model: nn.Module) -> dict[str, Tensor]:
    """What a file of `model` would hold: parameters, tied ones under each name, and persistent buffers."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and not _within_packed(model, name)}


def _within_packed(model: nn.Module, name: str) -> bool:
    """Whether it is part of a packed weight; a layer's bias is none."""
    path, _, last = name.partition(".weight")
    return bool(last or name.endswith(".weight")) and isinstance(model.get_submodule(path), QuantLinear)


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values of a file become those of the model by a cast."""
    return stored == wanted or (stored.is_floating_point and stored.itemsize > 1 and wanted.is_floating_point)
