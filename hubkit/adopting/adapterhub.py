"""Adopting a folder that the adapters library (AdapterHub) wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.adapterhub_heads import head_beside, tensors_in
from hubkit.adopting.heads import require_no_labels
from hubkit.artifact.adapterhub import CONFIG, PICKLE, WEIGHTS
from hubkit.errors import HubkitError
from hubkit.named.sources import base_with_record, under_its_name
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.adapterhub import AdapterHubForm
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.tasks.task import Task


def read_adapterhub_folder(
    folder: Path,
    data: Mapping[str, Any],
    name: str,
    base: Path | str | None,
    revision: str | None,
    where: Where,
    labels: Sequence[str] | None,
    without_head: bool,
) -> tuple[Method, Adapter, BaseRecord, Task | None]:
    """The adapter in an AdapterHub folder, at the sites of its base: every option and every tensor accounted for.

    Args:
        folder: ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        data: that config.
        name: the adapter's here; the one in its tensors' names is dropped.
        base: folder or repository; the one its config names when None.
        revision: of the base.
        where: where the base is looked for.
        labels: names of the labels that its head chooses, in order; those of its head when None.
        without_head: leave its prediction head out.

    Raises:
        HubkitError: ``HK-OPTION``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``,
            ``HK-HEAD`` for a head that the base's class does not compute, ``HK-LABELS``, ``HK-BASE-NEEDED``,
            ``HK-BASE-MISMATCH``; what fetching and reading the base raise.
    """
    from hubkit.methods.adapterhub import read_adapterhub
    from hubkit.methods.config import parse_config
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter

    config_path = str(folder / CONFIG)
    method, form = _method_for(data, config_path)
    weights = _weights(folder)
    stored = tensors_in(weights)
    named = base or data.get("model_name")
    if not named:
        raise HubkitError("HK-BASE-NEEDED", "the adapter names no base", where=config_path, fix="--base BASE")
    source, record = base_with_record(named if isinstance(named, Path) else str(named), revision, where)
    record = under_its_name(source, record)
    sites = Base.from_folder(source.path)
    values, tensors = read_adapterhub(form, data, stored, sites, str(weights))
    head = None if without_head else head_beside(folder, data, source.path, sites, labels)
    if head is None:
        require_no_labels(labels, str(folder))
    elif not hasattr(method.info.config, "modules_to_save"):
        what = f"method {method.name!r} keeps no head beside its parts"
        raise HubkitError("HK-HEAD", what, where=str(folder), fix="--without-head packs the body alone")
    else:
        sites, tensors = head.task.model.sites_of(sites), {**tensors, **head.tensors}
        values["modules_to_save"] = sorted({module for module, _ in head.tensors})
    config = parse_config(method.info.config, values, f"{config_path}#/config")
    own = {f"{site}.{role}": value for (site, role), value in tensors.items()}
    adapter = Adapter.of_stored(name, method, config, sites, own, str(weights))
    return method, adapter, record, head.task if head else None


def _method_for(data: Mapping[str, Any], where: str) -> tuple[Method, AdapterHubForm]:
    """The installed method that reads this kind of configuration; methods that cannot be imported are passed over.

    Raises:
        HubkitError: ``HK-OPTION``.
    """
    from hubkit.methods.host import host

    options = data["config"]
    if not isinstance(options, Mapping):
        raise HubkitError(
            "HK-OPTION",
            "the folder names a preset instead of its options",
            where=f"{where}#/config",
            have=str(options)[:80],
            fix="save it again with a current version of the adapters library",
        )
    known: list[str] = []
    for name in host().offers():
        try:
            method = host().load(name)
        except HubkitError:
            continue
        form = method.adapterhub_form
        if form is not None:
            known.append(form.architecture or "(none)")
            if form.architecture == options.get("architecture"):
                return method, form
    raise HubkitError(
        "HK-OPTION",
        "no installed method reads this kind of AdapterHub adapter",
        where=f"{where}#/config/architecture",
        want=", ".join(known),
        have=str(options.get("architecture")),
    )


def _weights(folder: Path) -> Path:
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise HubkitError("HK-MISSING", "the adapter has no weights", where=str(folder), want=f"{WEIGHTS} or {PICKLE}")
