"""An adapter's modules as PEFT names them: as the model in memory has them, where its files have other names.

transformers renames some architectures' modules while it loads (``model.layers`` of Qwen2-VL's files is
``model.language_model.layers``) and holds experts as one tensor. hubkit's sites have the files' names, PEFT's files the
model's, and PEFT converts those of some architectures only. An outline of the model says how the two go together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.experts import PARAMETERS, Fused, Spelling, apart, together
from hubkit.artifact.folder import PEFT_CONFIG, WEIGHTS_NAME
from hubkit.artifact.forms import PEFT_PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.artifact.forms import PeftForm


@dataclass(frozen=True)
class LiveNames:
    """How the model that transformers makes of a base names what the base's files name otherwise.

    Args:
        modules: name in the files -> in the model, of the modules for which these differ.
        experts: the tensors in which it holds experts, in its order.
    """

    modules: Mapping[str, str]
    experts: Sequence[Fused]


def live_names(base: Path) -> LiveNames:
    """The names in the model of the base in a folder.

    Raises:
        HubkitError: ``HK-BASE-LOAD``, ``HK-EXTRA``; ``HK-BASE-MODULES`` where the model has other experts.
    """
    from hubkit.tensors.base.agreement import outline, require_agreement
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.experts.expert import Expert, by_tensor, is_expert

    model, files = outline(base), Base.from_folder(base)
    live = Base.from_model(model)
    both = [name for name in files.sites if is_expert(name) and name in live.sites]
    require_agreement({n: files.sites[n] for n in both}, {n: live.sites[n] for n in both}, files, live)
    paths = {module: path for path, module in model.named_modules()}
    renamed: dict[str, str] = {}
    held: dict[Any, dict[Expert, str]] = {}
    for site in live.sites.values():
        if isinstance(site.module, Expert):
            held.setdefault(site.module.holder, {})[site.module] = site.name
        elif site.module is not None and site.kind != "block" and paths[site.module] != site.name:
            renamed[site.name] = paths[site.module]
    experts = []
    for module, path in paths.items():
        tensors = by_tensor(held.get(module, ()))
        for name in [name for name, _ in module.named_parameters(recurse=False) if name in tensors]:
            matrices = [[(held[module][e], e.rows) for e in layers] for layers in tensors[name]]
            crossed = tensors[name][0][0].turned and not getattr(module, "is_transposed", False)
            experts.append(Fused(path, name, matrices, crossed))
    return LiveNames(renamed, experts)


def for_peft(files: Mapping[str, bytes], form: PeftForm, names: LiveNames) -> dict[str, bytes]:
    """The files of an adapter with the names of the model.

    Args:
        files: ``adapter_config.json`` and ``adapter_model.safetensors`` with the names of the base's files, and others.
        form: of the adapter's method.

    Raises:
        HubkitError: ``HK-EXPORT`` for experts of which PEFT's form cannot say what the adapter does.
    """
    from safetensors.torch import load, save

    config, stored = json.loads(files[PEFT_CONFIG]), dict(load(files[WEIGHTS_NAME]))
    if form.parameters:
        together(Spelling(form), config, stored, names.experts)
    _rename(config, names.modules)
    made = {_renamed(key, names.modules): tensor.contiguous() for key, tensor in stored.items()}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return {**files, PEFT_CONFIG: text.encode(), WEIGHTS_NAME: save(made, metadata={"format": "pt"})}


def from_peft(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], form: PeftForm, names: LiveNames, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors with the names of the base's files.

    Args:
        stored: PEFT's keys -> tensors.
        form: of the adapter's method.
        where: the file, for messages.

    Raises:
        HubkitError: ``HK-TARGET``, ``HK-SHAPE``.
    """
    config, stored = dict(config), dict(stored)
    if form.parameters:
        apart(Spelling(form), config, stored, names.experts, where)
    back = {live: own for own, live in names.modules.items()}
    _rename(config, back)
    return config, {_renamed(key, back): tensor for key, tensor in stored.items()}


def _rename(config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames modules that a configuration of PEFT names in full, in place."""
    for key in ("target_modules", PARAMETERS, "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(_renamed(str(name), names, "") for name in config[key])
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            config[key] = {names.get(pattern, pattern): value for pattern, value in config[key].items()}


def _renamed(key: str, names: Mapping[str, str], prefix: str = PEFT_PREFIX) -> str:
    """A name whose first part, behind the prefix, is that of a module with another name."""
    path = key.removeprefix(prefix)
    ends = [len(path), *(at for at in range(len(path) - 1, -1, -1) if path[at] == ".")]
    stem = next((path[:end] for end in ends if path[:end] in names), None)
    return key if stem is None else prefix + names[stem] + path[len(stem) :]
