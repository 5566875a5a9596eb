"""Adopting an adapter that another tool wrote: what `pack` does with a folder that has no manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.adapterhub import read_adapterhub_folder
from hubkit.adopting.carry import carry
from hubkit.adopting.claims import found_base, require_promised
from hubkit.adopting.folders import foreign_config, weights_of
from hubkit.adopting.heads import labels_beside, require_no_labels, task_of
from hubkit.adopting.keys import plain_keys
from hubkit.adopting.live_names import from_peft, live_names
from hubkit.adopting.vocabulary import Folder, rows_alone
from hubkit.artifact.adapterhub import is_adapterhub
from hubkit.artifact.carried import types
from hubkit.artifact.folder import PEFT_CONFIG, TENSORS_NAME, tensors_bytes
from hubkit.artifact.task_types import TASK_TYPES, kind_of
from hubkit.documents.manifest import Manifest, Plugin
from hubkit.errors import USAGE, HubkitError
from hubkit.named.vocabulary import vocabulary_document
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.artifact.forms import PeftForm
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True)
class Adopted:
    """Another tool's adapter as ours.

    Args:
        manifest: its manifest, files not yet listed.
        files: name -> content.
        renamed: how names of its tensors differed from those that the tool itself writes.
    """

    manifest: Manifest
    files: dict[str, bytes | Path]
    renamed: tuple[str, ...] = ()


HEADS = {one.peft: one.heads for one in TASK_TYPES.values() if one.heads} | {"QUESTION_ANS": ("qa_outputs",)}
"""Tasks of PEFT that need a head which language models do not have -> last names of such heads."""


def adopt(
    folder: Path,
    name: str,
    base: Path | str | None,
    revision: str | None,
    where: Where,
    *,
    allow_partial: bool = False,
    allow_base_mismatch: bool = False,
    labels: Sequence[str] | None = None,
    without_head: bool = False,
) -> Adopted:
    """The manifest and files of another tool's adapter: every option and every tensor accounted for.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT, or AdapterHub's files.
        name: the adapter's.
        base: folder or repository; the one its config names when None.
        revision: of the base.
        where: where the base is looked for.
        allow_partial: go on although its configuration promises more modules than its file holds; recorded.
        allow_base_mismatch: go on although its configuration names another base; recorded.
        labels: names of the labels that its head chooses, in order; those that the folder or the base has when None.
        without_head: leave out the head that AdapterHub keeps in files of its own.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER``, ``HK-FOREIGN``, ``HK-METHOD-UNKNOWN``, ``HK-OPTION``, ``HK-PICKLE``,
            ``HK-SAFETENSORS``, ``HK-KEYS``, ``HK-TARGET``, ``HK-HEAD``, ``HK-LABELS``, ``HK-OPTIONS``, ``HK-TIED``,
            ``HK-VOCABULARY``, ``HK-SHAPE``, ``HK-DTYPE``, ``HK-NAN``, ``HK-BASE-NEEDED``, ``HK-BASE-MISMATCH``; what
            fetching and reading the base raise.
    """
    from hubkit.artifact.forms import HELD, from_peft_config, split_keys
    from hubkit.artifact.identity.header import read_header
    from hubkit.methods.config import parse_config
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.shards import read_file
    from hubkit.tensors.parts.adapter import Adapter

    foreign = foreign_config(folder)
    if is_adapterhub(foreign):
        return _adopted(
            name, *read_adapterhub_folder(folder, foreign, name, base, revision, where, labels, without_head)
        )
    read, weights, config_path = method_for(foreign, folder), weights_of(folder), str(folder / PEFT_CONFIG)
    if without_head:
        what, fix = "PEFT keeps no head in files of its own", "leave --without-head out"
        raise HubkitError("HK-OPTIONS", what, where=str(folder), fix=fix, status=USAGE)
    if read is None:
        require_no_labels(labels, str(folder))
        source, record, used = found_base(foreign, folder, base, revision, where, allow_base_mismatch)
        return Adopted(*carry(weights, foreign, name, Base.from_folder(source.path), record, used, allow_partial))
    method, form, values = read
    saved, resized = whole_modules(form, values)
    plain = plain_keys(form, read_header(weights), str(weights))
    parts = dict(split_keys(form, plain.names.values(), str(weights), [*saved, *resized]).parts)
    if not parts:
        raise HubkitError("HK-KEYS", "the file holds no tensor of an adapter", where=str(weights))
    source, record, used = found_base(foreign, folder, base, revision, where, allow_base_mismatch)
    sites = Base.from_folder(source.path)
    stored = {plain.names[key]: value for key, value in read_file(weights).items()}
    kind = kind_of(foreign)
    labels = labels_beside(folder) if labels is None and kind else labels
    task = task_of(kind, _shapes(parts, stored), source.path, sites, labels, str(weights))
    sites = task.model.sites_of(sites) if task else sites
    if any(sites.find(name) is None for name in parts):
        foreign, stored = from_peft(foreign, stored, form, live_names(source.path), str(weights))
        values = from_peft_config(form, foreign, config_path)
        parts = dict(split_keys(form, stored, str(weights), [*saved, *resized]).parts)
    if form.rows:
        listed = {name for name in parts if any(name.endswith(end) for end in saved)}
        stored, parts, values = rows_alone(Folder(folder, source.path, stored), form, parts, listed, values, sites)
    whole = [name for name, roles in parts.items() if set(roles) <= set(HELD)]
    _require_heads(foreign, whole, sites, str(weights), record.fingerprint.source or "the base")
    _require_homes(parts, sites, str(weights), record.fingerprint.source or "the base")
    if form.targets:
        chosen = [name for name in parts if name not in whole and name not in sites.rows]
        layers = record.fingerprint.config.get("layers")
        used += require_promised(
            foreign, (form.targets, form.parameters), chosen, sites, layers, config_path, allow_partial
        )
    values = _at_sites(form, values, parts, whole, sites)
    config = parse_config(method.info.config, values, config_path)
    adapter = Adapter.of_stored(name, method, config, sites, stored, str(weights))
    made = _adopted(name, method, adapter, record, task)
    return replace(made, manifest=replace(made.manifest, overrides=tuple(used)), renamed=plain.renamed)


def whole_modules(form: PeftForm, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Ends of names of modules that are trained as a whole: those listed, and those that PEFT writes unasked."""
    from hubkit.tensors.base.arch import arch_of

    saved = list(values.get(form.saved) or []) if form.saved else []
    if saved and values.get("tied"):
        saved += arch_of("").heads  # written, and not listed
    resized = [*arch_of("").embeddings, *arch_of("").heads[:1]] if form.rows else []  # listed nowhere either
    return saved, resized


