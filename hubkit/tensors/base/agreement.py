"""Whether a base has the same modules in its files and as a model: planned on the one, made on the other.

transformers can rename, fuse and split what the files hold (experts of a mixture become one tensor); an adapter made at
modules that the files do not know could never be read again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from hubkit.compat.transformers_names import file_naming, may_be_missing
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base, natural
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.tokenizer import model_class, transformers_module


def outline(folder: Path) -> nn.Module:
    """The language model that transformers makes of a base's configuration, on the meta device: no weight is read.

    Raises:
        HubkitError: ``HK-BASE-LOAD``, ``HK-EXTRA``.
    """
    transformers = transformers_module()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = model_class(transformers, config).from_config(config, trust_remote_code=False)
    except Exception as e:  # on a config of another maker, transformers can raise anything
        raise HubkitError(
            "HK-BASE-LOAD",
            "transformers cannot make a language model of the base's configuration",
            where=str(folder),
            have=f"{type(e).__name__}: {e}",
            fix="hubkit verify names what is wrong with its files",
        ) from e
    return model


INCOMPLETE = "allow-incomplete-base"
"""The override that goes on with a base whose files are not its model's weights, as manifests name it."""
_SHOWN = 24
"""Tensors that a refusal names one by one; a base of another depth has hundreds."""
_FAULTS = {
    "missing": "not in the files: transformers makes it up",
    "mismatched": "of another shape in the files: transformers makes it up",
    "unexpected": "in the files alone: the model has no place for it",
}


def refuse_incomplete(model: nn.Module, path: Path, found: Mapping[str, Iterable[str]]) -> None:
    """Refuses a base whose files do not hold the weights of `model`, each once: ``HK-BASE-INCOMPLETE``.

    Args:
        path: its folder.
        found: ``missing``, ``mismatched``, ``unexpected`` -> names of tensors.
    """
    have = [f"{name}: {what}" for kind, what in _FAULTS.items() for name in sorted(found.get(kind, ()), key=natural)]
    if len(have) > _SHOWN:
        have = [*have[:_SHOWN], f"and {len(have) - _SHOWN} more"]
    if have:
        raise HubkitError(
            "HK-BASE-INCOMPLETE",
            "the files do not hold the weights of the model, each once",
            where=str(path),
            want=f"the weights of {type(model).__name__}",
            have=have,
            fix=f"a complete checkpoint of a language model; --{INCOMPLETE} goes on, and is recorded",
        )


def require_weights(model: nn.Module, path: Path, stored: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    """Refuses files that lack weights of the model, or hold them in other shapes, before anything is loaded.

    Names that the model has no place for are found when it is loaded: transformers passes over some of them rightly.

    Args:
        model: the `outline` of the base.
        path: its folder.
        stored: name of a tensor in its files -> shape.
        prefix: of names that old files leave out.

    Raises:
        HubkitError: ``HK-BASE-INCOMPLETE``.
    """
    shapes = dict(stored)
    if prefix and not any(name.startswith(prefix) for name in shapes):
        shapes |= {prefix + name: shape for name, shape in shapes.items()}
    naming, groups = file_naming(model), dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (own := naming(name)) is not None:
            groups.setdefault(id(parameter), []).append(own)
    optional = [re.compile(pattern) for pattern in may_be_missing(model)]
    sizes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    there = {key: [name for name in names if name in shapes] for key, names in groups.items()}
    lacking = [names[0] for key, names in groups.items() if not there[key]]
    found = {
        "missing": [name for name in lacking if not any(pattern.search(name) for pattern in optional)],
        "mismatched": [name for key, names in there.items() for name in names if shapes[name] != sizes[key]],
    }
    refuse_incomplete(model, path, found)


def require_agreement(planned: Mapping[str, Site], live: Mapping[str, Site], files: Base, model: Base) -> None:
    """Refuses places that are not the same in the files and in the model: ``HK-BASE-MODULES``.

    Args:
        planned: site name -> site of what would be made, by the headers of the files.
        live: as found in the model.
        files: the base by its headers.
        model: the base by its model.
    """
    alike: Counter[str] = Counter(
        f"{re.sub(r'[.][0-9]+(?=[.])', '.*', name)}: {files_have} in the files, {model_has} in the model"
        for name in dict.fromkeys((*planned, *live))
        if (files_have := _facts(planned.get(name))) != (model_has := _facts(live.get(name)))
    )
    have = [f"{line} ({count} times)" if count > 1 else line for line, count in alike.items()]
    if have:
        both = dict.fromkeys(_last_names(files, model))
        raise HubkitError(
            "HK-BASE-MODULES",
            "the base's files and the model made of them have other modules: no adapter fits both",
            where=files.source,
            have=have,
            want="modules that are the same in both",
            fix=f"--set targets={','.join(both)}" if both else "another base",
        )


def _facts(site: Site | None) -> str:
    return "nothing" if site is None else f"{site.kind} {tuple(site.shape)}" + (", biased" if site.bias_tensor else "")


def _last_names(files: Base, model: Base) -> Iterable[str]:
    """Last names of the linear layers that both have alike, and that no other module shares."""
    linear = (site for site in files.sites.values() if site.kind == "linear")
    alike = {site.name for site in linear if _facts(site) == _facts(model.sites.get(site.name))}
    others = {name.rpartition(".")[2] for name in {*files.sites, *model.sites} - alike}
    names = (name.rpartition(".")[2] for name in files.sites if name in alike and not files.arch.is_head(name))
    return (name for name in names if name not in others)
