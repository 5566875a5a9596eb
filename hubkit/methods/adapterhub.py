"""An adapter as AdapterHub's folder, and that folder's tensors as an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubkit.artifact.adapterhub import (
    CONFIG,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    WEIGHTS,
    AdapterHubForm,
    from_adapterhub_config,
    place_keys,
    to_adapterhub_config,
)
from hubkit.artifact.adapterhub_heads import FORMS, head_config
from hubkit.errors import HubkitError
from hubkit.methods.config import config_document

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.blocks import Block
    from hubkit.tensors.parts.adapter import Adapter

_NO_CLASS = "(a model)"


def adapterhub_files(adapter: Adapter, form: AdapterHubForm) -> Mapping[str, bytes]:
    """``adapter_config.json`` and ``adapter.safetensors``, and the files of a head beside them, where it has one.

    Raises:
        HubkitError: ``HK-EXPORT`` for a base that AdapterHub does not build in, an option it has no word for, or a head
            that it does not have.
    """
    from safetensors.torch import save

    blocks = _blocks(adapter.base)
    places = {site: place for place, site in _places(adapter.base).items()}
    name = adapter.name.replace(".", "_")  # a module's name there: it cannot have dots
    parts = {site: part for site, part in adapter.parts.items() if site in blocks}
    taken = [blocks[site] for site in parts]
    left_out = {block.layer for block in blocks.values()} - {block.layer for block in taken}
    config = to_adapterhub_config(
        form,
        config_document(adapter.config),
        name=name,
        model_type=adapter.base.arch.model_type,
        model_class=_NO_CLASS,
        base_source=adapter.source,
        hidden=taken[0].shape[0],
        width=int(adapter.parts[taken[0].name].get_parameter(form.width[3]).shape[0]),
        left_out=left_out,
    )
    tensors = {
        f"{places[site]}.{name}.{form.roles[role]}": value.detach().cpu().contiguous()
        for site, part in parts.items()
        for role, value in part.roles().items()
    }
    whole = {site: part.roles() for site, part in adapter.parts.items() if site not in blocks}
    head = _head_files(adapter, whole, name, taken[0].shape[0]) if whole or adapter.task else {}
    return {CONFIG: config, WEIGHTS: save(tensors), **head}


def _head_files(
    adapter: Adapter, whole: Mapping[str, Mapping[str, Tensor]], name: str, hidden: int
) -> dict[str, bytes]:
    """``head_config.json`` and ``model_head.safetensors``.

    Args:
        whole: module -> its values.
        name: the adapter's there.
        hidden: width of what goes into the head.

    Raises:
        HubkitError: ``HK-EXPORT``.
    """
    from safetensors.torch import save

    task, known = adapter.task or {}, FORMS.get(adapter.base.arch.model_type, ())
    fitting = [one for one in known if one.kind == task.get("kind") and set(one.modules) == set(whole)]
    if not fitting:
        raise HubkitError(
            "HK-EXPORT",
            "AdapterHub has no head of these modules",
            where=adapter.name,
            want=[f"{one.kind}: {', '.join(one.modules)}" for one in known],
            have=f"{task.get('kind') or 'no task'}: {', '.join(whole) or 'no module'}",
            fix="hubkit's own form holds it: hubkit pack, hubkit push",
        )
    form, labels = fitting[0], list(map(str, task["labels"]))
    tensors = {
        f"heads.{name}.{step}.{role}": value.detach().cpu().contiguous()
        for step, module in zip(form.steps, form.modules, strict=True)
        for role, value in whole[module].items()
    }
    config = head_config(form, labels, name, adapter.base.arch.model_type, adapter.source, hidden)
    return {HEAD_CONFIG: config, HEAD_WEIGHTS: save(tensors)}


def read_adapterhub(
    form: AdapterHubForm, data: Mapping[str, Any], stored: Mapping[str, Tensor], base: Base, where: str
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """The method's configuration (JSON values) and its tensors, by site and role.

    Args:
        data: the folder's ``adapter_config.json``.
        stored: its tensors.

    Raises:
        HubkitError: ``HK-OPTION``, ``HK-KEYS``, ``HK-BASE-MISMATCH`` for a base of another architecture, ``HK-EXPORT``
            for one that AdapterHub does not build in.
    """
    config = from_adapterhub_config(form, data, where)
    have = base.arch.model_type
    if data.get("model_type") != have:
        raise HubkitError(
            "HK-BASE-MISMATCH",
            "the adapter was trained on a base of another architecture",
            where=where,
            want=str(data.get("model_type")),
            have=have,
            fix="--base with the base that it was trained on",
        )
    keys = place_keys(form, stored, str(data.get("name")), _places(base), where)
    tensors = {at: stored[key] for at, key in keys.items()}
    blocks = _blocks(base)
    config |= _width(form, data["config"], tensors, blocks, where)
    layers = {block.layer for block in blocks.values()}
    taken = {blocks[site].layer for site, _ in tensors}
    config[form.layers[1]] = [] if taken == layers else sorted(taken)
    return config, tensors


def _width(
    form: AdapterHubForm,
    options: Mapping[str, Any],
    tensors: Mapping[tuple[str, str], Tensor],
    blocks: Mapping[str, Block],
    where: str,
) -> dict[str, Any]:
    """The factor as it is written where it divides the hidden size, else the width that the tensors have."""
    key, factor, width, role = form.width
    given = options.get(key)
    widths = {int(value.shape[0]) for (_, r), value in tensors.items() if r == role and value.dim()}
    if len(widths) != 1:
        raise HubkitError(
            "HK-OPTION",
            "the adapter is not equally wide in all layers, which is not supported",
            where=f"{where}#/config/{key}",
            want="one width",
            have=sorted(map(str, widths)),
        )
    (only,) = widths
    hidden = next(iter(blocks.values())).shape[0]
    plain = isinstance(given, (int, float)) and not isinstance(given, bool)
    return {factor: given} if plain and given * only == hidden else {width: only}  # type: ignore[operator]


def _blocks(base: Base) -> dict[str, Block]:
    from hubkit.tensors.base.blocks import Block

    return {name: site for name, site in base.sites.items() if isinstance(site, Block)}


def _places(base: Base) -> dict[str, str]:
    """Where AdapterHub keeps what acts at a block -> the block.

    Raises:
        HubkitError: ``HK-EXPORT``.
    """
    known = base.arch.adapterhub
    found = {f"{block.path}.{known[block.sublayer]}": name for name, block in _blocks(base).items() if known}
    if not found:
        raise HubkitError(
            "HK-EXPORT",
            "AdapterHub's form is not known for this architecture",
            where=base.source,
            have=base.arch.model_type or "no model_type",
            fix="hubkit's own form holds it: hubkit pack, hubkit push",
        )
    return found
