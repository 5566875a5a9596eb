"""An adapter as files: in hubkit's own form, or in another tool's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hubkit.artifact.folder import PEFT_CONFIG, WEIGHTS_NAME
from hubkit.artifact.forms import short_targets, to_peft_config
from hubkit.errors import HubkitError
from hubkit.methods.adapterhub import adapterhub_files
from hubkit.methods.config import config_document

if TYPE_CHECKING:
    from hubkit.tensors.adapter import Adapter


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
            "HK-EXPORT", f"adapter {adapter.name!r} ({adapter.method.name}) has no form {target!r}",
            want=", ".join(known) or "(this method is hubkit's own)", have=target,
        )  # fmt: skip
    modules = {key: _named(adapter, field) for key, field in form.modules.items()}
    rest = [site for site in adapter.edits() if not any(site in chosen for chosen in modules.values())]
    lists = {k: short_targets(c, adapter.base.sites, set(adapter.parts) - c) for k, c in modules.items()}
    config = to_peft_config(
        form,
        config_document(adapter.config),
        targets={*short_targets(rest, adapter.base.sites), *(name for names in lists.values() for name in names)},
        modules=lists,
        transposed=any(s.transposed and s.kind == "linear" for s in adapter.sites.values()),
        base_source=adapter.source,
        revision=adapter.revision,
        task_type="FEATURE_EXTRACTION" if adapter.base.arch.encoder else "CAUSAL_LM",
    )
    return {PEFT_CONFIG: config, WEIGHTS_NAME: weights_file(adapter)}


def _named(adapter: Adapter, field: str) -> set[str]:
    """The adapted modules that one field of the configuration names."""
    return {site.name for site in adapter.base.match(getattr(adapter.config, field))} & set(adapter.parts)


def own_files(adapter: Adapter) -> Mapping[str, bytes]:
    """The files of an adapter folder: PEFT's where PEFT knows the method, else the tensors alone."""
    if adapter.method.peft_form is None:
        return {WEIGHTS_NAME: weights_file(adapter)}
    return adapter.method.export(adapter, "peft")