def _shapes(parts: Mapping[str, Mapping[str, str]], stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Module whose values a file holds -> shape of its weight."""
    return {
        name: tuple(stored[roles["weight"]].shape)
        for name, roles in parts.items()
        if "weight" in roles and set(roles) <= {"weight", "bias"}
    }


def _at_sites(
    form: PeftForm, values: Mapping[str, Any], parts: Collection[str], whole: Collection[str], base: Base
) -> dict[str, Any]:
    """The configuration with the modules of the file in place of whatever chose them."""
    from hubkit.tensors.base.targets import short_names
    from hubkit.tensors.parts.tied import tied_pairs

    made = dict(values)
    if form.targets:
        made["targets"] = short_names([n for n in parts if n not in whole and n not in base.rows], base.sites)
    if form.saved:
        made[form.saved] = list(whole)
    if not any(head in parts and table in parts for head, table in tied_pairs(base).items()):
        made.pop("tied", None)  # asked for, and nothing came of it
    return made


def _require_homes(parts: Collection[str], base: Base, where: str, named: str) -> None:
    """Refuses modules that the base does not have: ``HK-KEYS``."""
    homeless = [name for name in parts if (site := base.find(name)) is None or site.kind == "block"]
    if homeless:
        raise HubkitError(
            "HK-KEYS",
            f"{len(homeless)} of {len(parts)} adapted modules do not exist in the base",
            where=where,
            want=f"modules of {named}",
            have=homeless,
            fix="--base with the base that the adapter was trained on; where its modules are called otherwise now:"
            " hubkit migrate",
        )


def _require_heads(config: Mapping[str, Any], whole: list[str], base: Base, where: str, named: str) -> None:
    """Refuses a head that the base does not have, and a task whose head nobody trained: ``HK-HEAD``."""
    absent = [name for name in whole if base.find(name) is None]
    kind = kind_of(config)
    task = TASK_TYPES[kind].peft if kind else str(config.get("task_type"))
    heads = HEADS.get(task)
    if heads and not whole and not any(site.rpartition(".")[2] in heads for site in base.sites):
        absent = [f"no head, and the task {task}"]
    if absent:
        raise HubkitError(
            "HK-HEAD",
            "the adapter's head is not the base's: what it was trained to say could not be said",
            where=where,
            want=f"modules of {named}",
            have=absent,
            fix="save base and head with save_pretrained and name that folder with --base",
        )


def _adopted(name: str, method: Method, adapter: Adapter, record: BaseRecord, task: Task | None = None) -> Adopted:
    from hubkit.methods.config import config_document
    from hubkit.methods.foreign import own_files

    manifest = Manifest(
        kind="adapter",
        name=name,
        method=method.name,
        base=record.fingerprint,
        config=config_document(adapter.config),
        vocabulary=vocabulary_document(adapter.config),
        task=task.document({}) if task else None,
        plugin=Plugin(method.offer.distribution, method.offer.version),
    )
    public = manifest.shareable().base
    assert public is not None
    adapter.source, adapter.revision = public.source, public.revision
    adapter.task = manifest.task
    files: dict[str, bytes | Path] = {**own_files(adapter), TENSORS_NAME: tensors_bytes(record.tensors)}
    return Adopted(manifest, files)


def method_for(config: Mapping[str, Any], folder: Path) -> tuple[Method, PeftForm, dict[str, Any]] | None:
    """The installed method that reads this configuration of PEFT, and its own; the default method is asked first.

    Methods that cannot be imported are passed over. None for a type that can only be carried.

    Raises:
        HubkitError: ``HK-METHOD-UNKNOWN``; ``HK-OPTION`` of the method that comes closest, when none reads it.
    """
    from hubkit.artifact.forms import from_peft_config
    from hubkit.methods.host import host

    known: list[str] = []
    refusals: list[HubkitError] = []
    peft_type, where = str(config.get("peft_type")), str(folder / PEFT_CONFIG)
    for name in sorted(host().offers(), key=lambda name: (name != host().default(), name)):
        try:
            method = host().load(name)
        except HubkitError:
            continue
        form = method.peft_form
        known += [form.peft_type] if form else []
        if form is not None and form.peft_type == peft_type:
            try:
                return method, form, from_peft_config(form, config, where)
            except HubkitError as refusal:
                refusals.append(refusal)
    if refusals:
        raise min(refusals, key=lambda refusal: len(refusal.have))
    if peft_type in types():
        return None
    raise HubkitError(
        "HK-METHOD-UNKNOWN",
        f"no installed method reads adapters of type {peft_type!r}",
        where=f"{folder / PEFT_CONFIG}#/peft_type",
        want=", ".join(sorted({*known, *types()})),
        have=peft_type,
        fix="install the package that offers it; hubkit methods lists what is installed",
    )
