"""Whether a base has the same modules in its files and as a model: planned on the one, made on the other.

transformers can rename, fuse and split what the files hold (experts of a mixture become one tensor); an adapter made at
modules that the files do not know could never be read again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubkit.artifact.identity.base_files import local, read_config
from hubkit.compat.transformers_names import file_naming, may_be_missing
from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import arch_for
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site, natural
from hubkit.tensors.base.tokenizer import CAUSAL, ForTask, model_class, transformers_module, why
from hubkit.tensors.experts.expert import Expert


def outline(folder: Path, task: ForTask | None = None) -> nn.Module:
    """The language model that transformers makes of a base's configuration, on the meta device: no weight is read.

    Args:
        task: as `model_class` has it.

    Raises:
        HubkitError: ``HK-BASE-LOAD``, also for an architecture that this release of transformers computes wrongly;
            ``HK-EXTRA``.
    """
    transformers = transformers_module()
    require_release(read_config(local(folder)), folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if task is not None:
            task.configure(config)
        kind = model_class(transformers, config, task)
        model = without_values(lambda: kind.from_config(config, trust_remote_code=False))
    except Exception as e:  # on a config of another maker, transformers can raise anything
        raise HubkitError(
            "HK-BASE-LOAD",
            "transformers cannot make a language model of the base's configuration",
            where=str(folder),
            have=why(e),
            fix=CAUSAL,
        ) from e
    return model


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """A model on the meta device."""
    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:  # a module reads its own values while it is made: Apertus' activation in 4.57
        from accelerate import init_empty_weights

        with init_empty_weights():  # tensors are made as ever, parameters forgotten
            return make()


def require_release(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses a base that the installed release of transformers computes wrongly: ``HK-BASE-LOAD``."""
    arch, have = arch_for(config), version("transformers")
    if int(have.partition(".")[0]) < arch.since:
        raise HubkitError(
            "HK-BASE-LOAD",
            "an older transformers does not compute what the base's files hold",
            where=str(folder),
            want=f"transformers {arch.since}",
            have=f"transformers {have}, {arch.model_type}",
            fix=f"pip install 'transformers>={arch.since}'",
        )


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
            fix="a complete checkpoint of a language model; hubkit train --task for an encoder's labels or vectors;"
            f" --{INCOMPLETE} goes on, and is recorded",
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
    have = _alike(
        f"{name}: {files_have} in the files, {model_has} in the model"
        for name in dict.fromkeys((*planned, *live))
        if (files_have := _facts(planned.get(name))) != (model_has := _facts(live.get(name)))
    )
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


def left_alone(planned: Mapping[str, Site], model: Base) -> list[str]:
    """Parameters that nothing trains although every module of their kind is trained, those of many layers in one line.

    Routers, experts that the files hold as one tensor, convolutions and the state of Mamba, gains that multiply by
    something else: no module that hubkit acts at holds them. Matrices are named where all linear layers but the heads
    are trained, vectors where all norms are.

    Args:
        planned: site name -> site of what will be made.
        model: the base by its `outline`.
    """
    assert model.model is not None
    held_alone = (s for s in model.sites.values() if s.number is None or s.name in planned)
    modules = [site.module for site in held_alone if site.module is not None and site.kind in _KINDS]
    parts = ([m.all] if isinstance(m, Expert) else m.parameters(recurse=False) for m in modules)
    held = {id(parameter) for parameters in parts for parameter in parameters}
    whole = {kind: _all_planned(kind, planned, model) for kind in ("linear", "norm")}
    naming = file_naming(model.model)
    if not all(whole.values()):  # nor is any other table named unless all that there is is trained
        held |= _tables(model)
    return _alike(
        f"{naming(name) or name}: {tuple(parameter.shape)}"
        for name, parameter in model.model.named_parameters()
        if id(parameter) not in held and whole["linear" if parameter.dim() > 1 else "norm"]
    )


_KINDS = ("linear", "embedding", "norm")


def _tables(model: Base) -> set[int]:
    """The parameters of an encoder-decoder's tables, by id."""
    modules = dict(model.model.named_modules()) if model.model is not None else {}
    return {id(p) for name in model.shared if name in modules for p in modules[name].parameters()}


def _all_planned(kind: str, planned: Mapping[str, Site], model: Base) -> bool:
    """Whether all sites of that kind are `planned`, and there are some; output heads apart."""
    sites = (site for site in model.sites.values() if site.kind == kind and site.number is None)
    names = [site.name for site in sites if not model.arch.is_head(site.name)]
    return bool(names) and all(name in planned for name in names)


def _alike(lines: Iterable[str]) -> list[str]:
    """`lines` without their numbers, those that are then the same once."""
    alike = Counter(re.sub(r"[.][0-9]+(?=[.])", ".*", line) for line in lines)
    return [f"{line} ({count} times)" if count > 1 else line for line, count in alike.items()]


def _facts(site: Site | None) -> str:
    if site is None:
        return "nothing"
    turned = ", stored (in, out)" if site.number is not None and site.transposed else ""
    return f"{site.kind} {tuple(site.shape)}" + (", biased" if site.bias_tensor else "") + turned


def _last_names(files: Base, model: Base) -> Iterable[str]:
    """Last names of the linear layers that both have alike, and that no other module shares."""
    alike = {site.name for site in files.linear() if _facts(site) == _facts(model.sites.get(site.name))}
    others = {name.rpartition(".")[2] for name in {*files.sites, *model.sites} - alike}
    names = (name.rpartition(".")[2] for name in files.sites if name in alike and not files.arch.is_head(name))
    return (name for name in names if name not in others)
