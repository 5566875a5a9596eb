"""Adopting a folder that the adapters library (AdapterHub) wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.adapterhub import CONFIG, PICKLE, WEIGHTS
from hubkit.errors import HubkitError
from hubkit.named.sources import base_with_record, under_its_name
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.artifact.adapterhub import AdapterHubForm
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.parts.adapter import Adapter


def read_adapterhub_folder(
    folder: Path, data: Mapping[str, Any], name: str, base: Path | str | None, revision: str | None, where: Where
) -> tuple[Method, Adapter, BaseRecord]:
    """The adapter in an AdapterHub folder, at the sites of its base: every option and every tensor accounted for.

    Args:
        folder: ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        data: that config.
        name: the adapter's here; the one in its tensors' names is dropped.
        base: folder or repository; the one its config names when None.
        revision: of the base.
        where: where the base is looked for.

    Raises:
        HubkitError: ``HK-OPTION``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``,
            ``HK-BASE-NEEDED``, ``HK-BASE-MISMATCH``; what fetching and reading the base raise.
    """
    from hubkit.methods.adapterhub import read_adapterhub
    from hubkit.methods.config import parse_config
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter

    config_path = str(folder / CONFIG)
    method, form = _method_for(data, config_path)
    weights = _weights(folder)
    stored = _tensors(weights)
    named = base or data.get("model_name")
    if not named:
        raise HubkitError("HK-BASE-NEEDED", "the adapter names no base", where=config_path, fix="--base BASE")
    source, record = base_with_record(named if isinstance(named, Path) else str(named), revision, where)
    record = under_its_name(source, record)
    sites = Base.from_folder(source.path)
    values, tensors = read_adapterhub(form, data, stored, sites, str(weights))
    config = parse_config(method.info.config, values, f"{config_path}#/config")
    own = {f"{site}.{role}": value for (site, role), value in tensors.items()}
    return method, Adapter.of_stored(name, method, config, sites, own, str(weights)), record


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


def _tensors(path: Path) -> Mapping[str, Tensor]:
    from hubkit.tensors.files.pickles import read_pickle
    from hubkit.tensors.files.shards import read_file

    return read_pickle(path) if path.name == PICKLE else read_file(path)
