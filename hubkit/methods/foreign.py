"""An adapter as files: in hubkit's own form, or in another tool's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hubkit.artifact.folder import PEFT_CONFIG, WEIGHTS_NAME
from hubkit.artifact.forms import short_targets, to_peft_config
from hubkit.artifact.task_types import TASK_TYPES
from hubkit.errors import HubkitError
from hubkit.methods.adapterhub import adapterhub_files
from hubkit.methods.config import config_document

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import Edit

TASKS = {one.ending: one.peft for one in TASK_TYPES.values() if one.ending} | {"ForQuestionAnswering": "QUESTION_ANS"}
"""Ends of class names of transformers -> PEFT's ``task_type``; every other base is a language model."""


def weights_file(adapter: Adapter) -> bytes:
    """The bytes of ``adapter_model.safetensors``, tensors as they are; one metadata key, so the bytes are stable."""
    from safetensors.torch import save

    data: bytes = save(adapter.tensors(), metadata={"format": "pt"})
    return data


def foreign_files(adapter: Adapter, target: str) -> Mapping[str, bytes]:
    """The files of an adapter in another tool's form.

    Args:
        target: ``"peft"``: ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's own keys;
            ``"adapterhub"``: see `hubkit.methods.adapterhub`.

    Raises:
        HubkitError: ``HK-EXPORT`` for a form that the method does not have.
    """
    form, theirs = adapter.method.peft_form, adapter.method.adapterhub_form
    if target == "adapterhub" and theirs is not None:
        return adapterhub_files(adapter, theirs)
    if target != "peft" or form is None:
        known = [name for name, have in (("peft", form), ("adapterhub", theirs)) if have is not None]
        raise HubkitError(
            "HK-EXPORT",
            f"adapter {adapter.name!r} ({adapter.method.name}) has no form {target!r}",
            want=", ".join(known) or "(this method is hubkit's own)",
            have=target,
        )
    modules = {key: _named(adapter, field) for key, field in form.modules.items()}
    whole = {site for site, part in adapter.edits().items() if is_whole(part)}
    rest = [s for s in adapter.edits() if s not in whole and not any(s in chosen for chosen in modules.values())]
    sites = adapter.base.sites
    body, every = adapter.base.body, {*sites, *adapter.base.poolers}
    lists = {k: _bare(short_targets(c, every, set(adapter.parts) - c), body) for k, c in modules.items()}
    alike = adapter.base.beside_experts() & set(rest) if form.parameters else set()
    targets, excluded = _targets(set(rest) - alike, adapter.base)
    config = to_peft_config(
        form,
        config_document(adapter.config),
        targets={*_bare(targets, body), *(name for names in lists.values() for name in names)},
        excluded=excluded,
        parameters=_bare(short_targets(alike, sites), body),
        modules=lists,
        rows=_rows(adapter),
        saved=_bare(_saved(whole, adapter.base, _task(adapter)), body),
        transposed=any(s.transposed and s.kind == "linear" and s.number is None for s in adapter.sites.values()),
        base_source=adapter.source,
        revision=adapter.revision,
        task_type=_task(adapter),
    )
    return {PEFT_CONFIG: config, WEIGHTS_NAME: weights_file(adapter)}


def _bare(names: Iterable[str], body: str) -> list[str]:
    """Names of modules as ``AutoModel`` has them, for an adapter of a body without a head; see `Base.body`."""
    return [name.removeprefix(body) for name in names]


def _targets(chosen: set[str], base: Base) -> tuple[list[str], str]:
    """The names of `chosen` modules for PEFT, and an expression for modules that it must pass over.

    A model of several parts is named one way in its files and another in memory, so that only last names fit both: what
    sees is told from what speaks by its own name, which stays.
    """
    from hubkit.tensors.base.targets import short_names

    beside = {*base.sites, *base.poolers}
    names = short_targets(chosen, beside) if base.poolers else short_names(chosen, base.sites)
    towers = {site: tower for site in base.sites if (tower := base.arch.tower(site))}
    if not towers or not any("." in name for name in names):
        return names, ""
    seeing = rf"(.*\.)?({'|'.join(sorted(set(towers.values())))})(\..*)?"
    if chosen.isdisjoint(towers):
        return short_names(chosen, {name: site for name, site in base.sites.items() if name not in towers}), seeing
    return (short_targets(chosen, towers), rf"(?!{seeing}$).*") if chosen <= towers.keys() else (names, "")


def is_whole(part: Edit) -> bool:
    """Whether `part` is that of a module trained as a whole, or follows one."""
    from hubkit.tensors.parts.tied import TiedChange
    from hubkit.tensors.parts.whole import WholeModule

    return isinstance(part.part if isinstance(part, TiedChange) else part, WholeModule)


def _saved(whole: set[str], base: Base, task: str) -> list[str]:
    """The names of modules trained as a whole, for PEFT.

    PEFT adds the head of a task by its name. Where that is a module of several layers, all of them trained, it is named
    alone: PEFT cannot read layers that are named beside the module that they are in.
    """
    heads = {name for one in TASK_TYPES.values() if one.peft == task for name in one.heads}
    inside = {head: {site for site in base.sites if site.startswith(f"{head}.")} for head in sorted(heads)}
    named = [head for head, sites in inside.items() if sites and sites <= whole]
    rest = whole.difference(*(inside[head] for head in named))
    every = {*base.sites, *base.poolers}
    return [*named, *short_targets(rest, every, every - whole)]


def _rows(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Module -> ids of the tokens whose rows the adapter holds there."""
    from hubkit.tensors.base.token_sites import SUFFIX
    from hubkit.tensors.parts.vocabulary import TokenRows

    held = {site.removesuffix(SUFFIX): part for site, part in adapter.parts.items() if isinstance(part, TokenRows)}
    return {site.rpartition(".")[2]: part.ids for site, part in held.items()}


def _task(adapter: Adapter) -> str:
    """What PEFT calls the adapter's task: the one that it was trained for, or that of the base's class."""
    if (known := TASK_TYPES.get(str((adapter.task or {}).get("kind")))) is not None:
        return known.peft
    base = adapter.base
    default = "FEATURE_EXTRACTION" if base.arch.encoder else "SEQ_2_SEQ_LM" if base.encodes else "CAUSAL_LM"
    return next((task for ending, task in TASKS.items() if any(ending in name for name in base.classes)), default)


def _named(adapter: Adapter, field: str) -> set[str]:
    """The adapted modules that one field of the configuration names."""
    return {site.name for site in adapter.base.match(getattr(adapter.config, field))} & set(adapter.parts)


def own_files(adapter: Adapter) -> Mapping[str, bytes]:
    """The files of an adapter folder: PEFT's where PEFT knows the method, else the tensors alone."""
    if adapter.method.peft_form is None:
        return {WEIGHTS_NAME: weights_file(adapter)}
    return adapter.method.export(adapter, "peft")
